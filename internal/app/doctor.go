package app

import (
	"bytes"
	"context"
	"crypto/rand"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"mailbridge/auth/oauth"
	"mailbridge/internal/config"
	"mailbridge/internal/mail"
	"mailbridge/internal/mailerr"
	"mailbridge/providers"
)

// DoctorOptions says what doctor looks at.
type DoctorOptions struct {
	Accounts []string // empty: all
	Send     bool     // send a message from each mailbox to itself
	JSON     bool
	Version  string
	Out      io.Writer
}

// expireSoon is when an expiring certificate is worth a warning.
const expireSoon = 30 * 24 * time.Hour

// Doctor checks everything between the configuration and a sent message. It returns ErrStuck when something is
// wrong, after it has printed what.
func Doctor(ctx context.Context, f *config.File, o DoctorOptions) error {
	r := &Report{}
	if !o.JSON {
		r.show = textReport(o.Out)
	}
	r.add(Finding{"", "config", OK, fmt.Sprintf("%s: %d profiles, %d accounts", f.Path, len(f.Profiles), len(f.Accounts)), ""})
	r.checkState(f)
	a, err := New(ctx, f, Options{Version: o.Version, LogTo: io.Discard})
	if err != nil {
		r.add(Finding{"", "start", Fail, err.Error(), "mend this first: the service would not start"})
	} else {
		names := o.Accounts
		if len(names) == 0 {
			names = slices.Sorted(maps.Keys(f.Accounts))
		}
		for _, name := range names {
			a.examine(ctx, r, a.accounts[mail.AccountID(name)], o.Send)
		}
		if err := a.close(); err != nil {
			return err
		}
	}
	if o.JSON {
		if err := r.WriteJSON(o.Out); err != nil {
			return err
		}
	}
	return r.Err()
}

// checkState looks whether the state folder can be written.
func (r *Report) checkState(f *config.File) {
	dir := f.Absolute()
	err := os.MkdirAll(dir, 0o700)
	if err == nil {
		probe := filepath.Join(dir, ".doctor")
		if err = os.WriteFile(probe, nil, 0o600); err == nil {
			err = os.Remove(probe)
		}
	}
	if err != nil {
		r.add(Finding{"", "state_dir", Fail, err.Error(), "let the user that runs the service own " + dir})
		return
	}
	r.add(Finding{"", "state_dir", OK, dir + " can be written", ""})
}

// examine checks one account, from the network up.
func (a *App) examine(ctx context.Context, r *Report, c *account, send bool) {
	id, p := string(c.id), c.profile
	add := func(check string, level Level, text, next string) { r.add(Finding{id, check, level, text, next}) }
	if e := p.entry; e != nil {
		text := "key " + e.Alias
		switch {
		case e.Certificate == nil:
			add("key", OK, text+", no certificate", "")
		case a.now().After(e.Certificate.NotAfter) && p.cfg.Provider == "graph":
			add("key", Fail, text+": its certificate expired on "+e.Certificate.NotAfter.Format(time.DateOnly), "make a new key and certificate, and upload the certificate to the application")
		case a.now().Add(expireSoon).After(e.Certificate.NotAfter) && p.cfg.Provider == "graph":
			add("key", Warn, text+": its certificate expires on "+e.Certificate.NotAfter.Format(time.DateOnly), "make a new one in time, and upload it to the application")
		default:
			add("key", OK, text+", certificate until "+e.Certificate.NotAfter.Format(time.DateOnly), "")
		}
	}
	good := true
	for _, e := range p.endpoints() {
		good = r.checkEndpoint(ctx, id, e, p.roots) && good
	}
	if !good {
		add("token", Skip, "not asked for, because of the above", "")
		return
	}
	r.checkClock(ctx, id, p.client.Endpoint(), &http.Client{Transport: p.transport}, a.now)
	tctx, cancel := context.WithTimeout(ctx, checkTimeout*2)
	defer cancel()
	tok, err := c.tokens.Token(tctx)
	if err != nil {
		add("token", Fail, mailerr.Of(err).Text, "")
		return
	}
	add("token", OK, fmt.Sprintf("issued, good for %v", tok.Expiry.Sub(a.now()).Round(time.Second)), "")
	if p.cfg.Provider == "graph" {
		c.checkPermissions(add, tok)
	}
	detail, err := c.provider.Prober.Probe(tctx)
	if err != nil {
		add("mailbox", Fail, mailerr.Of(err).Text, "")
		return
	}
	add("mailbox", OK, detail, "")
	if send {
		a.probeSend(ctx, add, c)
	}
}

