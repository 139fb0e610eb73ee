package smtpd

import (
	"errors"
	"fmt"
	"strings"

	"mailbridge/internal/mailerr"
)

// reply is an answer. Every line of it carries the enhanced code (RFC 2034 §4), whose class is that of code.
type reply struct {
	code int
	enh  string // "5.7.8"; empty for greeting, EHLO, 334 and 354
	text string // lines, separated by \n; ASCII
}

func (r reply) String() string {
	var b strings.Builder
	lines := strings.Split(r.text, "\n")
	for i, l := range lines {
		sep := byte('-')
		if i == len(lines)-1 {
			sep = ' '
		}
		fmt.Fprintf(&b, "%d%c", r.code, sep)
		if r.enh != "" {
			b.WriteString(r.enh + " ")
		}
		b.WriteString(clean(l) + "\r\n")
	}
	return b.String()
}

// maxText bounds the text of one reply line: RFC 5321 §4.5.3.1.5 allows 512 octets with code and line end.
const maxText = 450

// clean makes a text one line of ASCII: an answer never carries what could be read as another.
func clean(s string) string {
	s = strings.Map(func(r rune) rune {
		switch {
		case r >= ' ' && r <= '~':
			return r
		case r == '\r' || r == '\n' || r == '\t':
			return ' '
		}
		return '?'
	}, s)
	if len(s) > maxText {
		s = s[:maxText]
	}
	return s
}

// The prepared replies.
var (
	replyBye          = reply{221, "2.0.0", "Bye"}
	replyOK           = reply{250, "2.0.0", "OK"}
	replySenderOK     = reply{250, "2.1.0", "Sender OK"}
	replyRcptOK       = reply{250, "2.1.5", "Recipient OK"}
	replyVrfy         = reply{252, "2.5.1", "Cannot verify, but will take a message and try"}
	replyHelp         = reply{214, "2.0.0", "See RFC 5321"}
	replyStartTLS     = reply{220, "2.0.0", "Ready to start TLS"}
	replyData         = reply{354, "", "End data with <CR><LF>.<CR><LF>"}
	replyAuthOK       = reply{235, "2.7.0", "Authentication successful"}
	replyShutdown     = reply{421, "4.3.2", "Shutting down, try again later"}
	replyIdle         = reply{421, "4.4.2", "Idle for too long, closing"}
	replyTooLong      = reply{421, "4.4.2", "Session took too long, closing"}
	replyTooManyBad   = reply{421, "4.7.0", "Too many bad commands, closing"}
	replyTooManyAuth  = reply{421, "4.7.0", "Too many failed logins, closing"}
	replyUnknown      = reply{500, "5.5.1", "Command not recognised"}
	replyLineLong     = reply{500, "5.5.2", "Line too long"}
	replyLineEnd      = reply{500, "5.5.2", "Lines end with CR LF"}
	replySyntax       = reply{501, "5.5.4", "Syntax error in parameters"}
	replyBase64       = reply{501, "5.5.2", "Not valid base64"}
	replyCancelled    = reply{501, "5.7.0", "Authentication cancelled"}
	replyNoExpn       = reply{502, "5.5.1", "Command not implemented"}
	replySequence     = reply{503, "5.5.1", "Bad sequence of commands"}
	replyNoHello      = reply{503, "5.5.1", "Say EHLO first"}
	replyAuthTwice    = reply{503, "5.5.1", "Already authenticated"}
	replyAuthInMail   = reply{503, "5.5.1", "No AUTH inside of a message"}
	replyNoRcpt       = reply{503, "5.5.1", "No valid recipients"}
	replyMechanism    = reply{504, "5.5.4", "Mechanism not supported: use PLAIN or LOGIN"}
	replyNeedAuth     = reply{530, "5.7.0", "Authentication required"}
	replyNeedTLS      = reply{538, "5.7.11", "Encryption required: use STARTTLS before AUTH, and change this password, for it crossed the network in clear"}
	replyWrong        = reply{535, "5.7.8", "User name or password is wrong"}
	replyTryLater     = reply{454, "4.7.0", "Cannot check the login at the moment"}
	replyMayNotSend   = reply{550, "5.7.1", "This account may not send"}
	replyTooManyRcpt  = reply{452, "4.5.3", "Too many recipients"}
	replyTooBig       = reply{552, "5.3.4", "Message too large"}
	replyHeaderBig    = reply{554, "5.6.0", "Header too large"}
	replyParam        = reply{555, "5.5.4", "Parameter not recognised"}
	replyUTF8         = reply{553, "5.6.7", "Address is not ASCII: SMTPUTF8 is needed and may not be offered"}
	replyBadAddress   = reply{501, "5.1.3", "Bad address syntax"}
	replyBadSender    = reply{501, "5.1.7", "Bad address syntax"}
	replyNoDomain     = reply{501, "5.1.3", "Address needs a domain, such as name@example.org"}
	replyBareCR       = reply{554, "5.6.0", "Message has a bare CR: lines end with CR LF"}
	replyBareLF       = reply{554, "5.6.0", "Message has a bare LF: lines end with CR LF"}
	replyNUL          = reply{554, "5.6.0", "Message has a NUL byte"}
	replyLoneDot      = reply{554, "5.6.0", "Message has a line with a lone dot and a wrong line end"}
	replyLoop         = reply{554, "5.4.6", "Too many hops: this looks like a mail loop"}
	replyTwoFrom      = reply{554, "5.6.0", "Message has more than one From field"}
	replyFromUnread   = reply{554, "5.6.0", "From field cannot be read"}
	replyNoSender     = reply{554, "5.6.0", "Several authors in From need a Sender"}
	replyEmptyMessage = reply{554, "5.6.0", "Message is empty"}
)

// refusal is a reply as an error: what a reader of a message's bytes gives up with.
type refusal struct {
	reply
	closing bool // and the connection ends
}

func (r *refusal) Error() string { return strings.TrimRight(r.reply.String(), "\r\n") }

// render says to a client what became of its message (RFC 5321 §4.2, RFC 3463). It is the only place where
// a failure becomes a reply.
func render(err error, id string) reply {
	if r, ok := errors.AsType[*refusal](err); ok {
		return r.reply
	}
	e := mailerr.Of(err)
	r := reply{code: 451, enh: e.Code(), text: clean(e.Text) + " (id " + id + ")"}
	switch e.Class {
	case mailerr.Permanent:
		r.code = 554
		switch s := e.Status; {
		case s == mailerr.Status{Subject: 3, Detail: 4} || s.Subject == 2 && s.Detail == 2 || s.Subject == 2 && s.Detail == 3:
			r.code = 552
		case s.Subject == 1 || s.Subject == 2 || s == mailerr.Status{Subject: 7, Detail: 1}:
			r.code = 550
		}
	case mailerr.Quota:
		r.code = 452
	case mailerr.Temporary:
		if e.Status == (mailerr.Status{Subject: 3, Detail: 1}) {
			r.code = 452
		}
	case mailerr.Unknown:
		// The text of an unclassified failure may be anything.
		r.enh, r.text = "4.3.0", "Internal error, try again later (id "+id+")"
	}
	return r
}
