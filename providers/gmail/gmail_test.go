package gmail

import (
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/emersion/go-smtp"

	"mailbridge/internal/mailerr"
	"mailbridge/internal/secret"
	"mailbridge/providers"
)

// Every reply of the vendors' lists, at the stage where it is seen.
func TestRepliesMeanWhatTheVendorsSay(t *testing.T) {
	now := time.Date(2026, 11, 24, 10, 0, 0, 0, time.UTC)
	c := &Client{now: func() time.Time { return now }}
	const (
		T, P, A, Q, S = mailerr.Temporary, mailerr.Permanent, mailerr.Auth, mailerr.Quota, mailerr.Throttled
		bug           = mailerr.Unknown
	)
	for _, r := range []struct {
		at    stage
		reply string
		class mailerr.Class
		code  string
	}{
		{stageMail, "421 4.3.0 Temporary System Problem", T, "4.3.0"}, {stageEnd, "421 4.4.5 Server busy", T, "4.4.5"},
		{stageMail, "421 4.7.0 Try again later, closing connection.", T, "4.7.0"}, {stageMail, "421 4.7.0 Connection expired, try reconnecting.", T, "4.7.0"},
		{stageMail, "421 4.7.28 Gmail has detected an unusual rate of mail", S, "4.7.28"}, {stageRcpt, "450 4.2.1 receiving mail at a rate that prevents", S, "4.2.1"},
		{stageEnd, "451 4.3.0 Mail server temporarily rejected message", T, "4.3.0"}, {stageMail, "451 4.4.2 Timeout - closing connection.", T, "4.4.2"}, {stageEnd, "451 4.5.0 SMTP protocol violation", T, "4.5.0"},
		{stageRcpt, "452 4.2.2 The email account is over quota", T, "4.2.2"}, {stageRcpt, "452 4.5.3 Your message has too many recipients.", T, "4.5.3"},
		{stageAuth, "454 4.7.0 Too many login attempts", S, "4.7.0"}, {stageMail, "454 4.5.0 SMTP protocol violation, no commands allowed to pipeline after STARTTLS", T, "4.5.0"},
		{stageMail, "501 5.5.2 Cannot Decode response", bug, ""}, {stageConnect, "501 5.5.4 HELO/EHLO argument is invalid", bug, ""}, {stageMail, "502 5.5.1 Unrecognized command", bug, ""}, {stageMail, "503 5.5.1 Bad sequence", bug, ""}, {stageMail, "555 5.5.2 Syntax error", bug, ""}, {stageMail, "523 5.7.10 Must issue STARTTLS", bug, ""},
		{stageAuth, "503 5.7.0 No identity changes permitted", bug, ""}, {stageAuth, "504 5.7.4 Unrecognized Authentication Type", A, ""},
		{stageMail, "530 5.5.1 Authentication Required", A, "4.7.0"}, {stageMail, "530 5.7.0 Must issue a STARTTLS command first.", A, "4.7.0"}, {stageMail, "530 5.7.0 Authentication Required.", A, "4.7.0"},
		{stageAuth, "534 5.7.9 Application-specific password required", A, "4.7.0"}, {stageAuth, "534 5.7.14 Please log in through your web browser", A, "4.7.0"},
		{stageAuth, "535 5.7.8 Username and Password not accepted", A, "4.7.0"}, {stageAuth, "535 5.7.1 Username and Password not accepted", A, "4.7.0"},
		{stageRcpt, "550 5.1.1 The email account does not exist", P, "5.1.1"}, {stageRcpt, "553 5.1.2 We weren't able to find the recipient domain", P, "5.1.2"}, {stageRcpt, "553 5.1.3 not a valid RFC 5321 address", P, "5.1.3"},
		{stageRcpt, "550 5.2.1 The email account is disabled", P, "5.2.1"}, {stageMail, "550 5.4.5 Daily user sending limit exceeded.", Q, "4.4.5"}, {stageEnd, "550 5.4.5 Daily SMTP relay limit exceeded.", Q, "4.4.5"},
		{stageRcpt, "550 5.5.3 Too many recipients for this sender", P, "5.5.3"}, {stageMail, "550 5.7.0 Mail relay denied", A, "4.7.0"},
		{stageEnd, "550 5.7.1 likely unsolicited mail", P, "5.7.1"}, {stageEnd, "550 5.7.1 Daily SMTP relay limit exceeded for customer", Q, ""}, {stageEnd, "550 5.7.26 Unauthenticated email is not accepted", P, "5.7.26"},
		{stageRcpt, "552 5.2.2 The email account is over quota", P, "5.2.2"}, {stageEnd, "552 5.2.3 exceeded size limits", P, "5.3.4"}, {stageMail, "552 5.3.4 exceeded Google's message size limits", P, "5.3.4"}, {stageEnd, "552 5.7.0 blocked because its content presents a potential security issue", P, "5.7.0"},
		{stageMail, "553 5.1.7 The sender address is not valid", P, "5.1.7"}, {stageEnd, "554 5.4.6 Message exceeded 50 hops", P, "5.4.6"}, {stageEnd, "554 5.6.0 Mail message is malformed", P, "5.6.0"}, {stageMail, "554 5.7.0 Too many unauthenticated commands", bug, ""},
		// Exchange Online.
		{stageMail, "432 4.3.2 Concurrent connections limit exceeded.", S, "4.3.2"}, {stageEnd, "554 5.2.0 STOREDRV.Submission.Exception:SubmissionQuotaExceededException", Q, ""},
		{stageAuth, "535 5.7.3 Authentication unsuccessful", A, "4.7.0"}, {stageAuth, "535 5.7.139 Authentication unsuccessful, SmtpClientAuthentication is disabled for the Tenant.", A, "4.7.0"},
		{stageMail, "530 5.7.57 Client not authenticated to send mail", A, "4.7.0"}, {stageEnd, "554 5.2.2 mailbox full; STOREDRV.Submission.Exception:QuotaExceededException", Q, ""},
		{stageMail, "550 5.7.60 SMTP; Client does not have permissions to send as this sender", P, "5.7.1"}, {stageEnd, "554 5.2.252 SendAsDenied", P, "5.7.1"}, {stageEnd, "550 5.1.90 daily recipient limit", Q, ""},
		{stageMail, "451 4.7.500 Server busy", T, "4.7.255"}, {stageEnd, "550 5.6.11 Bare line feeds", P, "5.6.11"},
	} {
		code, rest, _ := strings.Cut(r.reply, " ")
		enh, text, _ := strings.Cut(rest, " ")
		e := c.classify(r.at, smtpError(t, code, enh, text))
		if e.Class != r.class || r.code != "" && e.Code() != r.code || e.Unsure {
			t.Errorf("%s %q: %v %s unsure %v, want %v %s", r.at, r.reply, e.Class, e.Code(), e.Unsure, r.class, r.code)
		}
		if e.Text == "" || (e.Class == Q || e.Class == S) && !e.RetryAt.After(now) {
			t.Errorf("%q: text %q, retry at %v", r.reply, e.Text, e.RetryAt)
		}
	}
	for at, unsure := range map[stage]bool{stageConnect: false, stageAuth: false, stageMail: false, stageRcpt: false, stageData: false, stageEnd: true} {
		if e := c.classify(at, io.ErrUnexpectedEOF); e.Class != T || e.Unsure != unsure {
			t.Errorf("cut at %s: %v unsure %v", at, e.Class, e.Unsure)
		}
	}
	if e := c.classify(stageConnect, &net.DNSError{Name: "smtp.x"}); e.Class != T || !strings.Contains(e.Text, "resolved") {
		t.Errorf("%+v", e)
	}
}

