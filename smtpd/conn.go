package smtpd

import (
	"bufio"
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"sync"
	"time"

	"mailbridge/auth"
	"mailbridge/internal/mail"
	"mailbridge/internal/outbox"
)

const (
	// maxLine bounds a command line. RFC 5321 §4.5.3.1.4 allows 512 octets, extensions add to it.
	maxLine = 4096
	// maxAuthLine bounds a line of an AUTH exchange (RFC 4954 §4).
	maxAuthLine = 12288 + 2
	// maxBad is how many bad commands a session may send.
	maxBad = 10
	// maxAuthFails is how many logins a session may fail.
	maxAuthFails = 4
	// bufSize of the reader, in bytes.
	bufSize = 32 << 10
)

// patient is a connection whose deadlines move with its progress, and whose read errors stay: after one, all
// further reads fail, so that nothing behind a gap is ever taken for a command.
type patient struct {
	net.Conn
	mu      sync.Mutex
	timeout time.Duration
	end     time.Time // of the session
	sticky  error
	poked   bool // a watcher is being called off: a time-out is not an error
}

func (p *patient) Read(b []byte) (int, error) {
	p.mu.Lock()
	if p.sticky != nil {
		p.mu.Unlock()
		return 0, p.sticky
	}
	deadline := time.Now().Add(p.timeout)
	if p.end.Before(deadline) {
		deadline = p.end
	}
	var err error
	if !p.poked {
		err = p.Conn.SetReadDeadline(deadline)
	}
	p.mu.Unlock()
	n := 0
	if err == nil {
		n, err = p.Conn.Read(b)
	}
	if err != nil {
		p.mu.Lock()
		if ne, ok := errors.AsType[net.Error](err); !ok || !ne.Timeout() || !p.poked {
			p.sticky = err
		}
		p.mu.Unlock()
	}
	return n, err
}

func (p *patient) Write(b []byte) (int, error) {
	if err := p.Conn.SetWriteDeadline(time.Now().Add(2 * time.Minute)); err != nil {
		return 0, err
	}
	return p.Conn.Write(b)
}

// broken reports whether the connection has ended.
func (p *patient) broken() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.sticky != nil
}

func (p *patient) setTimeout(d time.Duration) {
	p.mu.Lock()
	p.timeout = d
	p.mu.Unlock()
}

// poke ends a read that is waiting, without making its time-out stick; unpoke ends the time of grace.
func (p *patient) poke() {
	p.mu.Lock()
	p.poked = true
	_ = p.Conn.SetReadDeadline(time.Unix(1, 0))
	p.mu.Unlock()
}

func (p *patient) unpoke() {
	p.mu.Lock()
	p.poked = false
	p.mu.Unlock()
}

// conn is one session.
type conn struct {
	s      *Server
	l      Listener
	raw    net.Conn
	p      *patient
	nc     net.Conn // raw, or TLS over it
	br     *bufio.Reader
	bw     *bufio.Writer
	log    *slog.Logger
	ctx    context.Context
	cancel context.CancelFunc
	remote netip.Addr
	local  bool // both ends on loopback
	tls    *tls.ConnectionState
	bare   bool // the last line ended with a bare LF

	mu          sync.Mutex
	between     bool // waiting for a command outside of a message
	interrupted bool

	// The session's state.
	hello     string
	esmtp     bool
	account   *auth.Account
	bad       int
	authFails int
	mail      *transaction
	bdat      *bdat

	// The answer to a message of which it is not known yet whether the client has read it.
	unread    outbox.ID
	unreadMid bool // bytes were there before the answer left: they prove nothing
}

// transaction is a mail transaction (RFC 5321 §3.3).
type transaction struct {
	env  mail.Envelope
	size int64 // announced
}

func newConn(s *Server, l Listener, raw net.Conn, addr netip.Addr) *conn {
	id := rand.Text()[:10]
	c := &conn{s: s, l: l, raw: raw, remote: addr, log: s.cfg.Log.With("conn", id)}
	c.p = &patient{Conn: raw, timeout: s.cfg.CommandTimeout, end: time.Now().Add(s.cfg.SessionTimeout)}
	if ap, err := netip.ParseAddrPort(raw.LocalAddr().String()); err == nil {
		c.local = ap.Addr().Unmap().IsLoopback() && addr.IsLoopback()
	}
	c.ctx, c.cancel = context.WithCancel(context.Background())
	c.use(c.p)
	return c
}

// use makes nc the stream that commands are read from; what an earlier one had buffered is dropped.
func (c *conn) use(nc net.Conn) {
	c.nc = nc
	c.br = bufio.NewReaderSize(nc, bufSize)
	c.bw = bufio.NewWriterSize(nc, 4096)
}

// interrupt ends the session at once if it is between messages, else after the one under way.
func (c *conn) interrupt() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.interrupted = true
	if c.between {
		c.p.poke()
	}
}

func (c *conn) isInterrupted() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.interrupted
}

// errEnd ends a session in order.
var errEnd = errors.New("end of session")

func (c *conn) serve() {
	defer c.cancel()
	defer c.raw.Close()
	err := c.session()
	c.endBDAT(errors.New("the session ended"))
	// What is known about the last answer: a close in order has read it; a broken connection may not have.
	if c.unread != "" {
		c.answered(errors.Is(err, io.EOF) && !c.unreadMid || errors.Is(err, errEnd) && c.closedInOrder())
	}
	if c.nc != c.p && errors.Is(err, errEnd) {
		_ = c.nc.Close() // TLS close_notify
	}
	switch {
	case errors.Is(err, errEnd), errors.Is(err, io.EOF):
		c.log.Debug("session ended")
	default:
		c.log.Debug("session broke off", "err", err)
	}
}

