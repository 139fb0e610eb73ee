package auth

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"sync"
	"time"

	"mailbridge/internal/secret"
)

// TooManyError refuses a login unlooked at, because too many before it failed.
type TooManyError struct{ Wait time.Duration }

func (e *TooManyError) Error() string {
	return fmt.Sprintf("too many failed logins; try again in %v", e.Wait.Round(time.Second))
}

// RetryAfter is how long to wait.
func (e *TooManyError) RetryAfter() time.Duration { return e.Wait }

// Directory knows the accounts and checks who logs in. It is safe for concurrent use.
type Directory struct {
	accounts  map[string]*Account // by name and by mailbox, lower case
	passwords *Passwords
	log       *slog.Logger
	now       func() time.Time
	macKey    [32]byte
	dummy     string        // a hash that unknown users are checked against
	hashing   chan struct{} // bounds the memory that argon2 takes at once

	mu       sync.Mutex
	known    map[[32]byte]remembered // successes, as keyed hashes
	failures map[string]*failure
	lastUsed map[string]time.Time // not yet written

	stop chan struct{}
	done chan struct{}
}

// remembered is a success: as long as no password has changed since, the same one is right again.
type remembered struct {
	id         string
	generation int64
}

const (
	maxHashing    = 2      // argon2 runs at once: 19 MiB each
	maxRemembered = 10_000 // entries
	maxFailures   = 50_000 // entries
	freeFailures  = 5      // of one address or account before it must wait
	maxWait       = time.Minute * 15
	forgetAfter   = time.Hour   // without a failure
	flushEvery    = time.Minute // last_used
)

// NewDirectory makes the directory of these accounts. Close it to write what it remembers.
func NewDirectory(accounts []Account, p *Passwords, log *slog.Logger) (*Directory, error) {
	d := &Directory{
		accounts: map[string]*Account{}, passwords: p, log: log, now: time.Now,
		hashing: make(chan struct{}, maxHashing),
		known:   map[[32]byte]remembered{}, failures: map[string]*failure{}, lastUsed: map[string]time.Time{},
		stop: make(chan struct{}), done: make(chan struct{}),
	}
	for i := range accounts {
		a := &accounts[i]
		if mb := strings.ToLower(a.Mailbox); d.accounts[mb] == nil {
			d.accounts[mb] = a
		}
	}
	// An account's name wins over another one's mailbox address.
	for i := range accounts {
		d.accounts[strings.ToLower(string(accounts[i].ID))] = &accounts[i]
	}
	if _, err := rand.Read(d.macKey[:]); err != nil {
		return nil, err
	}
	var err error
	if d.dummy, err = hashPassword(secret.New(rand.Text())); err != nil {
		return nil, err
	}
	go d.flushLoop()
	return d, nil
}

// Close stops the directory and writes when passwords were last used.
func (d *Directory) Close() error {
	close(d.stop)
	<-d.done
	return d.flush(context.Background())
}

func (d *Directory) flushLoop() {
	defer close(d.done)
	t := time.NewTicker(flushEvery)
	defer t.Stop()
	for {
		select {
		case <-d.stop:
			return
		case <-t.C:
			if err := d.flush(context.Background()); err != nil {
				d.log.Warn("when passwords were last used could not be written", "err", err)
			}
		}
	}
}

func (d *Directory) flush(ctx context.Context) error {
	d.mu.Lock()
	used := d.lastUsed
	d.lastUsed = map[string]time.Time{}
	d.mu.Unlock()
	if len(used) == 0 {
		return nil
	}
	return d.passwords.used(ctx, used)
}

