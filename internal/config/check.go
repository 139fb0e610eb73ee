package config

import (
	"fmt"
	"maps"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Defaults of an account's settings.
const (
	DefaultFirstAttempt = 10 * time.Second
	DefaultSettle       = 2 * time.Minute
	DefaultGiveUp       = 5 * 24 * time.Hour
)

type checker struct {
	f        *File
	at       map[string][2]int
	problems []Problem
}

// bad reports a problem at key, or at the nearest enclosing key that the file has.
func (c *checker) bad(key, format string, a ...any) {
	p := Problem{Key: key, Text: fmt.Sprintf(format, a...)}
	for k := key; k != ""; {
		if pos, ok := c.at[k]; ok {
			p.Line, p.Column = pos[0], pos[1]
			break
		}
		i := strings.LastIndexByte(k, '.')
		if i < 0 {
			break
		}
		k = k[:i]
	}
	c.problems = append(c.problems, p)
}

// choice checks that *v is one of the words, the first of which is the default.
func (c *checker) choice(key string, v *string, words ...string) {
	if *v == "" {
		*v = words[0]
		return
	}
	if !slices.Contains(words, *v) {
		c.bad(key, "%q is not one of %s", *v, quoted(words))
	}
}

func (c *checker) check() {
	f := c.f
	if f.StateDir == "" {
		c.bad("state_dir", "it is missing: the folder for accepted mail, passwords and tokens, such as \"/var/lib/mailbridge\"")
	}
	c.smtp()
	if f.HTTP.Address != "" {
		c.address("http.address", f.HTTP.Address)
	}
	if (f.TLS.Certificate == "") != (f.TLS.Key == "") {
		c.bad("tls", "certificate and key go together: name both files, or neither to have a certificate made")
	}
	f.TLS.Certificate = c.path("tls.certificate", f.TLS.Certificate)
	f.TLS.Key = c.path("tls.key", f.TLS.Key)
	c.choice("log.level", &f.Log.Level, "info", "debug", "warn", "error")
	c.choice("log.format", &f.Log.Format, "text", "json")
	c.choice("vault.key", &f.Vault.Key, "file", "keyring")
	for _, name := range slices.Sorted(maps.Keys(f.Keystores)) {
		f.Keystores[name] = c.keystore("keystores."+name, f.Keystores[name])
	}
	for _, name := range slices.Sorted(maps.Keys(f.Profiles)) {
		c.name("profiles."+name, name)
		f.Profiles[name] = c.profile("profiles."+name, f.Profiles[name])
	}
	seen := map[string]string{}
	for _, name := range slices.Sorted(maps.Keys(f.Accounts)) {
		key := "accounts." + name
		c.name(key, name)
		a := c.account(key, f.Accounts[name])
		f.Accounts[name] = a
		for _, login := range []string{strings.ToLower(name), strings.ToLower(a.Mailbox)} {
			if other, ok := seen[login]; ok && other != name && login != strings.ToLower(a.Mailbox) {
				c.bad(key, "clients log in by account name or mailbox address, and %q is also account %s", login, other)
			}
		}
		seen[strings.ToLower(name)] = name
		if _, ok := seen[strings.ToLower(a.Mailbox)]; !ok {
			seen[strings.ToLower(a.Mailbox)] = name
		}
	}
}

// name checks the name of a table that becomes a login, a file name or an argument on a command line.
func (c *checker) name(key, name string) {
	for _, r := range name {
		if !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("-_.@", r)) {
			c.bad(key, "the name %q may hold letters, digits and - _ . @ only", name)
			return
		}
	}
	if name == "" || len(name) > 128 {
		c.bad(key, "a name has 1 to 128 characters")
	}
}

func (c *checker) smtp() {
	s := &c.f.SMTP
	if s.MaxConnections == 0 {
		s.MaxConnections = 2000
	}
	if s.MaxConnectionsPerAddress == 0 {
		s.MaxConnectionsPerAddress = 200
	}
	if s.MaxConnections < 0 || s.MaxConnectionsPerAddress < 0 {
		c.bad("smtp.max_connections", "a limit is a positive number")
	}
	used := map[string]int{}
	for i := range s.Listen {
		l := &s.Listen[i]
		key := "smtp.listen." + strconv.Itoa(i)
		c.choice(key+".tls", &l.TLS, "starttls", "implicit", "none")
		c.choice(key+".tls_profile", &l.TLSProfile, "modern", "legacy-1.2", "legacy-1.0")
		c.choice(key+".line_ends", &l.LineEnds, "strict", "tolerant")
		if l.Address == "" {
			c.bad(key+".address", "it is missing: host and port to listen on, such as \"127.0.0.1:1587\"")
			continue
		}
		c.address(key+".address", l.Address)
		if j, ok := used[l.Address]; ok && !strings.HasSuffix(l.Address, ":0") {
			c.bad(key+".address", "listener %d has %s already", j+1, l.Address)
		}
		used[l.Address] = i
		if l.TLS == "none" && !l.CleartextAuth && !loopback(l.Address) {
			c.bad(key+".tls", "without TLS passwords are taken on loopback addresses only, so nobody could log in at %s: use \"starttls\" or \"implicit\", or set cleartext_auth = true if the network is private", l.Address)
		}
	}
}

