package gmail

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"strings"
	"time"

	"github.com/emersion/go-smtp"

	"mailbridge/internal/mailerr"
	"mailbridge/internal/secret"
)

// stage is how far a transaction had come.
type stage string

const (
	stageConnect stage = "connect"
	stageAuth    stage = "auth"
	stageMail    stage = "mail"
	stageRcpt    stage = "rcpt"
	stageData    stage = "data"
	stageEnd     stage = "end" // the message was ended: the server may have it
)

const (
	// quotaWait is how long a daily limit is left alone.
	quotaWait = time.Hour
	// loginWait is how long too many logins are.
	loginWait = 5 * time.Minute
	// busyWait is how long a busy or throttling server is left alone.
	busyWait = time.Minute
)

func st(subject, detail uint8) mailerr.Status {
	return mailerr.Status{Subject: subject, Detail: detail}
}

// classify says what a failure means, by the codes of Gmail
// (https://support.google.com/a/answer/3726730) and of Exchange Online.
func (c *Client) classify(at stage, err error) *mailerr.Error {
	if e, ok := errors.AsType[*mailerr.Error](err); ok {
		return e
	}
	e := &mailerr.Error{Class: mailerr.Temporary, Status: st(4, 2), Op: "gmail." + string(at), Err: scrubbed{err}, Unsure: at == stageEnd}
	said, ok := errors.AsType[*smtp.SMTPError](err)
	if !ok {
		e.Text = "the connection to the mail server ended"
		var cert *tls.CertificateVerificationError
		var dns *net.DNSError
		switch {
		case errors.As(err, &cert):
			e.Status, e.Text = st(4, 1), "the mail server's certificate is not trusted; check smtp and ca in the profile"
		case errors.As(err, &dns):
			e.Status, e.Text = st(4, 3), "the mail server's name cannot be resolved; check smtp in the profile"
		case at == stageConnect:
			e.Status, e.Text = st(4, 1), "no connection to the mail server "+c.cfg.SMTPAddr
		case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
			e.Text = "interrupted before the mail server answered"
		}
		return e
	}
	// The server has answered, so nothing is in doubt, but for a server that says it had trouble of its own
	// at the very end; even then it has not taken the message (RFC 5321 §4.2.1).
	e.Unsure = false
	if en := said.EnhancedCode; en[0] == said.Code/100 {
		e.Status = st(uint8(en[1]), uint8(min(en[2], 255)))
	}
	c.decide(e, at, said)
	if e.Text == "" {
		e.Text = "the mail server says: " + short(said.Message)
	}
	return e
}

// decide fills in class, time and text.
func (c *Client) decide(e *mailerr.Error, at stage, said *smtp.SMTPError) {
	now := c.now()
	code := fmt.Sprintf("%d %d.%d.%d", said.Code, said.EnhancedCode[0], said.EnhancedCode[1], said.EnhancedCode[2])
	low := strings.ToLower(said.Message)
	limit := strings.Contains(low, "limit") || strings.Contains(low, "quota exceeded") || strings.Contains(low, "rate")
	later := func(class mailerr.Class, wait time.Duration, text string) {
		e.Class, e.RetryAt, e.Text = class, now.Add(wait), text
	}
	switch {
	case said.Code == 550 && code == "550 5.4.5":
		later(mailerr.Quota, quotaWait, "the mailbox has reached its daily sending limit")
		return
	case code == "554 5.2.0" && strings.Contains(low, "storedrv") || strings.HasPrefix(code, "550 5.1.9") || code == "550 5.1.8" && at != stageRcpt:
		later(mailerr.Quota, quotaWait, "the mailbox may not send for now; an administrator can see why")
		return
	case code == "554 5.2.2", code == "552 5.2.2" && at != stageRcpt:
		later(mailerr.Quota, quotaWait, "the sender's mailbox is full")
		return
	case code == "550 5.7.1" && limit, code == "550 5.2.1" && limit && at != stageRcpt:
		later(mailerr.Quota, quotaWait, "the mail server limits what this mailbox sends")
		return
	case said.Code == 432:
		later(mailerr.Throttled, busyWait, "too many connections to the mail server at once")
		return
	case at == stageAuth && said.Code == 454:
		later(mailerr.Throttled, loginWait, "the mail server wants fewer logins")
		return
	case said.Code == 530 && e.Status == st(7, 0) && strings.Contains(low, "starttls"):
		e.Class, e.Text = mailerr.Auth, "the mail server wants STARTTLS; set smtp_tls in the profile"
		return
	case said.Code == 530, said.Code == 534, said.Code == 535, said.Code == 550 && e.Status == st(7, 0) && at != stageEnd:
		e.Class, e.Status = mailerr.Auth, st(7, 0)
		e.Text = "the mail server does not accept the sign-in; check mailbox, subject and the scope https://mail.google.com/ with mailbridge doctor"
		if strings.Contains(code, "5.7.139") || strings.Contains(low, "disabled for the") {
			e.Text = "SMTP AUTH is switched off for this mailbox or tenant; an administrator must allow it"
		}
		return
	case said.Code == 504:
		e.Class, e.Text = mailerr.Auth, "the mail server does not offer XOAUTH2; check smtp in the profile"
		return
	case said.Code == 421 && limit, said.Code == 450 && limit:
		later(mailerr.Throttled, busyWait, "the mail server asks to send more slowly")
		return
	case said.Code/100 == 4:
		e.Class = mailerr.Temporary
		return
	case said.Code == 501, said.Code == 502, said.Code == 503, said.Code == 555, said.Code == 523, code == "554 5.7.0":
		if at == stageRcpt {
			e.Class = mailerr.Permanent
			return
		}
		e.Class, e.Text = mailerr.Unknown, "the mail server did not understand the request"
		return
	}
	e.Class = mailerr.Permanent
	switch code {
	case "550 5.7.60", "554 5.2.252":
		e.Status, e.Text = st(7, 1), "the mailbox may not send as this sender; an administrator can grant Send As"
	case "552 5.2.3", "552 5.3.4":
		e.Status, e.Text = st(3, 4), "the message is larger than the mail server takes"
	}
}

// short is a server's text as a client may see it: one line, no link, no session.
func short(s string) string {
	s = secret.Scrub(s)
	s, _, _ = strings.Cut(s, "For more information")
	s = strings.Join(strings.FieldsFunc(s, func(r rune) bool { return r < ' ' || r > '~' || r == ' ' }), " ")
	if len(s) > 200 {
		s = s[:200]
	}
	return s
}

// scrubbed shows an error without anything secret.
type scrubbed struct{ err error }

func (s scrubbed) Error() string { return secret.Scrub(s.err.Error()) }
func (s scrubbed) Unwrap() error { return s.err }
