package auth

import (
	"errors"
	"log/slog"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"mailbridge/internal/mail"
	"mailbridge/internal/secret"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

type fixture struct {
	*Directory
	p    *Passwords
	path string
	time time.Time
}

func setup(t testing.TB) *fixture {
	t.Helper()
	f := &fixture{path: filepath.Join(t.TempDir(), "auth.db"), time: time.Date(2026, 11, 24, 10, 0, 0, 0, time.UTC)}
	var err error
	if f.p, err = OpenPasswords(t.Context(), f.path); err != nil {
		t.Fatal(err)
	}
	f.p.now = func() time.Time { return f.time }
	f.Directory, err = NewDirectory([]Account{{ID: "scanners", Mailbox: "Scanner@contoso.example"}, {ID: "relay", Mailbox: "relay@x.example"}, {ID: "empty", Mailbox: "e@x.example"}}, f.p, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	f.Directory.now = f.p.now
	t.Cleanup(func() {
		if err := errors.Join(f.Directory.Close(), f.p.Close()); err != nil {
			t.Error(err)
		}
	})
	return f
}

func (f *fixture) login(t testing.TB, user, pw, from string) error {
	t.Helper()
	a, err := f.Authenticate(t.Context(), Credentials{User: user, Password: secret.New(pw), Remote: netip.MustParseAddr(from)})
	if (a == nil) == (err == nil) {
		t.Fatalf("account %v with error %v", a, err)
	}
	return err
}

func TestOnlyTheAccountsOwnPasswordsOpenIt(t *testing.T) {
	f := setup(t)
	made, err := f.p.Add(t.Context(), "scanners", "floor 2", LongPassword)
	if err != nil {
		t.Fatal(err)
	}
	if n := len(made.Reveal()); n != LongPassword {
		t.Errorf("length %d", n)
	}
	if err := f.p.AddGiven(t.Context(), "Scanners", "erp", secret.New("chosen by hand")); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		user, pw string
		want     error
	}{
		{"scanners", made.Reveal(), nil}, {"SCANNERS", made.Reveal(), nil}, {"scanner@Contoso.example", made.Reveal(), nil}, {"scanners", "chosen by hand", nil},
		{"scanners", made.Reveal() + "x", ErrCredentials}, {"scanners", "", ErrCredentials}, {"relay", made.Reveal(), ErrCredentials},
		{"empty", "x", ErrCredentials}, {"nobody", made.Reveal(), ErrCredentials}, {"", "", ErrCredentials}, {"scanners", strings.Repeat("x", 5000), ErrCredentials},
	} {
		f.failures = map[string]*failure{}
		for range 2 { // the second time from memory
			if err := f.login(t, c.user, c.pw, "192.0.2.1"); !errors.Is(err, c.want) {
				t.Errorf("%s %.8s: %v, want %v", c.user, c.pw, err, c.want)
			}
		}
	}
	if err := f.p.AddGiven(t.Context(), "scanners", "short", secret.New("too short")); err == nil {
		t.Error("a short password was taken")
	}
	if err := f.p.AddGiven(t.Context(), "scanners", "erp", secret.New("another by hand")); err == nil {
		t.Error("one label for two passwords")
	}
}

func TestRevokedPasswordIsRefusedAtOnceWhoeverRevokedIt(t *testing.T) {
	f := setup(t)
	keep, err := f.p.Add(t.Context(), "scanners", "keep", LongPassword)
	if err != nil {
		t.Fatal(err)
	}
	gone, err := f.p.Add(t.Context(), "scanners", "gone", ShortPassword)
	if err != nil {
		t.Fatal(err)
	}
	for _, pw := range []secret.Text{keep, gone} {
		if err := f.login(t, "scanners", pw.Reveal(), "192.0.2.1"); err != nil {
			t.Fatal(err)
		}
	}
	other, err := OpenPasswords(t.Context(), f.path) // as another process does
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	if err := other.Revoke(t.Context(), "scanners", "gone"); err != nil {
		t.Fatal(err)
	}
	if err := f.login(t, "scanners", gone.Reveal(), "192.0.2.1"); !errors.Is(err, ErrCredentials) {
		t.Errorf("the revoked password: %v", err)
	}
	if err := f.login(t, "scanners", keep.Reveal(), "192.0.2.1"); err != nil {
		t.Errorf("the other password: %v", err)
	}
	for _, which := range []string{"gone", ""} {
		if err := other.Revoke(t.Context(), "scanners", which); err == nil {
			t.Errorf("revoking %q: no error", which)
		}
	}
}

func TestGuessesAreSlowedDownAndDoNotLockOutWhoIsKnown(t *testing.T) {
	f := setup(t)
	pw, err := f.p.Add(t.Context(), "scanners", "", LongPassword)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.login(t, "scanners", pw.Reveal(), "192.0.2.1"); err != nil {
		t.Fatal(err)
	}
	guess := func() error { return f.login(t, "scanners", "wrong wrong wrong", "198.51.100.7") }
	for range freeFailures {
		if err := guess(); !errors.Is(err, ErrCredentials) {
			t.Fatal(err)
		}
	}
	wait, ok := errors.AsType[*TooManyError](guess())
	if !ok || wait.RetryAfter() != time.Second {
		t.Fatalf("after %d failures: %v", freeFailures, wait)
	}
	f.time = f.time.Add(wait.Wait)
	if err := guess(); !errors.Is(err, ErrCredentials) {
		t.Fatal(err)
	}
	if w, ok := errors.AsType[*TooManyError](guess()); !ok || w.Wait != 2*time.Second {
		t.Errorf("the wait does not grow: %v", w)
	}
	// Another address that guesses at the same account waits too; the device that is known does not.
	if _, ok := errors.AsType[*TooManyError](f.login(t, "scanners", "wrong wrong wrong", "203.0.113.9")); !ok {
		t.Error("a second address guesses on")
	}
	if err := f.login(t, "scanners", pw.Reveal(), "192.0.2.1"); err != nil {
		t.Errorf("the known device is locked out: %v", err)
	}
	for range 100 {
		f.failed("address x", f.time)
	}
	if w := f.wait("address x", f.time); w != maxWait {
		t.Errorf("longest wait %v", w)
	}
	if w := f.wait("address x", f.time.Add(-24*time.Hour)); w != maxWait {
		t.Errorf("after the clock was set back: %v", w)
	}
}

func TestFailuresTakeBoundedMemory(t *testing.T) {
	f := setup(t)
	for i := range maxFailures + 100 {
		f.failed("address "+netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}).String(), f.time)
	}
	if n := len(f.failures); n > maxFailures {
		t.Errorf("%d entries", n)
	}
	if addressKey(netip.MustParseAddr("2001:db8::1")) != addressKey(netip.MustParseAddr("2001:db8::ffff")) || addressKey(netip.MustParseAddr("::ffff:192.0.2.1")) != addressKey(netip.MustParseAddr("192.0.2.1")) {
		t.Error("one host under several keys")
	}
}

