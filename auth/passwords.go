package auth

import (
	"context"
	"crypto/rand"
	"database/sql"
	"encoding/base64"
	"errors"
	"fmt"
	"math/big"
	"strings"
	"time"

	"golang.org/x/crypto/argon2"

	"mailbridge/internal/db"
	"mailbridge/internal/mail"
	"mailbridge/internal/secret"
)

// Password is what is known of a bridge password. The password itself is known to nobody but its client.
type Password struct {
	ID       string // short, for revoking
	Account  mail.AccountID
	Label    string // what it is for, such as the device's name
	Created  time.Time
	LastUsed time.Time // to about a minute; zero is never
}

// Passwords stores bridge passwords as argon2id hashes in one SQLite file. Several processes may use it.
type Passwords struct {
	db  *sql.DB
	now func() time.Time
}

const passwordSchema = `
CREATE TABLE passwords (
	id        TEXT PRIMARY KEY,
	account   TEXT NOT NULL,    -- lower case
	label     TEXT NOT NULL,
	hash      TEXT NOT NULL,    -- PHC string
	created   BIGINT NOT NULL,  -- seconds since 1970
	last_used BIGINT NOT NULL DEFAULT 0
);
CREATE INDEX passwords_account ON passwords (account);
-- generation counts the changes after which a remembered login is worth nothing.
CREATE TABLE generation (n BIGINT NOT NULL);
INSERT INTO generation VALUES (1);
`

// OpenPasswords opens or creates the store at path.
func OpenPasswords(ctx context.Context, path string) (*Passwords, error) {
	d, err := db.Open(ctx, path, []string{passwordSchema})
	if err != nil {
		return nil, err
	}
	return &Passwords{db: d, now: time.Now}, nil
}

// Close closes the store.
func (p *Passwords) Close() error { return p.db.Close() }

const (
	// alphabet has no letters or digits that a printed page or a device's panel confuses.
	alphabet = "abcdefghijkmnpqrstuvwxyzABCDEFGHJKLMNPQRSTUVWXYZ23456789"
	// LongPassword and ShortPassword are the lengths of made passwords: 139 and 92 bits. Some devices cut
	// what is longer than 16 characters.
	LongPassword  = 24
	ShortPassword = 16
	// MinGiven is the least length of a password that somebody chose.
	MinGiven = 12
	// maxPassword bounds what is hashed.
	maxPassword = 1024
)

// Add makes a password of length characters for an account, stores its hash and returns it; it can't be
// shown again.
func (p *Passwords) Add(ctx context.Context, account mail.AccountID, label string, length int) (secret.Text, error) {
	b := make([]byte, length)
	for i := range b {
		n, err := rand.Int(rand.Reader, big.NewInt(int64(len(alphabet))))
		if err != nil {
			return secret.Text{}, err
		}
		b[i] = alphabet[n.Int64()]
	}
	pw := secret.New(string(b))
	return pw, p.AddGiven(ctx, account, label, pw)
}

// AddGiven stores a password that somebody chose. It has at least MinGiven characters.
func (p *Passwords) AddGiven(ctx context.Context, account mail.AccountID, label string, pw secret.Text) error {
	switch n := len(pw.Reveal()); {
	case n < MinGiven:
		return fmt.Errorf("the password has %d characters: use at least %d, or have one made", n, MinGiven)
	case n > maxPassword:
		return fmt.Errorf("the password has more than %d bytes", maxPassword)
	}
	hash, err := hashPassword(pw)
	if err != nil {
		return err
	}
	id := make([]byte, 5)
	if _, err := rand.Read(id); err != nil {
		return err
	}
	return p.change(ctx, func(tx *sql.Tx) error {
		var n int
		if label != "" {
			if err := tx.QueryRowContext(ctx, "SELECT count(*) FROM passwords WHERE account = ? AND label = ?", key(account), label).Scan(&n); err != nil {
				return err
			}
			if n > 0 {
				return fmt.Errorf("account %s has a password labelled %q already: revoke it first, or choose another label", account, label)
			}
		}
		_, err := tx.ExecContext(ctx, "INSERT INTO passwords (id, account, label, hash, created) VALUES (?, ?, ?, ?, ?)",
			fmt.Sprintf("%x", id), key(account), label, hash, p.now().Unix())
		return err
	})
}

// List lists an account's passwords, or all when account is empty, oldest first.
func (p *Passwords) List(ctx context.Context, account mail.AccountID) ([]Password, error) {
	rows, err := p.db.QueryContext(ctx, "SELECT id, account, label, created, last_used FROM passwords WHERE account = ? OR ? = '' ORDER BY account, created, id", key(account), key(account))
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var list []Password
	for rows.Next() {
		var pw Password
		var created, used int64
		if err := rows.Scan(&pw.ID, &pw.Account, &pw.Label, &created, &used); err != nil {
			return nil, err
		}
		pw.Created = time.Unix(created, 0)
		if used > 0 {
			pw.LastUsed = time.Unix(used, 0)
		}
		list = append(list, pw)
	}
	return list, rows.Err()
}

