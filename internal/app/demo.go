package app

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"software.sslmate.com/src/go-pkcs12"

	"mailbridge/auth"
	"mailbridge/internal/cloudsim"
	"mailbridge/internal/cloudsim/identity"
	"mailbridge/internal/config"
	"mailbridge/internal/mail"
	"mailbridge/internal/obs"
)

// DemoOptions says how the demo runs.
type DemoOptions struct {
	JSON      bool // settings as one JSON object on the first line
	Ephemeral bool // free ports
	Verbose   bool // log what happens
	Version   string
	Out       io.Writer
	LogTo     io.Writer
}

// The demo's world: two tenants, and mailboxes to send from and to.
const (
	demoTenant   = "11111111-2222-3333-4444-555555555555"
	demoClient   = "aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee"
	demoSecret   = "demo~secret"
	demoService  = "svc@demo.iam.gserviceaccount.com"
	demoPassword = "notasecret"
)

// endpointJSON is one port in the settings.
type endpointJSON struct {
	Host string `json:"host"`
	Port int    `json:"port"`
	TLS  string `json:"tls"`
}

type accountJSON struct {
	Name     string `json:"name"`
	Mailbox  string `json:"mailbox"`
	Password string `json:"password"`
	Provider string `json:"provider"`
}

// demoSettings is what anybody types into a mail client.
type demoSettings struct {
	SMTP     endpointJSON  `json:"smtp"`
	SMTPS    endpointJSON  `json:"smtps"`
	HTTP     string        `json:"http"`
	CA       string        `json:"ca"`
	Accounts []accountJSON `json:"accounts"`
}

// seed fills the simulated clouds with the demo's tenants and mailboxes.
func seed(c *cloudsim.Cloud, cert *x509.Certificate) error {
	pub, ok := cert.PublicKey.(*rsa.PublicKey)
	if !ok {
		return errors.New("the demo's key is not RSA")
	}
	c.Identity.AddApp(identity.App{TenantID: demoTenant, ClientID: demoClient, Secrets: []string{demoSecret}, Certificates: []*x509.Certificate{cert}, Roles: []string{"Mail.Send", "Mail.ReadWrite"}})
	c.Identity.AddServiceAccount(identity.ServiceAccount{Email: demoService, Keys: map[string]*rsa.PublicKey{"demo": pub}, Scopes: []string{"https://mail.google.com/"}})
	for _, m := range []string{"scanner@contoso.example", "ann@contoso.example", "hidden@contoso.example"} {
		c.Graph.AddMailbox(m)
	}
	for _, m := range []string{"relay@workspace.example", "ben@workspace.example"} {
		c.Gmail.AddMailbox(m)
		c.Identity.AddGoogleUser(m)
	}
	return nil
}

// demoKey makes a key with a certificate and writes it as a PKCS#12 file.
func demoKey(path string) (*x509.Certificate, error) {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return nil, err
	}
	t := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "mailbridge demo"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().AddDate(1, 0, 0)}
	der, err := x509.CreateCertificate(rand.Reader, t, t, key.Public(), key)
	if err != nil {
		return nil, err
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	p12, err := pkcs12.Modern.Encode(key, cert, nil, demoPassword)
	if err != nil {
		return nil, err
	}
	return cert, os.WriteFile(path, p12, 0o600)
}

// demoConfig is the demo's configuration file.
func demoConfig(dir string, c *cloudsim.Cloud, smtp, smtps, web string) string {
	return fmt.Sprintf(`state_dir = %q
allow_literal_secrets = true

[[smtp.listen]]
address = %q

[[smtp.listen]]
address = %q
tls     = "implicit"

[http]
address = %q

[keystores.demo]
file     = %q
password = %q

[profiles.contoso]
provider       = "graph"
grant          = "client_credentials"
tenant_id      = %q
client_id      = %q
client_secret  = %q
token_endpoint = %q
endpoint       = %q
ca             = %q

[profiles.workspace]
provider       = "gmail"
grant          = "jwt_bearer"
jwt            = { keystore = "demo", issuer = %q, subject = "{mailbox}" }
claims         = { scope = "https://mail.google.com/" }
token_endpoint = %q
smtp           = %q
smtp_tls       = "implicit"
imap           = %q
ca             = %q

[accounts.scanners]
mailbox = "scanner@contoso.example"
profile = "contoso"

[accounts.relay]
mailbox = "relay@workspace.example"
profile = "workspace"
`, filepath.Join(dir, "state"), smtp, smtps, web, filepath.Join(dir, "demo.p12"), demoPassword, demoTenant, demoClient, demoSecret, c.TokenEndpoint(), c.GraphURL(), c.CAFile,
		demoService, c.GoogleTokenEndpoint(), c.SMTPS, c.IMAPS, c.CAFile)
}