func TestListShowsLabelsAndUseButNoHash(t *testing.T) {
	f := setup(t)
	pw, err := f.p.Add(t.Context(), "scanners", "floor 2", LongPassword)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.login(t, "scanners", pw.Reveal(), "192.0.2.1"); err != nil {
		t.Fatal(err)
	}
	if err := f.flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, account := range []string{"scanners", "SCANNERS", ""} {
		list, err := f.p.List(t.Context(), mail.AccountID(account))
		if err != nil || len(list) != 1 {
			t.Fatalf("%s: %v, %v", account, list, err)
		}
		if l := list[0]; l.Label != "floor 2" || !l.LastUsed.Equal(f.time) || !l.Created.Equal(f.time) {
			t.Errorf("%+v", l)
		}
	}
}

func BenchmarkLogin(b *testing.B) {
	f := setup(b)
	pw, err := f.p.Add(b.Context(), "scanners", "", LongPassword)
	if err != nil {
		b.Fatal(err)
	}
	c := Credentials{User: "scanners", Password: pw, Remote: netip.MustParseAddr("192.0.2.1")}
	b.Run("known", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, err := f.Authenticate(b.Context(), c); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("argon2", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			clear(f.known)
			if _, err := f.Authenticate(b.Context(), c); err != nil {
				b.Fatal(err)
			}
		}
	})
}
