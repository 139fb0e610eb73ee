// Package mail holds the nouns every other package speaks in: who may reach whom (Envelope), what is
// sent (Content, Outgoing) and what a cloud said about it (Handle, Receipt). It does no I/O and imports
// nothing of ours.
package mail

import (
	"errors"
	"io"
)

// AccountID is the name of an account in the configuration file, [accounts.NAME].
type AccountID string

// Envelope is the SMTP envelope (RFC 5321 §2.3.1). It alone decides who receives a message.
type Envelope struct {
	From string   // reverse-path without brackets; empty is the null reverse-path "<>" (RFC 5321 §4.5.5)
	To   []string // forward-paths without brackets, in the order of RCPT, without duplicates
	UTF8 bool     // SMTPUTF8 was asked for (RFC 6531 §3.4)
}

// Content is the immutable bytes of a message: RFC 5322 with CRLF line ends only. Whoever made it
// removes it. Open may be called any number of times, also concurrently.
type Content interface {
	Open() (io.ReadCloser, error)
	// Size is the exact number of bytes that a reader of Open yields.
	Size() int64
}

// Handle names what a cloud keeps staged for a message, such as the immutable id of a Graph draft.
// Only the provider that made it reads it; empty means that nothing is staged.
type Handle string

// Outgoing is one message on its way out. Envelope.To holds the recipients of this attempt only.
type Outgoing struct {
	Envelope
	Content Content
	// TraceID is our own id of the message, the "id" clause of the Received line that the bridge put on
	// top: proof that a copy found in Sent is this very message.
	TraceID string
	// MessageID is the Message-ID field with its angle brackets. It finds candidates and proves nothing,
	// for scanners and scripts reuse them.
	MessageID string
}

// Receipt is what a cloud said when it took a message.
type Receipt struct {
	ID        string    // the cloud's id of the message, when it gave one
	RequestID string    // the cloud's id of the request or session, for its support
	Refused   []Refusal // recipients that the cloud did not take while it took the others
}

// Refusal is one recipient that a cloud refused. Err is a *mailerr.Error, whose class says whether the
// recipient may be tried again.
type Refusal struct {
	Recipient string
	Err       error
}

// Sentinels that failures wrap, for those who ask what it was rather than what to do next.
var (
	ErrNoMailbox = errors.New("no such mailbox")
	ErrNoMessage = errors.New("no such message")
)