// closedInOrder waits a moment for the client to close after QUIT, which shows that it has read everything.
func (c *conn) closedInOrder() bool {
	c.p.setTimeout(2 * time.Second)
	_, err := c.br.ReadByte()
	return err == nil || errors.Is(err, io.EOF)
}

func (c *conn) answered(read bool) {
	if c.unread != "" {
		c.s.cfg.Submit.Answered(c.unread, read)
		c.unread, c.unreadMid = "", false
	}
}

func (c *conn) session() error {
	c.log.Debug("connection", "client", c.remote.String(), "listener", c.l.Addr().String())
	if c.l.TLS == Implicit {
		if err := c.handshake(); err != nil {
			return err
		}
	}
	if err := c.reply(reply{220, "", c.s.cfg.Hostname + " ESMTP Mailbridge"}); err != nil {
		return err
	}
	for {
		line, err := c.command()
		if err != nil {
			return err
		}
		if line == nil {
			continue
		}
		if err := c.execute(*line); err != nil {
			return err
		}
	}
}

// handshake begins TLS. Whatever the client sent in clear behind STARTTLS is dropped with the old reader.
func (c *conn) handshake() error {
	t := tls.Server(c.p, c.l.TLSConfig)
	ctx, cancel := context.WithTimeout(c.ctx, time.Minute)
	defer cancel()
	if err := t.HandshakeContext(ctx); err != nil {
		if re, ok := errors.AsType[tls.RecordHeaderError](err); ok {
			c.log.Info("a client speaks without TLS on a port that begins with TLS: set it to implicit TLS (SSL), or use a STARTTLS port", "client", c.remote.String(), "err", re.Msg)
		} else {
			c.log.Info("TLS handshake failed", "client", c.remote.String(), "err", err)
		}
		return err
	}
	state := t.ConnectionState()
	c.tls = &state
	c.use(t)
	if state.Version < tls.VersionTLS12 {
		c.log.Warn("a client uses an old TLS version", "client", c.remote.String(), "version", tls.VersionName(state.Version))
	}
	return nil
}

// reply writes an answer; it leaves before the next read that has to wait.
func (c *conn) reply(r reply) error {
	if _, err := c.bw.WriteString(r.String()); err != nil {
		return err
	}
	if r.code == 421 {
		return errors.Join(c.bw.Flush(), errEnd)
	}
	return nil
}

// flush sends the gathered answers unless further commands are there already (RFC 2920 §3.2).
func (c *conn) flush() error {
	if c.br.Buffered() > 0 {
		return nil
	}
	return c.bw.Flush()
}

// command reads a command line, without its end; nil when there was none to execute.
func (c *conn) command() (*string, error) {
	if c.isInterrupted() {
		return nil, c.reply(replyShutdown)
	}
	if err := c.flush(); err != nil {
		return nil, err
	}
	c.p.setTimeout(c.s.cfg.CommandTimeout)
	c.mu.Lock()
	c.between = true
	c.mu.Unlock()
	// A TLS record (RFC 8446 §5.1) may hold no line end for a long time.
	if first, err := c.br.Peek(1); err == nil && first[0] == 0x16 {
		c.log.Info("a client begins with TLS on a port that does not: set it to STARTTLS, or use an implicit TLS port", "client", c.remote.String())
		return nil, errEnd
	}
	b, err := c.readLine(maxAuthLine)
	if err == nil && len(b) > maxLine && !strings.EqualFold(string(b[:5]), "AUTH ") {
		err = errLong
	}
	c.mu.Lock()
	c.between = false
	c.mu.Unlock()
	if err == nil || errors.Is(err, errLong) {
		if !c.unreadMid {
			c.answered(true) // a command after the answer
		}
		c.unreadMid = false
	}
	switch {
	case errors.Is(err, errLong):
		return nil, c.badCommand(replyLineLong)
	case err != nil:
		if ne, ok := errors.AsType[net.Error](err); ok && ne.Timeout() {
			r := replyIdle
			if c.isInterrupted() {
				r = replyShutdown
			} else if time.Now().After(c.p.end) {
				r = replyTooLong
			}
			return nil, errors.Join(c.reply(r), err)
		}
		return nil, err
	}
	if c.bare && !c.l.Tolerant {
		return nil, c.badCommand(replyLineEnd)
	}
	line := strings.TrimRight(string(b), " \t")
	if line == "" {
		c.bad++
		if c.bad > maxBad {
			return nil, c.reply(replyTooManyBad)
		}
		return nil, nil // some clients send empty lines between commands
	}
	return &line, nil
}

// errLong is a line over its limit; the rest of it was read and dropped.
var errLong = errors.New("line too long")

// readLine reads a line without its end.
func (c *conn) readLine(limit int) ([]byte, error) {
	b, err := c.br.ReadSlice('\n')
	long := false
	for errors.Is(err, bufio.ErrBufferFull) {
		long = true
		b, err = c.br.ReadSlice('\n')
	}
	if err != nil {
		if errors.Is(err, io.EOF) && len(b) > 0 {
			err = io.ErrUnexpectedEOF
		}
		return nil, err
	}
	if long || len(b) > limit {
		return nil, errLong
	}
	b = b[:len(b)-1]
	c.bare = len(b) == 0 || b[len(b)-1] != '\r'
	if !c.bare {
		b = b[:len(b)-1]
	}
	return b, nil
}

// badCommand answers a command that was none and counts it.
func (c *conn) badCommand(r reply) error {
	c.bad++
	if c.bad > maxBad {
		return c.reply(replyTooManyBad)
	}
	return c.reply(r)
}

// reset forgets the transaction.
func (c *conn) reset() {
	c.endBDAT(errors.New("the message was given up"))
	c.mail = nil
}
