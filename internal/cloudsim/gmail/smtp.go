// Package gmail simulates smtp.gmail.com and the IMAP by which sent mail is looked up. It is written from the
// vendor's documentation and captures, and knows nothing of the bridge. The SMTP loop is its own, for no
// server library gives Gmail's greeting lines, reply endings and two-step refusals.
package gmail

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/mail"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/emersion/go-imap/v2/imapserver/imapmemserver"

	"mailbridge/internal/cloudsim/world"
)

// Limits (https://support.google.com/a/answer/166852).
const (
	maxSize       = 35_882_577
	maxRecipients = 100
	scope         = "https://mail.google.com/"
	sentMail      = "[Gmail]/Sent Mail"
)

// Options is what the server needs.
type Options struct {
	World  *world.World
	Verify func(token string) (mailbox string, scopes []string, expiry time.Time, err error)
	TLS    *tls.Config
	Log    *slog.Logger
	// PerDay is how many messages a mailbox may send; 0 is 2,000.
	PerDay int
}

// Server is the simulated Gmail.
type Server struct {
	o Options

	mu    sync.Mutex
	boxes map[string]*box
	lns   map[net.Listener]bool
	conns map[net.Conn]bool
	done  bool
	wg    sync.WaitGroup
	imap  imapState
}

type box struct {
	addr    string
	aliases []string
	user    *imapmemserver.User
	sent    int
	seen    map[string]bool // Message-ID and Date of what is in Sent Mail
	refused map[string]bool
}

// New makes an empty server.
func New(o Options) *Server {
	if o.PerDay == 0 {
		o.PerDay = 2000
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	return &Server{o: o, boxes: map[string]*box{}, lns: map[net.Listener]bool{}, conns: map[net.Conn]bool{}}
}

// AddMailbox makes a mailbox; aliases are verified "send mail as" addresses.
func (s *Server) AddMailbox(addr string, aliases ...string) {
	b := &box{addr: addr, aliases: aliases, user: newUser(addr), seen: map[string]bool{}, refused: map[string]bool{}}
	s.mu.Lock()
	s.boxes[world.Fold(addr)] = b
	s.mu.Unlock()
	s.o.World.Register(addr, func(d world.Delivery) { fileIn(b.user, "INBOX", d.Raw) })
}

// Refuse makes RCPT of an address fail with 550 5.1.1.
func (s *Server) Refuse(mailbox, rcpt string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if b := s.boxes[world.Fold(mailbox)]; b != nil {
		b.refused[world.Fold(rcpt)] = true
	}
}

// ServeSMTPS serves port 465: TLS from the first byte.
func (s *Server) ServeSMTPS(l net.Listener) error { return s.serve(l, true) }

// ServeSubmission serves port 587: STARTTLS.
func (s *Server) ServeSubmission(l net.Listener) error { return s.serve(l, false) }

func (s *Server) serve(l net.Listener, implicit bool) error {
	s.mu.Lock()
	s.lns[l] = true
	s.mu.Unlock()
	for {
		nc, err := l.Accept()
		if err != nil {
			s.mu.Lock()
			defer s.mu.Unlock()
			if s.done {
				return nil
			}
			return err
		}
		s.mu.Lock()
		if s.done {
			s.mu.Unlock()
			_ = nc.Close()
			continue
		}
		s.conns[nc] = true
		s.wg.Add(1)
		s.mu.Unlock()
		go func() {
			defer s.wg.Done()
			defer func() {
				_ = nc.Close()
				s.mu.Lock()
				delete(s.conns, nc)
				s.mu.Unlock()
			}()
			c := &session{s: s, raw: nc, nc: nc, id: strings.ToLower(rand.Text()[:12]) + ".7"}
			if implicit {
				t := tls.Server(nc, s.o.TLS)
				if t.Handshake() != nil {
					return
				}
				c.nc, c.tls = t, true
			}
			if err := c.run(); err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, errCut) {
				s.o.Log.Debug("session ended", "err", err)
			}
		}()
	}
}

