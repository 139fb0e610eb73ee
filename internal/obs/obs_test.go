package obs

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"mailbridge/internal/secret"
)

func TestNoTokenReachesTheLog(t *testing.T) {
	for _, format := range []string{"text", "json"} {
		var out bytes.Buffer
		log, err := NewLogger(&out, LogOptions{Format: format, Level: "debug"})
		if err != nil {
			t.Fatal(err)
		}
		tok := "Bearer SECRETSECRET"
		log.With("h", tok).Info("sent "+tok, "a", tok, "e", errors.New(tok), "g", slog.GroupValue(slog.String("x", tok)), "l", []string{tok},
			"any", struct{ V string }{tok}, "s", secret.New("SECRET"), "jwt", "eyJhbGciOiJSUzI1NiJ9.SECRETSECRET.SECRET", "g2", "ya29.SECRETSECRET", "form", "x=1&client_secret=SECRETSECRET")
		log.WithGroup("g").Error("AUTH PLAIN SECRETSECRET")
		if s := out.String(); strings.Contains(s, "SECRET") || !strings.Contains(s, "[redacted]") {
			t.Errorf("%s: %s", format, s)
		}
	}
	if _, err := NewLogger(io.Discard, LogOptions{Level: "loud"}); err == nil {
		t.Error("an unknown level was taken")
	}
}

// What the cheap look passes must be what the patterns would not touch.
func FuzzSuspiciousMissesNothing(f *testing.F) {
	for _, s := range []string{"bearer x", "?code=y", "password: z", "AUTH LOGIN x", "Authtoken=1", "ya29.a", "eyJaaaaaaaaa", "id_token=1", "code_verifier:x", "device_code=1"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if !suspicious(s) && secret.Scrub(s) != s {
			t.Errorf("%q holds something secret", s)
		}
	})
}

func TestReadinessNamesWhatFails(t *testing.T) {
	var h Health
	srv := httptest.NewServer(Mux(NewRegistry("1"), &h))
	defer srv.Close()
	get := func(path string) (int, string) {
		resp, err := http.Get(srv.URL + path)
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
	h.Add("outbox", func(context.Context) error { return nil })
	if code, _ := get("/readyz"); code != 200 {
		t.Errorf("ready: %d", code)
	}
	h.Add("outbox", func(context.Context) error { return errors.New("the disk is full") })
	if code, body := get("/readyz"); code != 503 || !strings.Contains(body, `"outbox":"the disk is full"`) {
		t.Errorf("not ready: %d %s", code, body)
	}
	if code, _ := get("/healthz"); code != 200 {
		t.Errorf("alive: %d", code)
	}
	if code, body := get("/metrics"); code != 200 || !strings.Contains(body, "mailbridge_build_info") || !strings.Contains(body, "go_goroutines") {
		t.Errorf("metrics: %d %.200s", code, body)
	}
}

func BenchmarkOrdinaryLine(b *testing.B) {
	log, err := NewLogger(io.Discard, LogOptions{})
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		log.LogAttrs(b.Context(), slog.LevelInfo, "message sent", slog.String(Item, "0123456789ABCDEFGHJKMNPQRS"), slog.String("client", "192.0.2.1"), slog.Int("bytes", 10000))
	}
}