func smtpError(t *testing.T, code, enh, text string) error {
	t.Helper()
	e := &smtp.SMTPError{Message: text}
	if n, err := parse(code); err == nil {
		e.Code = n[0]
	}
	if n, err := parse(enh); err == nil && len(n) == 3 {
		e.EnhancedCode = smtp.EnhancedCode{n[0], n[1], n[2]}
	}
	return e
}

func parse(s string) ([]int, error) {
	var ns []int
	for _, p := range strings.Split(s, ".") {
		n := 0
		for _, r := range p {
			if r < '0' || r > '9' {
				return nil, errors.New(s)
			}
			n = n*10 + int(r-'0')
		}
		ns = append(ns, n)
	}
	return ns, nil
}

func TestXOAUTH2IsAsTheVendorWritesItAndWaitsForTheCode(t *testing.T) {
	x := &xoauth2{user: "relay@example.test", token: secret.New("tok-1")}
	mech, ir, err := x.Start()
	if err != nil || mech != "XOAUTH2" || string(ir) != "user=relay@example.test\x01auth=Bearer tok-1\x01\x01" {
		t.Errorf("%s %q %v", mech, ir, err)
	}
	if next, err := x.Next([]byte(`{"status":"400"}`)); err != nil || next == nil || len(next) != 0 || x.challenge != `{"status":"400"}` {
		t.Errorf("%v, %v, %q", next, err, x.challenge)
	}
}

func TestTextsShowNoSecretAndNoLink(t *testing.T) {
	got := short("Refused Bearer ya29.SECRETSECRET today. For more information, go to\n https://support.google.com/x\r\nnext")
	if strings.Contains(got, "SECRET") || strings.Contains(got, "https") || strings.ContainsAny(got, "\r\n") {
		t.Errorf("%q", got)
	}
	for _, cfg := range []providers.Config{{}, {SMTPAddr: "x:465", Mailbox: "m@x"}} {
		if _, err := Open(cfg); err == nil {
			t.Errorf("%+v was opened", cfg)
		}
	}
}
