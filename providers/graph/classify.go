package graph

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"time"

	"mailbridge/internal/mail"
	"mailbridge/internal/mailerr"
	"mailbridge/internal/secret"
)

// ErrTooLarge is wrapped by the refusal of a message that is too large for one request. Nothing was
// staged or sent, so another route may take the message.
var ErrTooLarge = errors.New("larger than one request to Microsoft Graph may be")

// errTooSmall marks the refusal of an upload session for a small attachment.
var errTooSmall = errors.New("too small for an upload session")

// op is what a request is for, as far as failures depend on it.
type op struct {
	name  string // mailerr.Error.Op
	write bool   // a lost answer leaves the outcome open
	send  bool   // a refusal that nobody knows concerns the message
	item  bool   // the path names a message
	needs string // the permission that Microsoft 365 wants for it
}

var (
	opPrepare = op{name: "graph.prepare", write: true, send: true, needs: "Mail.ReadWrite"}
	opCommit  = op{name: "graph.commit", write: true, send: true, item: true, needs: "Mail.Send"}
	opMail    = op{name: "graph.sendmail", write: true, send: true, needs: "Mail.Send"}
	opBounce  = op{name: "graph.bounce", write: true, send: true, needs: "Mail.Send"}
	// A draft that lacks an attachment is deleted on any failure: nothing stays open.
	opAttach  = op{name: "graph.attach", send: true, item: true, needs: "Mail.ReadWrite"}
	opUpload  = op{name: "graph.upload", item: true, needs: "Mail.ReadWrite"}
	opItem    = op{name: "graph.find", item: true, needs: "Mail.ReadWrite"}
	opSearch  = op{name: "graph.find", needs: "Mail.ReadWrite"}
	opAbandon = op{name: "graph.abandon", item: true, needs: "Mail.ReadWrite"}
	opProbe   = op{name: "graph.probe", needs: "Mail.ReadWrite"}
)

// maxErrorBody is how much of a refusal's body is read, in bytes. Gateways answer with pages of HTML.
const maxErrorBody = 64 << 10

// maxDetail is how much of a cloud's own text goes to the log, in bytes.
const maxDetail = 400

// quotaWait is how long a used-up allowance waits where the cloud names no time. Exchange counts
// recipients over a rolling day, so trying by the hour is often enough.
const quotaWait = time.Hour

// refusal is an answer that is no success.
type refusal struct {
	status    int
	header    http.Header
	code      string // error.code, lower case; empty when the body is not Graph's
	message   string
	requestID string
}

// readRefusal reads a refusal out of an answer; the body may be Graph's JSON, HTML, anything or nothing.
func readRefusal(resp *http.Response) refusal {
	r := refusal{status: resp.StatusCode, header: resp.Header, requestID: resp.Header.Get("request-id")}
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxErrorBody))
	if err != nil && len(body) == 0 {
		return r // the status alone is an answer
	}
	var g struct {
		Error struct {
			Code       string `json:"code"`
			Message    string `json:"message"`
			InnerError struct {
				RequestID string `json:"request-id"`
			} `json:"innerError"` // "innererror" matches too: encoding/json ignores case
		} `json:"error"`
	}
	if json.Unmarshal(body, &g) == nil {
		r.code, r.message = strings.ToLower(strings.TrimSpace(g.Error.Code)), g.Error.Message
		if r.requestID == "" {
			r.requestID = g.Error.InnerError.RequestID
		}
	}
	return r
}

// detail is the refusal for the log: one line, scrubbed, bounded.
func (r refusal) detail() error {
	s := fmt.Sprintf("HTTP %d", r.status)
	if r.code != "" {
		s += " " + r.code
	}
	if r.message != "" {
		s += ": " + r.message
	}
	s = printable(secret.Scrub(s))
	if len(s) > maxDetail {
		s = s[:maxDetail] + "..."
	}
	if r.requestID != "" {
		s += " (request-id " + printable(secret.Scrub(r.requestID)) + ")"
	}
	return errors.New(s)
}

