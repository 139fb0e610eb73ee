// Package cert gives the server its certificate: the configured one, watched for changes, or one of its own
// making.
//
// A made certificate is RSA-2048, which old devices can use, under a certificate authority that is made once
// and kept, so that clients import the authority and never hear of renewals:
//
//	DIR/ca.pem, DIR/ca.key          the authority, ten years
//	DIR/server.pem, DIR/server.key  the certificate with the authority behind it, a year
package cert

import (
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"
)

const (
	caLife     = 10 * 365 * 24 * time.Hour
	serverLife = 365 * 24 * time.Hour
	// renewBefore is how long before its end a made certificate is replaced.
	renewBefore = 30 * 24 * time.Hour
	// lookEvery bounds how often configured files are looked at.
	lookEvery = 5 * time.Second
)

// Made is a certificate of our own making.
type Made struct {
	CAFile string // PEM file of the authority, for clients to import
	dir    string
	names  []string
	now    func() time.Time

	mu   sync.Mutex
	cert *tls.Certificate
}

// Make gives the certificate kept in dir, for localhost and names (host names or addresses), and makes or
// renews what is missing, about to expire, or for other names.
func Make(dir string, names []string, now func() time.Time) (*Made, error) {
	all := []string{"localhost", "127.0.0.1", "::1"}
	for _, n := range names {
		if ip := net.ParseIP(n); ip != nil {
			n = ip.String() // one address has several spellings
		}
		all = append(all, n)
	}
	slices.Sort(all)
	m := &Made{CAFile: filepath.Join(dir, "ca.pem"), dir: dir, names: slices.Compact(all), now: now}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	_, err := m.current()
	return m, err
}

// GetCertificate is for tls.Config. It renews the certificate when that is due.
func (m *Made) GetCertificate(*tls.ClientHelloInfo) (*tls.Certificate, error) { return m.current() }

func (m *Made) current() (*tls.Certificate, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.cert != nil && m.good(m.cert.Leaf) {
		return m.cert, nil
	}
	ca, err := m.authority()
	if err != nil {
		return nil, err
	}
	server := filepath.Join(m.dir, "server")
	c, err := tls.LoadX509KeyPair(server+".pem", server+".key")
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w; delete %s.pem and %s.key to have them made again", err, server, server)
	}
	if err != nil || !m.good(c.Leaf) || c.Leaf.CheckSignatureFrom(ca.Leaf) != nil {
		if c, err = m.issue(server, ca); err != nil {
			return nil, err
		}
	}
	m.cert = &c
	return m.cert, nil
}

// good reports whether a certificate is for our names and not about to expire.
func (m *Made) good(leaf *x509.Certificate) bool {
	have := slices.Clone(leaf.DNSNames)
	for _, ip := range leaf.IPAddresses {
		have = append(have, ip.String())
	}
	slices.Sort(have)
	now := m.now()
	return slices.Equal(have, m.names) && now.After(leaf.NotBefore) && now.Add(renewBefore).Before(leaf.NotAfter)
}

// authority loads the authority, or makes it.
func (m *Made) authority() (tls.Certificate, error) {
	base := filepath.Join(m.dir, "ca")
	c, err := tls.LoadX509KeyPair(base+".pem", base+".key")
	if err == nil && m.now().Add(serverLife).Before(c.Leaf.NotAfter) {
		return c, nil
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return c, fmt.Errorf("%w; delete %s.pem and %s.key to have them made again (clients must then import the new ca.pem)", err, base, base)
	}
	host, err := os.Hostname()
	if err != nil {
		host = "localhost"
	}
	return write(base, &x509.Certificate{
		Subject:   pkix.Name{CommonName: "Mailbridge on " + host, Organization: []string{"Mailbridge"}},
		NotBefore: m.now().Add(-time.Hour), NotAfter: m.now().Add(caLife),
		IsCA: true, BasicConstraintsValid: true, MaxPathLenZero: true,
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}, nil)
}

