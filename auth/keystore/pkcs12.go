package keystore

import (
	"crypto/ed25519"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha1"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"strconv"
	"strings"
	"unicode/utf16"

	pkcs12 "software.sslmate.com/src/go-pkcs12"

	"mailbridge/internal/secret"
)

// A PKCS#12 file (RFC 7292 §4) is a list of safes, each a list of bags. go-pkcs12 decodes files of one key
// alone. So this file walks the outer structure, which is not encrypted, and wraps each encrypted part into
// a file of its own, of the one shape that go-pkcs12 does decode. All decryption stays with go-pkcs12.

const (
	maxIterations = 1_000_000 // of one key derivation
	maxTotal      = 5_000_000 // of a whole file
	maxBags       = 100
)

var (
	oidData      = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 7, 1}
	oidEncrypted = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 7, 6}
	oidName      = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 20}
	oidX509      = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 22, 1}
	oidKeyBag    = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 12, 10, 1, 1}
	oidShrouded  = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 12, 10, 1, 2}
	oidCertBag   = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 12, 10, 1, 3}
	oidSHA1      = asn1.ObjectIdentifier{1, 3, 14, 3, 2, 26}
)

type pfx struct {
	Version  int
	AuthSafe contentInfo
	MacData  macData `asn1:"optional"`
}

type contentInfo struct {
	Type    asn1.ObjectIdentifier
	Content asn1.RawValue `asn1:"tag:0,explicit,optional"`
}

type macData struct {
	Mac struct {
		Algorithm pkix.AlgorithmIdentifier
		Digest    []byte
	}
	Salt       []byte
	Iterations int `asn1:"optional,default:1"`
}

type bag struct {
	ID         asn1.ObjectIdentifier
	Value      asn1.RawValue `asn1:"tag:0,explicit"`
	Attributes []attribute   `asn1:"set,optional"`
}

type attribute struct {
	ID    asn1.ObjectIdentifier
	Value asn1.RawValue `asn1:"set"`
}

type certBag struct {
	ID   asn1.ObjectIdentifier
	Data []byte `asn1:"tag:0,explicit"`
}

var (
	errShape    = errors.New("it is not a PKCS#12 file, or damaged, or not DER-encoded: check it with keytool -list -keystore FILE")
	errPassword = errors.New("the password is wrong, or the file is damaged: try it with keytool -list -keystore FILE")
)

func unmarshal(b []byte, v any) error {
	if rest, err := asn1.Unmarshal(b, v); err != nil || len(rest) != 0 {
		return errShape
	}
	return nil
}

// octets opens the [0] EXPLICIT OCTET STRING of a data content.
func octets(c contentInfo) (b []byte, err error) {
	return b, unmarshal(c.Content.Bytes, &b)
}

func parseP12(b []byte, pw secret.Text) (*Store, error) {
	var file pfx
	if err := unmarshal(b, &file); err != nil {
		return nil, err
	}
	if file.Version != 3 || !file.AuthSafe.Type.Equal(oidData) {
		return nil, errors.New("it is a PKCS#12 file of an unsupported kind (RFC 7292 version 3 with password integrity is supported)")
	}
	content, err := octets(file.AuthSafe)
	if err != nil {
		return nil, err
	}
	var safes []contentInfo
	if err := unmarshal(content, &safes); err != nil {
		return nil, err
	}
	w, err := newWalker(pw)
	if err != nil {
		return nil, err
	}
	hasMac := len(file.MacData.Mac.Algorithm.Algorithm) > 0
	if hasMac {
		if err := w.cost(file.MacData.Iterations); err != nil {
			return nil, err
		}
		if err := w.costIn(file.MacData.Mac.Algorithm.Parameters.FullBytes, 0); err != nil {
			return nil, err
		}
	}
	for _, safe := range safes {
		if err := w.costIn(safe.Content.FullBytes, 0); err != nil {
			return nil, err
		}
		if safe.Type.Equal(oidData) {
			data, err := octets(safe)
			if err != nil {
				return nil, err
			}
			if err := w.costIn(data, 0); err != nil {
				return nil, err
			}
		}
	}
	if hasMac {
		if _, _, _, err := pkcs12.DecodeChain(b, pw.Reveal()); errors.Is(err, pkcs12.ErrIncorrectPassword) {
			return nil, errPassword
		}
	}
	for _, safe := range safes {
		if err := w.safe(safe); err != nil {
			return nil, err
		}
	}
	s := &Store{keys: w.keys}
	certs := slices.Clone(w.certs)
	for i := range s.keys {
		e := &s.keys[i]
		if !e.attach(w.certs) {
			continue
		}
		certs = slices.DeleteFunc(certs, func(c *x509.Certificate) bool {
			return c.Equal(e.Certificate) || slices.ContainsFunc(e.Chain, c.Equal)
		})
	}
	// One key and certificates, none of which is its own, is an export gone wrong.
	if len(s.keys) == 1 && s.keys[0].Certificate == nil && len(w.certs) == 1 {
		return nil, errors.New("the certificate does not belong to the private key: their public keys differ; export both again together")
	}
	s.trusted = certs
	return s, nil
}

