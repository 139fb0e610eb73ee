package app

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"os"
	"slices"
	"strings"
	"time"

	"mailbridge/auth"
	"mailbridge/auth/keystore"
	"mailbridge/auth/oauth"
	"mailbridge/auth/vault"
	"mailbridge/internal/cloudhttp"
	"mailbridge/internal/config"
	"mailbridge/internal/mail"
	"mailbridge/internal/outbox"
	"mailbridge/internal/pace"
	"mailbridge/internal/secret"
	"mailbridge/providers"
	"mailbridge/providers/gmail"
	"mailbridge/providers/graph"
)

// profile is an OAuth 2.0 authentication profile, ready for use.
type profile struct {
	cfg       config.Profile
	client    *oauth.Client
	transport *http.Transport
	roots     *x509.CertPool
	entry     *keystore.Entry // the key it signs with; nil when there is none
	base      string          // of the Graph API
}

// account is an account with everything that belongs to it.
type account struct {
	id       mail.AccountID
	cfg      config.Account
	profile  *profile
	tokens   *oauth.Source
	provider *providers.Account
	maxSize  int64
	pace     *pace.Scheduler
}

// secrets resolves references, with the vault behind vault:NAME.
func secrets(ctx context.Context, v *vault.Vault) config.Secrets {
	return config.Secrets{Vault: func(name string) (secret.Text, error) {
		t, err := v.Get(ctx, secretName(name))
		if errors.Is(err, vault.ErrNotFound) {
			return t, fmt.Errorf("the vault holds no secret %q: run mailbridge secret set %s", name, name)
		}
		return t, err
	}}
}

// secretName keeps the secrets of the configuration apart from the vault's other contents.
func secretName(name string) string { return "secret/" + name }

// profiles makes the profiles that accounts use.
func (a *App) profiles(ctx context.Context) error {
	sec := secrets(ctx, a.vault)
	for _, name := range slices.Sorted(maps.Keys(a.cfg.Profiles)) {
		p, err := a.profile(name, a.cfg.Profiles[name], sec)
		if err != nil {
			return fmt.Errorf("profiles.%s: %w", name, err)
		}
		a.profilesByName[name] = p
	}
	return nil
}

func (a *App) profile(name string, c config.Profile, sec config.Secrets) (*profile, error) {
	p := &profile{cfg: c, base: c.Endpoint}
	if c.CA != "" {
		pem, err := os.ReadFile(c.CA)
		if err != nil {
			return nil, err
		}
		p.roots = x509.NewCertPool()
		if !p.roots.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("%s holds no certificate in PEM", c.CA)
		}
	}
	p.transport = cloudhttp.NewTransport(p.roots, c.Proxy)
	o := oauth.Profile{Name: name, Provider: c.Provider, Grant: oauth.Grant(c.Grant), Cloud: c.Cloud, TenantID: c.TenantID, ClientID: c.ClientID, Claims: c.Claims, Scopes: c.Scopes, TokenEndpoint: c.TokenEndpoint}
	var err error
	if o.ClientSecret, err = sec.Resolve(c.ClientSecret); err != nil {
		return nil, fmt.Errorf("client_secret: %w", err)
	}
	if o.RefreshToken, err = sec.Resolve(c.RefreshToken); err != nil {
		return nil, fmt.Errorf("refresh_token: %w", err)
	}
	if c.Assertion != nil {
		if p.entry, err = a.key(c.Assertion.Keystore, c.Assertion.Alias, sec); err != nil {
			return nil, err
		}
		o.Assertion = &oauth.Assertion{Key: oauth.Key{Signer: p.entry.Key, Certificate: p.entry.Certificate}, Algorithm: c.Assertion.Algorithm, Audience: c.Assertion.Audience}
	}
	if c.JWT != nil {
		if p.entry, err = a.key(c.JWT.Keystore, c.JWT.Alias, sec); err != nil {
			return nil, err
		}
		// A JSON key brings its issuer and its id along.
		o.JWT = &oauth.JWT{Key: oauth.Key{Signer: p.entry.Key, Certificate: p.entry.Certificate, KeyID: or(c.JWT.KeyID, p.entry.KeyID)}, Issuer: or(c.JWT.Issuer, p.entry.ClientEmail),
			Subject: c.JWT.Subject, Audience: c.JWT.Audience, Algorithm: c.JWT.Algorithm, Lifetime: time.Duration(c.JWT.Lifetime)}
	}
	if p.client, err = oauth.NewClient(o, &http.Client{Transport: p.transport}, a.now); err != nil {
		return nil, err
	}
	if cloud, ok := oauth.CloudByName(c.Cloud); ok && p.base == "" {
		p.base = "https://" + cloud.Graph + "/v1.0"
	}
	return p, nil
}

func or(a, b string) string {
	if a != "" {
		return a
	}
	return b
}

func (a *App) key(store, alias string, sec config.Secrets) (*keystore.Entry, error) {
	k := a.cfg.Keystores[store]
	pw, err := sec.Resolve(k.Password)
	if err != nil {
		return nil, fmt.Errorf("keystores.%s.password: %w", store, err)
	}
	s, err := keystore.Open(keystore.Options{File: k.File, Password: pw, Certificate: k.Certificate, Key: k.Key})
	if err != nil {
		return nil, fmt.Errorf("keystores.%s: %w", store, err)
	}
	e, err := s.Entry(alias)
	if err != nil {
		return nil, fmt.Errorf("keystores.%s: %w", store, err)
	}
	return e, nil
}

