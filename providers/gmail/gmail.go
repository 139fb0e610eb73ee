// Package gmail sends through Gmail's submission server with XOAUTH2, and through any server of the same
// contract, such as Exchange Online's.
//
// The SMTP envelope decides who receives. Connections are kept as long as their token is good, because many
// logins in a row are refused. A refused login is tried once more with a new token. Nothing is staged; an answer
// that was lost after the end of the message is looked up over IMAP, in the mailbox that is marked \Sent, by
// Message-ID and the id in our Received line.
//
// Gmail rewrites a From that is neither the mailbox nor a verified alias, without an error: what an account may
// send as is for the edge to hold.
package gmail

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"strings"
	"sync"
	"time"

	"github.com/emersion/go-smtp"

	"mailbridge/internal/mail"
	"mailbridge/internal/mailerr"
	"mailbridge/providers"
)

const (
	// maxSize is what smtp.gmail.com announces, in bytes.
	maxSize = 35_882_577
	// maxRecipients of one message over SMTP (https://support.google.com/a/answer/166852).
	maxRecipients = 100
	// parallel connections. Gmail publishes no limit for SMTP; four keep well below that of IMAP, which is 15.
	parallel = 4
	// maxIdle is how long a connection waits for its next message: servers close idle ones after minutes.
	maxIdle = time.Minute
	// minToken is the life that a connection's token must have left: Gmail ends sessions with their token.
	minToken = 3 * time.Minute

	dialTimeout    = 20 * time.Second
	commandTimeout = time.Minute
	// endTimeout is how long the answer to the end of a message may take (RFC 5321 §4.5.3.2.6).
	endTimeout = 10 * time.Minute
	writeTime  = 2 * time.Minute
)

// Client is one mailbox.
type Client struct {
	cfg providers.Config
	log *slog.Logger
	now func() time.Time

	mu     sync.Mutex
	idle   []*session
	closed bool
}

// Open opens the account. It asks the cloud nothing.
func Open(cfg providers.Config) (*providers.Account, error) {
	switch {
	case cfg.Tokens == nil:
		return nil, errors.New("gmail: no tokens")
	case cfg.SMTPAddr == "":
		return nil, errors.New("gmail: no SMTP server")
	case !strings.Contains(cfg.Mailbox, "@"):
		return nil, errors.New("gmail: the mailbox must be an address")
	}
	c := &Client{cfg: cfg, log: cfg.Log, now: time.Now}
	if c.log == nil {
		c.log = slog.New(slog.DiscardHandler)
	}
	a := &providers.Account{Sender: c, Prober: c, Close: c.Close,
		Traits: providers.Traits{MaxSize: maxSize, MaxRecipients: maxRecipients, Parallel: parallel, SMTPUTF8: true, OneStep: true}}
	if cfg.IMAPAddr != "" {
		a.Sent, a.Bouncer = c, c
	}
	return a, nil
}

// Close ends the idle connections.
func (c *Client) Close() error {
	c.mu.Lock()
	idle := c.idle
	c.idle, c.closed = nil, true
	c.mu.Unlock()
	for _, s := range idle {
		s.quit()
	}
	return nil
}

// session is one connection that is logged in.
type session struct {
	*smtp.Client
	nc    *conn
	token providers.Token
	used  time.Time
	fresh bool // no message has gone over it yet
}

// quit ends a connection; what the server thinks of that does not matter.
func (s *session) quit() { _ = s.Quit(); _ = s.Client.Close() }

// conn gives every write a deadline of its own: the client library sets none while a message is written.
type conn struct{ net.Conn }

func (c *conn) Write(p []byte) (int, error) {
	if err := c.SetWriteDeadline(time.Now().Add(writeTime)); err != nil {
		return 0, err
	}
	return c.Conn.Write(p)
}

// take gives a connection: an idle one, or a new one.
func (c *Client) take(ctx context.Context) (*session, error) {
	c.mu.Lock()
	now := c.now()
	var stale []*session
	var s *session
	for len(c.idle) > 0 && s == nil {
		last := c.idle[len(c.idle)-1]
		c.idle = c.idle[:len(c.idle)-1]
		if now.Sub(last.used) > maxIdle || last.token.Expiry.Sub(now) < minToken {
			stale = append(stale, last)
			continue
		}
		s = last
	}
	c.mu.Unlock()
	for _, old := range stale {
		old.quit()
	}
	if s != nil {
		return s, nil
	}
	return c.connect(ctx)
}

