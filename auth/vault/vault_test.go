package vault

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/zalando/go-keyring"

	"mailbridge/internal/secret"
)

func open(t *testing.T, dir string) *Vault {
	t.Helper()
	k, err := FindKey(dir, false)
	if err != nil {
		t.Fatal(err)
	}
	v, err := Open(t.Context(), filepath.Join(dir, "vault.db"), k)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := v.Close(); err != nil {
			t.Error(err)
		}
	})
	return v
}

func TestSecretsSurviveAndDoNotShowOnDisk(t *testing.T) {
	dir := t.TempDir()
	v := open(t, dir)
	if err := v.Put(t.Context(), "contoso", secret.New("SECRETSECRET")); err != nil {
		t.Fatal(err)
	}
	again := open(t, dir)
	got, err := again.Get(t.Context(), "contoso")
	if err != nil || got.Reveal() != "SECRETSECRET" {
		t.Fatalf("%q, %v", got.Reveal(), err)
	}
	files, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		if bytes.Contains(b, []byte("SECRET")) {
			t.Errorf("%s shows the secret", f)
		}
		if st, err := os.Stat(f); err != nil || st.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s is open to others: %v %v", f, st.Mode(), err)
		}
	}
	if names, err := again.Names(t.Context()); err != nil || len(names) != 1 || names[0] != "contoso" {
		t.Errorf("%v, %v", names, err)
	}
	if err := again.Delete(t.Context(), "contoso"); err != nil {
		t.Fatal(err)
	}
	if _, err := v.Get(t.Context(), "contoso"); !errors.Is(err, ErrNotFound) {
		t.Errorf("deleted: %v", err)
	}
	if err := v.Delete(t.Context(), "contoso"); !errors.Is(err, ErrNotFound) {
		t.Errorf("deleted twice: %v", err)
	}
}

func TestWrongKeyOrSwappedValueIsToldAndNotUsed(t *testing.T) {
	dir := t.TempDir()
	v := open(t, dir)
	for _, n := range []string{"a", "b"} {
		if err := v.Put(t.Context(), n, secret.New("value of "+n)); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := v.db.Exec("UPDATE secrets SET sealed = (SELECT sealed FROM secrets WHERE name = 'a') WHERE name = 'b'"); err != nil {
		t.Fatal(err)
	}
	if s, err := v.Get(t.Context(), "b"); err == nil {
		t.Errorf("another name's value opened: %q", s.Reveal())
	}
	other, err := FindKey(t.TempDir(), false)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Open(t.Context(), filepath.Join(dir, "vault.db"), other); err == nil || !strings.Contains(err.Error(), "another key") || !strings.Contains(err.Error(), other.Origin) {
		t.Errorf("wrong key: %v", err)
	}
}

func TestRotationsByManyProcessesLoseNone(t *testing.T) {
	dir := t.TempDir()
	var wg sync.WaitGroup
	for range 4 {
		v := open(t, dir)
		wg.Go(func() {
			for range 10 {
				err := v.Update(t.Context(), "n", func(old secret.Text) (secret.Text, error) { return secret.New(old.Reveal() + "x"), nil })
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	v := open(t, dir)
	if s, err := v.Get(t.Context(), "n"); err != nil || len(s.Reveal()) != 40 {
		t.Errorf("%d of 40 rotations kept, %v", len(s.Reveal()), err)
	}
	boom := errors.New("boom")
	if err := v.Update(t.Context(), "n", func(secret.Text) (secret.Text, error) { return secret.New("lost"), boom }); !errors.Is(err, boom) {
		t.Error(err)
	}
	if s, _ := v.Get(t.Context(), "n"); len(s.Reveal()) != 40 {
		t.Error("a failed update changed the value")
	}
}

func TestKeysAreFoundInTheirOrder(t *testing.T) {
	state, creds := t.TempDir(), t.TempDir()
	file, err := FindKey(state, false)
	if err != nil {
		t.Fatal(err)
	}
	if again, err := FindKey(state, false); err != nil || again.bytes != file.bytes {
		t.Errorf("another key on second use: %v", err)
	}
	t.Setenv("CREDENTIALS_DIRECTORY", creds)
	if k, err := FindKey(state, false); err != nil || k.bytes != file.bytes {
		t.Errorf("no credential: %v", err)
	}
	if err := os.WriteFile(filepath.Join(creds, credentialName), bytes.Repeat([]byte{7}, 32), 0o400); err != nil {
		t.Fatal(err)
	}
	if k, err := FindKey(state, true); err != nil || k.bytes[0] != 7 || !strings.Contains(k.Origin, "systemd") {
		t.Errorf("credential: %v", err)
	}
	if err := os.WriteFile(filepath.Join(creds, "x"), nil, 0o400); err != nil {
		t.Fatal(err)
	}
	t.Setenv("CREDENTIALS_DIRECTORY", "")
	keyring.MockInit()
	k1, err := FindKey(state, true)
	if err != nil || k1.bytes == file.bytes {
		t.Fatalf("keyring: %v", err)
	}
	if k2, err := FindKey(state, true); err != nil || k2.bytes != k1.bytes {
		t.Errorf("keyring on second use: %v", err)
	}
	keyring.MockInitWithError(errors.New("no session"))
	if _, err := FindKey(state, true); err == nil || !strings.Contains(err.Error(), "systemd credential") {
		t.Errorf("keyring without a session: %v", err)
	}
	if err := os.Chmod(filepath.Join(state, keyFile), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := FindKey(state, false); err == nil || !strings.Contains(err.Error(), "chmod 600") {
		t.Errorf("a key that all can read: %v", err)
	}
	if err := os.WriteFile(filepath.Join(state, keyFile), []byte("short"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(filepath.Join(state, keyFile), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := FindKey(state, false); err == nil || !strings.Contains(err.Error(), "openssl rand") {
		t.Errorf("a damaged key: %v", err)
	}
}