// Shutdown closes everything.
func (s *Server) Shutdown(context.Context) error {
	s.mu.Lock()
	s.done = true
	for l := range s.lns {
		_ = l.Close()
	}
	for c := range s.conns {
		_ = c.Close()
	}
	s.mu.Unlock()
	err := s.imap.close()
	s.wg.Wait()
	return err
}

// session is one SMTP connection.
type session struct {
	s    *Server
	raw  net.Conn
	nc   net.Conn
	br   *bufio.Reader
	id   string
	tls  bool
	box  *box
	ends time.Time // of the token
	from string
	to   []string
	mail bool
	bdat []byte
}

var errCut = errors.New("cut by a knob")

// say answers with every line ending as Gmail's do.
func (c *session) say(code int, enh, text string) error {
	lines := strings.Split(text, "\n")
	var b strings.Builder
	for i, l := range lines {
		sep := "-"
		if i == len(lines)-1 {
			sep = " "
		}
		if enh != "" {
			l = enh + " " + l
		}
		if i == len(lines)-1 {
			l += " " + c.id + " - gsmtp"
		}
		fmt.Fprintf(&b, "%d%s%s\r\n", code, sep, l)
	}
	_, err := io.WriteString(c.nc, b.String())
	return err
}

// meet lets one step meet its rule. Handled says that the rule has answered.
func (c *session) meet(route string, act func() error) error {
	who := ""
	if c.box != nil {
		who = c.box.addr
	}
	r := c.s.o.World.Match("gmail-smtp", who, route)
	rec := world.Request{Service: "gmail-smtp", Route: route, Mailbox: who, ID: c.id, Status: r.Status}
	defer func() { c.s.o.World.Record(rec) }()
	if r.Latency > 0 {
		time.Sleep(r.Latency)
	}
	cut := func() error {
		if t, ok := c.raw.(*net.TCPConn); ok {
			_ = t.SetLinger(0)
		}
		_ = c.raw.Close()
		return errCut
	}
	if r.Cut == "before" {
		return cut()
	}
	if r.Status != 0 && !r.After {
		if err := c.say(r.Status, r.Code, r.Text); err != nil {
			return err
		}
		if r.Status == 421 {
			return io.EOF
		}
		return nil
	}
	spoil := r.Cut == "after" || r.Cut == "answer" || r.Hang || r.Status != 0
	if !spoil {
		return act()
	}
	// Act, and let nobody hear of it.
	real := c.nc
	c.nc = silent{real}
	err := act()
	c.nc = real
	switch {
	case err != nil:
		return err
	case r.Hang:
		_, _ = io.Copy(io.Discard, c.nc)
		return errCut
	case r.Status != 0:
		return c.say(r.Status, r.Code, r.Text)
	case r.Cut == "answer":
		_, _ = io.WriteString(c.nc, "250-2.0")
	}
	return cut()
}

// silent drops what is written.
type silent struct{ net.Conn }

func (silent) Write(p []byte) (int, error) { return len(p), nil }

func (c *session) run() error {
	c.br = bufio.NewReaderSize(c.nc, 64<<10)
	if err := c.meet("CONNECT", func() error { return c.say(220, "", "smtp.gmail.com ESMTP") }); err != nil {
		return err
	}
	for {
		line, err := c.br.ReadString('\n')
		if err != nil {
			return err
		}
		line = strings.TrimRight(line, "\r\n")
		verb, args, _ := strings.Cut(line, " ")
		if c.box != nil && !c.s.o.World.Now().Before(c.ends) {
			_ = c.say(421, "4.7.0", "Connection expired, try reconnecting.")
			return io.EOF
		}
		switch strings.ToUpper(verb) {
		case "EHLO", "HELO":
			err = c.meet("EHLO", c.ehlo)
		case "STARTTLS":
			err = c.meet("STARTTLS", c.startTLS)
		case "AUTH":
			err = c.meet("AUTH", func() error { return c.auth(args) })
		case "MAIL":
			err = c.meet("MAIL", func() error { return c.mailFrom(args) })
		case "RCPT":
			err = c.meet("RCPT", func() error { return c.rcptTo(args) })
		case "DATA":
			err = c.data()
		case "BDAT":
			err = c.chunk(args)
		case "RSET":
			c.reset()
			err = c.say(250, "2.1.5", "Flushed")
		case "NOOP":
			err = c.say(250, "2.0.0", "OK")
		case "QUIT":
			_ = c.say(221, "2.0.0", "closing connection")
			return io.EOF
		default:
			err = c.say(502, "5.5.1", "Unrecognized command.")
		}
		if err != nil {
			return err
		}
	}
}

