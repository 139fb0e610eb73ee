// Package config reads the one configuration file. It is strict: an unknown key, a reference to nothing, a
// secret in clear or a setting that contradicts another is an error with line, column and what was expected,
// and all of them are reported at once. Reading it starts nothing and opens no network connection.
package config

import (
	"time"

	"mailbridge/internal/secret"
)

// File is the configuration as written, checked, with defaults filled in. Secrets are still references:
// Resolve gives their values.
type File struct {
	Path string `toml:"-"`

	StateDir            string `toml:"state_dir"`
	AllowLiteralSecrets bool   `toml:"allow_literal_secrets"`

	SMTP      SMTP                `toml:"smtp"`
	TLS       TLS                 `toml:"tls"`
	HTTP      HTTP                `toml:"http"`
	Log       Log                 `toml:"log"`
	Vault     Vault               `toml:"vault"`
	Keystores map[string]Keystore `toml:"keystores"`
	Profiles  map[string]Profile  `toml:"profiles"`
	Accounts  map[string]Account  `toml:"accounts"`
}

// SMTP is the submission server.
type SMTP struct {
	Hostname string       `toml:"hostname"` // in greeting, EHLO and Received; default: the machine's name
	Listen   []SMTPListen `toml:"listen"`
	// HideClient leaves the client's address out of the Received line.
	HideClient bool `toml:"hide_client"`
	// MaxConnections and MaxConnectionsPerAddress bound the sessions; defaults 2000 and 200.
	MaxConnections           int `toml:"max_connections"`
	MaxConnectionsPerAddress int `toml:"max_connections_per_address"`
}

// SMTPListen is one port.
type SMTPListen struct {
	Address       string `toml:"address"`
	TLS           string `toml:"tls"`            // "implicit", "starttls" (default), "none"
	TLSProfile    string `toml:"tls_profile"`    // "modern" (default), "legacy-1.2", "legacy-1.0"
	CleartextAuth bool   `toml:"cleartext_auth"` // take passwords without TLS from other machines too
	LineEnds      string `toml:"line_ends"`      // "strict" (default) or "tolerant": bare line feeds are repaired
	AuthEquals    bool   `toml:"auth_equals"`    // announce AUTH=PLAIN LOGIN as well, for very old clients
}

// TLS names the server's certificate; without it one is made and kept in state_dir.
type TLS struct {
	Certificate string `toml:"certificate"`
	Key         string `toml:"key"`
}

// HTTP is the listener for health, metrics and the status page.
type HTTP struct {
	Address string `toml:"address"`
}

// Log says how much is logged and in which form.
type Log struct {
	Level  string `toml:"level"`  // "debug", "info" (default), "warn", "error"
	Format string `toml:"format"` // "text" (default), "json"
}

// Vault says where the key comes from under which tokens are sealed at rest.
type Vault struct {
	Key string `toml:"key"` // "file" (default): a 0600 file in state_dir; "keyring": the OS keyring
}

// Keystore is a source of private keys.
type Keystore struct {
	File        string `toml:"file"`     // PKCS#12 or a Google service-account JSON key
	Password    string `toml:"password"` // reference
	Certificate string `toml:"certificate"`
	Key         string `toml:"key"`
}

// Profile is an OAuth 2.0 authentication profile.
type Profile struct {
	Provider      string         `toml:"provider"` // "graph", "gmail"
	Grant         string         `toml:"grant"`    // "client_credentials", "jwt_bearer", "refresh_token"
	TenantID      string         `toml:"tenant_id"`
	ClientID      string         `toml:"client_id"`
	ClientSecret  string         `toml:"client_secret"` // reference
	Assertion     *Assertion     `toml:"assertion"`
	JWT           *JWT           `toml:"jwt"`
	Claims        map[string]any `toml:"claims"`
	Scopes        []string       `toml:"scopes"`
	RefreshToken  string         `toml:"refresh_token"` // reference
	TokenEndpoint string         `toml:"token_endpoint"`
	Endpoint      string         `toml:"endpoint"`
	Cloud         string         `toml:"cloud"` // "global" (default), "us-gov-l4", "us-gov-l5", "china"
	CA            string         `toml:"ca"`    // PEM file of roots to trust instead of the system's
	SMTP          string         `toml:"smtp"`  // host:port; 465 speaks TLS at once, any other STARTTLS unless smtp_tls says
	SMTPTLS       string         `toml:"smtp_tls"`
	IMAP          string         `toml:"imap"`
	Proxy         bool           `toml:"proxy"` // use HTTPS_PROXY and its kin from the environment
}

// Assertion is a client assertion (RFC 7523 §2.2) in place of a client secret.
type Assertion struct {
	Keystore  string `toml:"keystore"`
	Alias     string `toml:"alias"`
	Algorithm string `toml:"algorithm"` // "PS256" (default), "RS256"
	Audience  string `toml:"audience"`  // default: the token endpoint
}

// JWT is a JWT bearer grant (RFC 7523 §2.1).
type JWT struct {
	Keystore  string   `toml:"keystore"`
	Alias     string   `toml:"alias"`
	Issuer    string   `toml:"issuer"`
	Subject   string   `toml:"subject"`
	Audience  string   `toml:"audience"`
	KeyID     string   `toml:"key_id"`
	Algorithm string   `toml:"algorithm"`
	Lifetime  Duration `toml:"lifetime"`
}

// Account is what a client logs in to.
type Account struct {
	Mailbox  string   `toml:"mailbox"`
	Profile  string   `toml:"profile"`
	May      []string `toml:"may"`
	From     []string `toml:"from"`
	Accept   string   `toml:"accept"` // "queued" (default), "delivered"
	Unsure   string   `toml:"unsure"` // "hold" (default), "resend"
	Mismatch string   `toml:"envelope_mismatch"`
	Route    string   `toml:"route"` // Graph: "auto" (default), "draft", "sendmail"

	FirstAttempt Duration `toml:"first_attempt"`
	Settle       Duration `toml:"settle"`
	GiveUp       Duration `toml:"give_up"`
	MaxSize      Size     `toml:"max_size"`
	Pace         Pace     `toml:"pace"`
}

// Pace bounds what an account asks of its cloud. Zero is the provider's default; accounts on one mailbox
// share the strictest.
type Pace struct {
	Concurrent        int  `toml:"concurrent"`
	RequestsPer10Min  int  `toml:"requests_per_10m"`
	UploadPer5Min     Size `toml:"upload_per_5m"`
	MessagesPerMinute int  `toml:"messages_per_minute"`
	MessagesPerDay    int  `toml:"messages_per_day"`
}

// Duration is written as "90s", "2m", "120h" or "5d".
type Duration time.Duration

// Size is written as "25MB" (10^6), "32MiB" (2^20) or a number of bytes.
type Size int64

// Secrets are the values behind references.
type Secrets struct {
	// Vault reads vault:NAME; nil makes such a reference an error.
	Vault func(name string) (secret.Text, error)
	// Getenv is os.Getenv but for tests.
	Getenv func(string) (string, bool)
}
