package smtpd

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/tools/txtar"

	"mailbridge/auth"
	"mailbridge/internal/cert"
	"mailbridge/internal/mailerr"
	"mailbridge/internal/outbox"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// taken is one message that the outbox was handed.
type taken struct {
	outbox.Submission
	raw string
	sum [32]byte
}

// fake stands in for directory and outbox.
type fake struct {
	mu       sync.Mutex
	n        int
	taken    []taken
	answered map[outbox.ID]bool
	fail     error
	wait     chan struct{} // Submit waits for it after the message has come in
	came     chan struct{}
	tooMany  bool
	change   chan struct{}
}

func newFake() *fake { return &fake{answered: map[outbox.ID]bool{}, change: make(chan struct{}, 1000)} }

type tooMany struct{}

func (tooMany) Error() string             { return "too many" }
func (tooMany) RetryAfter() time.Duration { return time.Minute }

func (f *fake) Authenticate(_ context.Context, c auth.Credentials) (*auth.Account, error) {
	if f.tooMany {
		return nil, tooMany{}
	}
	if strings.EqualFold(c.User, "dev") && c.Password.Reveal() == "pass word" {
		return &auth.Account{ID: "dev", Mailbox: "dev@x.example", Send: true, From: []string{"dev@x.example", "*@sub.x.example"}, MaxSize: 1 << 20}, nil
	}
	return nil, auth.ErrCredentials
}

func (f *fake) NewID() outbox.ID {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.n++
	return outbox.ID(fmt.Sprintf("ID%d", f.n))
}

func (f *fake) Submit(_ context.Context, s outbox.Submission, r io.Reader) (outbox.Result, error) {
	b, err := io.ReadAll(r)
	if err != nil {
		return outbox.Result{}, err
	}
	if f.came != nil {
		close(f.came)
		<-f.wait
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.fail != nil {
		return outbox.Result{}, f.fail
	}
	f.taken = append(f.taken, taken{s, string(b), s.ClientDigest()})
	return outbox.Result{ID: s.ID, State: outbox.Sent}, nil
}

func (f *fake) Answered(id outbox.ID, read bool) {
	f.mu.Lock()
	f.answered[id] = read
	f.mu.Unlock()
	select {
	case f.change <- struct{}{}:
	default: // a benchmark, in which nobody waits
	}
}

func (f *fake) messages() []taken {
	f.mu.Lock()
	defer f.mu.Unlock()
	return append([]taken(nil), f.taken...)
}

type harness struct {
	*fake
	t    testing.TB
	addr string
	srv  *Server
	log  *locked
}

func start(t testing.TB, change func(*Config, *Listener)) *harness {
	t.Helper()
	h := &harness{fake: newFake(), t: t, log: &locked{}}
	cfg := Config{Hostname: "bridge.example", Auth: h.fake, Submit: h.fake, Log: slog.New(slog.NewTextHandler(h.log, &slog.HandlerOptions{Level: slog.LevelDebug})),
		MaxSize: 2 << 20, Now: func() time.Time { return time.Date(2026, 11, 24, 10, 0, 0, 0, time.UTC) }}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l := Listener{Listener: ln, TLS: StartTLS}
	if change != nil {
		change(&cfg, &l)
	}
	if l.TLS != None && l.TLSConfig == nil {
		made, err := cert.Make(testCerts(t), nil, time.Now)
		if err != nil {
			t.Fatal(err)
		}
		if l.TLSConfig, err = TLSConfig("modern", made.GetCertificate); err != nil {
			t.Fatal(err)
		}
	}
	h.srv, h.addr = New(cfg), ln.Addr().String()
	done := make(chan error, 1)
	go func() { done <- h.srv.Serve(l) }()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		if err := h.srv.Shutdown(ctx); err != nil {
			t.Error(err)
		}
		if err := <-done; !errors.Is(err, ErrClosed) {
			t.Error(err)
		}
	})
	return h
}

