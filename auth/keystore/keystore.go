// Package keystore opens the private keys that sign OAuth 2.0 assertions: from PKCS#12 files by the alias that
// keytool -list shows, from PEM files, and from Google service-account JSON keys. It only reads.
package keystore

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"slices"
	"strings"
	"time"

	"mailbridge/internal/secret"
)

// maxFile is the largest file that is read, in bytes.
const maxFile = 1 << 20

// Options name the files. Set File alone (PKCS#12, JSON, or PEM with key and certificate in one), or Key with
// or without Certificate (PEM).
type Options struct {
	File             string
	Password         secret.Text // of a PKCS#12 file or an encrypted PEM key
	Certificate, Key string
	// AllowReadable takes key files that group or others can read.
	AllowReadable bool
}

// Info describes an entry for people.
type Info struct {
	Alias string // as keytool -list shows it; "" for a certificate, whose name the file encrypts
	Kind  string // "key", or "certificate" for one that belongs to no key, such as a Java trusted certificate
	// Algorithm is such as "RSA 2048" or "EC P-256".
	Algorithm           string
	Subject             string // of the certificate; "" without one
	NotBefore, NotAfter time.Time
}

// Entry is one private key with what belongs to it.
type Entry struct {
	Alias       string
	Key         crypto.Signer       // *rsa.PrivateKey or *ecdsa.PrivateKey
	Certificate *x509.Certificate   // its public key is Key's; nil without one
	Chain       []*x509.Certificate // the issuers of Certificate, as far as the file has them
	// From a JSON key; else empty.
	KeyID, ClientEmail, TokenURI string
}

// Store is an opened file. It is immutable.
type Store struct {
	name    string
	keys    []Entry
	trusted []*x509.Certificate
}

// Open reads the files. Errors name the cause and the next step and hold no secret. An expired certificate is
// no error here: Google looks at the key alone.
func Open(o Options) (*Store, error) {
	if o.File == "" && o.Key == "" {
		return nil, errors.New("no key file is configured: give a .p12, .json or .pem file, or a key with its certificate")
	}
	if o.File != "" && (o.Key != "" || o.Certificate != "") {
		return nil, errors.New("give either one file or a key with its certificate, not both")
	}
	name := o.File + o.Key
	b, err := readFile(name, !o.AllowReadable)
	if err != nil {
		return nil, err
	}
	if o.Certificate != "" {
		c, err := readFile(o.Certificate, false)
		if err != nil {
			return nil, err
		}
		if !bytes.Contains(b, []byte("-----BEGIN ")) {
			return nil, fmt.Errorf("%s is not a PEM file: convert it with openssl pkey -inform DER -in FILE -out key.pem", name)
		}
		if !bytes.Contains(c, []byte("-----BEGIN CERTIFICATE-----")) {
			return nil, fmt.Errorf("%s holds no PEM certificate: convert it with openssl x509 -inform DER -in FILE -out cert.pem", o.Certificate)
		}
		b = slices.Concat(b, []byte("\n"), c)
	}
	s, err := parse(b, o.Password)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	s.name = name
	return s, nil
}

func readFile(name string, private bool) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is not a regular file", name)
	}
	if private && runtime.GOOS != "windows" && st.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("%s can be read by others (mode %04o): run chmod 600 %s", name, st.Mode().Perm(), name)
	}
	b, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return nil, err
	}
	if len(b) > maxFile {
		return nil, fmt.Errorf("%s is larger than 1 MiB: that is no key file", name)
	}
	return b, nil
}

func parse(b []byte, pw secret.Text) (*Store, error) {
	switch t := bytes.TrimSpace(b); {
	case bytes.HasPrefix(t, []byte("{")):
		return parseJSON(t)
	case bytes.Contains(b, []byte("-----BEGIN ")):
		return parsePEM(b, pw)
	default:
		return parseP12(b, pw)
	}
}

// parseJSON reads a service-account key.
// https://cloud.google.com/iam/docs/keys-create-delete shows its members.
func parseJSON(b []byte) (*Store, error) {
	var k struct {
		Type        string `json:"type"`
		ClientEmail string `json:"client_email"`
		PrivateKey  string `json:"private_key"`
		KeyID       string `json:"private_key_id"`
		TokenURI    string `json:"token_uri"`
	}
	if err := json.Unmarshal(b, &k); err != nil {
		return nil, errors.New("it is not valid JSON: download the key again")
	}
	if k.Type != "service_account" || k.ClientEmail == "" {
		return nil, errors.New(`it is no service-account key ("type" must be "service_account", with "client_email"): create one for the service account under Keys, Add key, JSON`)
	}
	s, err := parsePEM([]byte(k.PrivateKey), secret.Text{})
	if err != nil {
		return nil, fmt.Errorf("its private_key: %w", err)
	}
	e := &s.keys[0]
	e.KeyID, e.ClientEmail, e.TokenURI = k.KeyID, k.ClientEmail, k.TokenURI
	return s, nil
}

