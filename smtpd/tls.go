package smtpd

import (
	"crypto/tls"
	"fmt"
)

// TLSConfig makes a listener's configuration for a named profile: "modern" (TLS 1.2 and 1.3), "legacy-1.2"
// (adds suites with RSA key exchange, for devices that know nothing else) and "legacy-1.0" (TLS 1.0 and up).
// Suites are listed by hand: Go's own defaults drop old ones from release to release.
func TLSConfig(profile string, get func(*tls.ClientHelloInfo) (*tls.Certificate, error)) (*tls.Config, error) {
	c := &tls.Config{GetCertificate: get, MinVersion: tls.VersionTLS12}
	forward := []uint16{
		tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
		tls.TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384, tls.TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384,
		tls.TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256, tls.TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256,
	}
	old := []uint16{
		tls.TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA, tls.TLS_ECDHE_RSA_WITH_AES_128_CBC_SHA,
		tls.TLS_ECDHE_ECDSA_WITH_AES_256_CBC_SHA, tls.TLS_ECDHE_RSA_WITH_AES_256_CBC_SHA,
		tls.TLS_RSA_WITH_AES_128_GCM_SHA256, tls.TLS_RSA_WITH_AES_256_GCM_SHA384,
		tls.TLS_RSA_WITH_AES_128_CBC_SHA, tls.TLS_RSA_WITH_AES_256_CBC_SHA,
	}
	switch profile {
	case "", "modern":
		c.CipherSuites = forward
	case "legacy-1.2":
		c.CipherSuites = append(forward, old...)
	case "legacy-1.0":
		c.MinVersion = tls.VersionTLS10
		c.CipherSuites = append(append(forward, old...), tls.TLS_RSA_WITH_3DES_EDE_CBC_SHA)
	default:
		return nil, fmt.Errorf("there is no TLS profile %q", profile)
	}
	return c, nil
}