var certDir = sync.OnceValues(func() (string, error) { return os.MkdirTemp("", "smtpd-test-") })

func testCerts(t testing.TB) string {
	dir, err := certDir()
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// locked is a log that is read while it is written.
type locked struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *locked) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *locked) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// client is one raw connection.
type client struct {
	t  testing.TB
	nc net.Conn
	br *bufio.Reader
}

func (h *harness) dial() *client {
	h.t.Helper()
	nc, err := net.Dial("tcp", h.addr)
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { nc.Close() })
	return &client{h.t, nc, bufio.NewReader(nc)}
}

func (c *client) send(s string) {
	c.t.Helper()
	if _, err := io.WriteString(c.nc, s); err != nil {
		c.t.Fatal(err)
	}
}

// read reads one reply, all its lines.
func (c *client) read() string {
	c.t.Helper()
	_ = c.nc.SetReadDeadline(time.Now().Add(10 * time.Second))
	var all strings.Builder
	for {
		line, err := c.br.ReadString('\n')
		all.WriteString(line)
		if err != nil {
			return all.String() + "<" + err.Error() + ">"
		}
		if len(line) < 4 || line[3] != '-' {
			return all.String()
		}
	}
}

func (c *client) want(prefix string) string {
	c.t.Helper()
	got := c.read()
	if !strings.HasPrefix(got, prefix) {
		c.t.Fatalf("got %q, want %s…", got, prefix)
	}
	return got
}

func (c *client) cmd(s, prefix string) string {
	c.t.Helper()
	c.send(s + "\r\n")
	return c.want(prefix)
}

func plain(user, pass string) string {
	return base64.StdEncoding.EncodeToString([]byte("\x00" + user + "\x00" + pass))
}

// login brings a session to where it may send.
func (h *harness) login() *client {
	c := h.dial()
	c.want("220 ")
	c.cmd("EHLO c.example", "250-")
	c.cmd("AUTH PLAIN "+plain("dev", "pass word"), "235 2.7.0")
	return c
}

func (c *client) envelope() {
	c.cmd("MAIL FROM:<dev@x.example>", "250 2.1.0")
	c.cmd("RCPT TO:<r@y.example>", "250 2.1.5")
}

// Transcripts: C: is sent (with CR LF), c: without a line end and with Go escapes, S: is a regular expression
// for a whole reply line; T: starts TLS.
func TestTranscripts(t *testing.T) {
	files, err := filepath.Glob(filepath.Join("..", "testdata", "smtp", "*.txtar"))
	if err != nil || len(files) == 0 {
		t.Fatalf("no transcripts: %v", err)
	}
	for _, file := range files {
		a, err := txtar.ParseFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range a.Files {
			t.Run(strings.TrimSuffix(filepath.Base(file), ".txtar")+"/"+s.Name, func(t *testing.T) {
				h := start(t, func(cfg *Config, l *Listener) {
					l.Tolerant = strings.Contains(s.Name, "tolerant")
					l.AuthEquals = strings.Contains(s.Name, "auth-equals")
					cfg.SMTPUTF8 = strings.Contains(s.Name, "utf8")
					cfg.MaxRecipients = 3
				})
				c := h.dial()
				if strings.Contains(s.Name, "foreign") {
					// A client from elsewhere: passwords in clear are not taken from it.
					h.srv.foreign(c.nc)
				}
				play(t, c, string(s.Data))
			})
		}
	}
}

// foreign makes a running session count as one from another machine.
func (s *Server) foreign(nc net.Conn) {
	for {
		s.mu.Lock()
		for c := range s.conns {
			if c.raw.RemoteAddr().String() == nc.LocalAddr().String() {
				c.mu.Lock()
				c.local = false
				c.mu.Unlock()
				s.mu.Unlock()
				return
			}
		}
		s.mu.Unlock()
	}
}

