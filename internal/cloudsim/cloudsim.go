// Package cloudsim puts the simulated clouds on real ports: identity of both vendors, Microsoft Graph with the
// host for uploads, and Gmail. They speak TLS under an authority of their own and listen on loopback only.
package cloudsim

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"mailbridge/internal/cloudsim/gmail"
	"mailbridge/internal/cloudsim/graph"
	"mailbridge/internal/cloudsim/identity"
	"mailbridge/internal/cloudsim/world"
)

// Options says where the clouds listen. Empty addresses are free ports on 127.0.0.1.
type Options struct {
	Dir                      string // keeps the authority in ca.pem and ca.key; must exist
	API, Uploads             string
	SMTPS, Submission, IMAPS string
	Admin                    string // plain HTTP: deliveries, requests, knobs; "-" is none
	Log                      *slog.Logger
}

// Cloud is the running clouds.
type Cloud struct {
	World    *world.World
	Identity *identity.Server
	Graph    *graph.Server
	Gmail    *gmail.Server
	CAFile   string

	API, Uploads, SMTPS, Submission, IMAPS, Admin string // addresses, host:port
	servers                                       []*http.Server
}

// Start starts everything. Shutdown ends it.
func Start(o Options) (*Cloud, error) {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	cert, caFile, err := certificate(o.Dir)
	if err != nil {
		return nil, err
	}
	c := &Cloud{World: world.New(0), CAFile: caFile}
	tc := &tls.Config{Certificates: []tls.Certificate{cert}, NextProtos: []string{"h2", "http/1.1"}}
	var opened []net.Listener
	listen := func(addr string, at *string) (net.Listener, error) {
		if addr == "" {
			addr = "127.0.0.1:0"
		}
		l, err := net.Listen("tcp", addr)
		if err != nil {
			return nil, fmt.Errorf("simulated cloud: %w", err)
		}
		*at = l.Addr().String()
		opened = append(opened, l)
		return l, nil
	}
	fail := func(err error) (*Cloud, error) {
		for _, l := range opened {
			_ = l.Close()
		}
		return nil, err
	}
	ls := make([]net.Listener, 6)
	for i, p := range []struct {
		addr string
		at   *string
	}{{o.API, &c.API}, {o.Uploads, &c.Uploads}, {o.SMTPS, &c.SMTPS}, {o.Submission, &c.Submission}, {o.IMAPS, &c.IMAPS}, {o.Admin, &c.Admin}} {
		if p.addr == "-" {
			continue
		}
		if ls[i], err = listen(p.addr, p.at); err != nil {
			return fail(err)
		}
	}
	c.Identity = identity.New(c.World, func() string { return "https://" + c.API })
	c.Graph = graph.New(c.World, c.Identity.Verify, func() string { return "https://localhost:" + port(c.Uploads) })
	c.Gmail = gmail.New(gmail.Options{World: c.World, TLS: &tls.Config{Certificates: []tls.Certificate{cert}}, Log: o.Log, Verify: func(t string) (string, []string, time.Time, error) {
		cl, err := c.Identity.Verify(t)
		if err == nil && !cl.Google {
			err = errors.New("a token of another cloud")
		}
		return cl.Mailbox, cl.Scopes, cl.Expiry, err
	}})
	login, graphMux, up := http.NewServeMux(), http.NewServeMux(), http.NewServeMux()
	c.Identity.Register(login)
	c.Graph.Register(graphMux)
	// One port for both: a tenant is never called v1.0.
	api := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasPrefix(r.URL.Path, "/v1.0/") {
			graphMux.ServeHTTP(w, r)
			return
		}
		login.ServeHTTP(w, r)
	})
	c.Graph.RegisterUploads(up)
	// HTTP/1.1 alone: cutting a connection must cut this request and no other.
	h1 := tc.Clone()
	h1.NextProtos = []string{"http/1.1"}
	c.http(tls.NewListener(ls[0], h1), api)
	c.http(tls.NewListener(ls[1], h1), up)
	if ls[5] != nil {
		c.http(ls[5], c.admin())
	}
	report := func(err error) {
		if err != nil {
			o.Log.Error("a simulated cloud stopped", "err", err)
		}
	}
	go func() { report(c.Gmail.ServeSMTPS(ls[2])) }()
	go func() { report(c.Gmail.ServeSubmission(ls[3])) }()
	go func() {
		report(c.Gmail.ServeIMAPS(tls.NewListener(ls[4], &tls.Config{Certificates: []tls.Certificate{cert}})))
	}()
	return c, nil
}

func (c *Cloud) http(l net.Listener, h http.Handler) {
	s := &http.Server{Handler: h, ReadHeaderTimeout: 30 * time.Second, ErrorLog: slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)}
	c.servers = append(c.servers, s)
	go func() { _ = s.Serve(l) }() // ends with Shutdown
}