type walker struct {
	pw      secret.Text
	spent   int
	bags    int
	unnamed int
	keys    []Entry
	certs   []*x509.Certificate
	// What go-pkcs12 wants beside the part in question.
	dummyKey, dummyCert bag
	dummyRaw            []byte
}

func newWalker(pw secret.Text) (*walker, error) {
	w := &walker{pw: pw}
	pub, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	t := &x509.Certificate{SerialNumber: big.NewInt(1)}
	if w.dummyRaw, err = x509.CreateCertificate(rand.Reader, t, t, pub, key); err != nil {
		return nil, err
	}
	cb, err := asn1.Marshal(certBag{oidX509, w.dummyRaw})
	if err != nil {
		return nil, err
	}
	w.dummyKey = bag{ID: oidKeyBag, Value: explicit(pkcs8)}
	w.dummyCert = bag{ID: oidCertBag, Value: explicit(cb)}
	return w, nil
}

func explicit(b []byte) asn1.RawValue {
	return asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: 0, IsCompound: true, Bytes: b}
}

// cost counts iterations of key derivations before any is run.
func (w *walker) cost(n int) error {
	if w.spent += n; n < 0 || n > maxIterations || w.spent > maxTotal {
		return fmt.Errorf("its key derivation takes more than %d iterations (%d for the whole file): export it again with fewer", maxIterations, maxTotal)
	}
	return nil
}

// costIn counts the integers in algorithm parameters, in whatever depth: iteration counts are among them and
// nothing else there is large.
func (w *walker) costIn(b []byte, depth int) error {
	if depth > 12 {
		return errShape
	}
	for len(b) > 0 {
		var v asn1.RawValue
		rest, err := asn1.Unmarshal(b, &v)
		if err != nil {
			return errShape
		}
		b = rest
		switch {
		case v.IsCompound:
			if err := w.costIn(v.Bytes, depth+1); err != nil {
				return err
			}
		case v.Class == asn1.ClassUniversal && v.Tag == asn1.TagInteger:
			n := new(big.Int).SetBytes(v.Bytes)
			// A plain key bag holds the key's own numbers; those are longer than any count.
			if len(v.Bytes) > 8 {
				continue
			}
			if !n.IsInt64() || n.Int64() > maxIterations {
				return w.cost(maxIterations + 1)
			}
			if err := w.cost(int(n.Int64())); err != nil {
				return err
			}
		}
	}
	return nil
}

func (w *walker) safe(safe contentInfo) error {
	switch {
	case safe.Type.Equal(oidEncrypted):
		return w.encryptedSafe(safe)
	case !safe.Type.Equal(oidData):
		return errors.New("it is encrypted for a certificate instead of a password, which is not supported")
	}
	data, err := octets(safe)
	if err != nil {
		return err
	}
	var bags []bag
	if err := unmarshal(data, &bags); err != nil {
		return err
	}
	if w.bags += len(bags); w.bags > maxBags {
		return fmt.Errorf("it holds more than %d entries", maxBags)
	}
	for _, b := range bags {
		switch {
		case b.ID.Equal(oidKeyBag), b.ID.Equal(oidShrouded):
			k, _, err := w.decode(w.data(b, w.dummyCert))
			if err != nil {
				return err
			}
			signer, err := usable(k)
			if err != nil {
				return err
			}
			w.keys = append(w.keys, Entry{Alias: w.alias(b), Key: signer})
		case b.ID.Equal(oidCertBag):
			_, certs, err := w.decode(w.data(w.dummyKey, b))
			if err != nil {
				return err
			}
			w.certs = append(w.certs, certs...)
		}
	}
	return nil
}

// encryptedSafe takes the certificates of an encrypted safe. Every tool that we know keeps keys outside of it.
func (w *walker) encryptedSafe(safe contentInfo) error {
	_, certs, err := w.decode(w.data(w.dummyKey, w.dummyCert), safe)
	if err != nil && !errors.Is(err, errPassword) && strings.Contains(err.Error(), "exactly one key bag") {
		return errors.New("it keeps its keys in an encrypted safe, which is not supported: export it again with keytool -importkeystore or openssl pkcs12 -export")
	}
	if err != nil {
		return err
	}
	w.certs = append(w.certs, certs...)
	if len(w.certs) > maxBags {
		return fmt.Errorf("it holds more than %d certificates", maxBags)
	}
	return nil
}