func play(t *testing.T, c *client, script string) {
	t.Helper()
	for n, line := range strings.Split(script, "\n") {
		op, text, _ := strings.Cut(line, " ")
		switch op {
		case "C:":
			c.send(text + "\r\n")
		case "c:":
			b := strings.NewReplacer(`\r`, "\r", `\n`, "\n", `\0`, "\x00", `\x16`, "\x16", `\x03`, "\x03").Replace(text)
			c.send(b)
		case "S:":
			_ = c.nc.SetReadDeadline(time.Now().Add(10 * time.Second))
			got, err := c.br.ReadString('\n')
			got = strings.TrimSuffix(got, "\r\n")
			if text == "<closed>" {
				if err == nil {
					t.Fatalf("line %d: got %q, want the end", n+1, got)
				}
				return
			}
			if ok, rerr := regexp.MatchString("^(?:"+text+")$", got); rerr != nil || !ok || err != nil {
				t.Fatalf("line %d: got %q, %v; want %s", n+1, got, err, text)
			}
		case "T:":
			tc := tls.Client(c.nc, &tls.Config{InsecureSkipVerify: true})
			if err := tc.Handshake(); err != nil {
				t.Fatal(err)
			}
			c.nc, c.br = tc, bufio.NewReader(tc)
		case "", "#":
		default:
			t.Fatalf("line %d: %s", n+1, line)
		}
	}
}

func TestMessageGoesOnToTheByteBehindItsTraceLine(t *testing.T) {
	h := start(t, nil)
	c := h.login()
	c.envelope()
	c.cmd("DATA", "354 ")
	msg := "From: Dev <dev@x.example>\r\nX-Odd:  a\r\n\tb \r\nBcc: hidden@y.example,\r\n other@y.example\r\nTo: r@y.example\r\nDate: Tue, 24 Nov 2026 10:00:00 +0100\r\nMessage-ID: <1@c.example>\r\n\r\n.dot\r\n..dots\r\nGr\xfc\xdfe " + strings.Repeat("x", 100_000) + "\r\n\r\nend\r\n"
	c.send(strings.ReplaceAll(msg, "\r\n.", "\r\n..") + ".\r\n")
	c.want("250 2.0.0 OK: ID1")
	c.cmd("QUIT", "221 ")
	<-h.change
	m := h.messages()[0]
	want := strings.Replace(msg, "Bcc: hidden@y.example,\r\n other@y.example\r\n", "", 1)
	trace, rest, ok := strings.Cut(m.raw, "\r\nFrom: ")
	if !ok || "From: "+rest != want {
		t.Errorf("changed:\n%.600q\nwant\n%.600q", m.raw, want)
	}
	if trace != "Received: from c.example ([127.0.0.1])\r\n\tby bridge.example with ESMTPA id ID1;\r\n\tTue, 24 Nov 2026 10:00:00 +0000" {
		t.Errorf("trace %q", trace)
	}
	if m.Envelope.From != "dev@x.example" || len(m.Envelope.To) != 1 || m.MessageID != "<1@c.example>" || strings.Join(m.Fixes, " ") != "bcc" || m.Account != "dev" {
		t.Errorf("%+v", m.Submission)
	}
	if !h.answered["ID1"] {
		t.Error("a further command does not show that the answer was read")
	}
	if strings.Contains(h.log.String(), "pass word") || strings.Contains(h.log.String(), plain("dev", "pass word")) || !strings.Contains(h.log.String(), "item=ID1") {
		t.Errorf("log: %s", h.log)
	}
}

