package app

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/emersion/go-sasl"
	"github.com/emersion/go-smtp"

	"mailbridge/internal/cloudsim/world"
	"mailbridge/internal/config"
	"mailbridge/internal/outbox"
	"mailbridge/internal/secret"
)

// running is a bridge that serves.
type running struct {
	*bridge
	log  *syncBuffer
	stop func() error
}

type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

// serve runs the bridge on its configuration; called again it is a restart.
func (b *bridge) serve(t *testing.T) *running {
	t.Helper()
	if b.App != nil && b.closers != nil {
		if err := b.close(); err != nil {
			t.Fatal(err)
		}
	}
	f, err := config.Load(b.path)
	if err != nil {
		t.Fatal(err)
	}
	f.Log.Level = "debug"
	r := &running{bridge: b, log: &syncBuffer{}}
	if b.App, err = New(t.Context(), f, Options{Version: "test", LogTo: r.log}); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ready, done := make(chan struct{}), make(chan error, 1)
	go func() { done <- b.Run(ctx, func() { close(ready) }) }()
	select {
	case <-ready:
	case err := <-done:
		t.Fatal(err)
	}
	var once sync.Once
	r.stop = func() (err error) {
		once.Do(func() {
			cancel()
			err = <-done
		})
		return err
	}
	t.Cleanup(func() {
		if err := r.stop(); err != nil {
			t.Error(err)
		}
	})
	return r
}

// send sends with a bridge password over STARTTLS.
func (r *running) send(t *testing.T, account, from string, to []string, body string) error {
	t.Helper()
	pem, err := os.ReadFile(r.caFile)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(pem)
	c, err := smtp.DialStartTLS(r.listeners[0].Addr().String(), &tls.Config{RootCAs: roots, ServerName: "127.0.0.1"})
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.Auth(sasl.NewPlainClient("", account, "a password for tests")); err != nil {
		return err
	}
	if err := c.SendMail(from, to, strings.NewReader(body)); err != nil {
		return err
	}
	return c.Quit()
}

func (b *bridge) passwords(t *testing.T) {
	t.Helper()
	f, err := config.Load(b.path)
	if err != nil {
		t.Fatal(err)
	}
	for name := range f.Accounts {
		if _, err := AddPassword(t.Context(), f, NewPassword{Account: name, Label: "t", Given: secret.New("a password for tests")}); err != nil {
			t.Fatal(err)
		}
	}
}

func (r *running) until(t *testing.T, what string, cond func() bool) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	deadline := time.After(20 * time.Second)
	for !cond() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("never came: %s\n%s", what, r.log)
		}
	}
}

func letter(from, subject string) string {
	return "From: " + from + "\r\nTo: ann@contoso.example\r\nSubject: " + subject + "\r\nDate: Tue, 24 Nov 2026 10:00:00 +0000\r\nMessage-ID: <" + subject + "@c.example>\r\n\r\nhello\r\n"
}

