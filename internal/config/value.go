package config

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"mailbridge/internal/secret"
)

// UnmarshalText reads "90s", "2m", "120h", "5d".
func (d *Duration) UnmarshalText(b []byte) error {
	s := string(b)
	if days, ok := strings.CutSuffix(s, "d"); ok {
		n, err := strconv.Atoi(days)
		if err == nil && n >= 0 && n <= 3650 {
			*d = Duration(time.Duration(n) * 24 * time.Hour)
			return nil
		}
	}
	v, err := time.ParseDuration(s)
	if err != nil || v < 0 {
		return fmt.Errorf("%q is not a duration: write it as \"90s\", \"2m\", \"36h\" or \"5d\"", s)
	}
	*d = Duration(v)
	return nil
}

// UnmarshalText reads "25MB", "32MiB" or "1000000".
func (z *Size) UnmarshalText(b []byte) error {
	s := strings.TrimSpace(string(b))
	units := []struct {
		suffix string
		n      int64
	}{{"KiB", 1 << 10}, {"MiB", 1 << 20}, {"GiB", 1 << 30}, {"kB", 1e3}, {"KB", 1e3}, {"MB", 1e6}, {"GB", 1e9}, {"B", 1}, {"", 1}}
	for _, u := range units {
		digits, ok := strings.CutSuffix(s, u.suffix)
		if !ok {
			continue
		}
		n, err := strconv.ParseInt(strings.TrimSpace(digits), 10, 64)
		if err != nil || n < 0 || n > (1<<62)/u.n {
			break
		}
		*z = Size(n * u.n)
		return nil
	}
	return fmt.Errorf("%q is not a size: write it as \"25MB\", \"32MiB\" or \"1000000B\"", s)
}

// maxSecretFile bounds a secret's file: a refresh token is a few kilobytes.
const maxSecretFile = 64 << 10

// Resolve gives the value behind a reference: env:NAME, file:PATH (without the trailing line end),
// vault:NAME, or, where literals are allowed, the string itself.
func (s Secrets) Resolve(ref string) (secret.Text, error) {
	kind, name, found := strings.Cut(ref, ":")
	switch {
	case ref == "":
		return secret.Text{}, nil
	case found && kind == "env":
		get := s.Getenv
		if get == nil {
			get = os.LookupEnv
		}
		v, ok := get(name)
		if !ok || v == "" {
			return secret.Text{}, fmt.Errorf("the environment variable %s is not set", name)
		}
		return secret.New(v), nil
	case found && kind == "file":
		return readSecret(name)
	case found && kind == "vault":
		if s.Vault == nil {
			return secret.Text{}, errors.New("the vault is not open")
		}
		return s.Vault(name)
	}
	return secret.New(ref), nil
}

func readSecret(path string) (secret.Text, error) {
	f, err := os.Open(path)
	if err != nil {
		return secret.Text{}, err
	}
	defer f.Close()
	b := make([]byte, maxSecretFile+1)
	n := 0
	for n < len(b) {
		k, err := f.Read(b[n:])
		n += k
		if err != nil {
			break
		}
	}
	if n > maxSecretFile {
		return secret.Text{}, fmt.Errorf("%s is larger than a secret can be (%d bytes)", path, maxSecretFile)
	}
	v := strings.TrimRight(string(b[:n]), "\r\n")
	if v == "" {
		return secret.Text{}, fmt.Errorf("%s is empty", path)
	}
	return secret.New(v), nil
}

// isReference reports whether s names a secret instead of being one.
func isReference(s string) bool {
	kind, name, ok := strings.Cut(s, ":")
	return ok && name != "" && (kind == "env" || kind == "file" || kind == "vault")
}
