// Package providers is the contract: what a mail cloud must be able to do for the bridge. Each cloud is a
// package below this one; which cloud an account has is known to internal/app alone.
package providers

import (
	"context"
	"crypto/x509"
	"log/slog"
	"net/http"
	"time"

	"mailbridge/internal/mail"
	"mailbridge/internal/secret"
)

// Account is one opened account: a struct of small roles. A nil role is one that this account does not
// have, for want of an API or of consent.
type Account struct {
	Sender  Sender
	Sent    SentFinder
	Prober  Prober
	Bouncer Bouncer
	Traits  Traits
	// Close gives up pooled connections; nil when there are none.
	Close func() error
}

// Traits are the limits of the cloud for this account.
type Traits struct {
	MaxSize       int64 // bytes of a raw message that Sender takes; 0 is unknown
	MaxRecipients int   // recipients of one Commit; 0 is no limit. The outbox splits longer lists
	Parallel      int   // requests that the cloud takes at once for this mailbox; 0 is one
	SMTPUTF8      bool  // takes addresses beyond ASCII (RFC 6531)
	// OneStep says that Prepare stages nothing and asks the cloud nothing, so that an attempt may be recorded
	// as committing from its start.
	OneStep bool
}

// Sender hands messages to the cloud in two steps, so that what is unsure can be looked up.
type Sender interface {
	// Prepare stages the message where the cloud can (a Graph draft) and returns a handle, which the
	// caller stores durably before Commit; the handle is empty where there is nothing to stage. It never
	// sends. An error with Unsure set means that something may be staged that nobody has a handle of:
	// nothing was sent, and Abandon clears it up.
	Prepare(ctx context.Context, out *mail.Outgoing) (mail.Handle, error)
	// Commit sends. It returns nil once the cloud has the message; some recipients may be listed as
	// refused in the receipt. When every recipient was refused it returns an error. An error with
	// Unsure set means that the cloud may have the message: the caller asks SentFinder before it
	// calls Commit again with the same handle. Any other error means that it has not.
	Commit(ctx context.Context, out *mail.Outgoing, h mail.Handle) (mail.Receipt, error)
	// Abandon removes what Prepare staged, or may have staged, for a message that will not be sent with
	// that handle; with an empty handle, everything that was staged for the message and not sent, so that
	// the caller has no other handle of it in use. It never touches a message that was sent. Calling it
	// twice is harmless.
	Abandon(ctx context.Context, out *mail.Outgoing, h mail.Handle) error
}

// Finding is what a look-up after an unsure Commit says.
type Finding uint8

const (
	// Inconclusive: neither was seen. It is no proof of anything; the caller looks again later or holds.
	Inconclusive Finding = iota
	// WasSent: the cloud has it. Never commit again.
	WasSent
	// NotSent: it is certain that it was not sent, and Commit with the same handle may be called again.
	NotSent
)

// SentFinder looks up the outcome of an unsure Commit.
type SentFinder interface {
	FindSent(ctx context.Context, out *mail.Outgoing, h mail.Handle) (mail.Receipt, Finding, error)
}

// Prober checks, without sending or changing anything, that the mailbox is there and may be used.
// The detail is a sentence for the operator.
type Prober interface {
	Probe(ctx context.Context) (detail string, err error)
}

// Bouncer files a report, such as an RFC 3464 bounce, into the mailbox of the account itself, where its
// owner reads it. Where the cloud knows no other way it is a message that the mailbox sends: the report's
// From becomes the mailbox's own address. To is where the report goes, empty for the mailbox's address; it
// must be an address of the account, for a bounce to anybody else is backscatter. An error with Unsure set
// means that the report may be there.
type Bouncer interface {
	Bounce(ctx context.Context, raw mail.Content, to string) error
}

// Token is an access token and the time after which it must not be used.
type Token struct {
	Value  secret.Text
	Expiry time.Time
}

// Tokens hands out access tokens for one account, fresh enough to be used at once. Reject reports that
// the cloud refused exactly this token; the next Token call then gives another one or an error of
// class Auth. Both are safe for concurrent use.
type Tokens interface {
	Token(ctx context.Context) (Token, error)
	Reject(t Token)
}

// Mismatch says what happens when the header names recipients that the envelope does not (Graph takes
// recipients from the header).
type Mismatch string

const (
	Refuse  Mismatch = "refuse"  // refuse the message, 554 5.6.0
	Rewrite Mismatch = "rewrite" // take such recipients out of To and Cc
)

// Config is all that a provider gets to know of an account.
type Config struct {
	ID       mail.AccountID
	Mailbox  string // the address of the mailbox
	Mismatch Mismatch
	Log      *slog.Logger
	// NoDrafts says that the profile may send and nothing more (Graph: Mail.Send alone), so that staging
	// is not even tried. Without it the provider finds out by a refusal.
	NoDrafts bool

	// HTTP clouds: a client that already authorises, paces and measures, and the base of the API without
	// a trailing slash, such as https://graph.microsoft.com/v1.0.
	HTTP *http.Client
	Base string
	// Uploads are requests to URLs that carry their own authority: the same client without the
	// Authorization header.
	Uploads *http.Client

	// Mail-protocol clouds: tokens for XOAUTH2, addresses as host:port, the roots to trust (nil is the
	// system's), the name for EHLO, and whether to speak TLS from the first byte (else STARTTLS).
	Tokens       Tokens
	SMTPAddr     string
	SMTPImplicit bool
	IMAPAddr     string
	Roots        *x509.CertPool
	HELO         string
}