func TestServiceSendsSurvivesARestartAndShowsNoSecret(t *testing.T) {
	b := newBridge(t, func(s string) string {
		return strings.ReplaceAll(s, `profile = "contoso"`, "profile = \"contoso\"\nsettle = \"100ms\"")
	})
	b.passwords(t)
	r := b.serve(t)
	for _, a := range []struct{ name, from string }{{"scanners", "scanner@contoso.example"}, {"relay", "relay@workspace.example"}} {
		if err := r.send(t, a.name, a.from, []string{"ann@contoso.example", "hidden@contoso.example"}, letter(a.from, "one-"+a.name)); err != nil {
			t.Fatal(err)
		}
	}
	r.until(t, "four copies", func() bool { return len(b.cloud.World.Deliveries()) == 4 })
	get := func(path string) (int, string) {
		resp, err := http.Get("http://" + r.httpLn.Addr().String() + path)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return resp.StatusCode, string(body)
	}
	for path, want := range map[string]string{"/healthz": "ok", "/readyz": "ready", "/": "Ready.", "/metrics": "mailbridge_outbox_submitted_total 2"} {
		if code, body := get(path); code != 200 || !strings.Contains(body, want) {
			t.Errorf("%s: %d %.300s", path, code, body)
		}
	}
	_, metrics := get("/metrics")
	if strings.Contains(metrics, "@") {
		t.Error("a metric shows an address")
	}

	// A second service on the same state would send the same mail.
	f, err := config.Load(b.path)
	if err != nil {
		t.Fatal(err)
	}
	if err := Serve(t.Context(), f, Options{LogTo: io.Discard}); err == nil || !strings.Contains(err.Error(), "another mailbridge") {
		t.Errorf("a second service: %v", err)
	}

	// The answer to the send is lost, and the service stops: the next one finds it sent.
	b.cloud.World.Add(world.Rule{Service: "graph", Route: "send", Times: 1, Cut: "after"})
	if err := r.send(t, "scanners", "scanner@contoso.example", []string{"ann@contoso.example"}, letter("scanner@contoso.example", "two")); err != nil {
		t.Fatal(err)
	}
	r.until(t, "unsure", func() bool { return strings.Contains(r.log.String(), "unsure=true") })
	if err := r.stop(); err != nil {
		t.Fatal(err)
	}
	logs := r.log.String()
	b.App = nil
	r = b.serve(t)
	r.until(t, "found sent", func() bool { return strings.Contains(r.log.String(), "looked up: it was sent") })
	if n := len(b.cloud.World.Deliveries()); n != 5 {
		t.Errorf("%d copies, want 5", n)
	}
	logs += r.log.String()
	for _, s := range []string{demoSecret, "a password for tests", "ya29.", "eyJ", demoPassword, "Bearer "} {
		if strings.Contains(logs, s) {
			t.Errorf("the log shows %q", s)
		}
	}
	if !strings.Contains(logs, "request_id=") {
		t.Error("the log does not name the cloud's request")
	}
}

func TestRevokedConsentHoldsMailAndARetryByHandSendsIt(t *testing.T) {
	b := newBridge(t, nil)
	b.passwords(t)
	r := b.serve(t)
	b.cloud.World.Add(world.Rule{Service: "entra", Status: 401, Code: "invalid_client", Text: "expired"})
	if err := r.send(t, "scanners", "scanner@contoso.example", []string{"ann@contoso.example"}, letter("scanner@contoso.example", "held")); err != nil {
		t.Fatalf("trouble with the cloud is no trouble of the client's: %v", err)
	}
	q := r.outbox.Queue()
	r.until(t, "parked", func() bool { p, err := q.Parks(t.Context()); return err == nil && len(p) == 1 })
	// The other account does not notice.
	if err := r.send(t, "relay", "relay@workspace.example", []string{"ann@contoso.example"}, letter("relay@workspace.example", "fine")); err != nil {
		t.Fatal(err)
	}
	r.until(t, "one copy", func() bool { return len(b.cloud.World.Deliveries()) == 1 })
	b.cloud.World.Reset()
	if running, err := Tell(t.Context(), r.dirOf(), "/resume?account=scanners"); err != nil || !running {
		t.Fatalf("%v, %v", running, err)
	}
	r.until(t, "two copies", func() bool { return len(b.cloud.World.Deliveries()) == 2 })
	if running, err := Tell(t.Context(), t.TempDir(), "/kick"); err != nil || running {
		t.Errorf("nobody runs there: %v, %v", running, err)
	}
	list, err := q.List(t.Context(), outbox.Filter{})
	if err != nil {
		t.Fatal(err)
	}
	r.until(t, "empty", func() bool { list, err = q.List(t.Context(), outbox.Filter{}); return err == nil && len(list) == 0 })
}

func (r *running) dirOf() string { return r.App.dir }

func TestRevokedPasswordIsRefusedByARunningService(t *testing.T) {
	b := newBridge(t, nil)
	b.passwords(t)
	r := b.serve(t)
	send := func() error {
		return r.send(t, "relay", "relay@workspace.example", []string{"ann@contoso.example"}, letter("relay@workspace.example", fmt.Sprint(time.Now().UnixNano())))
	}
	if err := send(); err != nil {
		t.Fatal(err)
	}
	f, err := config.Load(b.path)
	if err != nil {
		t.Fatal(err)
	}
	if err := RevokePassword(t.Context(), f, "relay", "t"); err != nil {
		t.Fatal(err)
	}
	if err := send(); err == nil || !strings.Contains(err.Error(), "5.7.8") && !strings.Contains(err.Error(), "wrong") {
		t.Errorf("a revoked password: %v", err)
	}
}

