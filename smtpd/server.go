// Package smtpd is the submission server (RFC 6409): it takes messages from clients, exactly, and hands them
// to the outbox.
//
// The command loop is its own. Clients of twenty years do things for which a general server has no hook, and
// a read error in the middle of a message must never leave the rest of it to be read as commands. Each
// connection is one goroutine that reads commands in order; whatever cannot be read ends the connection.
package smtpd

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"mailbridge/auth"
	"mailbridge/internal/outbox"
)

// Authenticator checks logins. It returns auth.ErrCredentials for a wrong one, and an error with a method
// RetryAfter() time.Duration for one that was not looked at because too many failed before.
type Authenticator interface {
	Authenticate(ctx context.Context, c auth.Credentials) (*auth.Account, error)
}

// Submitter takes messages; *outbox.Outbox is one.
type Submitter interface {
	NewID() outbox.ID
	Submit(ctx context.Context, s outbox.Submission, r io.Reader) (outbox.Result, error)
	Answered(id outbox.ID, read bool)
}

// TLSMode says when a listener speaks TLS.
type TLSMode string

const (
	None     TLSMode = "none"
	StartTLS TLSMode = "starttls"
	Implicit TLSMode = "implicit"
)

// Listener is one port with one policy.
type Listener struct {
	net.Listener
	TLS           TLSMode
	TLSConfig     *tls.Config // for all modes but None
	CleartextAuth bool        // take passwords without TLS from other machines too
	Tolerant      bool        // repair bare CR and LF, take what is known to be harmless
	AuthEquals    bool        // announce AUTH=PLAIN LOGIN too
}

// Config is what a server needs. Zero limits and times are the defaults named with them.
type Config struct {
	Hostname      string
	Auth          Authenticator
	Submit        Submitter
	Log           *slog.Logger
	Metrics       prometheus.Registerer // nil for none
	Now           func() time.Time
	MaxSize       int64 // the most that any account takes, for EHLO
	SMTPUTF8      bool  // every account's cloud takes it
	HideClient    bool
	MaxConns      int // 2000
	MaxPerAddress int // 200
	MaxRecipients int // 500

	CommandTimeout time.Duration // 5 min, RFC 5321 §4.5.3.2.7
	DataTimeout    time.Duration // 3 min for each block, RFC 5321 §4.5.3.2.5
	SessionTimeout time.Duration // 1 h
}

// Server serves any number of listeners.
type Server struct {
	cfg     Config
	metrics *metrics

	mu      sync.Mutex
	lns     map[net.Listener]bool
	conns   map[*conn]bool
	perAddr map[netip.Addr]int
	closing bool
	wg      sync.WaitGroup
}