func (c *checker) address(key, addr string) {
	_, port, err := net.SplitHostPort(addr)
	if n, perr := strconv.Atoi(port); err != nil || perr != nil || n < 0 || n > 65535 {
		c.bad(key, "%q is not host:port, such as \"127.0.0.1:1587\" or \":587\"", addr)
	}
}

// loopback reports whether a listener's address is reachable from this machine alone.
func loopback(addr string) bool {
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		return false
	}
	ip, err := netip.ParseAddr(host)
	return err == nil && ip.IsLoopback() || host == "localhost"
}

// path resolves a file's name, with or without "file:" before it, and checks that the file is there.
func (c *checker) path(key, p string) string {
	if p == "" {
		return ""
	}
	p = c.f.Rel(strings.TrimPrefix(p, "file:"))
	if st, err := os.Stat(p); err != nil {
		c.bad(key, "cannot be read: %v", err)
	} else if st.IsDir() {
		c.bad(key, "%s is a folder, not a file", p)
	}
	return p
}

// reference checks a secret's reference and resolves a relative path in it.
func (c *checker) reference(key, ref string) string {
	if ref == "" {
		return ""
	}
	if !isReference(ref) {
		if !c.f.AllowLiteralSecrets {
			c.bad(key, "the secret stands here in clear: put it elsewhere and write \"env:NAME\", \"file:PATH\" or \"vault:NAME\" (or, for tests only, set allow_literal_secrets = true)")
		}
		return ref
	}
	kind, name, _ := strings.Cut(ref, ":")
	switch kind {
	case "env":
		if v, ok := os.LookupEnv(name); !ok || v == "" {
			c.bad(key, "the environment variable %s is not set", name)
		}
	case "file":
		return "file:" + c.path(key, name)
	}
	return ref
}

func (c *checker) keystore(key string, k Keystore) Keystore {
	switch {
	case k.File != "" && (k.Certificate != "" || k.Key != ""):
		c.bad(key, "name either file (PKCS#12 or a JSON key) or certificate and key (PEM), not both")
	case k.File == "" && (k.Certificate == "" || k.Key == ""):
		c.bad(key, "name a file (PKCS#12 or a Google JSON key), or certificate and key (PEM files)")
	}
	k.File = c.path(key+".file", k.File)
	k.Certificate = c.path(key+".certificate", k.Certificate)
	k.Key = c.path(key+".key", k.Key)
	k.Password = c.reference(key+".password", k.Password)
	return k
}

