package keystore

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"mailbridge/internal/secret"
)

const folder = "../../testdata/keys"

var password = secret.New("notasecret")

func file(t testing.TB, name string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(folder, name))
	if err != nil {
		t.Fatal(err)
	}
	// A checkout does not keep the mode.
	p := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(p, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return p
}

func TestAliasesAreThoseThatKeytoolShows(t *testing.T) {
	golden, err := os.ReadFile(folder + "/keytool.golden")
	if err != nil {
		t.Fatal(err)
	}
	files := map[string][]string{}
	for line := range strings.Lines(string(golden)) {
		name, entry, _ := strings.Cut(strings.TrimSpace(line), ".p12 ")
		files[name] = append(files[name], entry)
	}
	if len(files) < 12 {
		t.Fatalf("%d golden lists", len(files))
	}
	for name, entries := range files {
		t.Run(name, func(t *testing.T) {
			s, err := Open(Options{File: file(t, name+".p12"), Password: password})
			if err != nil {
				t.Fatal(err)
			}
			var want, got []string
			trusted := 0
			for _, entry := range entries {
				alias, kind, _ := strings.Cut(entry, " ")
				if kind == "PrivateKeyEntry" {
					want = append(want, alias)
				} else {
					trusted++
				}
			}
			for _, i := range s.Aliases() {
				if i.Kind == "key" {
					got = append(got, i.Alias)
					e, err := s.Entry(strings.ToUpper(i.Alias))
					if err != nil {
						t.Fatal(err)
					}
					if name == "nocert" {
						continue
					}
					if e.Certificate == nil || !e.Key.Public().(interface{ Equal(x crypto.PublicKey) bool }).Equal(e.Certificate.PublicKey) {
						t.Errorf("%s: not the key's own certificate", i.Alias)
					}
				} else {
					trusted--
				}
			}
			slices.Sort(got)
			if name == "chain" {
				trusted++ // a certificate in the file that belongs to no key, which keytool does not show
			}
			if !slices.Equal(got, want) || trusted != 0 {
				t.Errorf("aliases %q, keytool shows %q; certificates off by %d", got, want, trusted)
			}
			if len(got) == 0 {
				t.Error("no key")
			}
			if _, err := s.Entry(""); (err == nil) != (len(got) == 1) {
				t.Errorf("no alias with %d keys: %v", len(got), err)
			}
			if _, err := s.Entry("nobody"); err == nil || !strings.Contains(err.Error(), got[0]) {
				t.Errorf("wrong alias: %v", err)
			}
			for _, pw := range []string{"wrong-guess", ""} {
				_, err := Open(Options{File: file(t, name+".p12"), Password: secret.New(pw)})
				if err == nil || !strings.Contains(err.Error(), "password") || pw != "" && strings.Contains(err.Error(), pw) {
					t.Errorf("wrong password: %v", err)
				}
			}
		})
	}
}

func TestPEMAndJSONKeysOpen(t *testing.T) {
	for name, o := range map[string]Options{
		"pkcs8":     {Key: "bridge-key.pem", Certificate: "bridge-cert.pem"},
		"pkcs1":     {Key: "bridge-pkcs1-key.pem", Certificate: "bridge-cert.pem"},
		"sec1":      {Key: "ec-key.pem", Certificate: "ec-cert.pem"},
		"encrypted": {Key: "bridge-encrypted-key.pem", Certificate: "bridge-cert.pem", Password: password},
		"expired":   {Key: "expired-key.pem", Certificate: "expired-cert.pem"},
		"combined":  {File: "bridge-both.pem"},
		"json":      {File: "service-account.json"},
	} {
		t.Run(name, func(t *testing.T) {
			for _, p := range []*string{&o.Key, &o.Certificate, &o.File} {
				if *p != "" {
					*p = file(t, *p)
				}
			}
			s, err := Open(o)
			if err != nil {
				t.Fatal(err)
			}
			e, err := s.Entry("")
			if err != nil {
				t.Fatal(err)
			}
			if (e.Certificate == nil) != (name == "json") || (e.KeyID == "0123456789abcdef0123456789abcdef01234567") != (name == "json") {
				t.Errorf("entry %+v", e)
			}
			if _, ec := e.Key.(*ecdsa.PrivateKey); ec != (name == "sec1") {
				t.Errorf("key %T", e.Key)
			}
		})
	}
}

func TestWhatCannotSignIsRefusedWithTheNextStep(t *testing.T) {
	readable := file(t, "bridge-key.pem")
	if err := os.Chmod(readable, 0o640); err != nil {
		t.Fatal(err)
	}
	big := filepath.Join(t.TempDir(), "big")
	if err := os.WriteFile(big, bytes.Repeat([]byte("x"), maxFile+1), 0o600); err != nil {
		t.Fatal(err)
	}
	for want, o := range map[string]Options{
		"does not belong":              {Key: file(t, "bridge-key.pem"), Certificate: file(t, "other-cert.pem")},
		"chmod 600":                    {File: readable},
		"1 MiB":                        {File: big},
		"no password":                  {Key: file(t, "bridge-encrypted-key.pem")},
		"not both":                     {File: "a", Key: "b"},
		"0 PEM private keys":           {File: file(t, "bridge-cert.pem")},
		"password of its key is wrong": {Key: file(t, "bridge-encrypted-key.pem"), Password: secret.New("x")},
		"no such file":                 {File: filepath.Join(t.TempDir(), "none.p12")},
		"is not a regular file":        {File: t.TempDir(), AllowReadable: true},
		"no key file is configured":    {},
	} {
		if _, err := Open(o); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", want, err)
		}
	}
	if _, err := Open(Options{File: readable, AllowReadable: true}); err != nil {
		t.Error(err)
	}
}

func TestEndlessKeyDerivationIsNotRun(t *testing.T) {
	b, err := os.ReadFile(folder + "/modern.p12")
	if err != nil {
		t.Fatal(err)
	}
	// OpenSSL derives with 2048 iterations: INTEGER 08 00.
	n := 0
	for i := range len(b) - 4 {
		if bytes.Equal(b[i:i+4], []byte{2, 2, 8, 0}) {
			n++
		}
	}
	if n == 0 {
		t.Fatal("no iteration count found")
	}
	w := &walker{}
	if w.cost(maxIterations) != nil || w.cost(maxIterations+1) == nil {
		t.Error("the limit is off")
	}
	if (&walker{}).costIn([]byte{0x30, 6, 2, 4, 0x7f, 0xff, 0xff, 0xff}, 0) == nil {
		t.Error("two thousand million iterations accepted")
	}
}

func FuzzParse(f *testing.F) {
	names, err := filepath.Glob(folder + "/*")
	if err != nil {
		f.Fatal(err)
	}
	for _, n := range names {
		if b, err := os.ReadFile(n); err == nil {
			f.Add(b)
		}
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if s, err := parse(b, password); err == nil {
			s.Aliases()
			_, _ = s.Entry("")
		}
	})
}
