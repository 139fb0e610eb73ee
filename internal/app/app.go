// Package app wires everything: the configuration into profiles, accounts, outbox and servers, and their
// lifecycle. It alone knows all other packages.
package app

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"mailbridge/auth"
	"mailbridge/auth/oauth"
	"mailbridge/auth/vault"
	"mailbridge/internal/cert"
	"mailbridge/internal/cloudhttp"
	"mailbridge/internal/config"
	"mailbridge/internal/mail"
	"mailbridge/internal/obs"
	"mailbridge/internal/outbox"
	"mailbridge/smtpd"
)

// stopTimeout is how long running sessions and attempts have after the first signal.
const stopTimeout = 30 * time.Second

// Options is what the command line adds to the configuration.
type Options struct {
	Version string
	LogTo   io.Writer
	// Pages serves / of the HTTP listener; nil is the status page.
	Pages http.Handler

	outbox func(*outbox.Options) // changes the outbox's options, in tests
}

// App is the bridge.
type App struct {
	cfg      *config.File
	version  string
	dir      string
	hostname string
	log      *slog.Logger
	now      func() time.Time
	pages    http.Handler
	tune     func(*outbox.Options)

	registry    *prometheus.Registry
	httpMetrics *cloudhttp.Metrics
	health      *obs.Health

	vault          *vault.Vault
	tokens         *oauth.Manager
	profilesByName map[string]*profile
	accounts       map[mail.AccountID]*account
	passwords      *auth.Passwords
	directory      *auth.Directory
	outbox         *outbox.Outbox
	smtp           *smtpd.Server

	caFile    string
	listeners []smtpd.Listener
	httpLn    net.Listener
	closers   []func() error // in the order of opening
}

// New opens everything that the configuration names and listens nowhere yet.
func New(ctx context.Context, f *config.File, o Options) (_ *App, err error) {
	a := &App{cfg: f, version: o.Version, dir: f.Absolute(), now: time.Now, pages: o.Pages, tune: o.outbox, registry: obs.NewRegistry(o.Version), health: &obs.Health{},
		profilesByName: map[string]*profile{}, accounts: map[mail.AccountID]*account{}}
	defer func() {
		if err != nil {
			err = errors.Join(err, a.close())
		}
	}()
	if a.log, err = obs.NewLogger(o.LogTo, obs.LogOptions{Level: f.Log.Level, Format: f.Log.Format}); err != nil {
		return nil, err
	}
	if a.hostname = f.SMTP.Hostname; a.hostname == "" {
		if a.hostname, err = os.Hostname(); err != nil {
			a.hostname = "localhost"
		}
	}
	if err := os.MkdirAll(a.dir, 0o700); err != nil {
		return nil, fmt.Errorf("state_dir: %w", err)
	}
	a.httpMetrics = cloudhttp.NewMetrics(a.registry)
	if a.vault, err = openVault(ctx, f); err != nil {
		return nil, err
	}
	a.closers = append(a.closers, a.vault.Close)
	if err := a.profiles(ctx); err != nil {
		return nil, err
	}
	a.tokens = oauth.NewManager(oauth.ManagerOptions{Store: a.vault, Missing: func(err error) bool { return errors.Is(err, vault.ErrNotFound) }, Log: a.log, Now: a.now, Metrics: a.registry})
	a.closers = append(a.closers, func() error { a.tokens.Close(); return nil })
	if err := a.openAccounts(); err != nil {
		return nil, err
	}
	a.closers = append(a.closers, a.closeAccounts)
	return a, nil
}

// open opens what serving needs beyond New.
func (a *App) open(ctx context.Context) (err error) {
	if a.passwords, err = auth.OpenPasswords(ctx, filepath.Join(a.dir, "auth.db")); err != nil {
		return err
	}
	a.closers = append(a.closers, a.passwords.Close)
	if a.directory, err = auth.NewDirectory(a.authAccounts(), a.passwords, a.log); err != nil {
		return err
	}
	a.closers = append(a.closers, a.directory.Close)
	oo := outbox.Options{Dir: filepath.Join(a.dir, "outbox"), Accounts: a.outboxAccounts(), Log: a.log, Metrics: a.registry, Now: a.now, Hostname: a.hostname}
	if a.tune != nil {
		a.tune(&oo)
	}
	if a.outbox, err = outbox.Open(ctx, oo); err != nil {
		return err
	}
	a.health.Add("outbox", a.outbox.Ready)
	var most int64
	utf8 := len(a.accounts) > 0
	for _, c := range a.accounts {
		most = max(most, c.maxSize)
		utf8 = utf8 && c.provider.Traits.SMTPUTF8
	}
	a.smtp = smtpd.New(smtpd.Config{Hostname: a.hostname, Auth: a.directory, Submit: a.outbox, Log: a.log, Metrics: a.registry, MaxSize: most, SMTPUTF8: utf8,
		HideClient: a.cfg.SMTP.HideClient, MaxConns: a.cfg.SMTP.MaxConnections, MaxPerAddress: a.cfg.SMTP.MaxConnectionsPerAddress})
	return nil
}

// listen opens the ports.
func (a *App) listen() error {
	get, err := a.certificate()
	if err != nil {
		return err
	}
	for _, l := range a.cfg.SMTP.Listen {
		tc, err := smtpd.TLSConfig(l.TLSProfile, get)
		if err != nil {
			return err
		}
		ln, err := net.Listen("tcp", l.Address)
		if err != nil {
			return fmt.Errorf("smtp.listen: %w", err)
		}
		a.listeners = append(a.listeners, smtpd.Listener{Listener: ln, TLS: smtpd.TLSMode(l.TLS), TLSConfig: tc, CleartextAuth: l.CleartextAuth, Tolerant: l.LineEnds == "tolerant", AuthEquals: l.AuthEquals})
	}
	if a.cfg.HTTP.Address != "" {
		if a.httpLn, err = net.Listen("tcp", a.cfg.HTTP.Address); err != nil {
			return fmt.Errorf("http: %w", err)
		}
	}
	return nil
}