// Authenticate checks a login. It returns ErrCredentials when user or password is wrong, without saying
// which, a *TooManyError while the address or the account has to wait, and any other error when it could
// not find out. A password that was right before costs microseconds, an unknown one some 20 ms of one core.
func (d *Directory) Authenticate(ctx context.Context, c Credentials) (*Account, error) {
	now := d.now()
	addr := addressKey(c.Remote)
	if wait := d.wait(addr, now); wait > 0 {
		return nil, &TooManyError{wait}
	}
	user := strings.ToLower(c.User)
	account := d.accounts[user]
	if account == nil || c.Password.Empty() || len(c.Password.Reveal()) > maxPassword {
		return nil, d.refuse(ctx, c, addr, user, now)
	}
	gen, err := d.passwords.generation(ctx)
	if err != nil {
		return nil, fmt.Errorf("reading passwords: %w", err)
	}
	mac := d.mac(account, c.Password)
	d.mu.Lock()
	hit, ok := d.known[mac]
	if ok && hit.generation == gen {
		// A known password works even while somebody else's guesses make the account wait.
		d.lastUsed[hit.id] = now
		d.mu.Unlock()
		return account, nil
	}
	d.mu.Unlock()
	accountKey := "account " + key(account.ID)
	if wait := d.wait(accountKey, now); wait > 0 {
		return nil, &TooManyError{wait}
	}
	hashes, err := d.passwords.hashes(ctx, account.ID)
	if err != nil {
		return nil, fmt.Errorf("reading passwords: %w", err)
	}
	for id, hash := range hashes {
		good, err := d.check(ctx, hash, c.Password)
		if err != nil {
			return nil, err
		}
		if !good {
			continue
		}
		d.mu.Lock()
		if len(d.known) >= maxRemembered {
			clear(d.known)
		}
		d.known[mac] = remembered{id, gen}
		d.lastUsed[id] = now
		delete(d.failures, addr)
		delete(d.failures, accountKey)
		d.mu.Unlock()
		return account, nil
	}
	if len(hashes) == 0 {
		return nil, d.refuse(ctx, c, addr, user, now)
	}
	d.failed(addr, now)
	d.failed(accountKey, now)
	return nil, ErrCredentials
}

// refuse takes as long about a user who is unknown, or has no password, as about a wrong password.
func (d *Directory) refuse(ctx context.Context, c Credentials, addr, user string, now time.Time) error {
	pw := c.Password
	if len(pw.Reveal()) > maxPassword {
		pw = secret.Text{}
	}
	if _, err := d.check(ctx, d.dummy, pw); err != nil {
		return err
	}
	d.failed(addr, now)
	d.failed("account "+user, now)
	return ErrCredentials
}

// check runs argon2 when a slot is free.
func (d *Directory) check(ctx context.Context, hash string, pw secret.Text) (bool, error) {
	select {
	case d.hashing <- struct{}{}:
		defer func() { <-d.hashing }()
		return checkPassword(hash, pw)
	case <-ctx.Done():
		return false, ctx.Err()
	}
}

// mac is how a success is remembered: useless outside of this process.
func (d *Directory) mac(a *Account, pw secret.Text) (sum [32]byte) {
	h := hmac.New(sha256.New, d.macKey[:])
	fmt.Fprintf(h, "%d %s%s", len(a.ID), a.ID, pw.Reveal())
	h.Sum(sum[:0])
	return sum
}

// failure counts refused logins of one address or account.
type failure struct {
	n     int
	last  time.Time
	until time.Time
}

// wait is how long a key has to wait still.
func (d *Directory) wait(key string, now time.Time) time.Duration {
	d.mu.Lock()
	defer d.mu.Unlock()
	f := d.failures[key]
	if f == nil {
		return 0
	}
	// A clock set back must not lock anybody out for longer than the longest wait.
	return max(0, min(f.until.Sub(now), maxWait))
}

// failed counts one failure: after some free ones each doubles the wait.
func (d *Directory) failed(key string, now time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	f := d.failures[key]
	if f == nil || now.Sub(f.last) > forgetAfter {
		if len(d.failures) >= maxFailures {
			for k, old := range d.failures {
				if now.Sub(old.last) > forgetAfter || len(d.failures) > maxFailures*9/10 {
					delete(d.failures, k)
				}
			}
		}
		f = &failure{}
		d.failures[key] = f
	}
	f.n++
	f.last = now
	if over := f.n - freeFailures; over >= 0 {
		f.until = now.Add(min(time.Second<<min(over, 12), maxWait))
	}
}

// addressKey groups addresses as one attacker has them: an IPv6 host has a /64.
func addressKey(a netip.Addr) string {
	a = a.Unmap()
	if a.Is6() {
		if p, err := a.WithZone("").Prefix(64); err == nil {
			return "address " + p.String()
		}
	}
	return "address " + a.String()
}
