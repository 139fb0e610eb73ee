package vault

import (
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/zalando/go-keyring"
)

// Key seals a vault. Origin says in words where it came from.
type Key struct {
	bytes  [32]byte
	Origin string
}

const (
	credentialName = "mailbridge-vault-key" // systemd's LoadCredential=
	keyFile        = "vault.key"
	keyringService = "mailbridge"
	keyringUser    = "vault-key"
)

// FindKey gives the key of the vault in stateDir. A systemd credential named mailbridge-vault-key comes
// first; then, as the configuration says, the OS keyring or the file vault.key, which are filled with a new
// key on first use.
func FindKey(stateDir string, useKeyring bool) (Key, error) {
	if dir := os.Getenv("CREDENTIALS_DIRECTORY"); dir != "" {
		path := filepath.Join(dir, credentialName)
		b, err := os.ReadFile(path)
		if err == nil {
			return parseKey(b, "the systemd credential "+credentialName)
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return Key{}, err
		}
	}
	if useKeyring {
		return fromKeyring()
	}
	return fromFile(filepath.Join(stateDir, keyFile))
}

// parseKey reads 32 bytes in base64; a credential may also be 32 raw bytes.
func parseKey(b []byte, origin string) (Key, error) {
	k := Key{Origin: origin}
	raw := b
	if len(b) != len(k.bytes) {
		var err error
		if raw, err = base64.StdEncoding.DecodeString(strings.TrimSpace(string(b))); err != nil || len(raw) != len(k.bytes) {
			return Key{}, fmt.Errorf("the vault's key from %s is not 32 bytes in base64; make one with: openssl rand -base64 32", origin)
		}
	}
	copy(k.bytes[:], raw)
	return k, nil
}

func newKey() (string, error) {
	var b [32]byte
	_, err := rand.Read(b[:])
	return base64.StdEncoding.EncodeToString(b[:]), err
}

func fromKeyring() (Key, error) {
	text, err := keyring.Get(keyringService, keyringUser)
	if errors.Is(err, keyring.ErrNotFound) {
		if text, err = newKey(); err == nil {
			err = keyring.Set(keyringService, keyringUser, text)
		}
	}
	if err != nil {
		return Key{}, fmt.Errorf("the OS keyring cannot be used: %w; it needs a user session, so a service is better off with vault.key = \"file\" or a systemd credential", err)
	}
	return parseKey([]byte(text), "the OS keyring")
}

func fromFile(path string) (Key, error) {
	origin := "the file " + path
	st, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		text, err := newKey()
		if err != nil {
			return Key{}, err
		}
		if err := writeOnce(path, []byte(text+"\n")); err != nil {
			return Key{}, err
		}
	} else if err != nil {
		return Key{}, err
	} else if runtime.GOOS != "windows" && st.Mode().Perm()&0o077 != 0 {
		return Key{}, fmt.Errorf("%s can be read by other users; run: chmod 600 %s", path, path)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return Key{}, err
	}
	return parseKey(b, origin)
}

// writeOnce writes a new file whole, durably, and leaves one that another process made first.
func writeOnce(path string, b []byte) error {
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	f, err := os.CreateTemp(dir, ".vault-key-*") // mode 0600
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, err = f.Write(b)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Link(f.Name(), path); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return syncDir(dir)
}

// syncDir makes names in a folder durable, where the system knows how.
func syncDir(dir string) error {
	if runtime.GOOS == "windows" {
		return nil
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
