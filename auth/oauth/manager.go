package oauth

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"log/slog"
	"math/rand/v2"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"mailbridge/internal/mailerr"
	"mailbridge/internal/secret"
	"mailbridge/providers"
)

const (
	// early is how long before its end a token is replaced, at most a fifth of its life.
	early = 5 * time.Minute
	// least is the life that a token must have left to be handed out.
	least = 20 * time.Second
	// After a refusal the endpoint is left alone for firstBackoff, doubling up to a longest time by class.
	firstBackoff = 5 * time.Second
	longRefused  = 5 * time.Minute
	longTrouble  = time.Minute
	// young is the age under which a token that the cloud refuses says that the next one will be refused too.
	young = 10 * time.Second
)

// Store keeps rotated refresh tokens. *vault.Vault is one.
type Store interface {
	Get(ctx context.Context, name string) (secret.Text, error)
	Update(ctx context.Context, name string, f func(old secret.Text) (secret.Text, error)) error
}

// Manager keeps one source of tokens for each profile and, where tokens are for single mailboxes, for each of
// them. It is safe for concurrent use.
type Manager struct {
	store   Store
	missing func(error) bool
	log     *slog.Logger
	now     func() time.Time
	metrics *metrics

	ctx    context.Context // ends with Close
	cancel context.CancelFunc
	flying sync.WaitGroup

	mu      sync.Mutex
	sources map[string]*Source
}

// ManagerOptions is what a manager needs. Store may be nil where no profile has refresh tokens.
type ManagerOptions struct {
	Store   Store
	Missing func(error) bool // reports whether a Get error says that there is nothing yet
	Log     *slog.Logger
	Now     func() time.Time
	Metrics prometheus.Registerer
}

// NewManager makes a manager. Close it to end its requests.
func NewManager(o ManagerOptions) *Manager {
	m := &Manager{store: o.Store, missing: o.Missing, log: o.Log, now: o.Now, metrics: newMetrics(o.Metrics), sources: map[string]*Source{}}
	m.ctx, m.cancel = context.WithCancel(context.Background())
	return m
}

// Close ends all requests and waits for them.
func (m *Manager) Close() {
	m.cancel()
	m.flying.Wait()
}

// Source gives the source of tokens for a mailbox under a profile. Mailboxes share one where the profile's
// tokens are not for single mailboxes.
func (m *Manager) Source(c *Client, mailbox string) *Source {
	subject := strings.ToLower(c.p.subject(mailbox))
	m.mu.Lock()
	defer m.mu.Unlock()
	key := c.p.Name + "\x00" + subject
	s := m.sources[key]
	if s == nil {
		s = &Source{m: m, client: c, mailbox: mailbox}
		m.sources[key] = s
	}
	return s
}

// Source hands out tokens, kept fresh. It is a providers.Tokens.
type Source struct {
	m       *Manager
	client  *Client
	mailbox string

	mu      sync.Mutex
	cur     providers.Token
	got     time.Time // when cur was issued
	renewAt time.Time
	flight  *flight
	failed  error // the last refusal; nil after a success
	fails   int   // in a row
	until   time.Time
}

// flight is one request that any number of callers wait for.
type flight struct {
	done chan struct{}
	err  error
}

// Token gives a token that is good for some time. While a newer one is on its way, or cannot be had for the
// moment, it gives the one that is still good. Every caller waits with its own context; who leaves does not
// end the request for the others.
func (s *Source) Token(ctx context.Context) (providers.Token, error) {
	for {
		s.mu.Lock()
		now := s.m.now()
		good := !s.cur.Value.Empty() && now.Add(least).Before(s.cur.Expiry)
		resting := now.Before(s.until) && s.until.Sub(now) <= longRefused*2 // not for ever after the clock was set back
		if good && (now.Before(s.renewAt) || resting || s.flight != nil) {
			t := s.cur
			s.mu.Unlock()
			return t, nil
		}
		if !good && resting && s.flight == nil {
			err := s.failed
			s.mu.Unlock()
			return providers.Token{}, err
		}
		f := s.flight
		if f == nil {
			f = &flight{done: make(chan struct{})}
			s.flight = f
			if s.m.ctx.Err() != nil {
				s.flight = nil
				s.mu.Unlock()
				return providers.Token{}, s.client.fail(mailerr.Temporary, mailerr.Status{Subject: 3, Detail: 2}, "the bridge is stopping", nil)
			}
			s.m.flying.Go(func() { s.fly(f) })
		}
		if good {
			t := s.cur
			s.mu.Unlock()
			return t, nil
		}
		s.mu.Unlock()
		select {
		case <-f.done:
			if f.err != nil {
				return providers.Token{}, f.err
			}
		case <-ctx.Done():
			return providers.Token{}, s.client.fail(mailerr.Temporary, mailerr.Status{Subject: 4, Detail: 2}, "interrupted while waiting for a token", ctx.Err())
		}
	}
}

// Reject says that the cloud refused this very token. Another one that is there by now is left alone.
func (s *Source) Reject(t providers.Token) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.cur.Value.Empty() || !s.cur.Value.Equal(t.Value) {
		return
	}
	now := s.m.now()
	s.cur = providers.Token{}
	s.m.metrics.rejected.Inc()
	if now.Sub(s.got) < young && s.fails > 0 {
		// The second in a row: the next one would fare no better, so asking for it is put off.
		s.rest(now, s.client.fail(mailerr.Auth, mailerr.Status{Subject: 7},
			"the cloud refuses tokens that it has just issued; check endpoint, scopes and permissions with mailbridge doctor", errLoop))
		return
	}
	if now.Sub(s.got) < young {
		s.fails++
	}
}

