// Package cloudhttp is the transport chain for clouds that speak HTTP: it authorises, paces, measures and
// traces requests, so that a provider needs to know none of that.
package cloudhttp

import (
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"mailbridge/internal/mailerr"
	"mailbridge/internal/pace"
	"mailbridge/providers"
)

// NewTransport makes the pool of connections that all accounts of a profile share. Roots nil are the
// system's. With proxy it honours HTTPS_PROXY and NO_PROXY.
func NewTransport(roots *x509.CertPool, proxy bool) *http.Transport {
	t := &http.Transport{
		DialContext:         (&net.Dialer{Timeout: 15 * time.Second, KeepAlive: 30 * time.Second}).DialContext,
		TLSClientConfig:     &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12},
		TLSHandshakeTimeout: 15 * time.Second,
		// A send may take the cloud a while; the caller's context has the last word.
		ResponseHeaderTimeout: 100 * time.Second,
		IdleConnTimeout:       60 * time.Second,
		MaxIdleConnsPerHost:   64,
		ForceAttemptHTTP2:     true,
		DisableCompression:    true, // answers are small, and $value must come as it is
	}
	if proxy {
		t.Proxy = http.ProxyFromEnvironment
	}
	return t
}

// Options is what the clients of one account need.
type Options struct {
	Transport http.RoundTripper
	Tokens    providers.Tokens
	Base      string          // the API; tokens go to no other host
	Provider  string          // "graph"
	Version   string          // of the bridge, for User-Agent
	Pace      *pace.Scheduler // shared by all who use the mailbox under the same application
	Log       *slog.Logger
	Metrics   *Metrics
}

// New makes the account's client and the one for upload URLs, which carry their own authority and never get
// a token.
func New(o Options) (api, uploads *http.Client, err error) {
	base, err := url.Parse(o.Base)
	if err != nil || base.Host == "" {
		return nil, nil, fmt.Errorf("the endpoint %q is not an https:// address", o.Base)
	}
	shared := &chain{o: o}
	auth := &chain{o: o, host: base.Host, scheme: base.Scheme}
	// Redirects would repeat a body, or carry a token elsewhere: Graph sends none.
	stay := func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	return &http.Client{Transport: auth, CheckRedirect: stay}, &http.Client{Transport: shared, CheckRedirect: stay}, nil
}

// chain is the round tripper. Host is empty for uploads.
type chain struct {
	o            Options
	host, scheme string
}

// errHost refuses to give a token away.
var errHost = errors.New("the request leads to another host than the configured endpoint: no token is sent there")

// RoundTrip sends one request, with a token, and once more with a new one after a 401.
func (c *chain) RoundTrip(req *http.Request) (*http.Response, error) {
	if c.host == "" {
		req = req.Clone(req.Context())
		req.Header.Del("Authorization")
		return c.send(req)
	}
	if req.URL.Host != c.host || req.URL.Scheme != c.scheme {
		drop(req.Body)
		return nil, errHost
	}
	tok, err := c.o.Tokens.Token(req.Context())
	if err != nil {
		drop(req.Body)
		return nil, err
	}
	resp, err := c.send(authorised(req, tok, req.Body))
	if err != nil || resp.StatusCode != http.StatusUnauthorized {
		return resp, err
	}
	c.o.Tokens.Reject(tok)
	body := req.Body
	if body != nil && body != http.NoBody {
		if req.GetBody == nil {
			return resp, nil
		}
		if body, err = req.GetBody(); err != nil {
			return resp, nil
		}
	}
	if tok, err = c.o.Tokens.Token(req.Context()); err != nil {
		drop(body)
		finish(resp.Body)
		return nil, err
	}
	finish(resp.Body)
	resp, err = c.send(authorised(req, tok, body))
	if err == nil && resp.StatusCode == http.StatusUnauthorized {
		c.o.Tokens.Reject(tok)
	}
	return resp, err
}

// drop closes a request's body unread: what was read of it counts as sent.
func drop(body io.ReadCloser) {
	if body != nil {
		_ = body.Close()
	}
}

// finish ends an answer that is not wanted, so that its connection can serve again.
func finish(body io.ReadCloser) {
	_, _ = io.CopyN(io.Discard, body, 4<<10)
	_ = body.Close()
}

