package app

import (
	"context"
	"crypto/x509"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"mailbridge/internal/cloudsim"
	"mailbridge/internal/cloudsim/world"
	"mailbridge/internal/config"
	"mailbridge/internal/mail"
	"mailbridge/internal/mailerr"
	"mailbridge/providers/providertest"
)

// demoKeyOnce makes the key that all clouds of the tests know.
var demoKeyOnce = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "mailbridge-test-")
	if err != nil {
		return "", err
	}
	_, err = demoKey(filepath.Join(dir, "demo.p12"))
	return dir, err
})

// bridge is the whole bridge but its listeners, on simulated clouds of its own.
type bridge struct {
	*App
	cloud *cloudsim.Cloud
	dir   string
	path  string // the configuration
}

// newBridge starts clouds and opens the accounts of the demo on them, by way of a configuration file.
func newBridge(t *testing.T, change func(string) string) *bridge {
	t.Helper()
	keyDir, err := demoKeyOnce()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	b, err := os.ReadFile(filepath.Join(keyDir, "demo.p12"))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "demo.p12"), b, 0o600); err != nil {
		t.Fatal(err)
	}
	cloud, err := cloudsim.Start(cloudsim.Options{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		if err := cloud.Shutdown(ctx); err != nil && !strings.Contains(err.Error(), "closed") {
			t.Log(err)
		}
	})
	if err := seed(cloud, certOf(t, filepath.Join(dir, "demo.p12"))); err != nil {
		t.Fatal(err)
	}
	text := demoConfig(dir, cloud, "127.0.0.1:0", "127.0.0.1:0", "127.0.0.1:0")
	if change != nil {
		text = change(text)
	}
	br := &bridge{cloud: cloud, dir: dir, path: filepath.Join(dir, "mailbridge.toml")}
	if err := os.WriteFile(br.path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := config.Load(br.path)
	if err != nil {
		t.Fatal(err)
	}
	if br.App, err = New(t.Context(), f, Options{Version: "test", LogTo: io.Discard}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := br.close(); err != nil {
			t.Error(err)
		}
	})
	return br
}

func certOf(t *testing.T, p12 string) *x509.Certificate {
	t.Helper()
	a := &App{cfg: &config.File{Keystores: map[string]config.Keystore{"k": {File: p12, Password: demoPassword}}}}
	e, err := a.key("k", "", config.Secrets{})
	if err != nil {
		t.Fatal(err)
	}
	return e.Certificate
}

// cloud shows the suite what the simulated clouds delivered, and makes them fail.
type cloudFaults struct {
	*bridge
	gmail, direct bool
}

func (c *cloudFaults) Deliveries() []providertest.Delivery {
	var list []providertest.Delivery
	for _, d := range c.cloud.World.Deliveries() {
		// The trace line that the cloud put on top is none of the message's.
		_, raw, _ := strings.Cut(string(d.Raw), "+0000\r\n")
		list = append(list, providertest.Delivery{To: d.To, Raw: []byte(raw)})
	}
	return list
}

func (c *cloudFaults) Staged() int { return c.cloud.Graph.Count("scanner@contoso.example", "drafts") }

func (c *cloudFaults) Reset() { c.cloud.World.Reset() }

func (c *cloudFaults) Set(f providertest.Fault, arg string) bool {
	service, commit := "graph", "send"
	if c.direct {
		commit = "sendMail"
	}
	if c.gmail {
		service, commit = "gmail-smtp", "EOD"
	}
	r := world.Rule{Service: service, Route: commit, Times: 1}
	switch {
	case f == providertest.LoseCommitAnswer:
		r.Cut = "after"
	case f == providertest.LoseCommit && !c.direct:
		r.Cut = "before"
	case f == providertest.LosePrepareAnswer && !c.gmail && !c.direct:
		r.Route, r.Cut = "createDraft", "after"
	case f == providertest.HangCommit:
		r.Hang, r.Times = true, 0
	case f == providertest.HangPrepare && !c.gmail && !c.direct:
		r.Route, r.Hang, r.Times = "createDraft", true, 0
	case f == providertest.Throttle && !c.gmail:
		r = world.Rule{Service: service, Status: 429, RetryAfter: arg}
	case f == providertest.RefuseRecipient && c.gmail:
		c.cloud.Gmail.Refuse("relay@workspace.example", arg)
		return true
	default:
		return false
	}
	c.cloud.World.Add(r)
	return true
}

func (c *cloudFaults) refusal(r world.Rule) func() { return func() { c.cloud.World.Add(r) } }