// Retry forgets what failed, so that the next Token asks the endpoint again at once: somebody has signed in or
// an administrator has acted.
func (s *Source) Retry() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.failed, s.fails, s.until = nil, 0, time.Time{}
}

// rest puts the next request off; the caller holds the lock.
func (s *Source) rest(now time.Time, err error) {
	longest := longTrouble
	e := mailerr.Of(err)
	if e.Class == mailerr.Auth {
		longest = longRefused
	}
	wait := min(firstBackoff<<min(s.fails, 10), longest)
	wait += rand.N(wait/4 + 1)
	s.failed, s.until = err, now.Add(wait)
	if e.RetryAt.After(s.until) {
		s.until = e.RetryAt
	}
	s.fails++
}

// fly makes the request and lets everybody know.
func (s *Source) fly(f *flight) {
	start := s.m.now()
	g, err := s.fetch(s.m.ctx)
	now := s.m.now()
	s.m.metrics.observe(err, now.Sub(start))
	s.mu.Lock()
	defer s.mu.Unlock()
	s.flight = nil
	f.err = err
	close(f.done)
	if err != nil {
		if s.fails == 0 || mailerr.Of(err).Class == mailerr.Auth {
			s.m.log.Warn("no token", "profile", s.client.p.Name, "class", mailerr.Of(err).Class.String(), "err", err)
		}
		s.rest(now, err)
		return
	}
	if s.failed != nil {
		s.m.log.Info("tokens are issued again", "profile", s.client.p.Name)
		s.fails = 0
	} else if now.Sub(s.got) >= young {
		s.fails = 0
	}
	life := g.token.Expiry.Sub(now)
	before := min(early, life/5)
	s.cur, s.got, s.failed, s.until = g.token, now, nil, time.Time{}
	// Jitter, so that many sources made at one start do not ask at one time for ever after.
	s.renewAt = g.token.Expiry.Add(-before - rand.N(before/4+1))
}

// fetch asks the endpoint, with the newest refresh token where the grant is one, and keeps a new one before
// the access token is used.
func (s *Source) fetch(ctx context.Context) (grant, error) {
	c := s.client
	if c.p.Grant != RefreshToken {
		return c.fetch(ctx, s.mailbox, secret.Text{})
	}
	for again := true; ; again = false {
		used, err := s.refreshToken(ctx)
		if err != nil {
			return grant{}, c.fail(mailerr.Temporary, mailerr.Status{Subject: 3}, "the vault cannot be read", err)
		}
		g, err := c.fetch(ctx, s.mailbox, used)
		if err != nil {
			// Another process may have rotated it in the meantime.
			if now, rerr := s.refreshToken(ctx); again && mailerr.Of(err).Class == mailerr.Auth && rerr == nil && !now.Equal(used) {
				continue
			}
			return grant{}, err
		}
		if g.refresh.Empty() || g.refresh.Equal(used) {
			return g, nil
		}
		// Durable before use: the old one may be worthless from now on.
		err = s.m.store.Update(context.WithoutCancel(ctx), s.storeName(), func(secret.Text) (secret.Text, error) {
			return secret.New(fingerprint(c.p.RefreshToken) + "\n" + g.refresh.Reveal()), nil
		})
		if err != nil {
			return grant{}, c.fail(mailerr.Temporary, mailerr.Status{Subject: 3}, "the new refresh token cannot be stored", err)
		}
		return g, nil
	}
}

func (s *Source) storeName() string { return "oauth/" + s.client.p.Name }

// refreshToken is the newest one: from the store, unless the configuration has another one than that from
// which the stored one came.
func (s *Source) refreshToken(ctx context.Context) (secret.Text, error) {
	initial := s.client.p.RefreshToken
	if s.m.store == nil {
		return initial, errors.New("no store for refresh tokens")
	}
	kept, err := s.m.store.Get(ctx, s.storeName())
	if err != nil {
		if s.m.missing(err) {
			return initial, nil
		}
		return secret.Text{}, err
	}
	from, token, _ := strings.Cut(kept.Reveal(), "\n")
	if from != fingerprint(initial) || token == "" {
		return initial, nil
	}
	return secret.New(token), nil
}

// fingerprint recognises a refresh token without showing it.
func fingerprint(t secret.Text) string {
	sum := sha256.Sum256([]byte(t.Reveal()))
	return hex.EncodeToString(sum[:])
}

// metrics of all sources of a manager.
type metrics struct {
	requests *prometheus.CounterVec
	seconds  prometheus.Histogram
	rejected prometheus.Counter
}

func newMetrics(reg prometheus.Registerer) *metrics {
	m := &metrics{
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "mailbridge_oauth_requests_total", Help: "Token requests by result: ok or the class of the failure."}, []string{"result"}),
		seconds:  prometheus.NewHistogram(prometheus.HistogramOpts{Name: "mailbridge_oauth_request_seconds", Help: "Duration of token requests.", Buckets: prometheus.ExponentialBuckets(0.01, 3, 8)}),
		rejected: prometheus.NewCounter(prometheus.CounterOpts{Name: "mailbridge_oauth_rejected_total", Help: "Tokens that a cloud refused before their end."}),
	}
	m.requests.WithLabelValues("ok")
	for _, c := range mailerr.Classes() {
		m.requests.WithLabelValues(c.String())
	}
	if reg != nil {
		reg.MustRegister(m.requests, m.seconds, m.rejected)
	}
	return m
}

func (m *metrics) observe(err error, d time.Duration) {
	result := "ok"
	if err != nil {
		result = mailerr.Of(err).Class.String()
	}
	m.requests.WithLabelValues(result).Inc()
	m.seconds.Observe(d.Seconds())
}

var _ providers.Tokens = (*Source)(nil)