func authorised(req *http.Request, t providers.Token, body io.ReadCloser) *http.Request {
	r := req.Clone(req.Context())
	r.Body = body
	r.Header.Set("Authorization", "Bearer "+t.Value.Reveal())
	return r
}

// send paces, names, measures and traces one request.
func (c *chain) send(req *http.Request) (*http.Response, error) {
	ctx := req.Context()
	release, err := c.o.Pace.Request(ctx, req.ContentLength)
	if err != nil {
		drop(req.Body)
		if w, ok := errors.AsType[*pace.Wait](err); ok {
			err = &mailerr.Error{Class: mailerr.Throttled, Status: mailerr.Status{Subject: 7}, RetryAt: w.At, Text: w.Reason}
		}
		return nil, err
	}
	id := requestID()
	req.Header.Set("User-Agent", "Mailbridge/"+c.o.Version)
	if c.host != "" {
		// https://learn.microsoft.com/graph/errors: support asks for these ids.
		req.Header.Set("client-request-id", id)
		req.Header.Set("return-client-request-id", "true")
	}
	start := time.Now()
	resp, err := c.o.Transport.RoundTrip(req)
	took := time.Since(start)
	status := 0
	if err == nil {
		status = resp.StatusCode
	}
	c.o.Metrics.observe(c.o.Provider, status, took)
	if c.o.Log.Enabled(ctx, slog.LevelDebug) {
		attrs := []any{"provider", c.o.Provider, "method", req.Method, "path", req.URL.Path, "status", status, "took", took, "client_request_id", id}
		if err == nil {
			attrs = append(attrs, "request_id", resp.Header.Get("request-id"))
		}
		if c.host == "" {
			attrs[5] = "(upload)" // the URL is its own authority
		}
		c.o.Log.DebugContext(ctx, "request", attrs...)
	}
	if err != nil {
		release()
		return nil, err
	}
	// Not on 429 and 503 alone: Graph sends it with 202 too
	// (https://learn.microsoft.com/graph/throttling).
	if d, ok := mailerr.RetryAfter(resp.Header, time.Now()); ok {
		c.o.Pace.NotBefore(time.Now().Add(d))
	}
	resp.Body = &releasing{ReadCloser: resp.Body, release: release}
	return resp, nil
}

// releasing gives the slot back once the answer was read or dropped.
type releasing struct {
	io.ReadCloser
	release func()
	once    sync.Once
}

func (r *releasing) Close() error {
	r.once.Do(r.release)
	return r.ReadCloser.Close()
}

// requestID is a random UUID (RFC 9562 §5.4).
func requestID() string {
	var b [16]byte
	if _, err := rand.Read(b[:]); err != nil {
		return "" // never: crypto/rand ends the process instead
	}
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

// Metrics of requests to clouds.
type Metrics struct {
	requests *prometheus.CounterVec
	seconds  *prometheus.HistogramVec
}

var results = [...]string{"none", "2xx", "3xx", "401", "403", "429", "4xx", "5xx"}

// NewMetrics registers the metrics.
func NewMetrics(reg prometheus.Registerer) *Metrics {
	m := &Metrics{
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "mailbridge_cloudhttp_requests_total", Help: "Requests to clouds by the status of the answer; none is no answer."}, []string{"provider", "result"}),
		seconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "mailbridge_cloudhttp_request_seconds", Help: "Time until the answer's header came.",
			Buckets: prometheus.ExponentialBuckets(0.005, 3, 9)}, []string{"provider"}),
	}
	for _, r := range results {
		m.requests.WithLabelValues("graph", r)
	}
	m.seconds.WithLabelValues("graph")
	reg.MustRegister(m.requests, m.seconds)
	return m
}

func (m *Metrics) observe(provider string, status int, took time.Duration) {
	r := "none"
	switch {
	case status == 401:
		r = "401"
	case status == 403:
		r = "403"
	case status == 429:
		r = "429"
	case status >= 200 && status < 600:
		r = fmt.Sprintf("%dxx", status/100)
	}
	m.requests.WithLabelValues(provider, r).Inc()
	m.seconds.WithLabelValues(provider).Observe(took.Seconds())
}