// alias is the bag's friendlyName (RFC 2985 §5.5.1) in lower case, or its number among those without one, as
// Java's PKCS12 key store has it.
func (w *walker) alias(b bag) string {
	for _, a := range b.Attributes {
		var v asn1.RawValue
		if !a.ID.Equal(oidName) || unmarshal(a.Value.Bytes, &v) != nil || v.Tag != asn1.TagBMPString {
			continue
		}
		units := make([]uint16, len(v.Bytes)/2)
		for i := range units {
			units[i] = uint16(v.Bytes[2*i])<<8 | uint16(v.Bytes[2*i+1])
		}
		return strings.ToLower(string(utf16.Decode(units)))
	}
	w.unnamed++
	return strconv.Itoa(w.unnamed)
}

// data makes a safe of bags; the attributes have served.
func (w *walker) data(bags ...bag) contentInfo {
	for i := range bags {
		bags[i].Attributes = nil
		bags[i].Value = explicit(bags[i].Value.Bytes)
	}
	b, err := asn1.Marshal(bags)
	if err != nil {
		return contentInfo{Type: oidData}
	}
	return wrap(b)
}

func wrap(b []byte) contentInfo {
	o, err := asn1.Marshal(b)
	if err != nil {
		return contentInfo{Type: oidData}
	}
	return contentInfo{oidData, explicit(o)}
}

// decode lets go-pkcs12 decode a file of these safes.
func (w *walker) decode(safes ...contentInfo) (any, []*x509.Certificate, error) {
	content, err := asn1.Marshal(safes)
	if err != nil {
		return nil, nil, errShape
	}
	f := pfx{Version: 3, AuthSafe: wrap(content)}
	// RFC 7292 appendix B.2 with one iteration and one block: the key is SHA-1 of diversifier, salt and password.
	salt := []byte("mailbrid")
	units := utf16.Encode([]rune(w.pw.Reveal() + "\x00"))
	var p []byte
	for _, u := range units {
		p = append(p, byte(u>>8), byte(u))
	}
	h := sha1.New()
	h.Write(fill([]byte{3}, 64))
	h.Write(fill(salt, 64))
	h.Write(fill(p, (len(p)+63)/64*64))
	mac := hmac.New(sha1.New, h.Sum(nil))
	mac.Write(content)
	f.MacData.Mac.Algorithm = pkix.AlgorithmIdentifier{Algorithm: oidSHA1, Parameters: asn1.NullRawValue}
	f.MacData.Mac.Digest, f.MacData.Salt, f.MacData.Iterations = mac.Sum(nil), salt, 1
	b, err := asn1.Marshal(f)
	if err != nil {
		return nil, nil, errShape
	}
	k, first, rest, err := pkcs12.DecodeChain(b, w.pw.Reveal())
	switch {
	case errors.Is(err, pkcs12.ErrDecryption), errors.Is(err, pkcs12.ErrIncorrectPassword):
		return nil, nil, errPassword
	case err != nil:
		return nil, nil, fmt.Errorf("a part of it cannot be decoded (%w): check the password, or export it again", err)
	}
	certs := slices.DeleteFunc(append([]*x509.Certificate{first}, rest...), func(c *x509.Certificate) bool { return string(c.Raw) == string(w.dummyRaw) })
	return k, certs, nil
}

// fill repeats b to n bytes.
func fill(b []byte, n int) []byte {
	out := make([]byte, n)
	for i := range out {
		out[i] = b[i%len(b)]
	}
	return out
}

// decryptKey opens an EncryptedPrivateKeyInfo (RFC 5958 §3), which is what a shrouded key bag holds.
func decryptKey(der []byte, pw secret.Text) (any, error) {
	if pw.Empty() {
		return nil, errors.New("its key is encrypted and no password is configured")
	}
	w, err := newWalker(pw)
	if err != nil {
		return nil, err
	}
	if err := w.costIn(der, 0); err != nil {
		return nil, err
	}
	k, _, err := w.decode(w.data(bag{ID: oidShrouded, Value: explicit(der)}, w.dummyCert))
	if err != nil {
		// No MAC guards this key: a wrong password shows as bad padding or as rubbish.
		return nil, errors.New("the password of its key is wrong, or the key is damaged: try it with openssl pkey -noout -in FILE")
	}
	return k, nil
}