// Demo runs the bridge and the simulated clouds until ctx ends.
func Demo(ctx context.Context, o DemoOptions) (err error) {
	dir, err := os.MkdirTemp("", "mailbridge-demo-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	cert, err := demoKey(filepath.Join(dir, "demo.p12"))
	if err != nil {
		return err
	}
	co := cloudsim.Options{Dir: dir, Admin: "-"}
	smtp, smtps, web := "127.0.0.1:0", "127.0.0.1:0", "127.0.0.1:0"
	if !o.Ephemeral {
		co = simPorts(co)
		co.Admin = "-"
		smtp, smtps, web = "127.0.0.1:1587", "127.0.0.1:1465", "127.0.0.1:8025"
	}
	cloud, err := cloudsim.Start(co)
	if err != nil {
		return fmt.Errorf("%w (a demo may be running already; --ephemeral uses free ports)", err)
	}
	defer func() {
		sctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		defer cancel()
		err = errors.Join(err, cloud.Shutdown(sctx))
	}()
	if err := seed(cloud, cert); err != nil {
		return err
	}
	text := demoConfig(dir, cloud, smtp, smtps, web)
	path := filepath.Join(dir, "mailbridge.toml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		return err
	}
	f, err := config.Load(path)
	if err != nil {
		return err
	}
	f.Log.Level = "warn"
	if o.Verbose {
		f.Log.Level = "info"
	}
	list := func() []delivered {
		all := cloud.World.Deliveries()
		ds := make([]delivered, len(all))
		for i, d := range all {
			ds[i] = delivered(d)
		}
		return ds
	}
	a, err := New(ctx, f, Options{Version: o.Version, LogTo: o.LogTo, Pages: deliveriesHandler(list)})
	if err != nil {
		return err
	}
	passwords, err := demoPasswords(ctx, a)
	if err != nil {
		return errors.Join(err, a.close())
	}
	var werr error
	rerr := a.Run(ctx, func() { werr = a.announce(o, passwords) })
	return errors.Join(rerr, werr)
}

// demoPasswords makes a password for each account.
func demoPasswords(ctx context.Context, a *App) (map[mail.AccountID]string, error) {
	p, err := openPasswords(ctx, a.cfg)
	if err != nil {
		return nil, err
	}
	defer p.Close()
	m := map[mail.AccountID]string{}
	for id := range a.accounts {
		pw, err := p.Add(ctx, id, "demo", auth.ShortPassword)
		if err != nil {
			return nil, err
		}
		m[id] = pw.Reveal()
	}
	return m, nil
}

// announce prints the settings.
func (a *App) announce(o DemoOptions, passwords map[mail.AccountID]string) error {
	at := func(addr net.Addr, mode string) endpointJSON {
		host, port, err := net.SplitHostPort(addr.String())
		n, perr := strconv.Atoi(port)
		if err != nil || perr != nil {
			return endpointJSON{}
		}
		return endpointJSON{host, n, mode}
	}
	s := demoSettings{SMTP: at(a.listeners[0].Addr(), "starttls"), SMTPS: at(a.listeners[1].Addr(), "implicit"), HTTP: "http://" + a.httpLn.Addr().String(), CA: a.caFile}
	for _, id := range []mail.AccountID{"scanners", "relay"} {
		c := a.accounts[id]
		s.Accounts = append(s.Accounts, accountJSON{string(id), c.cfg.Mailbox, passwords[id], c.profile.cfg.Provider})
	}
	if o.JSON {
		return json.NewEncoder(o.Out).Encode(s)
	}
	w := &lines{w: o.Out}
	w.line("Mailbridge is running, with simulated clouds: nothing leaves this machine.")
	w.line("")
	w.line("Settings for a mail client:")
	w.line("  outgoing server   %s, port %d with STARTTLS, or port %d with TLS", s.SMTP.Host, s.SMTP.Port, s.SMTPS.Port)
	w.line("  authentication    user name and password (PLAIN or LOGIN)")
	w.line("  certificate       signed by %s", s.CA)
	w.line("")
	for _, c := range s.Accounts {
		cloud := "Microsoft 365 (Graph, client secret)"
		if c.Provider == "gmail" {
			cloud = "Gmail (XOAUTH2, service account with a .p12)"
		}
		w.line("  user %-9s password %s   sends as %s through %s", c.Name, c.Password, c.Mailbox, cloud)
	}
	w.line("")
	w.line("Mailboxes to send to: ann@contoso.example, ben@workspace.example; any other address works too.")
	w.line("What was delivered, each recipient's copy: %s", s.HTTP)
	w.line("")
	w.line("Stop with Ctrl-C.")
	return w.err
}

// lines writes lines until one fails.
type lines struct {
	w   io.Writer
	err error
}

func (l *lines) line(format string, a ...any) {
	if l.err == nil {
		_, l.err = fmt.Fprintf(l.w, format+"\n", a...)
	}
}

// simPorts are the fixed ports of the simulated clouds.
func simPorts(o cloudsim.Options) cloudsim.Options {
	o.API, o.Uploads, o.SMTPS, o.Submission, o.IMAPS, o.Admin = "127.0.0.1:8443", "127.0.0.1:8444", "127.0.0.1:8465", "127.0.0.1:8587", "127.0.0.1:8993", "127.0.0.1:8026"
	return o
}

// CloudsimOptions says how the simulated clouds run alone.
type CloudsimOptions struct {
	Dir       string
	Ephemeral bool
	Out       io.Writer
	LogTo     io.Writer
}

// Cloudsim runs the simulated clouds alone until ctx ends, seeded like the demo's.
func Cloudsim(ctx context.Context, o CloudsimOptions) (err error) {
	dir := o.Dir
	if dir == "" {
		if dir, err = os.MkdirTemp("", "mailbridge-cloudsim-"); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	} else if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	log, err := obs.NewLogger(o.LogTo, obs.LogOptions{})
	if err != nil {
		return err
	}
	cert, err := demoKey(filepath.Join(dir, "demo.p12"))
	if err != nil {
		return err
	}
	co := cloudsim.Options{Dir: dir, Log: log}
	if !o.Ephemeral {
		co = simPorts(co)
	}
	cloud, err := cloudsim.Start(co)
	if err != nil {
		return err
	}
	if err := seed(cloud, cert); err != nil {
		return errors.Join(err, cloud.Shutdown(ctx))
	}
	conf := filepath.Join(dir, "mailbridge.toml")
	if err := os.WriteFile(conf, []byte(demoConfig(dir, cloud, "127.0.0.1:1587", "127.0.0.1:1465", "127.0.0.1:8025")), 0o600); err != nil {
		return errors.Join(err, cloud.Shutdown(ctx))
	}
	w := &lines{w: o.Out}
	w.line("Simulated clouds, for tests; nothing leaves this machine.")
	w.line("  Entra ID     %s (tenant %s, client %s, secret %s)", cloud.TokenEndpoint(), demoTenant, demoClient, demoSecret)
	w.line("  Graph        %s", cloud.GraphURL())
	w.line("  Google       %s (service account %s, key %s, password %s)", cloud.GoogleTokenEndpoint(), demoService, filepath.Join(dir, "demo.p12"), demoPassword)
	w.line("  Gmail        SMTP %s (TLS), %s (STARTTLS), IMAP %s (TLS)", cloud.SMTPS, cloud.Submission, cloud.IMAPS)
	w.line("  trust        %s", cloud.CAFile)
	w.line("  seen, knobs  http://%s/_sim/deliveries, /_sim/requests, POST /_sim/rules", cloud.Admin)
	w.line("  a bridge     mailbridge --config %s doctor", conf)
	if w.err != nil {
		return errors.Join(w.err, cloud.Shutdown(ctx))
	}
	<-ctx.Done()
	sctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	return cloud.Shutdown(sctx)
}
