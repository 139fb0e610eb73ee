package app

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"mailbridge/auth"
	"mailbridge/internal/cert"
	"mailbridge/internal/config"
	"mailbridge/internal/mail"
	"mailbridge/internal/outbox"
	"mailbridge/internal/secret"
)

// NewPassword says what password to make.
type NewPassword struct {
	Account string
	Label   string
	Short   bool        // 16 characters
	Given   secret.Text // empty: make one
}

// Check tells what a configuration that reads well still lacks: secrets that references lead to, keys and their
// aliases, certificates. It makes nothing, asks no cloud, and reports all that it finds.
func Check(ctx context.Context, f *config.File) error {
	sec := config.Secrets{Vault: func(name string) (secret.Text, error) {
		return secret.Text{}, fmt.Errorf("the vault holds no secret %q: run mailbridge secret set %s", name, name)
	}}
	if _, err := os.Stat(filepath.Join(f.Absolute(), "vault.db")); err == nil {
		v, err := openVault(ctx, f)
		if err != nil {
			return err
		}
		defer v.Close()
		sec = secrets(ctx, v)
	}
	a := &App{cfg: f, now: time.Now}
	var errs []error
	for _, name := range slices.Sorted(maps.Keys(f.Profiles)) {
		if _, err := a.profile(name, f.Profiles[name], sec); err != nil {
			errs = append(errs, fmt.Errorf("profiles.%s: %w", name, err))
		}
	}
	if f.TLS.Certificate != "" {
		if _, err := cert.Load(f.TLS.Certificate, f.TLS.Key, a.now); err != nil {
			errs = append(errs, fmt.Errorf("tls: %w", err))
		}
	}
	return errors.Join(errs...)
}

func openPasswords(ctx context.Context, f *config.File) (*auth.Passwords, error) {
	return auth.OpenPasswords(ctx, filepath.Join(f.Absolute(), "auth.db"))
}

func known(f *config.File, account string) error {
	if _, ok := f.Accounts[account]; !ok {
		return fmt.Errorf("there is no account %q in %s; there are: %s", account, f.Path, strings.Join(slices.Sorted(maps.Keys(f.Accounts)), ", "))
	}
	return nil
}

// AddPassword makes or stores a bridge password.
func AddPassword(ctx context.Context, f *config.File, n NewPassword) (pw secret.Text, err error) {
	if err := known(f, n.Account); err != nil {
		return pw, err
	}
	p, err := openPasswords(ctx, f)
	if err != nil {
		return pw, err
	}
	defer p.Close()
	if !n.Given.Empty() {
		return n.Given, p.AddGiven(ctx, mail.AccountID(n.Account), n.Label, n.Given)
	}
	length := auth.LongPassword
	if n.Short {
		length = auth.ShortPassword
	}
	return p.Add(ctx, mail.AccountID(n.Account), n.Label, length)
}

// ListPasswords lists the passwords of an account, or all.
func ListPasswords(ctx context.Context, f *config.File, account string) ([]auth.Password, error) {
	if account != "" {
		if err := known(f, account); err != nil {
			return nil, err
		}
	}
	p, err := openPasswords(ctx, f)
	if err != nil {
		return nil, err
	}
	defer p.Close()
	return p.List(ctx, mail.AccountID(account))
}

// RevokePassword revokes a password by id or label. The account may be gone from the configuration.
func RevokePassword(ctx context.Context, f *config.File, account, which string) error {
	p, err := openPasswords(ctx, f)
	if err != nil {
		return err
	}
	defer p.Close()
	return p.Revoke(ctx, mail.AccountID(account), which)
}

// SetSecret stores a secret for vault:NAME.
func SetSecret(ctx context.Context, f *config.File, name string, v secret.Text) error {
	vlt, err := openVault(ctx, f)
	if err != nil {
		return err
	}
	defer vlt.Close()
	return vlt.Put(ctx, secretName(name), v)
}

// ListSecrets lists the names of stored secrets.
func ListSecrets(ctx context.Context, f *config.File) ([]string, error) {
	vlt, err := openVault(ctx, f)
	if err != nil {
		return nil, err
	}
	defer vlt.Close()
	all, err := vlt.Names(ctx)
	var names []string
	for _, n := range all {
		if s, ok := strings.CutPrefix(n, secretName("")); ok {
			names = append(names, s)
		}
	}
	return names, err
}

// DeleteSecret deletes a stored secret.
func DeleteSecret(ctx context.Context, f *config.File, name string) error {
	vlt, err := openVault(ctx, f)
	if err != nil {
		return err
	}
	defer vlt.Close()
	return vlt.Delete(ctx, secretName(name))
}

// OpenQueue opens the outbox's queue for an operator.
func OpenQueue(ctx context.Context, f *config.File) (*outbox.Queue, error) {
	return outbox.OpenQueue(ctx, filepath.Join(f.Absolute(), "outbox"))
}