func TestLargeMessageGoesByUploadSession(t *testing.T) {
	b := newBridge(t, nil)
	b.passwords(t)
	r := b.serve(t)
	pdf := strings.Repeat(strings.Repeat("QUJD", 19)+"\r\n", 120_000) // 6.8 MB of PDF
	msg := "From: scanner@contoso.example\r\nTo: ann@contoso.example\r\nSubject: large\r\nMIME-Version: 1.0\r\nContent-Type: multipart/mixed; boundary=b\r\n\r\n--b\r\nContent-Type: text/plain\r\n\r\nsee attachment\r\n--b\r\nContent-Type: application/pdf; name=scan.pdf\r\nContent-Transfer-Encoding: base64\r\nContent-Disposition: attachment; filename=scan.pdf\r\n\r\n" + pdf + "--b--\r\n"
	if err := r.send(t, "scanners", "scanner@contoso.example", []string{"ann@contoso.example", "ben@workspace.example"}, msg); err != nil {
		t.Fatal(err)
	}
	r.until(t, "two copies", func() bool { return len(b.cloud.World.Deliveries()) == 2 })
	uploads := 0
	for _, q := range b.cloud.World.Requests() {
		if q.Service == "upload" && q.Method == http.MethodPut {
			uploads++
		}
	}
	raw := string(b.cloud.World.Deliveries()[0].Raw)
	if uploads < 2 || !strings.Contains(raw, "scan.pdf") || strings.Count(raw, "QUJDQUJD") < 100_000 || strings.Contains(strings.ToLower(raw[:2000]), "bcc") {
		t.Errorf("%d uploads; %d bytes arrived: %.1000s", uploads, len(raw), raw)
	}
}

func TestDoctorFindsWhatIsWrongAndSaysWhatToDo(t *testing.T) {
	report := func(b *bridge, send bool) (string, error) {
		f, err := config.Load(b.path)
		if err != nil {
			t.Fatal(err)
		}
		var out bytes.Buffer
		err = Doctor(t.Context(), f, DoctorOptions{Send: send, Out: &out, JSON: true})
		var parsed struct {
			Healthy  bool      `json:"healthy"`
			Findings []Finding `json:"findings"`
		}
		if jerr := json.Unmarshal(out.Bytes(), &parsed); jerr != nil || parsed.Healthy != (err == nil) {
			t.Fatalf("%v: %s", jerr, out.String())
		}
		text := textOf(parsed.Findings)
		for _, s := range []string{demoSecret, "ya29.", "eyJ"} {
			if strings.Contains(text, s) {
				t.Errorf("doctor shows %q", s)
			}
		}
		return text, err
	}
	b := newBridge(t, nil)
	text, err := report(b, true)
	if err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	for _, want := range []string{"scanners ok tls token endpoint", "scanners ok clock", "scanners ok token issued", "scanners ok permissions Mail.Send and Mail.ReadWrite (application)", "scanners ok mailbox", "scanners ok send", "relay ok key", "relay ok mailbox", "relay ok send"} {
		if !strings.Contains(text, want) {
			t.Errorf("no %q in\n%s", want, text)
		}
	}
	if n := len(b.cloud.World.Deliveries()); n != 2 {
		t.Errorf("%d probes sent", n)
	}
	for _, c := range []struct {
		change func(string) string
		rule   *world.Rule
		want   string
	}{
		{func(s string) string { return strings.Replace(s, demoSecret, "wrong~secret", 1) }, nil, "AADSTS7000215"},
		{func(s string) string {
			return strings.Replace(s, demoTenant, "22222222-2222-3333-4444-555555555555", 1)
		}, nil, "AADSTS90002"},
		{func(s string) string {
			return strings.Replace(s, "scanner@contoso.example", "nobody@contoso.example", 1)
		}, nil, "scanners failure mailbox"},
		{func(s string) string { return strings.Replace(s, demoService, "other@x.iam.gserviceaccount.com", 1) }, nil, "check issuer"},
		{func(s string) string {
			return strings.Replace(s, "https://mail.google.com/\" }", "https://mail.google.com\" }", 1)
		}, nil, "misspelt"},
		{func(s string) string {
			return strings.Replace(s, "relay@workspace.example", "gone@workspace.example", 1)
		}, nil, "does not exist or is suspended"},
		{func(s string) string { return strings.Replace(s, `password = "notasecret"`, `password = "guess"`, 1) }, nil, "failure start"},
		{nil, &world.Rule{Service: "graph", Status: 403, Code: "ErrorAccessDenied", Text: "Access to OData is disabled."}, "access policies and RBAC"},
		{func(s string) string {
			return strings.Replace(s, "imap           = \"127.0.0.1:", "imap = \"127.0.0.1:1\" #", 1)
		}, nil, "relay failure connect"},
	} {
		b := newBridge2(t, c.change)
		if c.rule != nil {
			b.cloud.World.Add(*c.rule)
		}
		if text, err := report(b, false); err == nil || !strings.Contains(text, c.want) {
			t.Errorf("%v; no %q in\n%s", err, c.want, text)
		}
	}
}