// openAccounts opens every account at its provider. That asks no cloud anything.
func (a *App) openAccounts() error {
	limits, paces := map[string]pace.Limits{}, map[string]*pace.Scheduler{}
	for _, c := range a.cfg.Accounts {
		key := a.paceKey(c)
		limits[key] = strictest(limits[key], c.Pace)
	}
	for key, l := range limits {
		if strings.HasPrefix(key, "graph") {
			l = withDefaults(l, pace.Graph())
		}
		paces[key] = pace.New(l, a.now)
	}
	for _, name := range slices.Sorted(maps.Keys(a.cfg.Accounts)) {
		c := a.cfg.Accounts[name]
		p := a.profilesByName[c.Profile]
		acct := &account{id: mail.AccountID(name), cfg: c, profile: p, tokens: a.tokens.Source(p.client, c.Mailbox), pace: paces[a.paceKey(c)]}
		pc := providers.Config{ID: acct.id, Mailbox: c.Mailbox, Mismatch: providers.Mismatch(c.Mismatch), Log: a.log, NoDrafts: c.Route == "sendmail"}
		var err error
		switch p.cfg.Provider {
		case "graph":
			pc.Base = p.base
			pc.HTTP, pc.Uploads, err = cloudhttp.New(cloudhttp.Options{Transport: p.transport, Tokens: acct.tokens, Base: p.base, Provider: "graph", Version: a.version, Pace: acct.pace, Log: a.log, Metrics: a.httpMetrics})
			if err == nil {
				acct.provider, err = graph.Open(pc)
			}
		case "gmail":
			pc.Tokens, pc.SMTPAddr, pc.SMTPImplicit, pc.IMAPAddr, pc.Roots, pc.HELO = acct.tokens, p.cfg.SMTP, p.cfg.SMTPTLS == "implicit", p.cfg.IMAP, p.roots, a.hostname
			acct.provider, err = gmail.Open(pc)
		}
		if err != nil {
			return fmt.Errorf("accounts.%s: %w", name, err)
		}
		if n := c.Pace.Concurrent; n > 0 {
			acct.provider.Traits.Parallel = n
		}
		acct.maxSize = acct.provider.Traits.MaxSize
		if n := int64(c.MaxSize); n > 0 && (n < acct.maxSize || acct.maxSize == 0) {
			acct.maxSize = n
		}
		a.accounts[acct.id] = acct
	}
	return nil
}

// paceKey names what limits hold for: a mailbox of a cloud, under one application.
func (a *App) paceKey(c config.Account) string {
	p := a.cfg.Profiles[c.Profile]
	app := p.ClientID
	if p.JWT != nil {
		app = p.JWT.Keystore + "/" + p.JWT.Issuer
	}
	return strings.ToLower(strings.Join([]string{p.Provider, p.Cloud, p.Endpoint, p.TenantID, app, c.Mailbox}, "\x00"))
}

// strictest puts an account's limits, or the provider's, to those of the accounts that share its mailbox.
func strictest(l pace.Limits, c config.Pace) pace.Limits {
	return pace.Limits{
		Concurrent:        stricter(l.Concurrent, c.Concurrent),
		RequestsPer10Min:  stricter(l.RequestsPer10Min, c.RequestsPer10Min),
		UploadPer5Min:     stricter(l.UploadPer5Min, int64(c.UploadPer5Min)),
		MessagesPerMinute: stricter(l.MessagesPerMinute, c.MessagesPerMinute),
		MessagesPerDay:    stricter(l.MessagesPerDay, c.MessagesPerDay),
	}
}

// withDefaults puts the provider's limits where none are set.
func withDefaults(l, d pace.Limits) pace.Limits {
	if l.Concurrent == 0 {
		l.Concurrent = d.Concurrent
	}
	if l.RequestsPer10Min == 0 {
		l.RequestsPer10Min = d.RequestsPer10Min
	}
	if l.UploadPer5Min == 0 {
		l.UploadPer5Min = d.UploadPer5Min
	}
	return l
}

// stricter is the smaller of two limits; 0 is none.
func stricter[T int | int64](a, b T) T {
	if a == 0 || b != 0 && b < a {
		return b
	}
	return a
}

// outboxAccounts is the accounts as the outbox sees them.
func (a *App) outboxAccounts() []outbox.Account {
	var list []outbox.Account
	for _, id := range slices.Sorted(maps.Keys(a.accounts)) {
		c := a.accounts[id]
		list = append(list, outbox.Account{ID: id, Mailbox: c.cfg.Mailbox, Provider: c.provider, Pace: c.pace, FirstAttempt: time.Duration(c.cfg.FirstAttempt), Delivered: c.cfg.Accept == "delivered",
			Resend: c.cfg.Unsure == "resend", Settle: time.Duration(c.cfg.Settle), GiveUp: time.Duration(c.cfg.GiveUp)})
	}
	return list
}

// authAccounts is the accounts as clients log in to them.
func (a *App) authAccounts() []auth.Account {
	var list []auth.Account
	for _, id := range slices.Sorted(maps.Keys(a.accounts)) {
		c := a.accounts[id]
		list = append(list, auth.Account{ID: id, Mailbox: c.cfg.Mailbox, Send: slices.Contains(c.cfg.May, "send"), From: c.cfg.From, MaxSize: c.maxSize})
	}
	return list
}