func (c *checker) profile(key string, p Profile) Profile {
	if p.Provider == "" {
		c.bad(key+".provider", "it is missing: \"graph\" or \"gmail\"")
	} else {
		c.choice(key+".provider", &p.Provider, "graph", "gmail")
	}
	c.choice(key+".cloud", &p.Cloud, "global", "us-gov-l4", "us-gov-l5", "china")
	p.ClientSecret = c.reference(key+".client_secret", p.ClientSecret)
	p.RefreshToken = c.reference(key+".refresh_token", p.RefreshToken)
	p.CA = c.path(key+".ca", p.CA)
	c.https(key+".token_endpoint", p.TokenEndpoint)
	c.https(key+".endpoint", p.Endpoint)
	switch p.Grant {
	case "":
		c.bad(key+".grant", "it is missing: \"client_credentials\", \"jwt_bearer\" or \"refresh_token\"")
	case "client_credentials":
		c.need(key, p.Grant, map[string]string{"tenant_id": p.TenantID, "client_id": p.ClientID})
		if p.Provider == "gmail" {
			c.bad(key+".grant", "Google has no such grant for mail: use \"jwt_bearer\" with a service account's key, or \"refresh_token\"")
		}
		switch {
		case p.ClientSecret == "" && p.Assertion == nil:
			c.bad(key, "client_credentials needs client_secret, or assertion = { keystore = …, alias = … } for a certificate")
		case p.ClientSecret != "" && p.Assertion != nil:
			c.bad(key+".assertion", "name client_secret or assertion, not both")
		}
		switch strings.ToLower(p.TenantID) {
		case "common", "organizations", "consumers":
			c.bad(key+".tenant_id", "client_credentials needs the tenant itself: its GUID or one of its domains, not %q", p.TenantID)
		}
	case "jwt_bearer":
		if p.JWT == nil {
			c.bad(key+".jwt", "jwt_bearer needs jwt = { keystore = …, alias = …, issuer = …, subject = \"{mailbox}\" }")
		}
		if p.Provider == "graph" {
			c.bad(key+".grant", "Microsoft has no such grant for mail: use \"client_credentials\" with assertion = { keystore = …, alias = … }")
		}
	case "refresh_token":
		c.need(key, p.Grant, map[string]string{"client_id": p.ClientID, "refresh_token": p.RefreshToken})
		if p.Provider == "graph" {
			c.need(key, p.Grant, map[string]string{"tenant_id": p.TenantID})
		}
	case "authorization_code", "device_code":
		c.bad(key+".grant", "signing in by browser or device is not in this version: use \"client_credentials\", \"jwt_bearer\", or \"refresh_token\" with a token obtained elsewhere")
	default:
		c.bad(key+".grant", "%q is not one of %s", p.Grant, quoted([]string{"client_credentials", "jwt_bearer", "refresh_token"}))
	}
	if p.Assertion != nil {
		c.keystoreRef(key+".assertion", p.Assertion.Keystore)
		c.choice(key+".assertion.algorithm", &p.Assertion.Algorithm, "PS256", "RS256")
	}
	if p.JWT != nil {
		c.keystoreRef(key+".jwt", p.JWT.Keystore)
		c.choice(key+".jwt.algorithm", &p.JWT.Algorithm, "RS256", "PS256", "ES256")
		if d := time.Duration(p.JWT.Lifetime); d > time.Hour {
			c.bad(key+".jwt.lifetime", "an assertion lives for an hour at most, not %v", d)
		}
	}
	for name := range p.Claims {
		if slices.Contains([]string{"iss", "sub", "aud", "exp", "iat", "nbf", "jti"}, name) {
			c.bad(key+".claims."+name, "this claim is set by the jwt or assertion table (issuer, subject, audience, lifetime); claims holds custom ones only")
		}
	}
	if p.Provider != "gmail" {
		for field, v := range map[string]string{"smtp": p.SMTP, "imap": p.IMAP, "smtp_tls": p.SMTPTLS} {
			if v != "" {
				c.bad(key+"."+field, "only profiles of provider \"gmail\" have it")
			}
		}
	} else {
		if p.SMTP == "" {
			p.SMTP = "smtp.gmail.com:465"
		}
		if p.IMAP == "" {
			p.IMAP = "imap.gmail.com:993"
		}
		c.address(key+".smtp", p.SMTP)
		c.address(key+".imap", p.IMAP)
		if p.SMTPTLS == "" {
			p.SMTPTLS = "starttls"
			if strings.HasSuffix(p.SMTP, ":465") {
				p.SMTPTLS = "implicit"
			}
		}
		c.choice(key+".smtp_tls", &p.SMTPTLS, "implicit", "starttls")
		if p.Endpoint != "" {
			c.bad(key+".endpoint", "only profiles of provider \"graph\" have it; Gmail is spoken to by smtp and imap")
		}
		if p.TenantID != "" {
			c.bad(key+".tenant_id", "only profiles of provider \"graph\" have it")
		}
	}
	return p
}

func (c *checker) keystoreRef(key, name string) {
	if name == "" {
		c.bad(key+".keystore", "it is missing: the name of a [keystores.NAME] table")
	} else if _, ok := c.f.Keystores[name]; !ok {
		c.bad(key+".keystore", "there is no [keystores.%s]%s", name, has(c.f.Keystores))
	}
}

func (c *checker) need(key, what string, fields map[string]string) {
	for _, name := range slices.Sorted(maps.Keys(fields)) {
		if fields[name] == "" {
			c.bad(key+"."+name, "%s needs it", what)
		}
	}
}

func (c *checker) https(key, v string) {
	if v == "" {
		return
	}
	u, err := url.Parse(strings.ReplaceAll(v, "{tenant_id}", "t"))
	if err != nil || u.Scheme != "https" || u.Host == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" {
		c.bad(key, "%q is not an https:// address without query", v)
	}
}