// New makes a server.
func New(cfg Config) *Server {
	def := func(v *int, d int) {
		if *v == 0 {
			*v = d
		}
	}
	def(&cfg.MaxConns, 2000)
	def(&cfg.MaxPerAddress, 200)
	def(&cfg.MaxRecipients, 500)
	for _, t := range []struct {
		v *time.Duration
		d time.Duration
	}{{&cfg.CommandTimeout, 5 * time.Minute}, {&cfg.DataTimeout, 3 * time.Minute}, {&cfg.SessionTimeout, time.Hour}} {
		if *t.v == 0 {
			*t.v = t.d
		}
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.MaxSize == 0 {
		cfg.MaxSize = 35 << 20
	}
	return &Server{cfg: cfg, metrics: newMetrics(cfg.Metrics), lns: map[net.Listener]bool{}, conns: map[*conn]bool{}, perAddr: map[netip.Addr]int{}}
}

// ErrClosed is what Serve returns after Shutdown.
var ErrClosed = errors.New("smtpd: server closed")

// Serve takes connections until the listener fails or Shutdown is called.
func (s *Server) Serve(l Listener) error {
	s.mu.Lock()
	if s.closing {
		s.mu.Unlock()
		return ErrClosed
	}
	s.lns[l.Listener] = true
	s.mu.Unlock()
	wait := 5 * time.Millisecond
	for {
		nc, err := l.Accept()
		if err != nil {
			s.mu.Lock()
			closing := s.closing
			s.mu.Unlock()
			if closing {
				return ErrClosed
			}
			// Out of file descriptors, say: it passes.
			if ne, ok := errors.AsType[net.Error](err); ok && ne.Timeout() || isTemporary(err) {
				s.cfg.Log.Warn("a connection could not be accepted", "err", err)
				time.Sleep(wait)
				wait = min(2*wait, time.Second)
				continue
			}
			return err
		}
		wait = 5 * time.Millisecond
		s.start(l, nc)
	}
}

// isTemporary reports whether accepting may work again in a moment.
func isTemporary(err error) bool {
	var t interface{ Temporary() bool }
	return errors.As(err, &t) && t.Temporary()
}

// start serves one connection, or turns it away.
func (s *Server) start(l Listener, nc net.Conn) {
	addr := remoteAddr(nc)
	s.mu.Lock()
	refuse := ""
	switch {
	case s.closing:
		refuse = "421 4.3.2 Shutting down, try again later\r\n"
	case len(s.conns) >= s.cfg.MaxConns:
		refuse = "421 4.3.2 Too many connections, try again later\r\n"
	case s.perAddr[addr] >= s.cfg.MaxPerAddress:
		refuse = "421 4.7.0 Too many connections from your address, try again later\r\n"
	}
	if refuse != "" {
		s.mu.Unlock()
		s.metrics.turnedAway.Inc()
		// What cannot be said at once is not said.
		if l.TLS != Implicit {
			_ = nc.SetWriteDeadline(time.Now().Add(time.Second))
			_, _ = io.WriteString(nc, refuse)
		}
		_ = nc.Close()
		return
	}
	c := newConn(s, l, nc, addr)
	s.conns[c] = true
	s.perAddr[addr]++
	s.wg.Add(1)
	s.mu.Unlock()
	s.metrics.connections.Inc()
	go func() {
		defer s.wg.Done()
		defer func() {
			s.mu.Lock()
			delete(s.conns, c)
			if s.perAddr[addr]--; s.perAddr[addr] == 0 {
				delete(s.perAddr, addr)
			}
			s.mu.Unlock()
		}()
		c.serve()
	}()
}

func remoteAddr(nc net.Conn) netip.Addr {
	if ap, err := netip.ParseAddrPort(nc.RemoteAddr().String()); err == nil {
		return ap.Addr().Unmap()
	}
	return netip.Addr{}
}

// Shutdown stops listening, says 421 to sessions between messages, and waits for the others until ctx ends;
// then it closes them. When it returns no goroutine of the server is left.
func (s *Server) Shutdown(ctx context.Context) error {
	s.mu.Lock()
	s.closing = true
	for l := range s.lns {
		_ = l.Close()
	}
	for c := range s.conns {
		c.interrupt()
	}
	s.mu.Unlock()
	done := make(chan struct{})
	go func() {
		s.wg.Wait()
		close(done)
	}()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
	}
	s.mu.Lock()
	n := len(s.conns)
	for c := range s.conns {
		c.cancel()
		_ = c.raw.Close()
	}
	s.mu.Unlock()
	<-done
	return fmt.Errorf("%d sessions were cut off", n)
}

type metrics struct {
	connections, turnedAway prometheus.Counter
	logins, messages        *prometheus.CounterVec
	bytes                   prometheus.Counter
}

func newMetrics(reg prometheus.Registerer) *metrics {
	m := &metrics{
		connections: prometheus.NewCounter(prometheus.CounterOpts{Name: "mailbridge_smtpd_connections_total", Help: "Connections served."}),
		turnedAway:  prometheus.NewCounter(prometheus.CounterOpts{Name: "mailbridge_smtpd_turned_away_total", Help: "Connections over a limit."}),
		logins:      prometheus.NewCounterVec(prometheus.CounterOpts{Name: "mailbridge_smtpd_logins_total", Help: "Logins by result."}, []string{"result"}),
		messages:    prometheus.NewCounterVec(prometheus.CounterOpts{Name: "mailbridge_smtpd_messages_total", Help: "Messages by the first digit of the answer."}, []string{"result"}),
		bytes:       prometheus.NewCounter(prometheus.CounterOpts{Name: "mailbridge_smtpd_received_bytes_total", Help: "Bytes of messages taken."}),
	}
	for _, r := range []string{"ok", "refused", "delayed", "error"} {
		m.logins.WithLabelValues(r)
	}
	for _, r := range []string{"2", "4", "5"} {
		m.messages.WithLabelValues(r)
	}
	if reg != nil {
		reg.MustRegister(m.connections, m.turnedAway, m.logins, m.messages, m.bytes)
	}
	return m
}
