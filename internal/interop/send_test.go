//go:build interop

package interop

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// submission is one message as a client is told to send it.
type submission struct {
	settings
	account
	port endpoint
	to   []string
	file string // the message, CRLF
}

// clients are the programs of Debian, each told in its own words to send the file to the envelope.
var clients = map[string]func(s submission) *exec.Cmd{
	"swaks": func(s submission) *exec.Cmd {
		tls := "--tls"
		if s.port.TLS == "implicit" {
			tls = "--tlsc"
		}
		// swaks ends the message with a line end of its own.
		b, err := os.ReadFile(s.file)
		if err == nil {
			err = os.WriteFile(s.file+".swaks", bytes.TrimSuffix(b, []byte("\r\n")), 0o600)
		}
		if err != nil {
			panic(err)
		}
		return exec.Command("swaks", "--server", s.port.Host, "--port", strconv.Itoa(s.port.Port), tls, "--tls-verify", "--tls-ca-path", s.CA,
			"--auth", "LOGIN", "--auth-user", s.Name, "--auth-password", s.Password, "--helo", "scanner",
			"--from", s.Mailbox, "--to", strings.Join(s.to, ","), "--data", "@"+s.file+".swaks")
	},
	"msmtp": func(s submission) *exec.Cmd {
		starttls := "on"
		if s.port.TLS == "implicit" {
			starttls = "off"
		}
		args := []string{"--host=" + s.port.Host, "--port=" + strconv.Itoa(s.port.Port), "--tls=on", "--tls-starttls=" + starttls,
			"--tls-trust-file=" + s.CA, "--auth=plain", "--user=" + s.Mailbox, "--passwordeval=printf %s " + s.Password, "--from=" + s.Mailbox, "--"}
		cmd := exec.Command("msmtp", append(args, s.to...)...)
		b, err := os.ReadFile(s.file)
		if err != nil {
			panic(err)
		}
		cmd.Stdin = bytes.NewReader(bytes.ReplaceAll(b, []byte("\r\n"), []byte("\n"))) // what a local program pipes
		return cmd
	},
	"curl": func(s submission) *exec.Cmd {
		scheme := "smtp"
		if s.port.TLS == "implicit" {
			scheme = "smtps"
		}
		args := []string{"--silent", "--show-error", "--ssl-reqd", "--cacert", s.CA, "--url", fmt.Sprintf("%s://%s:%d", scheme, s.port.Host, s.port.Port),
			"--user", s.Name + ":" + s.Password, "--mail-from", s.Mailbox, "--upload-file", s.file}
		for _, to := range s.to {
			args = append(args, "--mail-rcpt", to)
		}
		return exec.Command("curl", args...)
	},
	"smtplib": func(s submission) *exec.Cmd {
		const script = `
import smtplib, ssl, sys
host, port, tls, ca, user, password, sender, path, *to = sys.argv[1:]
ctx = ssl.create_default_context(cafile=ca)
if tls == "implicit":
    c = smtplib.SMTP_SSL(host, int(port), context=ctx)
else:
    c = smtplib.SMTP(host, int(port)); c.starttls(context=ctx)
c.login(user, password)
refused = c.sendmail(sender, to, open(path, "rb").read())
c.quit()
sys.exit(1 if refused else 0)
`
		return exec.Command("python3", append([]string{"-c", script, s.port.Host, strconv.Itoa(s.port.Port), s.port.TLS, s.CA,
			s.Name, s.Password, s.Mailbox, s.file}, s.to...)...)
	},
}

// letter is a message and what is to be found in every copy of it.
type letter struct {
	header string // without From, To: the suite puts them in
	body   string
	bcc    bool
}

func letters() map[string]letter {
	pdf := make([]byte, 90_000)
	for i := range pdf {
		pdf[i] = byte(i * i >> 3)
	}
	return map[string]letter{
		"text": {header: "Subject: plain\r\n", body: "Hello,\r\n.a line with a dot\r\n..and two\r\n\r\nend\r\n"},
		"html": {
			header: "Subject: =?utf-8?q?Gr=C3=BC=C3=9Fe?=\r\nMIME-Version: 1.0\r\nContent-Type: multipart/alternative; boundary=b\r\n",
			body: "--b\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Transfer-Encoding: 8bit\r\n\r\nGrüße, здравствуйте 👋\r\n" +
				"--b\r\nContent-Type: text/html; charset=utf-8\r\nContent-Transfer-Encoding: 8bit\r\n\r\n<p>Grüße <b>👋</b></p>\r\n--b--\r\n",
		},
		"attachment": {
			header: "Subject: scan\r\nMIME-Version: 1.0\r\nContent-Type: multipart/mixed; boundary=\"=_x\"\r\nX-Job: 7\r\nReferences: <a@x.example>\r\n <b@x.example>\r\n",
			body: "--=_x\r\nContent-Type: text/plain\r\n\r\nsee attachment\r\n--=_x\r\nContent-Type: application/pdf; name=\"scan 1.pdf\"\r\nContent-Transfer-Encoding: base64\r\n" +
				"Content-Disposition: attachment; filename=\"scan 1.pdf\"\r\n\r\n" + wrapped(base64.StdEncoding.EncodeToString(pdf)) + "--=_x--\r\n",
		},
		"bcc": {header: "Subject: quiet\r\n", body: "for some eyes only\r\n", bcc: true},
	}
}