// printable makes s one line of ASCII.
func printable(s string) string {
	return strings.Map(func(c rune) rune {
		switch {
		case c >= ' ' && c <= '~':
			return c
		case c == '\r':
			return -1
		case c == '\n' || c == '\t':
			return ' '
		}
		return '?'
	}, s)
}

// verdict is what a refusal means before the details that every failure has are added.
type verdict struct {
	class  mailerr.Class
	status mailerr.Status
	text   string
	open   bool  // a write may have been done all the same
	is     error // sentinel
}

// classify says what a refusal means: by the code first, which Graph keeps stable, then by the status
// (https://learn.microsoft.com/graph/errors).
func classify(o op, r refusal, now time.Time) *mailerr.Error {
	v, known := byCode(o, r)
	if !known {
		v = byStatus(o, r)
	}
	e := &mailerr.Error{
		Class:  v.class,
		Status: v.status,
		Unsure: v.open && o.write,
		Op:     o.name,
		Text:   v.text,
		Err:    r.detail(),
	}
	if v.is != nil {
		e.Err = fmt.Errorf("%w: %w", v.is, e.Err)
	}
	wait, asked := mailerr.RetryAfter(r.header, now)
	switch {
	case e.Class == mailerr.Temporary && asked:
		e.Class, e.RetryAt = mailerr.Throttled, now.Add(wait)
	case e.Class == mailerr.Throttled && asked:
		e.RetryAt = now.Add(wait)
	case e.Class == mailerr.Quota:
		e.RetryAt = now.Add(max(wait, quotaWait))
	}
	return e
}

func st(subject, detail uint8) mailerr.Status {
	return mailerr.Status{Subject: subject, Detail: detail}
}

// tooLarge is the verdict on a request body over the limit.
func tooLarge() verdict {
	return verdict{class: mailerr.Permanent, status: st(3, 4), text: "the message is too large for Microsoft 365 to take in one piece", is: ErrTooLarge}
}

func noMailbox(detail string) verdict {
	return verdict{class: mailerr.Auth, status: st(1, 8), is: mail.ErrNoMailbox,
		text: "Microsoft 365 has no usable mailbox for this account: " + detail}
}