// certificate gives the server's certificate: the configured one, or one of our making.
func (a *App) certificate() (func(*tls.ClientHelloInfo) (*tls.Certificate, error), error) {
	if a.cfg.TLS.Certificate != "" {
		f, err := cert.Load(a.cfg.TLS.Certificate, a.cfg.TLS.Key, a.now)
		if err != nil {
			return nil, fmt.Errorf("tls: %w", err)
		}
		return f.GetCertificate, nil
	}
	m, err := cert.Make(filepath.Join(a.dir, "tls"), []string{a.hostname}, a.now)
	if err != nil {
		return nil, fmt.Errorf("making a certificate: %w", err)
	}
	a.caFile = m.CAFile
	return m.GetCertificate, nil
}

// Run serves until ctx ends, then stops in order: no new sessions, running ones finish, running attempts
// finish, everything is closed. Ready is called once all ports are open.
func (a *App) Run(ctx context.Context, ready func()) error {
	ctl, err := listenControl(a.dir)
	if err != nil {
		return errors.Join(err, a.close())
	}
	if err := a.open(ctx); err != nil {
		return errors.Join(err, ctl.Close(), a.close())
	}
	if err := a.listen(); err != nil {
		return errors.Join(err, ctl.Close(), a.closeListeners(), a.outbox.Stop(ctx), a.close())
	}
	if err := a.outbox.Start(ctx); err != nil {
		return errors.Join(err, ctl.Close(), a.closeListeners(), a.outbox.Stop(ctx), a.close())
	}
	var wg sync.WaitGroup
	failed := make(chan error, len(a.listeners)+2)
	web := func(l net.Listener, h http.Handler) *http.Server {
		s := &http.Server{Handler: h, ReadHeaderTimeout: 10 * time.Second, ErrorLog: slog.NewLogLogger(a.log.Handler(), slog.LevelDebug)}
		wg.Go(func() {
			if err := s.Serve(l); !errors.Is(err, http.ErrServerClosed) {
				failed <- err
			}
		})
		return s
	}
	servers := []*http.Server{web(ctl, a.control())}
	if a.httpLn != nil {
		servers = append(servers, web(a.httpLn, a.web()))
	}
	for _, l := range a.listeners {
		wg.Go(func() {
			if err := a.smtp.Serve(l); !errors.Is(err, smtpd.ErrClosed) {
				failed <- fmt.Errorf("SMTP on %s: %w", l.Addr(), err)
			}
		})
		a.log.Info("listening", "address", l.Addr().String(), "tls", string(l.TLS))
	}
	a.log.Info("serving", "version", a.version, "accounts", len(a.accounts))
	if ready != nil {
		ready()
	}
	var cause error
	select {
	case <-ctx.Done():
		a.log.Info("stopping")
	case cause = <-failed:
		a.log.Error("stopping, for a listener failed", "err", cause)
	}
	sctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTimeout)
	defer cancel()
	if err := a.smtp.Shutdown(sctx); err != nil {
		a.log.Warn("not all sessions ended in time", "err", err)
	}
	if err := a.outbox.Stop(sctx); err != nil {
		cause = errors.Join(cause, err)
	}
	for _, s := range servers {
		if err := s.Shutdown(sctx); err != nil {
			cause = errors.Join(cause, s.Close())
		}
	}
	wg.Wait()
	cause = errors.Join(cause, a.close())
	a.log.Info("stopped")
	return cause
}

func (a *App) closeListeners() (err error) {
	for _, l := range a.listeners {
		err = errors.Join(err, l.Close())
	}
	if a.httpLn != nil {
		err = errors.Join(err, a.httpLn.Close())
	}
	return err
}

func (a *App) closeAccounts() (err error) {
	for _, c := range a.accounts {
		if c.provider != nil && c.provider.Close != nil {
			err = errors.Join(err, c.provider.Close())
		}
	}
	for _, p := range a.profilesByName {
		p.transport.CloseIdleConnections()
	}
	return err
}

func (a *App) close() (err error) {
	for i := len(a.closers) - 1; i >= 0; i-- {
		err = errors.Join(err, a.closers[i]())
	}
	a.closers = nil
	return err
}

// resume lets an account, or all, try again at once.
func (a *App) resume(_ context.Context, name string) error {
	if name == "" {
		for id := range a.accounts {
			a.accounts[id].tokens.Retry()
			a.outbox.Resume(id)
		}
		return nil
	}
	c := a.accounts[mail.AccountID(name)]
	if c == nil {
		return fmt.Errorf("there is no account %q", name)
	}
	c.tokens.Retry()
	a.outbox.Resume(c.id)
	return nil
}

// Serve runs the service.
func Serve(ctx context.Context, f *config.File, o Options) error {
	if len(f.SMTP.Listen) == 0 {
		return fmt.Errorf("%s has no [[smtp.listen]]: the service would have nothing to do", f.Path)
	}
	a, err := New(ctx, f, o)
	if err != nil {
		return err
	}
	return a.Run(ctx, nil)
}

// openVault opens the vault of the state folder.
func openVault(ctx context.Context, f *config.File) (*vault.Vault, error) {
	key, err := vault.FindKey(f.Absolute(), f.Vault.Key == "keyring")
	if err != nil {
		return nil, err
	}
	return vault.Open(ctx, filepath.Join(f.Absolute(), "vault.db"), key)
}