func TestWhatIsMissingIsAddedAndSignedMailIsLeftAlone(t *testing.T) {
	h := start(t, nil)
	c := h.login()
	for i, tc := range []struct{ head, want, fixes string }{
		{"Subject: x\r\n", "Subject: x\r\nDate: Tue, 24 Nov 2026 10:00:00 +0000\r\nFrom: dev@x.example\r\nTo: undisclosed-recipients:;\r\nMessage-ID: <~@x.example>\r\n\r\n", "add-date add-from add-to add-message-id"},
		{"From: dev@x.example\r\nTo: r@y.example\r\nDate: x\r\nMessage-ID: bad id\r\n", "From: dev@x.example\r\nTo: r@y.example\r\nDate: x\r\nMessage-ID: <~@x.example>\r\n\r\n", "message-id add-message-id"},
		{"From dev Tue\r\nReturn-Path: <x@y>\r\nFrom: dev@x.example\r\nCc: r@y.example\r\nDate: x\r\nMessage-ID: <a@b>\r\n", "From: dev@x.example\r\nCc: r@y.example\r\nDate: x\r\nMessage-ID: <a@b>\r\n\r\n", "mbox-line return-path"},
		{"DKIM-Signature: v=1\r\nFrom: dev@x.example\r\nTo: r@y.example\r\nDate: x\r\nMessage-ID: bad id\r\n", "DKIM-Signature: v=1\r\nFrom: dev@x.example\r\nTo: r@y.example\r\nDate: x\r\nMessage-ID: bad id\r\n\r\n", ""},
	} {
		c.envelope()
		c.cmd("DATA", "354 ")
		c.send(tc.head + "\r\nbody\r\n.\r\n")
		c.want("250 ")
		m := h.messages()[i]
		_, got, _ := strings.Cut(m.raw, "+0000\r\n")
		got = regexp.MustCompile(`<[a-z0-9]{26}@`).ReplaceAllString(got, "<~@")
		if got != tc.want+"body\r\n" || strings.Join(m.Fixes, " ") != tc.fixes {
			t.Errorf("%q:\n%q\nwant\n%q\nfixes %v", tc.head, got, tc.want, m.Fixes)
		}
	}
}

func TestSenderMustBeTheAccountsOwn(t *testing.T) {
	h := start(t, nil)
	c := h.login()
	c.cmd("MAIL FROM:<ceo@x.example>", "550 5.7.1 Sender ceo@x.example is not allowed for this account: use dev@x.example or *@sub.x.example")
	for head, want := range map[string]string{
		"From: CEO <ceo@x.example>":                                     "550 5.7.1",
		"From: dev@x.example\r\nFrom: ceo@x.example":                    "554 5.6.0",
		"From: dev@x.example\r\nSender: ceo@x.example":                  "550 5.7.1",
		"From: dev@x.example, ceo@x.example":                            "550 5.7.1",
		"From: dev@x.example, a@sub.x.example":                          "554 5.6.0",
		"From: dev@x.example, a@sub.x.example\r\nSender: dev@x.example": "250 ",
		"From: \"dev@x.example\" <ceo@x.example>":                       "550 5.7.1",
		"From: DEV@X.example":                                           "250 ",
		"From:":                                                         "554 5.6.0",
	} {
		c.envelope()
		c.cmd("DATA", "354 ")
		c.send(head + "\r\nTo: r@y.example\r\n\r\nx\r\n.\r\n")
		if got := c.read(); !strings.HasPrefix(got, want) {
			t.Errorf("%q: %q, want %s", head, got, want)
		}
	}
}

// smuggling is what other servers have taken for the end of a message.
var smuggling = []string{"\n.\n", "\n.\r\n", "\r\n.\n", "\r.\r", "\r.\r\n", "\r\n.\r", "\r\n\x00.\r\n", "\n\n.\r\n", "\r\r\n.\r\r\n"}