// byCode knows the codes that decide by themselves.
func byCode(o op, r refusal) (verdict, bool) {
	switch r.code {
	case "errormimecontentinvalidbase64string", "errormimecontentinvalid":
		return verdict{class: mailerr.Permanent, status: st(6, 0), text: "Microsoft 365 cannot read the message: its MIME structure is invalid"}, true
	case "invalidinternetmessageheader", "invalidinternetmessageheadercollection":
		return verdict{class: mailerr.Permanent, status: st(6, 0), text: "Microsoft 365 does not take the header fields of the message"}, true
	case "errorinvalidrecipients":
		return verdict{class: mailerr.Permanent, status: st(1, 3), text: "Microsoft 365 finds a recipient address invalid"}, true
	case "errormissingrecipients":
		return verdict{class: mailerr.Permanent, status: st(5, 4), text: "Microsoft 365 finds no recipient in the message"}, true
	case "errormessagesizeexceeded", "errorattachmentsizelimitexceeded":
		return verdict{class: mailerr.Permanent, status: st(3, 4), text: "the message is larger than the mailbox may send; an administrator can raise its limit (Set-Mailbox -MaxSendSize)"}, true
	case "errorquotaexceeded":
		return verdict{class: mailerr.Quota, status: st(2, 2), text: "the sender's mailbox in Microsoft 365 is full; make room in it"}, true
	case "errorsubmissionquotaexceeded", "errorexceededmessagelimit", "errormessagesubmissionblocked", "errorexceededmaxrecipientlimit", "erroraccountsuspend":
		return verdict{class: mailerr.Quota, status: st(7, 1), text: "the mailbox has used up what Microsoft 365 lets it send for now"}, true
	case "invalidauthenticationtoken":
		return signIn(), true
	case "errorsendasdenied":
		return verdict{class: mailerr.Permanent, status: st(7, 1),
			text: "the mailbox may not send as the From address of this message; use the mailbox's own address or let an administrator grant Send As"}, true
	case "erroraccessdenied", "authorization_requestdenied", "accessdenied":
		return denied(o), true
	case "erroraccountdisabled", "errormailboxlogonfailed", "errorpasswordexpired":
		return verdict{class: mailerr.Auth, status: st(2, 1), text: "the account behind the mailbox is disabled or cannot sign in to Microsoft 365; an administrator must enable it"}, true
	case "errorinvaliduser", "errornonexistentmailbox", "request_resourcenotfound":
		return noMailbox("check the address under mailbox"), true
	case "mailboxnotenabledforrestapi":
		v := noMailbox("it is inactive, deleted, on premises or without a licence")
		v.status = st(2, 1)
		return v, true
	case "resourcenotfound":
		if !o.item {
			return noMailbox("check the address under mailbox, and endpoint in the profile"), true
		}
		return gone(o), true
	case "erroritemnotfound":
		if !o.item {
			return noMailbox("its folders cannot be found; check the address under mailbox"), true
		}
		return gone(o), true
	case "errorfoldernotfound", "errorsyncfoldernotfound", "syncstatenotfound", "errorirresolvableconflict", "errorfolderexists":
		return verdict{class: mailerr.Temporary, status: st(2, 0), text: "the mailbox in Microsoft 365 has changed at this moment"}, true
	case "applicationthrottled", "toomanyrequests", "activitylimitreached":
		return slowDown(), true
	case "errortimeoutexpired":
		return verdict{class: mailerr.Temporary, status: st(4, 2), text: "Microsoft 365 did not finish in time", open: true}, true
	case "errormailboxmoveinprogress", "errormailboxstoreunavailable", "errormailboxfailover":
		// They may strike between storing and submitting.
		return verdict{class: mailerr.Temporary, status: st(2, 1), text: "the mailbox in Microsoft 365 is not available at the moment", open: true}, true
	case "unabletodeserializepostbody", "errorinvalididmalformed", "errorinvalidpropertyset", "errorinvalidrequest",
		"requestbodyread", "parametervalueempty", "inefficientfilter", "notimplemented":
		return ourBug(), true
	case "errorattachmentsizeshouldnotbelessthanminimumsize":
		v := ourBug()
		v.is = errTooSmall
		return v, true
	case "badrequest":
		// A code for many things; the length is only in the text:
		// https://github.com/microsoftgraph/microsoft-graph-docs-contrib/issues/682
		if strings.Contains(strings.ToLower(r.message), "maximum request length") {
			return tooLarge(), true
		}
	}
	return verdict{}, false
}

func signIn() verdict {
	return verdict{class: mailerr.Auth, status: st(7, 0), text: "Microsoft 365 does not accept the sign-in of this account; run mailbridge doctor, or sign in again"}
}

func denied(o op) verdict {
	return verdict{class: mailerr.Auth, status: st(7, 0),
		text: "Microsoft 365 denies access to the mailbox; grant the application " + o.needs + " for it, with admin consent, and check access policies and RBAC scopes (changes take up to two hours)"}
}

func slowDown() verdict {
	return verdict{class: mailerr.Throttled, status: st(4, 5), text: "Microsoft 365 asks to send more slowly"}
}

// gone: while a message is being submitted its draft may be missed, so that a send of a draft that is not
// there has an open outcome.
func gone(o op) verdict {
	if o.send {
		return verdict{class: mailerr.Temporary, status: st(3, 0), text: "the staged message is no longer in Drafts", open: true, is: mail.ErrNoMessage}
	}
	return verdict{class: mailerr.Permanent, status: st(2, 0), text: "the message is no longer in the mailbox", is: mail.ErrNoMessage}
}

// ourBug is of class Unknown: it counts as a defect of the bridge and never bounces anybody's mail.
func ourBug() verdict {
	return verdict{class: mailerr.Unknown, status: st(3, 0), text: "Microsoft 365 did not understand the request"}
}