func port(addr string) string {
	_, p, err := net.SplitHostPort(addr)
	if err != nil {
		return ""
	}
	return p
}

// TokenEndpoint is Entra's, with {tenant_id} for the tenant; GoogleTokenEndpoint is Google's; GraphURL is the API.
func (c *Cloud) TokenEndpoint() string       { return "https://" + c.API + "/{tenant_id}/oauth2/v2.0/token" }
func (c *Cloud) GoogleTokenEndpoint() string { return "https://" + c.API + "/token" }
func (c *Cloud) GraphURL() string            { return "https://" + c.API + "/v1.0" }

// Shutdown ends the clouds.
func (c *Cloud) Shutdown(ctx context.Context) error {
	var err error
	for _, s := range c.servers {
		if serr := s.Shutdown(ctx); serr != nil {
			err = errors.Join(err, s.Close())
		}
	}
	c.Graph.Close()
	return errors.Join(err, c.Gmail.Shutdown(ctx))
}

// admin is the stand-alone clouds' own interface: what was delivered, what was asked, and the knobs.
func (c *Cloud) admin() http.Handler {
	mux := http.NewServeMux()
	show := func(w http.ResponseWriter, v any) {
		w.Header().Set("Content-Type", "application/json")
		e := json.NewEncoder(w)
		e.SetIndent("", " ")
		_ = e.Encode(v) // whoever asked may have gone
	}
	mux.HandleFunc("GET /_sim/deliveries", func(w http.ResponseWriter, _ *http.Request) { show(w, c.World.Deliveries()) })
	mux.HandleFunc("GET /_sim/deliveries/{id}/raw", func(w http.ResponseWriter, r *http.Request) {
		id, err := strconv.Atoi(r.PathValue("id"))
		for _, d := range c.World.Deliveries() {
			if err == nil && d.ID == id {
				w.Header().Set("Content-Type", "text/plain; charset=utf-8")
				w.Header().Set("X-Content-Type-Options", "nosniff")
				_, _ = w.Write(d.Raw)
				return
			}
		}
		http.NotFound(w, r)
	})
	mux.HandleFunc("GET /_sim/requests", func(w http.ResponseWriter, _ *http.Request) { show(w, c.World.Requests()) })
	mux.HandleFunc("POST /_sim/rules", func(w http.ResponseWriter, r *http.Request) {
		var rule world.Rule
		d := json.NewDecoder(r.Body)
		d.DisallowUnknownFields()
		if err := d.Decode(&rule); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		c.World.Add(rule)
		w.WriteHeader(http.StatusNoContent)
	})
	mux.HandleFunc("DELETE /_sim/rules", func(w http.ResponseWriter, _ *http.Request) {
		c.World.Reset()
		w.WriteHeader(http.StatusNoContent)
	})
	return mux
}

// certificate makes a certificate for loopback under the authority in dir, which is made when it is missing.
func certificate(dir string) (tls.Certificate, string, error) {
	caFile, keyFile := filepath.Join(dir, "ca.pem"), filepath.Join(dir, "ca.key")
	ca, err := tls.LoadX509KeyPair(caFile, keyFile)
	if err != nil {
		key, der, err := sign(&x509.Certificate{Subject: pkix.Name{CommonName: "Simulated clouds"}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}, nil)
		if err != nil {
			return ca, "", err
		}
		kb, err := x509.MarshalECPrivateKey(key)
		if err != nil {
			return ca, "", err
		}
		if err := errors.Join(os.WriteFile(keyFile, pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: kb}), 0o600),
			os.WriteFile(caFile, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o644)); err != nil {
			return ca, "", err
		}
		if ca, err = tls.LoadX509KeyPair(caFile, keyFile); err != nil {
			return ca, "", err
		}
	}
	key, der, err := sign(&x509.Certificate{Subject: pkix.Name{CommonName: "localhost"}, DNSNames: []string{"localhost"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1), net.IPv6loopback},
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}, &ca)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, caFile, err
}

func sign(t *x509.Certificate, ca *tls.Certificate) (*ecdsa.PrivateKey, []byte, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	t.SerialNumber, err = rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 100))
	if err != nil {
		return nil, nil, err
	}
	t.NotBefore, t.NotAfter = time.Now().Add(-time.Hour), time.Now().AddDate(2, 0, 0)
	parent, signer := t, any(key)
	if ca != nil {
		parent, signer = ca.Leaf, ca.PrivateKey
	}
	der, err := x509.CreateCertificate(rand.Reader, t, parent, key.Public(), signer)
	return key, der, err
}