// TestProvidersConformOnTheSimulatedClouds runs the conformance suite through everything that stands between the
// configuration file and the clouds: profiles, grants, tokens, transports, real TLS.
func TestProvidersConformOnTheSimulatedClouds(t *testing.T) {
	for _, v := range []struct {
		name, account string
		change        func(string) string
	}{
		{"graph by drafts", "scanners", nil},
		{"graph by drafts, rewriting", "scanners", rewriting},
		{"graph by sendMail", "scanners", func(s string) string {
			return strings.Replace(rewriting(s), `profile = "contoso"`, "profile = \"contoso\"\nroute = \"sendmail\"", 1)
		}},
		{"graph with a certificate", "scanners", withCertificate},
		{"gmail with TLS", "relay", nil},
		{"gmail with STARTTLS", "relay", func(s string) string {
			return strings.Replace(s, `smtp_tls       = "implicit"`, `smtp_tls = "starttls"`, 1)
		}},
	} {
		t.Run(v.name, func(t *testing.T) {
			providertest.Run(t, func(t *testing.T) providertest.Harness {
				br := newBridge(t, v.change)
				if strings.Contains(v.name, "STARTTLS") {
					br.useSubmission(t)
				}
				a := br.accounts[mail.AccountID(v.account)]
				c := &cloudFaults{bridge: br, gmail: v.account == "relay", direct: strings.Contains(v.name, "sendMail")}
				h := providertest.Harness{Account: a.provider, Mailbox: a.cfg.Mailbox, Cloud: c, Faults: c, Settle: br.cloud.Graph.Settle,
					HeaderRecipients: !c.gmail, Rewriting: a.cfg.Mismatch == "rewrite"}
				if c.gmail {
					h.Errors = []providertest.ErrorCase{
						{Name: "550 5.4.5 at MAIL", Class: mailerr.Quota, Code: "4.4.5", Set: c.refusal(world.Rule{Service: "gmail-smtp", Route: "MAIL", Status: 550, Code: "5.4.5", Text: "Daily user sending limit exceeded."})},
						{Name: "550 5.7.1 after the dot", Class: mailerr.Permanent, Code: "5.7.1", Set: c.refusal(world.Rule{Service: "gmail-smtp", Route: "EOD", Status: 550, Code: "5.7.1", Text: "Spam."})},
						{Name: "451 after the dot", Class: mailerr.Temporary, Set: c.refusal(world.Rule{Service: "gmail-smtp", Route: "EOD", Status: 451, Code: "4.3.0", Text: "Try later."})},
						{Name: "454 at AUTH", Class: mailerr.Throttled, Set: c.refusal(world.Rule{Service: "gmail-smtp", Route: "AUTH", Status: 454, Code: "4.7.0", Text: "Too many login attempts."})},
						{Name: "552 5.3.4", Class: mailerr.Permanent, Code: "5.3.4", Set: c.refusal(world.Rule{Service: "gmail-smtp", Route: "MAIL", Status: 552, Code: "5.3.4", Text: "Too big."})},
						{Name: "535 for ever", Class: mailerr.Auth, Set: c.refusal(world.Rule{Service: "gmail-smtp", Route: "AUTH", Status: 535, Code: "5.7.8", Text: "Not accepted."})},
					}
					return h
				}
				if !c.direct {
					h.Stager = c
				}
				h.Errors = []providertest.ErrorCase{
					{Name: "403 ErrorSendAsDenied", Class: mailerr.Permanent, Code: "5.7.1", Set: c.refusal(world.Rule{Service: "graph", Status: 403, Code: "ErrorSendAsDenied"})},
					{Name: "404 ErrorInvalidUser", Class: mailerr.Auth, Set: c.refusal(world.Rule{Service: "graph", Status: 404, Code: "ErrorInvalidUser"})},
					{Name: "503 HTML", Class: mailerr.Temporary, Unsure: true, Set: c.refusal(world.Rule{Service: "graph", Status: 503, Body: "<html>busy</html>"})},
					{Name: "token endpoint down", Class: mailerr.Temporary, Set: func() {
						br.cloud.Identity.ExpireTokens()
						br.cloud.World.Add(world.Rule{Service: "entra", Status: 503})
					}},
				}
				return h
			})
		})
	}
}

func rewriting(s string) string {
	return strings.Replace(s, `profile = "contoso"`, "profile = \"contoso\"\nenvelope_mismatch = \"rewrite\"", 1)
}

func withCertificate(s string) string {
	return strings.Replace(s, `client_secret  = "`+demoSecret+`"`, `assertion = { keystore = "demo" }`, 1)
}

// useSubmission makes the Gmail account speak STARTTLS: its port is known only once the clouds run.
func (b *bridge) useSubmission(t *testing.T) {
	t.Helper()
	if err := b.close(); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(b.path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(b.path, []byte(strings.Replace(string(text), `"`+b.cloud.SMTPS+`"`, `"`+b.cloud.Submission+`"`, 1)), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := config.Load(b.path)
	if err != nil {
		t.Fatal(err)
	}
	if b.App, err = New(t.Context(), f, Options{Version: "test", LogTo: io.Discard}); err != nil {
		t.Fatal(err)
	}
}