func (c *session) reset() { c.mail, c.from, c.to, c.bdat = false, "", nil, nil }

func (c *session) ehlo() error {
	c.reset()
	host, _, _ := net.SplitHostPort(c.raw.RemoteAddr().String())
	last := "AUTH LOGIN PLAIN XOAUTH2 PLAIN-CLIENTTOKEN OAUTHBEARER XOAUTH"
	if !c.tls {
		last = "STARTTLS"
	}
	lines := []string{"smtp.gmail.com at your service, [" + host + "]", "SIZE " + strconv.Itoa(maxSize), "8BITMIME", last, "ENHANCEDSTATUSCODES", "PIPELINING", "CHUNKING"}
	var b strings.Builder
	for _, l := range lines {
		b.WriteString("250-" + l + "\r\n")
	}
	b.WriteString("250 SMTPUTF8\r\n")
	_, err := io.WriteString(c.nc, b.String())
	return err
}

func (c *session) startTLS() error {
	if c.tls {
		return c.say(503, "5.5.1", "TLS is on already.")
	}
	if err := c.say(220, "2.0.0", "Ready to start TLS"); err != nil {
		return err
	}
	t := tls.Server(c.raw, c.s.o.TLS)
	if err := t.Handshake(); err != nil {
		return err
	}
	c.nc, c.tls = t, true
	c.br = bufio.NewReaderSize(t, 64<<10)
	return nil
}