// Whatever stands behind a false end of a message is part of that message or of none, split as it may be.
func TestNoFalseEndMakesASecondMessage(t *testing.T) {
	for _, tolerant := range []bool{false, true} {
		h := start(t, func(_ *Config, l *Listener) { l.Tolerant = tolerant })
		for _, end := range smuggling {
			evil := "MAIL FROM:<dev@x.example>\r\nRCPT TO:<victim@y.example>\r\nDATA\r\nSubject: evil\r\n\r\nevil\r\n"
			body := "From: dev@x.example\r\nSubject: good\r\n\r\nx" + end + evil
			for _, way := range []string{"DATA", "BDAT"} {
				wire := "DATA\r\n" + strings.ReplaceAll(body, "\r\n..", "\r\n...") + "\r\n.\r\n"
				if way == "BDAT" {
					wire = fmt.Sprintf("BDAT %d LAST\r\n%s", len(body), body)
				}
				step := 1
				if testing.Short() {
					step = 7
				}
				for at := 0; at <= len(wire); at += max(step, len(wire)/40) {
					smuggle(t, h, wire[:at], wire[at:], way)
				}
			}
		}
		for _, m := range h.messages() {
			for _, r := range m.Envelope.To {
				if r != "r@y.example" {
					t.Fatalf("tolerant %v: a smuggled message to %s", tolerant, r)
				}
			}
			bare := strings.ReplaceAll(m.raw, "\r\n", "")
			if strings.ContainsAny(bare, "\r\n\x00") {
				t.Fatalf("tolerant %v: a bare CR, LF or NUL went on: %q", tolerant, m.raw)
			}
			if !tolerant {
				t.Fatalf("strict: taken: %q", m.raw)
			}
		}
	}
}

func smuggle(t *testing.T, h *harness, first, second, way string) {
	t.Helper()
	c := h.login()
	c.envelope()
	c.send(first)
	if second != "" {
		c.send(second)
	}
	if way == "DATA" {
		c.want("354 ")
	}
	got := c.read()
	if !strings.HasPrefix(got, "554 ") && !strings.HasPrefix(got, "250 ") {
		t.Fatalf("%q + %q: %q", first, second, got)
	}
	_ = c.nc.Close()
}

func TestBodyIsNeverReadAsCommandsAfterATimeOut(t *testing.T) {
	h := start(t, func(cfg *Config, _ *Listener) { cfg.DataTimeout = 50 * time.Millisecond })
	c := h.login()
	c.envelope()
	c.cmd("DATA", "354 ")
	c.send("From: dev@x.example\r\n\r\nslow\r\n")
	_ = c.nc.SetReadDeadline(time.Now().Add(5 * time.Second))
	b, err := io.ReadAll(c.br) // until the server has given up
	if err != nil {
		t.Fatal(err)
	}
	_, _ = io.WriteString(c.nc, "MAIL FROM:<dev@x.example>\r\nRCPT TO:<victim@y.example>\r\nDATA\r\n")
	if len(h.messages()) != 0 || strings.Contains(string(b), "250") {
		t.Errorf("went on after the time-out: %q, %v", b, h.messages())
	}
}

func TestSizeIsCountedAndTheSessionStaysInStep(t *testing.T) {
	h := start(t, nil)
	c := h.login()
	c.cmd("MAIL FROM:<dev@x.example> SIZE=1048577", "552 5.3.4")
	head := "From: dev@x.example\r\nTo: r@y.example\r\nDate: x\r\nMessage-ID: <a@b>\r\n\r\n"
	for _, over := range []int{0, 1} {
		body := strings.Repeat(strings.Repeat("x", 998)+"\r\n", 1049)
		body = body[:1<<20-len(head)+over-2] + "\r\n"
		c.envelope()
		c.cmd("DATA", "354 ")
		c.send(head + body + ".\r\n")
		want := "250 "
		if over > 0 {
			want = "552 5.3.4"
		}
		c.want(want)
		c.envelope()
		c.send(fmt.Sprintf("BDAT %d\r\n%s", len(head), head))
		c.want("250 ")
		c.send(fmt.Sprintf("BDAT %d LAST\r\n%s", len(body), body))
		c.want(want)
	}
	m := h.messages()
	if len(m) != 2 || m[0].sum != m[1].sum {
		t.Errorf("%d messages; DATA and BDAT have other digests", len(m))
	}
}