func (c *checker) account(key string, a Account) Account {
	if !plainAddress(a.Mailbox) {
		c.bad(key+".mailbox", "%q is not a mail address such as \"scanner@contoso.example\"", a.Mailbox)
	}
	p, ok := c.f.Profiles[a.Profile]
	if a.Profile == "" {
		c.bad(key+".profile", "it is missing: the name of a [profiles.NAME] table")
	} else if !ok {
		c.bad(key+".profile", "there is no [profiles.%s]%s", a.Profile, has(c.f.Profiles))
	}
	if len(a.May) == 0 {
		a.May = []string{"send"}
	}
	for _, m := range a.May {
		switch m {
		case "send":
		case "receive":
			c.bad(key+".may", "this version sends only: reading by IMAP is not in it yet; write may = [\"send\"]")
		default:
			c.bad(key+".may", "%q is not one of \"send\"", m)
		}
	}
	for _, pat := range a.From {
		if !plainAddress(strings.ReplaceAll(pat, "*", "x")) {
			c.bad(key+".from", "%q is not an address or a pattern such as \"*@devices.contoso.example\"", pat)
		}
	}
	c.choice(key+".accept", &a.Accept, "queued", "delivered")
	c.choice(key+".unsure", &a.Unsure, "hold", "resend")
	c.choice(key+".envelope_mismatch", &a.Mismatch, "refuse", "rewrite")
	c.choice(key+".route", &a.Route, "auto", "draft", "sendmail")
	if ok && p.Provider == "gmail" && a.Route != "auto" {
		c.bad(key+".route", "only accounts of Graph profiles have routes")
	}
	// RFC 6409 §5.3: every command is answered in under two minutes, the end of data too.
	if d := time.Duration(a.FirstAttempt); d > 100*time.Second {
		c.bad(key+".first_attempt", "clients wait two minutes at most: %v is too long, use up to 100s", d)
	} else if _, set := c.at[key+".first_attempt"]; !set {
		a.FirstAttempt = Duration(DefaultFirstAttempt)
	}
	if _, set := c.at[key+".settle"]; !set {
		a.Settle = Duration(DefaultSettle)
	}
	if a.GiveUp == 0 {
		a.GiveUp = Duration(DefaultGiveUp)
	}
	if time.Duration(a.GiveUp) < time.Minute {
		c.bad(key+".give_up", "under a minute there would be no second attempt")
	}
	for field, n := range map[string]int{"concurrent": a.Pace.Concurrent, "requests_per_10m": a.Pace.RequestsPer10Min,
		"upload_per_5m": int(a.Pace.UploadPer5Min), "messages_per_minute": a.Pace.MessagesPerMinute, "messages_per_day": a.Pace.MessagesPerDay} {
		if n < 0 {
			c.bad(key+".pace."+field, "a limit is a positive number, or 0 for the provider's own")
		}
	}
	return a
}

// plainAddress is a rough look for a slip of the pen; clouds know what their addresses are.
func plainAddress(s string) bool {
	local, domain, ok := strings.Cut(s, "@")
	return ok && local != "" && domain != "" && !strings.ContainsAny(s, " \t\r\n<>,;:\"()[]\\") && !strings.Contains(domain, "@")
}

func has[V any](m map[string]V) string {
	if len(m) == 0 {
		return ", and there are no others"
	}
	return "; there are: " + strings.Join(slices.Sorted(maps.Keys(m)), ", ")
}

func quoted(words []string) string {
	q := make([]string, len(words))
	for i, w := range words {
		q[i] = strconv.Quote(w)
	}
	return strings.Join(q, ", ")
}

// settings lists every key that the file may hold, by its last part.
func settings() []string {
	var names []string
	var walk func(t reflect.Type)
	walk = func(t reflect.Type) {
		switch t.Kind() {
		case reflect.Pointer, reflect.Slice, reflect.Map:
			walk(t.Elem())
		case reflect.Struct:
			for i := range t.NumField() {
				if name := t.Field(i).Tag.Get("toml"); name != "" && name != "-" {
					names = append(names, name)
					walk(t.Field(i).Type)
				}
			}
		}
	}
	walk(reflect.TypeFor[File]())
	return names
}

// nearest finds the setting that a mistyped key most likely meant; "" when none is near.
func nearest(key string) string {
	if slices.Contains(settings(), key) {
		return ""
	}
	best, dist := "", 3
	for _, s := range settings() {
		if d := distance(strings.ToLower(key), s); d < dist {
			best, dist = s, d
		}
	}
	return best
}

// distance counts the letters to insert, delete, change or swap with their neighbour between two short words.
func distance(a, b string) int {
	rows := make([][]int, len(a)+1)
	for i := range rows {
		rows[i] = make([]int, len(b)+1)
		rows[i][0] = i
	}
	for j := range rows[0] {
		rows[0][j] = j
	}
	for i := 1; i <= len(a); i++ {
		for j := 1; j <= len(b); j++ {
			change := rows[i-1][j-1]
			if a[i-1] != b[j-1] {
				change++
			}
			rows[i][j] = min(change, rows[i-1][j]+1, rows[i][j-1]+1)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				rows[i][j] = min(rows[i][j], rows[i-2][j-2]+1)
			}
		}
	}
	return rows[len(a)][len(b)]
}

// Absolute gives the state folder, resolved against the file's own folder.
func (f *File) Absolute() string { return filepath.Clean(f.Rel(f.StateDir)) }
