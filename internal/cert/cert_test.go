package cert

import (
	"crypto/tls"
	"crypto/x509"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

type clock struct{ t time.Time }

func (c *clock) now() time.Time { return c.t }

func TestMadeCertificateIsTrustedThroughItsAuthorityOverRenewals(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "tls")
	c := &clock{time.Now()}
	m, err := Make(dir, []string{"bridge.example.test", "192.0.2.1"}, c.now)
	if err != nil {
		t.Fatal(err)
	}
	pem, err := os.ReadFile(m.CAFile)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(pem)
	verify := func(m *Made) *x509.Certificate {
		got, err := m.GetCertificate(&tls.ClientHelloInfo{})
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{"localhost", "127.0.0.1", "::1", "bridge.example.test", "192.0.2.1"} {
			if _, err := got.Leaf.Verify(x509.VerifyOptions{DNSName: name, Roots: roots, CurrentTime: c.t}); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
		return got.Leaf
	}
	first := verify(m)
	again, err := Make(dir, []string{"192.0.2.1", "bridge.example.test", "0:0:0:0:0:0:0:1"}, c.now)
	if err != nil {
		t.Fatal(err)
	}
	if !verify(again).Equal(first) {
		t.Error("a restart made another certificate")
	}
	c.t = c.t.Add(serverLife - renewBefore + time.Hour)
	if renewed := verify(m); renewed.Equal(first) {
		t.Error("not renewed before its end")
	}
	other, err := Make(dir, nil, c.now)
	if err != nil {
		t.Fatal(err)
	}
	if l, _ := other.current(); len(l.Leaf.DNSNames) != 1 {
		t.Errorf("names %v after they changed", l.Leaf.DNSNames)
	}
	if now, err := os.ReadFile(m.CAFile); err != nil || string(now) != string(pem) {
		t.Error("the authority changed: clients would have to import it again")
	}
	if st, err := os.Stat(filepath.Join(dir, "ca.key")); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("key: %v, %v", st.Mode(), err)
	}
	if err := os.WriteFile(filepath.Join(dir, "server.key"), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Make(dir, nil, c.now); err == nil || !strings.Contains(err.Error(), "delete") {
		t.Errorf("damaged key: %v", err)
	}
}

func TestConfiguredFilesAreTakenUpWhenTheyChange(t *testing.T) {
	c := &clock{time.Now()}
	a, b := t.TempDir(), t.TempDir()
	for _, d := range []string{a, b} {
		if _, err := Make(d, nil, c.now); err != nil {
			t.Fatal(err)
		}
	}
	crt, key := filepath.Join(a, "server.pem"), filepath.Join(a, "server.key")
	f, err := Load(crt, key, c.now)
	if err != nil {
		t.Fatal(err)
	}
	serial := func() string {
		got, err := f.GetCertificate(nil)
		if err != nil {
			t.Fatal(err)
		}
		return got.Leaf.SerialNumber.String()
	}
	first := serial()
	move := func(name string) {
		if err := os.Rename(filepath.Join(b, name), filepath.Join(a, name)); err != nil {
			t.Fatal(err)
		}
		// The files of both were written within one tick of some file systems.
		if err := os.Chtimes(filepath.Join(a, name), c.t.Add(time.Minute), c.t.Add(time.Minute)); err != nil {
			t.Fatal(err)
		}
		c.t = c.t.Add(lookEvery)
	}
	move("server.pem")
	if serial() != first {
		t.Error("half of a pair was taken up")
	}
	move("server.key")
	if serial() == first {
		t.Error("the new pair was not taken up")
	}
	if _, err := Load(crt, filepath.Join(a, "ca.key"), c.now); err == nil || !strings.Contains(err.Error(), "must belong") {
		t.Errorf("wrong key: %v", err)
	}
	c.t = c.t.Add(2 * serverLife)
	if _, err := Load(crt, key, c.now); err == nil || !strings.Contains(err.Error(), "expired") {
		t.Errorf("expired: %v", err)
	}
}