func TestFailuresAreRenderedAndNothingInternalShows(t *testing.T) {
	h := start(t, nil)
	c := h.login()
	for _, tc := range []struct {
		err  error
		want string
	}{
		{&mailerr.Error{Class: mailerr.Permanent, Status: mailerr.Status{Subject: 3, Detail: 4}, Text: "too big"}, "552 5.3.4 too big (id ID"},
		{&mailerr.Error{Class: mailerr.Permanent, Status: mailerr.Status{Subject: 6}, Text: "bad"}, "554 5.6.0 bad"},
		{&mailerr.Error{Class: mailerr.Permanent, Status: mailerr.Status{Subject: 7, Detail: 1}, Text: "no"}, "550 5.7.1 no"},
		{&mailerr.Error{Class: mailerr.Permanent, Status: mailerr.Status{Subject: 1, Detail: 1}, Text: "who"}, "550 5.1.1 who"},
		{&mailerr.Error{Class: mailerr.Temporary, Status: mailerr.Status{Subject: 3, Detail: 1}, Text: "disk", Err: errors.New("/var/secret")}, "452 4.3.1 disk"},
		{&mailerr.Error{Class: mailerr.Throttled, Status: mailerr.Status{Subject: 4, Detail: 5}, Text: "slow"}, "451 4.4.5 slow"},
		{&mailerr.Error{Class: mailerr.Auth, Status: mailerr.Status{Subject: 7}, Text: "sign in"}, "451 4.7.0 sign in"},
		{&mailerr.Error{Class: mailerr.Quota, Status: mailerr.Status{Subject: 7, Detail: 1}, Text: "limit"}, "452 4.7.1 limit"},
		{&mailerr.Error{Class: mailerr.Temporary, Status: mailerr.Status{Subject: 4}, Text: "x\r\n250 forged\xff"}, "451 4.4.0 x  250 forged?"},
		{errors.New("dial tcp 10.1.2.3:443: /var/secret"), "451 4.3.0 Internal error"},
	} {
		h.mu.Lock()
		h.fail = tc.err
		h.mu.Unlock()
		c.envelope()
		c.cmd("DATA", "354 ")
		c.send("From: dev@x.example\r\n\r\nx\r\n.\r\n")
		if got := c.read(); !strings.HasPrefix(got, tc.want) || strings.Contains(got, "secret") {
			t.Errorf("%v: %q, want %s", tc.err, got, tc.want)
		}
	}
}

func TestWhetherTheAnswerWasReadIsTold(t *testing.T) {
	message := "From: dev@x.example\r\n\r\nx\r\n.\r\n"
	for _, tc := range []struct {
		name string
		do   func(h *harness, c *client)
		want bool
	}{
		{"a further command", func(_ *harness, c *client) { c.want("250 "); c.send("NOOP\r\n") }, true},
		{"a close in order", func(_ *harness, c *client) { c.want("250 "); c.nc.Close() }, true},
		{"a reset after the answer", func(_ *harness, c *client) {
			c.want("250 ")
			_ = c.nc.(*net.TCPConn).SetLinger(0)
			c.nc.Close()
		}, false},
		{"gone before the answer", func(h *harness, c *client) {
			<-h.came
			_ = c.nc.(*net.TCPConn).SetLinger(0)
			c.nc.Close()
			// That is told at once, while the outbox still has the message.
			<-h.change
			close(h.wait)
		}, false},
		{"gone before the answer to BDAT", func(h *harness, c *client) {
			<-h.came
			_ = c.nc.(*net.TCPConn).SetLinger(0)
			c.nc.Close()
			<-h.change
			close(h.wait)
		}, false},
	} {
		h := start(t, nil)
		if strings.HasPrefix(tc.name, "gone") {
			h.came, h.wait = make(chan struct{}), make(chan struct{})
		}
		c := h.login()
		c.envelope()
		if strings.HasSuffix(tc.name, "BDAT") {
			c.send(fmt.Sprintf("BDAT %d LAST\r\n%s", len(message), message))
		} else {
			c.cmd("DATA", "354 ")
			c.send(message)
		}
		tc.do(h, c)
		<-h.change
		h.mu.Lock()
		if h.answered["ID1"] != tc.want {
			t.Errorf("%s: read %v", tc.name, h.answered["ID1"])
		}
		h.mu.Unlock()
	}
}