// byStatus classifies what no code decided.
func byStatus(o op, r refusal) verdict {
	switch r.status {
	case http.StatusUnauthorized:
		return signIn()
	case http.StatusForbidden:
		return denied(o)
	case http.StatusNotFound:
		if o.item {
			return gone(o)
		}
		return noMailbox("check the address under mailbox, and endpoint in the profile")
	case http.StatusMethodNotAllowed:
		return ourBug()
	case http.StatusRequestTimeout:
		return verdict{class: mailerr.Temporary, status: st(4, 2), text: "Microsoft 365 did not finish in time", open: true}
	case http.StatusConflict, http.StatusPreconditionFailed, http.StatusGone, http.StatusLocked, http.StatusFailedDependency, http.StatusTooEarly:
		return verdict{class: mailerr.Temporary, status: st(2, 0), text: "the mailbox in Microsoft 365 has changed at this moment"}
	case http.StatusProxyAuthRequired:
		return verdict{class: mailerr.Temporary, status: st(4, 1), text: "a proxy on the way to Microsoft 365 wants a password"}
	case http.StatusRequestEntityTooLarge:
		return tooLarge()
	case http.StatusTooManyRequests:
		return slowDown()
	case http.StatusNotImplemented:
		return ourBug()
	case http.StatusInsufficientStorage:
		return verdict{class: mailerr.Quota, status: st(2, 2), text: "the sender's mailbox in Microsoft 365 is full; make room in it"}
	case 509: // bandwidth limit exceeded, https://learn.microsoft.com/graph/errors
		return slowDown()
	}
	switch {
	case r.status >= 500:
		return verdict{class: mailerr.Temporary, status: st(4, 0), text: "Microsoft 365 has trouble of its own at the moment", open: true}
	case r.status >= 400 && o.send:
		return verdict{class: mailerr.Permanent, status: st(6, 0), text: "Microsoft 365 refuses the message"}
	}
	return ourBug()
}

// classifyTransport says what it means that no answer came. Sent is whether the whole request may have
// left: then a write may have been done.
func classifyTransport(o op, err error, sent bool) *mailerr.Error {
	if e, ok := errors.AsType[*mailerr.Error](err); ok {
		// The client below has no token. If a request went out before, it was refused for its token, so that
		// nothing was done.
		c := *e
		if c.Op == "" {
			c.Op = o.name
		}
		return &c
	}
	e := &mailerr.Error{
		Class:  mailerr.Temporary,
		Status: st(4, 2),
		Unsure: sent && o.write,
		Op:     o.name,
		Text:   "the connection to Microsoft 365 ended without an answer",
		Err:    transportError{err},
	}
	var (
		dns  *net.DNSError
		nerr net.Error
	)
	switch {
	case errors.Is(err, context.Canceled):
		e.Text = "interrupted before Microsoft 365 answered"
	case errors.Is(err, context.DeadlineExceeded), errors.As(err, &nerr) && nerr.Timeout():
		e.Text = "Microsoft 365 did not answer in time"
	case errors.As(err, &dns):
		e.Status, e.Text = st(4, 3), "the name of Microsoft 365's server cannot be resolved"
	case isTLS(err):
		e.Status, e.Text = st(4, 1), "no secure connection to Microsoft 365: its certificate is not trusted or the handshake failed; check ca in the profile"
	case !sent:
		e.Status, e.Text = st(4, 1), "no connection to Microsoft 365"
	}
	return e
}

func isTLS(err error) bool {
	var (
		verify *tls.CertificateVerificationError
		record tls.RecordHeaderError
		alert  tls.AlertError
		ca     x509.UnknownAuthorityError
		host   x509.HostnameError
	)
	return errors.As(err, &verify) || errors.As(err, &record) || errors.As(err, &alert) || errors.As(err, &ca) || errors.As(err, &host)
}

// transportError shows a transport's error scrubbed.
type transportError struct{ err error }

func (e transportError) Error() string { return printable(secret.Scrub(e.err.Error())) }
func (e transportError) Unwrap() error { return e.err }