// put keeps a connection for the next message.
func (c *Client) put(s *session) {
	s.used, s.fresh = c.now(), false
	c.mu.Lock()
	keep := !c.closed && len(c.idle) < parallel
	if keep {
		c.idle = append(c.idle, s)
	}
	c.mu.Unlock()
	if !keep {
		s.quit()
	}
}

// connect makes a connection and logs in, with one more try under a new token when the first is refused.
func (c *Client) connect(ctx context.Context) (*session, error) {
	for again := true; ; again = false {
		tok, err := c.cfg.Tokens.Token(ctx)
		if err != nil {
			return nil, err
		}
		s, err := c.dial(ctx)
		if err != nil {
			return nil, err
		}
		x := &xoauth2{user: c.cfg.Mailbox, token: tok.Value}
		if err := s.Auth(x); err != nil {
			_ = s.Client.Close()
			e := c.classify(stageAuth, err)
			if e.Class == mailerr.Auth {
				c.cfg.Tokens.Reject(tok)
				if again {
					continue
				}
				e.Err = fmt.Errorf("%w (challenge %s)", e.Err, x.challenge)
			}
			return nil, e
		}
		s.token, s.fresh = tok, true
		return s, nil
	}
}

// dial connects, begins TLS and says EHLO.
func (c *Client) dial(ctx context.Context) (*session, error) {
	d := net.Dialer{Timeout: dialTimeout}
	raw, err := d.DialContext(ctx, "tcp", c.cfg.SMTPAddr)
	if err != nil {
		return nil, c.classify(stageConnect, err)
	}
	nc := &conn{raw}
	if err := raw.SetDeadline(time.Now().Add(dialTimeout)); err != nil {
		return nil, c.classify(stageConnect, errors.Join(err, raw.Close()))
	}
	tc, err := c.tlsConfig(c.cfg.SMTPAddr)
	if err != nil {
		return nil, c.classify(stageConnect, errors.Join(err, raw.Close()))
	}
	var cl *smtp.Client
	if c.cfg.SMTPImplicit {
		t := tls.Client(nc, tc)
		if err := t.HandshakeContext(ctx); err != nil {
			return nil, c.classify(stageConnect, errors.Join(err, raw.Close()))
		}
		cl = smtp.NewClient(t)
	} else if cl, err = smtp.NewClientStartTLS(nc, tc); err != nil {
		return nil, c.classify(stageConnect, errors.Join(err, raw.Close()))
	}
	if err := raw.SetDeadline(time.Time{}); err != nil {
		return nil, c.classify(stageConnect, errors.Join(err, raw.Close()))
	}
	cl.CommandTimeout, cl.SubmissionTimeout = commandTimeout, endTimeout
	helo := c.cfg.HELO
	if helo == "" {
		helo = "localhost"
	}
	if err := cl.Hello(helo); err != nil {
		_ = cl.Close()
		return nil, c.classify(stageConnect, err)
	}
	return &session{Client: cl, nc: nc}, nil
}

func (c *Client) tlsConfig(addr string) (*tls.Config, error) {
	host, _, err := net.SplitHostPort(addr)
	return &tls.Config{ServerName: host, RootCAs: c.cfg.Roots, MinVersion: tls.VersionTLS12}, err
}

// Prepare stages nothing.
func (c *Client) Prepare(context.Context, *mail.Outgoing) (mail.Handle, error) { return "", nil }

// Abandon has nothing to remove.
func (c *Client) Abandon(context.Context, *mail.Outgoing, mail.Handle) error { return nil }

// Commit sends the message. An idle connection that the server has closed meanwhile costs nothing but a new one.
func (c *Client) Commit(ctx context.Context, out *mail.Outgoing, _ mail.Handle) (mail.Receipt, error) {
	for {
		s, err := c.take(ctx)
		if err != nil {
			return mail.Receipt{}, err
		}
		r, err := c.send(ctx, s, out)
		if e, ok := errors.AsType[*staleError](err); ok {
			if !s.fresh && ctx.Err() == nil {
				continue
			}
			err = e.err
		}
		return r, err
	}
}