func wrapped(s string) string {
	var b strings.Builder
	for len(s) > 76 {
		b.WriteString(s[:76] + "\r\n")
		s = s[76:]
	}
	b.WriteString(s + "\r\n")
	return b.String()
}

// TestRealClientsSend sends every letter with every client through both clouds and compares each
// recipient's copy with what was submitted.
func TestRealClientsSend(t *testing.T) {
	for _, name := range []string{"swaks", "msmtp", "curl", "python3"} {
		if _, err := exec.LookPath(name); err != nil {
			t.Fatalf("%v: apt-get install swaks libnet-ssleay-perl msmtp curl python3", err)
		}
	}
	s := startDemo(t)
	for _, provider := range []string{"graph", "gmail"} {
		for _, port := range []endpoint{s.SMTP, s.SMTPS} {
			for _, client := range slices.Sorted(maps.Keys(clients)) {
				for name, l := range letters() {
					t.Run(strings.Join([]string{provider, port.TLS, client, name}, "/"), func(t *testing.T) {
						send(t, s, provider, port, client, l)
					})
				}
			}
		}
	}
}

func send(t *testing.T, s settings, provider string, port endpoint, client string, l letter) {
	a := s.account(t, provider)
	shown := []string{"ann@contoso.example", "ben@workspace.example", "Carol.Outside@elsewhere.example"}
	to := slices.Clone(shown)
	header := "From: Sender <" + a.Mailbox + ">\r\nTo: Ann <ann@contoso.example>,\r\n ben@workspace.example\r\nCc: \"Outside, Carol\" <Carol.Outside@elsewhere.example>\r\n" +
		"Date: Tue, 24 Nov 2026 10:00:00 +0100\r\nMessage-ID: <" + fmt.Sprintf("%x", sha256.Sum256([]byte(t.Name())))[:20] + "@client.example>\r\n" + l.header
	sent := header
	if l.bcc {
		to = append(to, "hidden@contoso.example", "secret@elsewhere.example")
		sent = "Bcc: hidden@contoso.example,\r\n secret@elsewhere.example\r\n" + header
	}
	file := filepath.Join(t.TempDir(), "message.eml")
	if err := os.WriteFile(file, []byte(sent+"\r\n"+l.body), 0o600); err != nil {
		t.Fatal(err)
	}
	before := s.last(t)
	cmd := clients[client](submission{settings: s, account: a, port: port, to: to, file: file})
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", client, err, out)
	}
	copies := s.arrived(t, before, len(to))
	for _, rcpt := range to {
		raw, ok := copies[rcpt]
		if !ok {
			t.Errorf("%s got nothing; copies: %v", rcpt, slices.Collect(maps.Keys(copies)))
			continue
		}
		compare(t, rcpt, string(raw), header, l.body)
	}
	if len(copies) != len(to) {
		t.Errorf("%d copies for %d recipients: %v", len(copies), len(to), slices.Collect(maps.Keys(copies)))
	}
}

// compare holds one copy against the submission: every header field as it was, in its order, others only on
// top or between, no trace of Bcc, and the body to the byte.
func compare(t *testing.T, rcpt, raw, header, body string) {
	t.Helper()
	h, b, ok := strings.Cut(raw, "\r\n\r\n")
	if !ok {
		t.Errorf("%s: no body:\n%s", rcpt, raw)
		return
	}
	if b != body {
		t.Errorf("%s: the body was changed: %d bytes, submitted %d\n%.300q", rcpt, len(b), len(body), b)
	}
	h += "\r\n"
	low := strings.ToLower(h)
	if strings.Contains(low, "bcc:") || strings.Contains(low, "hidden@") || strings.Contains(low, "secret@") {
		t.Errorf("%s sees who else got it:\n%s", rcpt, h)
	}
	rest := h
	for _, field := range fields(header) {
		i := strings.Index(rest, field)
		if i < 0 {
			t.Errorf("%s: field %q is missing, changed or out of order in\n%s", rcpt, field, h)
			return
		}
		rest = rest[i+len(field):]
	}
}

// fields splits a header block into its fields, folded lines and line ends included.
func fields(h string) []string {
	var fs []string
	for line := range strings.Lines(h) {
		if len(fs) > 0 && (line[0] == ' ' || line[0] == '\t') {
			fs[len(fs)-1] += line
			continue
		}
		fs = append(fs, line)
	}
	return fs
}