// newBridge2 is a bridge whose configuration is changed after it was found good: doctor meets what start does not.
func newBridge2(t *testing.T, change func(string) string) *bridge {
	t.Helper()
	b := newBridge(t, nil)
	if change == nil {
		return b
	}
	text, err := os.ReadFile(b.path)
	if err != nil {
		t.Fatal(err)
	}
	if changed := change(string(text)); changed == string(text) {
		t.Fatal("the change changes nothing")
	} else if err := os.WriteFile(b.path, []byte(changed), 0o600); err != nil {
		t.Fatal(err)
	}
	return b
}

func textOf(fs []Finding) string {
	var b strings.Builder
	for _, f := range fs {
		fmt.Fprintf(&b, "%s %s %s %s %s\n", f.Account, f.Level, f.Check, f.Text, f.Next)
	}
	return b.String()
}

func TestSecretsOfTheConfigurationComeFromTheVault(t *testing.T) {
	b := newBridge(t, nil)
	text, err := os.ReadFile(b.path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(b.path, []byte(strings.Replace(string(text), `"`+demoSecret+`"`, `"vault:contoso"`, 1)), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := config.Load(b.path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := New(t.Context(), f, Options{LogTo: io.Discard}); err == nil || !strings.Contains(err.Error(), "mailbridge secret set contoso") {
		t.Errorf("a secret that is not there: %v", err)
	}
	if err := SetSecret(t.Context(), f, "contoso", secret.New(demoSecret)); err != nil {
		t.Fatal(err)
	}
	if names, err := ListSecrets(t.Context(), f); err != nil || len(names) != 1 || names[0] != "contoso" {
		t.Errorf("%v, %v", names, err)
	}
	a, err := New(t.Context(), f, Options{LogTo: io.Discard})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := a.accounts["scanners"].provider.Prober.Probe(t.Context()); err != nil {
		t.Error(err)
	}
	if err := a.close(); err != nil {
		t.Error(err)
	}
	if err := DeleteSecret(t.Context(), f, "contoso"); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(filepath.Join(f.Absolute(), "vault.key")); err != nil {
		t.Error(err)
	}
}

func TestDemoPrintsSettingsOnItsFirstLine(t *testing.T) {
	var out syncBuffer
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		done <- Demo(ctx, DemoOptions{JSON: true, Ephemeral: true, Out: &out, LogTo: io.Discard, Version: "t"})
	}()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for !strings.Contains(out.String(), "\n") {
		select {
		case err := <-done:
			t.Fatal(err)
		case <-tick.C:
		}
	}
	var s demoSettings
	if err := json.Unmarshal([]byte(out.String()), &s); err != nil || s.SMTP.Port == 0 || s.SMTPS.TLS != "implicit" || len(s.Accounts) != 2 || s.HTTP == "" {
		t.Errorf("%+v, %v", s, err)
	}
	if _, err := os.Stat(s.CA); err != nil {
		t.Error(err)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(s.CA); err == nil {
		t.Error("the demo leaves its folder behind")
	}
}