// staleError is a failure before the server took the sender: a connection that was idle may just have ended.
type staleError struct{ err *mailerr.Error }

func (e *staleError) Error() string { return e.err.Error() }

func (c *Client) send(ctx context.Context, s *session, out *mail.Outgoing) (r mail.Receipt, err error) {
	// The context ends waits of the library, which knows none.
	stop := context.AfterFunc(ctx, func() { _ = s.nc.SetDeadline(time.Unix(1, 0)) })
	keep := false
	defer func() {
		if stop() && keep {
			c.put(s)
		} else {
			_ = s.Client.Close()
		}
	}()
	if limit, ok := s.MaxMessageSize(); ok && limit > 0 && out.Content.Size() > int64(limit) {
		keep = true
		return r, &mailerr.Error{Class: mailerr.Permanent, Status: st(3, 4), Op: "gmail.send", Text: fmt.Sprintf("the message has %d bytes and Gmail takes %d", out.Content.Size(), limit)}
	}
	opts := &smtp.MailOptions{Size: out.Content.Size(), UTF8: out.UTF8}
	if err := s.Mail(out.From, opts); err != nil {
		e := c.classify(stageMail, err)
		if e.Class == mailerr.Temporary {
			return r, &staleError{e}
		}
		return r, e
	}
	taken := 0
	for _, to := range out.To {
		if err := s.Rcpt(to, nil); err != nil {
			e := c.classify(stageRcpt, err)
			if _, said := errors.AsType[*smtp.SMTPError](err); !said || e.Class == mailerr.Auth || e.Class == mailerr.Quota {
				return r, e
			}
			r.Refused = append(r.Refused, mail.Refusal{Recipient: to, Err: e})
			continue
		}
		taken++
	}
	if taken == 0 {
		keep = s.Reset() == nil
		return mail.Receipt{}, worst(r.Refused)
	}
	w, err := s.Data()
	if err != nil {
		return mail.Receipt{}, c.classify(stageData, err)
	}
	body, err := out.Content.Open()
	if err != nil {
		return mail.Receipt{}, &mailerr.Error{Class: mailerr.Temporary, Status: st(3, 0), Op: "gmail.send", Text: "the stored message cannot be read at the moment", Err: err}
	}
	n, err := io.Copy(w, body)
	err = errors.Join(err, body.Close())
	if err == nil && n != out.Content.Size() {
		err = fmt.Errorf("the stored message has %d bytes and not %d", n, out.Content.Size())
	}
	if err != nil {
		// The message did not end, so nothing was sent: the connection must not end it either.
		return mail.Receipt{}, c.classify(stageData, err)
	}
	// From here on the server may have the message.
	resp, err := w.CloseWithResponse()
	if err != nil {
		return mail.Receipt{}, c.classify(stageEnd, err)
	}
	keep = true
	r.RequestID = resp.StatusText
	if f := strings.Fields(resp.StatusText); len(f) >= 3 {
		r.RequestID = f[len(f)-3] // "OK <time> <session id> - gsmtp"
	}
	return r, nil
}

// worst is what it means that no recipient was taken: a permanent failure only if it is one for all.
func worst(refused []mail.Refusal) error {
	for _, x := range refused {
		if e := mailerr.Of(x.Err); e.Class != mailerr.Permanent {
			return e
		}
	}
	return refused[0].Err
}

// Probe logs in.
func (c *Client) Probe(ctx context.Context) (string, error) {
	s, err := c.connect(ctx)
	if err != nil {
		return "", err
	}
	size, _ := s.MaxMessageSize()
	s.quit()
	return fmt.Sprintf("%s accepts the sign-in of %s and takes messages up to %d bytes", c.cfg.SMTPAddr, c.cfg.Mailbox, size), nil
}

var (
	_ providers.Sender     = (*Client)(nil)
	_ providers.SentFinder = (*Client)(nil)
	_ providers.Prober     = (*Client)(nil)
	_ providers.Bouncer    = (*Client)(nil)
)