// login checks an initial response of XOAUTH2 or OAUTHBEARER
// (https://developers.google.com/gmail/imap/xoauth2-protocol).
func (s *Server) login(mech, b64 string) (*box, time.Time, bool) {
	b, err := base64.StdEncoding.DecodeString(b64)
	if err != nil {
		return nil, time.Time{}, false
	}
	user, token := "", ""
	for _, part := range strings.Split(string(b), "\x01") {
		if v, ok := strings.CutPrefix(part, "user="); ok && mech == "XOAUTH2" {
			user = v
		}
		if v, ok := strings.CutPrefix(part, "n,a="); ok && mech == "OAUTHBEARER" {
			user = strings.TrimSuffix(v, ",")
		}
		if v, ok := strings.CutPrefix(part, "auth=Bearer "); ok {
			token = v
		}
	}
	mailbox, scopes, ends, err := s.o.Verify(token)
	if err != nil || world.Fold(mailbox) != world.Fold(user) {
		return nil, ends, false
	}
	good := false
	for _, sc := range scopes {
		good = good || sc == scope
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	bx := s.boxes[world.Fold(user)]
	return bx, ends, good && bx != nil
}

// challenge is what a refused token is answered with first.
const challenge = `{"status":"400","schemes":"Bearer","scope":"https://mail.google.com/"}`

func (c *session) auth(args string) error {
	mech, initial, _ := strings.Cut(args, " ")
	mech = strings.ToUpper(mech)
	if !c.tls {
		return c.say(530, "5.7.0", "Must issue a STARTTLS command first.")
	}
	if mech != "XOAUTH2" && mech != "OAUTHBEARER" {
		return c.say(504, "5.7.4", "Unrecognized Authentication Type")
	}
	if initial == "" {
		if _, err := io.WriteString(c.nc, "334 \r\n"); err != nil {
			return err
		}
		line, err := c.br.ReadString('\n')
		if err != nil {
			return err
		}
		initial = strings.TrimSpace(line)
	}
	b, ends, ok := c.s.login(mech, initial)
	if ok {
		c.box, c.ends = b, ends
		return c.say(235, "2.7.0", "Accepted")
	}
	if _, err := io.WriteString(c.nc, "334 "+base64.StdEncoding.EncodeToString([]byte(challenge))+"\r\n"); err != nil {
		return err
	}
	if _, err := c.br.ReadString('\n'); err != nil {
		return err
	}
	return c.say(535, "5.7.8", "Username and Password not accepted. For more information, go to\n https://support.google.com/mail/?p=BadCredentials")
}

func path(args, keyword string) (string, string, bool) {
	if len(args) < len(keyword) || !strings.EqualFold(args[:len(keyword)], keyword) {
		return "", "", false
	}
	rest := strings.TrimSpace(args[len(keyword):])
	i := strings.LastIndexByte(rest, '>')
	if !strings.HasPrefix(rest, "<") || i < 0 {
		return "", "", false
	}
	return rest[1:i], rest[i+1:], true
}

func (c *session) mailFrom(args string) error {
	if c.box == nil {
		return c.say(530, "5.7.0", "Authentication Required. For more information, go to\n https://support.google.com/mail/?p=WantAuthError")
	}
	from, params, ok := path(args, "FROM:")
	if !ok || c.mail {
		return c.say(555, "5.5.2", "Syntax error.")
	}
	for _, p := range strings.Fields(params) {
		name, v, _ := strings.Cut(strings.ToUpper(p), "=")
		switch name {
		case "SIZE":
			if n, err := strconv.Atoi(v); err != nil || n > maxSize {
				return c.say(552, "5.3.4", "Your message exceeded Google's message size limits.")
			}
		case "BODY", "SMTPUTF8", "AUTH":
		default: // DSN is not offered
			return c.say(555, "5.5.2", "Syntax error, unrecognized parameter.")
		}
	}
	c.s.mu.Lock()
	over := c.box.sent >= c.s.o.PerDay
	c.s.mu.Unlock()
	if over {
		return c.say(550, "5.4.5", "Daily user sending limit exceeded. For more information on Gmail\n sending limits go to https://support.google.com/a/answer/166852")
	}
	c.mail, c.from = true, from
	return c.say(250, "2.1.0", "OK")
}

func (c *session) rcptTo(args string) error {
	to, _, ok := path(args, "TO:")
	if !c.mail || !ok || !strings.Contains(to, "@") {
		return c.say(553, "5.1.3", "The recipient address is not a valid RFC 5321 address.")
	}
	c.s.mu.Lock()
	refused := c.box.refused[world.Fold(to)]
	c.s.mu.Unlock()
	switch {
	case refused:
		return c.say(550, "5.1.1", "The email account that you tried to reach does not exist.")
	case len(c.to) >= maxRecipients:
		return c.say(452, "4.5.3", "Your message has too many recipients.")
	}
	c.to = append(c.to, to)
	return c.say(250, "2.1.5", "OK")
}

func (c *session) data() error {
	if !c.mail || len(c.to) == 0 {
		return c.say(503, "5.5.1", "RCPT first.")
	}
	during := false
	rule := c.s.o.World.Match("gmail-smtp", c.box.addr, "DATA")
	if rule.Status != 0 {
		return c.say(rule.Status, rule.Code, rule.Text)
	}
	during = rule.Cut == "during"
	if err := c.say(354, "", "Go ahead"); err != nil {
		return err
	}
	var raw bytes.Buffer
	for {
		line, err := c.br.ReadBytes('\n')
		if err != nil {
			return err
		}
		if during && raw.Len() > 64 {
			_ = c.raw.Close()
			return errCut
		}
		if string(line) == ".\r\n" {
			break
		}
		if line[0] == '.' {
			line = line[1:]
		}
		if raw.Len() <= maxSize {
			raw.Write(line)
		}
	}
	return c.meet("EOD", func() error { return c.take(raw.Bytes()) })
}

func (c *session) chunk(args string) error {
	f := strings.Fields(args)
	n := 0
	if len(f) > 0 {
		n, _ = strconv.Atoi(f[0])
	}
	if n < 0 || n > maxSize {
		return io.EOF
	}
	b := make([]byte, n)
	if _, err := io.ReadFull(c.br, b); err != nil {
		return err
	}
	if !c.mail || len(c.to) == 0 {
		return c.say(503, "5.5.1", "RCPT first.")
	}
	c.bdat = append(c.bdat, b...)
	if len(f) < 2 {
		return c.say(250, "2.0.0", "OK")
	}
	return c.meet("EOD", func() error { return c.take(c.bdat) })
}

// take takes a message: checks it, rewrites From, files a copy in Sent Mail and delivers.
func (c *session) take(raw []byte) error {
	defer c.reset()
	if len(raw) > maxSize {
		return c.say(552, "5.3.4", "Your message exceeded Google's message size limits.")
	}
	if bare := bytes.ReplaceAll(raw, []byte("\r\n"), nil); bytes.ContainsAny(bare, "\r\n") {
		return c.say(550, "5.7.1", "Bare line ends.")
	}
	msg, err := mail.ReadMessage(bytes.NewReader(raw))
	if err != nil || len(msg.Header["From"]) != 1 {
		return c.say(550, "5.7.1", "Messages missing a valid address in From: header, or having no From: header, are not accepted.")
	}
	raw = c.rewrite(raw, msg)
	key := msg.Header.Get("Message-Id") + "\x00" + msg.Header.Get("Date")
	c.s.mu.Lock()
	c.box.sent++
	again := c.box.seen[key]
	c.box.seen[key] = true
	b, from, to := c.box, c.box.addr, append([]string(nil), c.to...)
	c.s.mu.Unlock()
	if !again {
		fileIn(b.user, sentMail, raw)
	}
	wire := append([]byte("Received: from simulated.client.example by smtp.gmail.com with ESMTPSA id "+c.id+";\r\n\t"+c.s.o.World.Now().UTC().Format(time.RFC1123Z)+"\r\n"), raw...)
	c.s.o.World.Deliver("gmail", from, to, wire)
	return c.say(250, "2.0.0", "OK  "+strconv.FormatInt(c.s.o.World.Now().Unix(), 10))
}

// rewrite does to the header what Gmail does: a From that is not the mailbox or a verified alias becomes the
// mailbox, and a missing or broken Message-ID is replaced.
func (c *session) rewrite(raw []byte, msg *mail.Message) []byte {
	var top strings.Builder
	from := msg.Header.Get("From")
	ok := false
	if a, err := mail.ParseAddress(from); err == nil {
		ok = world.Fold(a.Address) == world.Fold(c.box.addr)
		for _, al := range c.box.aliases {
			ok = ok || world.Fold(al) == world.Fold(a.Address)
		}
	} else if list, err := mail.ParseAddressList(from); err == nil && len(list) > 0 {
		ok = true
	}
	if !ok {
		top.WriteString("X-Google-Original-From: " + from + "\r\nFrom: " + c.box.addr + "\r\n")
		raw = drop(raw, "From")
	}
	id := msg.Header.Get("Message-Id")
	if id == "" || strings.Count(id, "@") != 1 || strings.ContainsAny(id, " \t") || strings.HasSuffix(id, ".>") {
		if id != "" {
			top.WriteString("X-Google-Original-Message-ID: " + id + "\r\n")
			raw = drop(raw, "Message-ID")
		}
		top.WriteString("Message-ID: <" + rand.Text() + "@mx.google.com>\r\n")
	}
	return append([]byte(top.String()), raw...)
}

// drop takes the fields of a name out of a header.
func drop(raw []byte, name string) []byte {
	head, rest, _ := bytes.Cut(raw, []byte("\r\n\r\n"))
	var out []byte
	skip := false
	for _, line := range bytes.SplitAfter(append(append([]byte(nil), head...), "\r\n"...), []byte("\r\n")) {
		if len(line) > 0 && line[0] != ' ' && line[0] != '\t' {
			n, _, _ := bytes.Cut(line, []byte(":"))
			skip = strings.EqualFold(strings.TrimSpace(string(n)), name)
		}
		if !skip {
			out = append(out, line...)
		}
	}
	return append(append(out, "\r\n"...), rest...)
}
