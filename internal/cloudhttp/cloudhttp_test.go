package cloudhttp

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"mailbridge/internal/mailerr"
	"mailbridge/internal/pace"
	"mailbridge/internal/secret"
	"mailbridge/providers"
)

// tokens hands out t1, t2, …: a new one after each rejection.
type tokens struct {
	mu       sync.Mutex
	n        int
	rejected []string
	err      error
}

func (t *tokens) Token(context.Context) (providers.Token, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.err != nil && t.n > 0 {
		return providers.Token{}, t.err
	}
	return providers.Token{Value: secret.New("TOKEN" + string(rune('1'+t.n))), Expiry: time.Now().Add(time.Hour)}, nil
}

func (t *tokens) Reject(tok providers.Token) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.rejected = append(t.rejected, tok.Value.Reveal())
	t.n++
}

func setup(t *testing.T, h http.HandlerFunc, slots int) (api, uploads *http.Client, toks *tokens, base string, log *bytes.Buffer) {
	srv := httptest.NewServer(h)
	t.Cleanup(srv.Close)
	toks, log = &tokens{}, &bytes.Buffer{}
	api, uploads, err := New(Options{Transport: http.DefaultTransport, Tokens: toks, Base: srv.URL + "/v1.0", Provider: "graph", Version: "1",
		Pace: pace.New(pace.Limits{Concurrent: slots}, time.Now), Log: slog.New(slog.NewTextHandler(log, &slog.HandlerOptions{Level: slog.LevelDebug})), Metrics: NewMetrics(prometheus.NewRegistry())})
	if err != nil {
		t.Fatal(err)
	}
	return api, uploads, toks, srv.URL, log
}

func post(t *testing.T, c *http.Client, url, body string) (int, string) {
	t.Helper()
	resp, err := c.Post(url, "text/plain", strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(b)
}

func TestExpiredTokenCostsOneRetryWithTheWholeBody(t *testing.T) {
	var calls atomic.Int32
	api, _, toks, base, log := setup(t, func(w http.ResponseWriter, r *http.Request) {
		calls.Add(1)
		b, _ := io.ReadAll(r.Body)
		if r.Header.Get("Authorization") != "Bearer TOKEN2" {
			w.WriteHeader(401)
			return
		}
		if r.Header.Get("client-request-id") == "" {
			t.Error("no client-request-id")
		}
		_, _ = w.Write(b)
	}, 4)
	if code, body := post(t, api, base+"/v1.0/x?secret=QUERY", "hello"); code != 200 || body != "hello" {
		t.Errorf("%d %q", code, body)
	}
	if calls.Load() != 2 || len(toks.rejected) != 1 || toks.rejected[0] != "TOKEN1" {
		t.Errorf("%d calls, rejected %v", calls.Load(), toks.rejected)
	}
	if strings.Contains(log.String(), "TOKEN") || strings.Contains(log.String(), "QUERY") || !strings.Contains(log.String(), "status=401") {
		t.Errorf("log: %s", log)
	}
}

func TestRefusalOfANewTokenIsNotRetriedForEver(t *testing.T) {
	var calls atomic.Int32
	api, _, toks, base, _ := setup(t, func(w http.ResponseWriter, r *http.Request) {
		calls.Add(1)
		w.WriteHeader(401)
	}, 4)
	if code, _ := post(t, api, base+"/v1.0/x", "hello"); code != 401 || calls.Load() != 2 || len(toks.rejected) != 2 {
		t.Errorf("%d after %d calls, rejected %v", code, calls.Load(), toks.rejected)
	}
	toks.n, toks.err = 0, errors.New("no more tokens")
	if _, err := api.Get(base + "/v1.0/x"); !errors.Is(err, toks.err) {
		t.Errorf("the reason is lost: %v", err)
	}
}

func TestTokenGoesToNoOtherHostAndNotIntoUploads(t *testing.T) {
	var auth atomic.Value
	auth.Store("")
	api, uploads, _, base, _ := setup(t, func(w http.ResponseWriter, r *http.Request) {
		auth.Store(r.Header.Get("Authorization"))
		if r.URL.Path == "/v1.0/redirect" {
			http.Redirect(w, r, "/elsewhere", http.StatusFound)
		}
	}, 4)
	other := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { t.Errorf("asked: %v", r.Header) }))
	defer other.Close()
	if _, err := api.Get(other.URL + "/v1.0/x"); !errors.Is(err, errHost) {
		t.Errorf("another host: %v", err)
	}
	req, err := http.NewRequest(http.MethodPut, base+"/upload", strings.NewReader("x"))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer x")
	resp, err := uploads.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if auth.Load() != "" {
		t.Errorf("the upload had %q", auth.Load())
	}
	resp, err = api.Get(base + "/v1.0/redirect")
	if err != nil || resp.StatusCode != http.StatusFound {
		t.Errorf("a redirect was followed: %v", err)
	}
	resp.Body.Close()
}

func TestMailboxIsAskedNoMoreAtOnceThanItTakes(t *testing.T) {
	var now, most atomic.Int32
	enter, leave := make(chan struct{}, 8), make(chan struct{})
	api, _, _, base, _ := setup(t, func(w http.ResponseWriter, r *http.Request) {
		most.Store(max(most.Load(), now.Add(1)))
		enter <- struct{}{}
		<-leave
		now.Add(-1)
	}, 2)
	var wg sync.WaitGroup
	for range 6 {
		wg.Go(func() { post(t, api, base+"/v1.0/x", "") })
	}
	<-enter
	<-enter
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, base+"/v1.0/x", nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := api.Do(req); !errors.Is(err, context.Canceled) {
		t.Errorf("who does not want to wait: %v", err)
	}
	close(leave)
	wg.Wait()
	if most.Load() > 2 {
		t.Errorf("%d at once", most.Load())
	}
}

func TestNothingIsAskedBeforeTheTimeThatTheCloudNames(t *testing.T) {
	for _, status := range []int{202, 429, 503} {
		var calls atomic.Int32
		api, uploads, _, base, _ := setup(t, func(w http.ResponseWriter, _ *http.Request) {
			calls.Add(1)
			w.Header().Set("Retry-After", "59.5")
			w.WriteHeader(status)
		}, 4)
		if code, _ := post(t, api, base+"/v1.0/x", "hello"); code != status {
			t.Fatal(code)
		}
		for _, c := range []*http.Client{api, uploads} {
			_, err := c.Get(base + "/v1.0/x")
			e, ok := errors.AsType[*mailerr.Error](err)
			if !ok || e.Class != mailerr.Throttled || e.Unsure || time.Until(e.RetryAt) > time.Minute || time.Until(e.RetryAt) < 50*time.Second {
				t.Errorf("%d: %v", status, err)
			}
		}
		if calls.Load() != 1 {
			t.Errorf("%d: %d requests", status, calls.Load())
		}
	}
}
