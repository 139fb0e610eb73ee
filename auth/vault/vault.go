// Package vault keeps tokens and secrets at rest, sealed with AES-256-GCM in one SQLite file. The name of a
// secret is authenticated with it, so that sealed values cannot be swapped.
package vault

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"database/sql"
	"errors"
	"fmt"

	"mailbridge/internal/db"
	"mailbridge/internal/secret"
)

// ErrNotFound says that the vault holds nothing under a name.
var ErrNotFound = errors.New("the vault holds no such secret")

// Vault is an open vault. It is safe for concurrent use, also by several processes.
type Vault struct {
	db  *sql.DB
	gcm cipher.AEAD
}

const schema = `
CREATE TABLE secrets (
	name   TEXT PRIMARY KEY,
	sealed BYTEA NOT NULL      -- nonce, ciphertext, tag
);`

// probe is a name under which every vault holds a known value, to tell a wrong key before it matters.
const probe = "mailbridge/vault"

// Open opens or creates the vault at path under key. A key that did not seal what is in it is an error that
// names the key's origin.
func Open(ctx context.Context, path string, key Key) (*Vault, error) {
	block, err := aes.NewCipher(key.bytes[:])
	if err != nil {
		return nil, err
	}
	gcm, err := cipher.NewGCM(block)
	if err != nil {
		return nil, err
	}
	d, err := db.Open(ctx, path, []string{schema})
	if err != nil {
		return nil, err
	}
	v := &Vault{db: d, gcm: gcm}
	_, err = v.Get(ctx, probe)
	if errors.Is(err, ErrNotFound) {
		err = v.Put(ctx, probe, secret.New("1"))
	}
	if err != nil {
		d.Close()
		return nil, fmt.Errorf("%s was sealed with another key than the one from %s: bring the old key back, or delete the file and store its secrets again (%w)", path, key.Origin, err)
	}
	return v, nil
}

// Close closes the vault.
func (v *Vault) Close() error { return v.db.Close() }

// Get gives the secret under name, or ErrNotFound.
func (v *Vault) Get(ctx context.Context, name string) (secret.Text, error) {
	return v.get(ctx, v.db, name)
}

type querier interface {
	QueryRowContext(ctx context.Context, q string, args ...any) *sql.Row
}

func (v *Vault) get(ctx context.Context, q querier, name string) (secret.Text, error) {
	var sealed []byte
	err := q.QueryRowContext(ctx, "SELECT sealed FROM secrets WHERE name = ?", name).Scan(&sealed)
	if errors.Is(err, sql.ErrNoRows) {
		return secret.Text{}, fmt.Errorf("%s: %w", name, ErrNotFound)
	}
	if err != nil {
		return secret.Text{}, err
	}
	n := v.gcm.NonceSize()
	if len(sealed) < n {
		return secret.Text{}, fmt.Errorf("%s: the sealed value is damaged", name)
	}
	plain, err := v.gcm.Open(nil, sealed[:n], sealed[n:], []byte(name))
	if err != nil {
		return secret.Text{}, fmt.Errorf("%s: the sealed value does not open with this key", name)
	}
	return secret.New(string(plain)), nil
}

// Put stores a secret under name; it is on disk when Put returns.
func (v *Vault) Put(ctx context.Context, name string, s secret.Text) error {
	return v.Update(ctx, name, func(secret.Text) (secret.Text, error) { return s, nil })
}

// Update replaces the secret under name by what f makes of it, while nobody else, in any process, can write.
// Old is empty when there is none. What f returns is on disk when Update returns; when f fails nothing
// changes.
func (v *Vault) Update(ctx context.Context, name string, f func(old secret.Text) (secret.Text, error)) error {
	tx, err := v.db.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	defer tx.Rollback()
	old, err := v.get(ctx, tx, name)
	if err != nil && !errors.Is(err, ErrNotFound) {
		return err
	}
	s, err := f(old)
	if err != nil {
		return err
	}
	nonce := make([]byte, v.gcm.NonceSize(), v.gcm.NonceSize()+len(s.Reveal())+v.gcm.Overhead())
	if _, err := rand.Read(nonce); err != nil {
		return err
	}
	sealed := v.gcm.Seal(nonce, nonce, []byte(s.Reveal()), []byte(name))
	if _, err := tx.ExecContext(ctx, "INSERT INTO secrets (name, sealed) VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET sealed = excluded.sealed", name, sealed); err != nil {
		return err
	}
	return tx.Commit()
}

// Delete removes the secret under name, or says ErrNotFound.
func (v *Vault) Delete(ctx context.Context, name string) error {
	res, err := v.db.ExecContext(ctx, "DELETE FROM secrets WHERE name = ?", name)
	if err != nil {
		return err
	}
	if n, err := res.RowsAffected(); err != nil || n > 0 {
		return err
	}
	return fmt.Errorf("%s: %w", name, ErrNotFound)
}

// Names lists what the vault holds, in order.
func (v *Vault) Names(ctx context.Context) ([]string, error) {
	rows, err := v.db.QueryContext(ctx, "SELECT name FROM secrets WHERE name <> ? ORDER BY name", probe)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var names []string
	for rows.Next() {
		var n string
		if err := rows.Scan(&n); err != nil {
			return nil, err
		}
		names = append(names, n)
	}
	return names, rows.Err()
}