func (m *Made) issue(base string, ca tls.Certificate) (tls.Certificate, error) {
	t := &x509.Certificate{
		Subject:   pkix.Name{CommonName: m.names[len(m.names)-1]},
		NotBefore: m.now().Add(-time.Hour), NotAfter: m.now().Add(serverLife),
		KeyUsage:    x509.KeyUsageDigitalSignature | x509.KeyUsageKeyEncipherment, // the second for RSA key exchange
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	for _, n := range m.names {
		if ip := net.ParseIP(n); ip != nil {
			t.IPAddresses = append(t.IPAddresses, ip)
		} else {
			t.DNSNames = append(t.DNSNames, n)
		}
	}
	return write(base, t, &ca)
}

// write makes a key and a certificate by the template, signed by ca or by itself, and writes both files.
func write(base string, t *x509.Certificate, ca *tls.Certificate) (tls.Certificate, error) {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return tls.Certificate{}, err
	}
	if t.SerialNumber, err = rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120)); err != nil {
		return tls.Certificate{}, err
	}
	parent, signer := t, crypto.Signer(key)
	if ca != nil {
		parent = ca.Leaf
		signer, _ = ca.PrivateKey.(crypto.Signer)
	}
	der, err := x509.CreateCertificate(rand.Reader, t, parent, key.Public(), signer)
	if err != nil {
		return tls.Certificate{}, err
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return tls.Certificate{}, err
	}
	chain := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	if ca != nil {
		chain = append(chain, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca.Certificate[0]})...)
	}
	// The key first: a certificate without its key would not load.
	if err := replace(base+".key", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8}), 0o600); err != nil {
		return tls.Certificate{}, err
	}
	if err := replace(base+".pem", chain, 0o644); err != nil {
		return tls.Certificate{}, err
	}
	return tls.LoadX509KeyPair(base+".pem", base+".key")
}

// replace writes a file whole or not at all.
func replace(path string, b []byte, mode fs.FileMode) error {
	f, err := os.CreateTemp(filepath.Dir(path), ".new-*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, err = f.Write(b)
	if err := errors.Join(err, f.Chmod(mode), f.Sync(), f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}

// Files is a configured certificate. Changed files are taken up without a restart; while they cannot be
// read the certificate before them serves on.
type Files struct {
	certFile, keyFile string
	now               func() time.Time

	mu     sync.Mutex
	cert   *tls.Certificate
	stamp  [2]time.Time
	looked time.Time
}

// Load reads a certificate chain, the server's own certificate first, and its key, both PEM.
func Load(certFile, keyFile string, now func() time.Time) (*Files, error) {
	f := &Files{certFile: certFile, keyFile: keyFile, now: now}
	if err := f.read(); err != nil {
		return nil, err
	}
	if leaf := f.cert.Leaf; now().After(leaf.NotAfter) {
		return nil, fmt.Errorf("the certificate in %s expired on %s: renew it", certFile, leaf.NotAfter.Format(time.DateOnly))
	}
	return f, nil
}

// read loads the files; the caller holds the lock or is alone.
func (f *Files) read() error {
	c, err := tls.LoadX509KeyPair(f.certFile, f.keyFile)
	if err != nil {
		return fmt.Errorf("certificate %s with key %s: %w (the server's own certificate comes first in the file, and the key must belong to it)", f.certFile, f.keyFile, err)
	}
	f.stamp, f.cert = f.stamps(), &c
	return nil
}

func (f *Files) stamps() (s [2]time.Time) {
	for i, name := range []string{f.certFile, f.keyFile} {
		if st, err := os.Stat(name); err == nil {
			s[i] = st.ModTime()
		}
	}
	return s
}

// GetCertificate is for tls.Config.
func (f *Files) GetCertificate(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if now := f.now(); now.Sub(f.looked).Abs() >= lookEvery {
		f.looked = now
		if f.stamps() != f.stamp {
			// Half of a pair may be there: the other half comes within moments.
			if err := f.read(); err != nil {
				return f.cert, nil
			}
		}
	}
	return f.cert, nil
}