// Revoke deletes the account's password with that id or label. It is refused from then on, by every
// process.
func (p *Passwords) Revoke(ctx context.Context, account mail.AccountID, which string) error {
	return p.change(ctx, func(tx *sql.Tx) error {
		res, err := tx.ExecContext(ctx, "DELETE FROM passwords WHERE account = ? AND (id = ? OR label = ?) AND ? <> ''", key(account), which, which, which)
		if err != nil {
			return err
		}
		n, err := res.RowsAffected()
		if err == nil && n == 0 {
			return fmt.Errorf("account %s has no password with id or label %q: mailbridge passwd list %s shows them", account, which, account)
		}
		return err
	})
}

// change runs f in a transaction that makes every remembered login worthless.
func (p *Passwords) change(ctx context.Context, f func(*sql.Tx) error) error {
	tx, err := p.db.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	defer tx.Rollback()
	if err := f(tx); err != nil {
		return err
	}
	if _, err := tx.ExecContext(ctx, "UPDATE generation SET n = n + 1"); err != nil {
		return err
	}
	return tx.Commit()
}

// generation is the number of changes so far.
func (p *Passwords) generation(ctx context.Context) (n int64, err error) {
	return n, p.db.QueryRowContext(ctx, "SELECT n FROM generation").Scan(&n)
}

// hashes gives the hashes of an account's passwords by id.
func (p *Passwords) hashes(ctx context.Context, account mail.AccountID) (map[string]string, error) {
	rows, err := p.db.QueryContext(ctx, "SELECT id, hash FROM passwords WHERE account = ?", key(account))
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	m := map[string]string{}
	for rows.Next() {
		var id, hash string
		if err := rows.Scan(&id, &hash); err != nil {
			return nil, err
		}
		m[id] = hash
	}
	return m, rows.Err()
}

// used notes when passwords were last used.
func (p *Passwords) used(ctx context.Context, at map[string]time.Time) error {
	tx, err := p.db.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	defer tx.Rollback()
	for id, t := range at {
		if _, err := tx.ExecContext(ctx, "UPDATE passwords SET last_used = ? WHERE id = ? AND last_used < ?", t.Unix(), id, t.Unix()); err != nil {
			return err
		}
	}
	return tx.Commit()
}

// key is the form of an account's name in the store: clients write it in any case.
func key(account mail.AccountID) string { return strings.ToLower(string(account)) }

// Parameters of new hashes: OWASP's second choice for argon2id (19 MiB, two passes, one lane).
const (
	argonMemory = 19 * 1024 // KiB
	argonTime   = 2
	argonLanes  = 1
	argonKey    = 32
)

// hashPassword gives the PHC string of a password: parameters and salt travel with the hash, so that they
// can change without making stored ones useless.
func hashPassword(pw secret.Text) (string, error) {
	salt := make([]byte, 16)
	if _, err := rand.Read(salt); err != nil {
		return "", err
	}
	h := argon2.IDKey([]byte(pw.Reveal()), salt, argonTime, argonMemory, argonLanes, argonKey)
	b64 := base64.RawStdEncoding
	return fmt.Sprintf("$argon2id$v=%d$m=%d,t=%d,p=%d$%s$%s", argon2.Version, argonMemory, argonTime, argonLanes, b64.EncodeToString(salt), b64.EncodeToString(h)), nil
}

var errHash = errors.New("a stored password hash cannot be read")

// checkPassword compares a password with a PHC string, in constant time.
func checkPassword(phc string, pw secret.Text) (bool, error) {
	parts := strings.Split(phc, "$")
	if len(parts) != 6 || parts[1] != "argon2id" || parts[2] != fmt.Sprintf("v=%d", argon2.Version) {
		return false, errHash
	}
	var m, t uint32
	var lanes uint8
	if _, err := fmt.Sscanf(parts[3], "m=%d,t=%d,p=%d", &m, &t, &lanes); err != nil || m < 8 || m > 1<<20 || t < 1 || t > 64 || lanes < 1 {
		return false, errHash
	}
	salt, err1 := base64.RawStdEncoding.DecodeString(parts[4])
	want, err2 := base64.RawStdEncoding.DecodeString(parts[5])
	if err1 != nil || err2 != nil || len(want) < 16 || len(want) > 128 {
		return false, errHash
	}
	got := argon2.IDKey([]byte(pw.Reveal()), salt, t, m, lanes, uint32(len(want)))
	return secret.New(string(got)).Equal(secret.New(string(want))), nil
}