// endpoints lists the hosts that the profile needs.
func (p *profile) endpoints() []endpoint {
	host := func(what, raw string) []endpoint {
		u, err := url.Parse(raw)
		if err != nil {
			return nil
		}
		port := u.Port()
		if port == "" {
			port = "443"
		}
		return []endpoint{{what, net.JoinHostPort(u.Hostname(), port), true}}
	}
	list := host("token endpoint", p.client.Endpoint())
	if p.cfg.Provider == "graph" {
		return append(list, host("Graph", p.base)...)
	}
	return append(list, endpoint{"Gmail SMTP", p.cfg.SMTP, p.cfg.SMTPTLS == "implicit"}, endpoint{"Gmail IMAP", p.cfg.IMAP, true})
}

// checkPermissions compares what the token shows with what sending needs
// (https://learn.microsoft.com/graph/permissions-reference).
func (c *account) checkPermissions(add func(string, Level, string, string), tok providers.Token) {
	cl, ok := oauth.Inspect(tok.Value)
	if !ok {
		add("permissions", Skip, "the token does not show its permissions", "")
		return
	}
	have := append(slices.Clone(cl.Roles), cl.Scopes...)
	kind := "application"
	if len(cl.Scopes) > 0 {
		kind = "delegated"
	}
	var missing []string
	for _, need := range []string{"Mail.Send", "Mail.ReadWrite"} {
		if !slices.Contains(have, need) {
			missing = append(missing, need)
		}
	}
	switch {
	case len(missing) == 0:
		add("permissions", OK, "Mail.Send and Mail.ReadWrite ("+kind+")", "")
	case len(missing) == 1 && missing[0] == "Mail.ReadWrite":
		add("permissions", Warn, "Mail.Send alone: sending works, without looking a lost answer up", "grant Mail.ReadWrite ("+kind+") with admin consent; if it was granted by RBAC for Applications, that does not show here")
	default:
		add("permissions", Warn, "the token does not show "+strings.Join(missing, " and "), "grant it ("+kind+") with admin consent; if it was granted by RBAC for Applications, that does not show in a token: the next check tells")
	}
}

// probeSend sends a message from the mailbox to itself.
func (a *App) probeSend(ctx context.Context, add func(string, Level, string, string), c *account) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	id := rand.Text()
	_, domain, _ := strings.Cut(c.cfg.Mailbox, "@")
	msgID := "<" + strings.ToLower(id) + "@" + domain + ">"
	raw := fmt.Sprintf("Received: by %s with SMTP id %s; %s\r\nFrom: %s\r\nTo: %s\r\nSubject: Mailbridge doctor\r\nDate: %s\r\nMessage-ID: %s\r\n\r\nThis message was sent by mailbridge doctor --send, to show that sending works.\r\n",
		a.hostname, id, a.now().Format(time.RFC1123Z), c.cfg.Mailbox, c.cfg.Mailbox, a.now().Format(time.RFC1123Z), msgID)
	out := &mail.Outgoing{Envelope: mail.Envelope{From: c.cfg.Mailbox, To: []string{c.cfg.Mailbox}}, Content: text(raw), TraceID: id, MessageID: msgID}
	h, err := c.provider.Sender.Prepare(ctx, out)
	if err == nil {
		_, err = c.provider.Sender.Commit(ctx, out, h)
	}
	if err != nil {
		e := mailerr.Of(err)
		add("send", Fail, e.Text, "")
		return
	}
	add("send", OK, "sent a message to "+c.cfg.Mailbox+", look for the subject \"Mailbridge doctor\"", "")
}

// text is a message in memory.
type text string

func (t text) Size() int64 { return int64(len(t)) }
func (t text) Open() (io.ReadCloser, error) {
	return io.NopCloser(bytes.NewReader([]byte(t))), nil
}