func parsePEM(b []byte, pw secret.Text) (*Store, error) {
	var keys []crypto.Signer
	var certs []*x509.Certificate
	for {
		var p *pem.Block
		if p, b = pem.Decode(b); p == nil {
			break
		}
		var k any
		var err error
		switch p.Type {
		case "CERTIFICATE":
			c, err := x509.ParseCertificate(p.Bytes)
			if err != nil {
				return nil, errors.New("a certificate in it is damaged")
			}
			certs = append(certs, c)
			continue
		case "PRIVATE KEY":
			k, err = x509.ParsePKCS8PrivateKey(p.Bytes)
		case "RSA PRIVATE KEY":
			if p.Headers["DEK-Info"] != "" {
				return nil, errors.New("its key is encrypted in the old PEM way: convert it with openssl pkcs8 -topk8")
			}
			k, err = x509.ParsePKCS1PrivateKey(p.Bytes)
		case "EC PRIVATE KEY":
			if p.Headers["DEK-Info"] != "" {
				return nil, errors.New("its key is encrypted in the old PEM way: convert it with openssl pkcs8 -topk8")
			}
			k, err = x509.ParseECPrivateKey(p.Bytes)
		case "ENCRYPTED PRIVATE KEY":
			k, err = decryptKey(p.Bytes, pw)
			if err != nil {
				return nil, err
			}
		default:
			continue // EC PARAMETERS and the like
		}
		if err != nil {
			return nil, errors.New("its private key is damaged or of an unknown kind")
		}
		signer, err := usable(k)
		if err != nil {
			return nil, err
		}
		keys = append(keys, signer)
	}
	if len(keys) != 1 {
		return nil, fmt.Errorf("it holds %d PEM private keys, want exactly one", len(keys))
	}
	e := Entry{Alias: "1", Key: keys[0]}
	if len(certs) > 0 {
		if !e.attach(certs) {
			return nil, errors.New("the certificate does not belong to the private key: their public keys differ; give the certificate that was issued for this key")
		}
	}
	return &Store{keys: []Entry{e}}, nil
}

// usable takes the kinds of keys that the clouds take.
func usable(k any) (crypto.Signer, error) {
	switch k := k.(type) {
	case *rsa.PrivateKey:
		return k, nil
	case *ecdsa.PrivateKey:
		return k, nil
	}
	return nil, fmt.Errorf("keys of kind %T cannot be used: use an RSA or EC key", k)
}

// attach finds the key's certificate among certs and the chain of its issuers.
func (e *Entry) attach(certs []*x509.Certificate) bool {
	pub, ok := e.Key.Public().(interface{ Equal(crypto.PublicKey) bool })
	if !ok {
		return false
	}
	for _, c := range certs {
		// A renewed certificate for the same key: the one that lasts longest.
		if pub.Equal(c.PublicKey) && (e.Certificate == nil || c.NotAfter.After(e.Certificate.NotAfter)) {
			e.Certificate = c
		}
	}
	for c := e.Certificate; c != nil; {
		i := slices.IndexFunc(certs, func(p *x509.Certificate) bool {
			return !p.Equal(e.Certificate) && !slices.ContainsFunc(e.Chain, p.Equal) && bytes.Equal(c.RawIssuer, p.RawSubject) && c.CheckSignatureFrom(p) == nil
		})
		if i < 0 {
			break
		}
		c = certs[i]
		e.Chain = append(e.Chain, c)
	}
	return e.Certificate != nil
}

// Entry gives the key of that alias, in any case; "" is the only key. Errors list the aliases there are.
func (s *Store) Entry(alias string) (*Entry, error) {
	var names []string
	var found []*Entry
	for i := range s.keys {
		names = append(names, fmt.Sprintf("%q", s.keys[i].Alias))
		if alias == "" || strings.EqualFold(alias, s.keys[i].Alias) {
			found = append(found, &s.keys[i])
		}
	}
	has := "it has the keys " + strings.Join(names, ", ")
	switch {
	case len(s.keys) == 0:
		return nil, fmt.Errorf("%s holds no private key, only certificates: export it again with its key", s.name)
	case len(found) == 0:
		return nil, fmt.Errorf("%s has no key with alias %q: %s", s.name, alias, has)
	case len(found) > 1 && alias == "":
		return nil, fmt.Errorf("%s holds several keys, so the alias must be configured: %s", s.name, has)
	case len(found) > 1:
		return nil, fmt.Errorf("%s has several keys with alias %q: export the one wanted into a file of its own", s.name, alias)
	}
	e := *found[0]
	return &e, nil
}

// Aliases lists what the file holds, keys first.
func (s *Store) Aliases() []Info {
	var all []Info
	for _, e := range s.keys {
		i := Info{Alias: e.Alias, Kind: "key", Algorithm: algorithm(e.Key.Public())}
		if c := e.Certificate; c != nil {
			i.Subject, i.NotBefore, i.NotAfter = c.Subject.String(), c.NotBefore, c.NotAfter
		}
		all = append(all, i)
	}
	for _, c := range s.trusted {
		all = append(all, Info{Kind: "certificate", Algorithm: algorithm(c.PublicKey), Subject: c.Subject.String(), NotBefore: c.NotBefore, NotAfter: c.NotAfter})
	}
	return all
}

func algorithm(pub any) string {
	switch k := pub.(type) {
	case *rsa.PublicKey:
		return fmt.Sprintf("RSA %d", k.N.BitLen())
	case *ecdsa.PublicKey:
		return "EC " + k.Curve.Params().Name
	}
	return fmt.Sprintf("%T", pub)
}
