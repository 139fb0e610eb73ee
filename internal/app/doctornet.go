package app

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"time"
)

// maxSkew is how far this machine's clock may be off before clouds refuse assertions.
const maxSkew = 2 * time.Minute

// checkTimeout bounds one check of doctor.
const checkTimeout = 15 * time.Second

// endpoint is a host that an account needs.
type endpoint struct {
	what string // "token endpoint", "Graph", "Gmail SMTP"
	addr string // host:port
	tls  bool   // speaks TLS from the first byte; else it is only connected to
}

// checkEndpoint looks up, connects and shakes hands with one endpoint. It reports whether all went well.
func (r *Report) checkEndpoint(ctx context.Context, account string, e endpoint, roots *x509.CertPool) bool {
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	host, _, err := net.SplitHostPort(e.addr)
	if err != nil {
		r.add(Finding{account, "address", Fail, fmt.Sprintf("%s: %v", e.what, err), "write it as host:port"})
		return false
	}
	if _, err := net.DefaultResolver.LookupHost(ctx, host); err != nil {
		r.add(Finding{account, "dns", Fail, fmt.Sprintf("%s: %s is not found: %v", e.what, host, err), "check the name in the profile, and this machine's resolver"})
		return false
	}
	var d net.Dialer
	c, err := d.DialContext(ctx, "tcp", e.addr)
	if err != nil {
		r.add(Finding{account, "connect", Fail, fmt.Sprintf("%s: no connection to %s: %v", e.what, e.addr, err), "a firewall may be in the way: this machine needs to reach " + e.addr})
		return false
	}
	defer c.Close()
	if !e.tls {
		r.add(Finding{account, "connect", OK, fmt.Sprintf("%s: %s answers", e.what, e.addr), ""})
		return true
	}
	t := tls.Client(c, &tls.Config{ServerName: host, RootCAs: roots})
	if err := t.HandshakeContext(ctx); err != nil {
		next := "something other than the cloud answered, or TLS is inspected on the way"
		if _, ok := errors.AsType[*tls.CertificateVerificationError](err); ok {
			next = "if TLS is inspected on the way, or the cloud is not the vendor's own, name its authority: ca = \"file:…\" in the profile"
		}
		r.add(Finding{account, "tls", Fail, fmt.Sprintf("%s: %s: %v", e.what, e.addr, err), next})
		return false
	}
	leaf := t.ConnectionState().PeerCertificates[0]
	r.add(Finding{account, "tls", OK, fmt.Sprintf("%s: %s, %s, certificate until %s", e.what, e.addr, tls.VersionName(t.ConnectionState().Version), leaf.NotAfter.Format(time.DateOnly)), ""})
	return true
}

// checkClock compares this machine's clock with the Date of an HTTPS answer.
func (r *Report) checkClock(ctx context.Context, account, url string, client *http.Client, now func() time.Time) {
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodHead, url, nil)
	if err != nil {
		return
	}
	sent := now()
	resp, err := client.Do(req)
	if err != nil {
		return // the checks of the endpoint have told what is wrong
	}
	resp.Body.Close()
	date, err := http.ParseTime(resp.Header.Get("Date"))
	if err != nil {
		r.add(Finding{account, "clock", Skip, "the token endpoint tells no time", ""})
		return
	}
	// Date has whole seconds and was written somewhere between sending and now.
	skew := sent.Add(now().Sub(sent) / 2).Sub(date.Add(500 * time.Millisecond)).Round(time.Second)
	if skew.Abs() > maxSkew {
		r.add(Finding{account, "clock", Fail, fmt.Sprintf("this machine's clock is off by %v", skew), "assertions and tokens have times in them: set the clock, and let NTP keep it"})
		return
	}
	r.add(Finding{account, "clock", OK, fmt.Sprintf("within %v of the cloud's", max(time.Second, skew.Abs())), ""})
}