func TestShutdownLetsAMessageFinishAndEndsTheIdle(t *testing.T) {
	h := start(t, nil)
	h.came, h.wait = make(chan struct{}), make(chan struct{})
	idle, busy := h.login(), h.login()
	busy.envelope()
	busy.cmd("DATA", "354 ")
	busy.send("From: dev@x.example\r\n\r\nx\r\n.\r\n")
	<-h.came
	done := make(chan error, 1)
	go func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		done <- h.srv.Shutdown(ctx)
	}()
	idle.want("421 4.3.2")
	close(h.wait)
	busy.want("250 2.0.0")
	busy.want("421 4.3.2")
	if err := <-done; err != nil {
		t.Error(err)
	}
	if _, err := net.Dial("tcp", h.addr); err == nil {
		t.Error("still listening")
	}
}

func TestTooManyConnectionsOfOneAddressAreTurnedAway(t *testing.T) {
	h := start(t, func(cfg *Config, _ *Listener) { cfg.MaxPerAddress = 2 })
	a, b := h.dial(), h.dial()
	a.want("220 ")
	b.want("220 ")
	h.dial().want("421 4.7.0")
	a.cmd("QUIT", "221 ")
	a.nc.Close()
	for {
		c := h.dial()
		if strings.HasPrefix(c.read(), "220 ") {
			break
		}
	}
}

func TestImplicitTLSAndLegacyProfiles(t *testing.T) {
	made, err := cert.Make(testCerts(t), nil, time.Now)
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		profile string
		client  *tls.Config
		ok      bool
	}{
		{"modern", &tls.Config{}, true},
		{"modern", &tls.Config{MaxVersion: tls.VersionTLS12, CipherSuites: []uint16{tls.TLS_RSA_WITH_AES_128_CBC_SHA}}, false},
		{"legacy-1.2", &tls.Config{MaxVersion: tls.VersionTLS12, CipherSuites: []uint16{tls.TLS_RSA_WITH_AES_128_CBC_SHA}}, true},
		{"legacy-1.2", &tls.Config{MinVersion: tls.VersionTLS10, MaxVersion: tls.VersionTLS11}, false},
		{"legacy-1.0", &tls.Config{MinVersion: tls.VersionTLS10, MaxVersion: tls.VersionTLS10, CipherSuites: []uint16{tls.TLS_RSA_WITH_AES_128_CBC_SHA}}, true},
	} {
		h := start(t, func(_ *Config, l *Listener) {
			l.TLS = Implicit
			if l.TLSConfig, err = TLSConfig(tc.profile, made.GetCertificate); err != nil {
				t.Fatal(err)
			}
		})
		tc.client.InsecureSkipVerify = true
		nc, err := tls.Dial("tcp", h.addr, tc.client)
		if (err == nil) != tc.ok {
			t.Errorf("%s, %+v: %v", tc.profile, tc.client.MaxVersion, err)
		}
		if err == nil {
			c := &client{t, nc, bufio.NewReader(nc)}
			c.want("220 ")
			c.cmd("EHLO x", "250-")
			c.cmd("AUTH PLAIN "+plain("dev", "pass word"), "235 ")
			nc.Close()
		}
	}
	if _, err := TLSConfig("ssl3", nil); err == nil {
		t.Error("an unknown profile")
	}
}

func TestMatchIsLinearInItsStars(t *testing.T) {
	for _, tc := range []struct {
		p, s string
		ok   bool
	}{{"*@a.b", "x@a.b", true}, {"*@a.b", "x@a.bc", false}, {"a*b*c", "a12b3c", true}, {"a*b*c", "acb", false}, {"*", "", true}, {"a*a", "a", false}, {"x@y", "x@y", true},
		{strings.Repeat("*a", 30) + "*b", strings.Repeat("a", 5000), false}} {
		if match(tc.p, tc.s) != tc.ok {
			t.Errorf("%.20s %.20s", tc.p, tc.s)
		}
	}
}

// What one session may send never makes another than the logged-in account send, never a bare line end go on,
// and always ends.
func FuzzSession(f *testing.F) {
	f.Add([]byte("EHLO x\r\nAUTH PLAIN AGRldgBwYXNzIHdvcmQ=\r\nMAIL FROM:<dev@x.example>\r\nRCPT TO:<r@y.example>\r\nDATA\r\nFrom: dev@x.example\r\n\r\n.x\r\n.\r\nQUIT\r\n"))
	f.Add([]byte("EHLO x\r\nAUTH LOGIN ZGV2\r\ncGFzcyB3b3Jk\r\nMAIL FROM:<>\r\nRCPT TO:<\"a>b\"@y.example>\r\nBDAT 5\r\nA: b\r\r\nBDAT 0 LAST\r\nRSET\r\n"))
	f.Add([]byte("HELO\r\nMAIL FROM:a\r\nNOOP x\r\nEHLO\r\nAUTH PLAIN\r\n=\r\n*\r\nDATA x\n\n\x00"))
	for _, s := range smuggling {
		f.Add([]byte("EHLO x\r\nAUTH PLAIN AGRldgBwYXNzIHdvcmQ=\r\nMAIL FROM:<dev@x.example>\r\nRCPT TO:<r@y.example>\r\nDATA\r\nFrom: dev@x.example\r\n\r\nx" + s + "RSET\r\n\r\n.\r\n"))
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		for _, tolerant := range []bool{false, true} {
			fk := newFake()
			srv := New(Config{Hostname: "b", Auth: fk, Submit: fk, Log: slog.New(slog.DiscardHandler)})
			a, b := net.Pipe()
			c := newConn(srv, Listener{Listener: dummy{}, TLS: None, CleartextAuth: true, Tolerant: tolerant}, b, netip.Addr{})
			done := make(chan struct{})
			go func() { defer close(done); c.serve() }()
			go func() {
				_, _ = a.Write(in)
				a.Close()
			}()
			_, _ = io.Copy(io.Discard, a)
			<-done
			for _, m := range fk.messages() {
				if m.Account != "dev" || m.Envelope.From != "" && !strings.HasSuffix(strings.ToLower(m.Envelope.From), "x.example") {
					t.Fatalf("%+v", m.Submission)
				}
				if strings.ContainsAny(strings.ReplaceAll(m.raw, "\r\n", ""), "\r\n\x00") {
					t.Fatalf("%q", m.raw)
				}
			}
		}
	})
}

type dummy struct{ net.Listener }

func (dummy) Addr() net.Addr { return &net.TCPAddr{} }

func BenchmarkData(b *testing.B) {
	for _, size := range []int{10_000, 1_000_000} {
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			h := start(b, nil)
			c := h.login()
			body := "From: dev@x.example\r\nTo: r@y.example\r\nDate: x\r\nMessage-ID: <a@b>\r\n\r\n" + strings.Repeat(strings.Repeat("x", 76)+"\r\n", size/78) + ".\r\n"
			b.SetBytes(int64(len(body)))
			b.ReportAllocs()
			for b.Loop() {
				c.envelope()
				c.cmd("DATA", "354 ")
				c.send(body)
				c.want("250 ")
				h.mu.Lock()
				h.taken = nil
				h.mu.Unlock()
			}
		})
	}
}
