package oauth

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v5"
	"go.uber.org/goleak"

	"mailbridge/internal/mailerr"
	"mailbridge/internal/secret"
	"mailbridge/providers"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var testKey = sync.OnceValues(func() (Key, error) {
	k, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return Key{}, err
	}
	t := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "t"}, NotBefore: time.Now(), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, t, t, k.Public(), k)
	if err != nil {
		return Key{}, err
	}
	c, err := x509.ParseCertificate(der)
	return Key{Signer: k, Certificate: c}, err
})

func key(t testing.TB) Key {
	t.Helper()
	k, err := testKey()
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// endpoint is a token endpoint that answers as it is told.
type endpoint struct {
	*httptest.Server
	mu     sync.Mutex
	forms  []url.Values
	answer func(f url.Values) (int, string)
	header http.Header
	clock  time.Time
}

func newEndpoint(t testing.TB) *endpoint {
	e := &endpoint{clock: time.Date(2026, 11, 24, 10, 0, 0, 0, time.UTC), header: http.Header{}}
	n := 0
	e.answer = func(url.Values) (int, string) {
		n++
		return 200, fmt.Sprintf(`{"access_token":"token-%d","token_type":"Bearer","expires_in":3599}`, n)
	}
	e.Server = httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if err := r.ParseForm(); err != nil {
			t.Error(err)
		}
		e.mu.Lock()
		e.forms = append(e.forms, r.PostForm)
		answer := e.answer
		for k, v := range e.header {
			w.Header()[k] = v
		}
		e.mu.Unlock()
		code, body := answer(r.PostForm)
		w.WriteHeader(code)
		_, _ = io.WriteString(w, body)
	}))
	t.Cleanup(e.Close)
	return e
}

func (e *endpoint) now() time.Time {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.clock
}

func (e *endpoint) pass(d time.Duration) {
	e.mu.Lock()
	e.clock = e.clock.Add(d)
	e.mu.Unlock()
}

func (e *endpoint) asked() int {
	e.mu.Lock()
	defer e.mu.Unlock()
	return len(e.forms)
}

func (e *endpoint) set(f func(url.Values) (int, string)) {
	e.mu.Lock()
	e.answer = f
	e.mu.Unlock()
}

func (e *endpoint) client(t testing.TB, p Profile) *Client {
	t.Helper()
	p.Name, p.TokenEndpoint = "test", e.URL+"/token"
	c, err := NewClient(p, e.Client(), e.now)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func secretProfile() Profile {
	return Profile{Provider: "graph", Grant: ClientCredentials, TenantID: "t", ClientID: "app", ClientSecret: secret.New("SECRET&value")}
}

func (e *endpoint) manager(t testing.TB, s Store) *Manager {
	m := NewManager(ManagerOptions{Store: s, Missing: func(err error) bool { return errors.Is(err, errMissing) }, Log: slog.New(slog.DiscardHandler), Now: e.now})
	t.Cleanup(m.Close)
	return m
}

func TestAssertionsAreWhatTheVendorsWant(t *testing.T) {
	e, k := newEndpoint(t), key(t)
	s1, s256 := sha1.Sum(k.Certificate.Raw), sha256.Sum256(k.Certificate.Raw)
	verify := func(a string) (*jwt.Token, jwt.MapClaims) {
		t.Helper()
		claims := jwt.MapClaims{}
		tok, err := jwt.NewParser(jwt.WithTimeFunc(e.now)).ParseWithClaims(a, claims, func(*jwt.Token) (any, error) { return k.Signer.Public(), nil })
		if err != nil {
			t.Fatal(err)
		}
		return tok, claims
	}
	seen := map[any]bool{}
	for alg, thumb := range map[string][2]string{"PS256": {"x5t#S256", base64.RawURLEncoding.EncodeToString(s256[:])}, "RS256": {"x5t", base64.RawURLEncoding.EncodeToString(s1[:])}} {
		c := e.client(t, Profile{Provider: "graph", Grant: ClientCredentials, TenantID: "t", ClientID: "app", Assertion: &Assertion{Key: k, Algorithm: alg}})
		if _, err := c.fetch(t.Context(), "m@x.example", secret.Text{}); err != nil {
			t.Fatal(err)
		}
		f := e.forms[len(e.forms)-1]
		if f.Get("client_assertion_type") != "urn:ietf:params:oauth:client-assertion-type:jwt-bearer" || f.Get("scope") != "https://graph.microsoft.com/.default" || f.Has("client_secret") {
			t.Errorf("%v", f)
		}
		tok, cl := verify(f.Get("client_assertion"))
		if tok.Method.Alg() != alg || tok.Header[thumb[0]] != thumb[1] || tok.Header["kid"] != nil {
			t.Errorf("header %v", tok.Header)
		}
		exp, _ := cl["exp"].(float64)
		if cl["iss"] != "app" || cl["sub"] != "app" || cl["aud"] != e.URL+"/token" || seen[cl["jti"]] || time.Unix(int64(exp), 0).Sub(e.now()) != 10*time.Minute {
			t.Errorf("claims %v", cl)
		}
		seen[cl["jti"]] = true
	}
	k.KeyID = "kid-1"
	c := e.client(t, Profile{Provider: "gmail", Grant: JWTBearer, JWT: &JWT{Key: k, Issuer: "svc@p", Subject: "{mailbox}", Lifetime: 30 * time.Minute},
		Claims: map[string]any{"scope": "https://mail.google.com/", "team": []any{"a", 1.0}, "who": "for {mailbox}"}})
	if _, err := c.fetch(t.Context(), "m@x.example", secret.Text{}); err != nil {
		t.Fatal(err)
	}
	f := e.forms[len(e.forms)-1]
	if len(f) != 2 || f.Get("grant_type") != "urn:ietf:params:oauth:grant-type:jwt-bearer" {
		t.Errorf("form %v", f)
	}
	tok, cl := verify(f.Get("assertion"))
	iat, _ := cl["iat"].(float64)
	exp, _ := cl["exp"].(float64)
	if tok.Header["kid"] != "kid-1" || tok.Header["x5t"] != nil || cl["sub"] != "m@x.example" || cl["who"] != "for m@x.example" || cl["scope"] != "https://mail.google.com/" || cl["team"] == nil || exp-iat != 1800 || int64(iat) >= e.now().Unix() {
		t.Errorf("%v %v", tok.Header, cl)
	}
	if _, isString := cl["aud"].(string); !isString {
		t.Errorf("aud %v is no string", cl["aud"])
	}
}

func TestProfilesThatCannotWorkAreRefusedAtOnce(t *testing.T) {
	k := key(t)
	other, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	for want, p := range map[string]Profile{
		"either a client secret or": {Grant: ClientCredentials, TokenEndpoint: "https://x/t"},
		"does not belong":           {Grant: ClientCredentials, TokenEndpoint: "https://x/t", Assertion: &Assertion{Key: Key{Signer: other, Certificate: k.Certificate}}},
		"no certificate":            {Grant: ClientCredentials, TokenEndpoint: "https://x/t", Assertion: &Assertion{Key: Key{Signer: other}}},
		"PS256 or RS256":            {Grant: ClientCredentials, TokenEndpoint: "https://x/t", Assertion: &Assertion{Key: k, Algorithm: "HS256"}},
		"set by jwt itself":         {Grant: JWTBearer, TokenEndpoint: "https://x/t", JWT: &JWT{Key: k, Issuer: "i"}, Claims: map[string]any{"aud": "x"}},
		"needs scope":               {Provider: "gmail", Grant: JWTBearer, TokenEndpoint: "https://x/t", JWT: &JWT{Key: k, Issuer: "i"}},
		"between a minute":          {Grant: JWTBearer, TokenEndpoint: "https://x/t", JWT: &JWT{Key: k, Issuer: "i", Lifetime: 2 * time.Hour}},
		"needs an issuer":           {Grant: JWTBearer, TokenEndpoint: "https://x/t", JWT: &JWT{Key: k}},
		"not an https":              {Grant: RefreshToken, ClientID: "x", TokenEndpoint: "http://x/t"},
		"no cloud":                  {Grant: RefreshToken, ClientID: "x", Cloud: "moon"},
		"no grant":                  {Grant: "password", TokenEndpoint: "https://x/t"},
	} {
		if _, err := NewClient(p, http.DefaultClient, time.Now); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", want, err)
		}
	}
	for name, want := range map[string]string{"": "https://login.microsoftonline.com/t/oauth2/v2.0/token https://graph.microsoft.com/.default", "us-gov-l5": "https://login.microsoftonline.us/t/oauth2/v2.0/token https://dod-graph.microsoft.us/.default",
		"china": "https://login.chinacloudapi.cn/t/oauth2/v2.0/token https://microsoftgraph.chinacloudapi.cn/.default"} {
		p := secretProfile()
		p.Cloud = name
		c, err := NewClient(p, http.DefaultClient, time.Now)
		if err != nil || c.p.TokenEndpoint+" "+c.p.Scopes[0] != want {
			t.Errorf("%s: %+v, %v", name, c.p, err)
		}
	}
}

func entraBody(code string, number int) string {
	b, err := json.Marshal(map[string]any{"error": code, "error_description": fmt.Sprintf("AADSTS%d: words. Trace ID: x", number), "error_codes": []int{number}})
	if err != nil {
		panic(err)
	}
	return string(b)
}

// Every refusal in the vendors' tables: its class, and the next step in its sentence.
func TestRefusalsAreSentencesWithTheNextStep(t *testing.T) {
	type row struct {
		status     int
		body       string
		class      mailerr.Class
		want       string
		retryAfter string
	}
	rows := []row{
		{500, "", mailerr.Temporary, "trouble of its own", ""}, {503, "<html>busy</html>", mailerr.Temporary, "trouble", ""}, {408, "", mailerr.Temporary, "trouble", ""},
		{429, "", mailerr.Throttled, "less often", ""}, {503, "", mailerr.Throttled, "trouble", "2.5"},
		{400, `{"error":"temporarily_unavailable"}`, mailerr.Temporary, "trouble", ""},
		{302, "", mailerr.Auth, "check token_endpoint", ""}, {404, "<html>no</html>", mailerr.Auth, "check token_endpoint", ""},
		{200, "garbage", mailerr.Temporary, "check token_endpoint", ""}, {200, `{"token_type":"Bearer"}`, mailerr.Auth, "no access token", ""},
		{200, `{"id_token":"eyJxxxxxxxxxx.a.b"}`, mailerr.Auth, "misspelt", ""}, {200, `{"access_token":"a b"}`, mailerr.Auth, "cannot be one", ""},
		{200, `{"access_token":"a","expires_in":-1}`, mailerr.Temporary, "no time", ""}, {200, strings.Repeat("x", maxReply+10), mailerr.Temporary, "no token reply", ""},
	}
	for _, n := range []int{90033, 90006, 90012, 90024, 90055} {
		rows = append(rows, row{400, entraBody("invalid_request", n), mailerr.Temporary, "trouble", ""})
	}
	for want, numbers := range map[string][]int{
		"tenant_id and client_id": {700016}, "not to its id": {7000215}, "has expired": {7000222}, "set client_secret or assertion": {7000216, 7000218}, "remove client_secret": {700025},
		"upload the keystore's certificate": {700027}, "set this machine's clock": {700024}, "check the keystore": {50013, 500133}, "disabled or unknown": {7000112, 70001}, "federated": {700229},
		"check tenant_id": {90002, 50059, 900023}, "not to common": {9001023, 50194}, "check scopes and cloud": {500011}, ".default": {70011, 28002, 28003}, "consent is missing": {65001, 65004, 90094, 90095},
		"add them under API permissions": {65005, 650056, 650057}, "no such user": {50034}, "locked": {50053}, "password": {50055, 50056, 50126}, "enable the account": {50057},
		"second factor": {50072, 50074, 50076, 50078, 50079, 50158}, "assign it": {50105}, "Conditional Access": {53000, 53001, 53002, 53003, 53004}, "security defaults": {530035},
		"set refresh_token": {50173, 50132, 50133, 50089, 70008, 700082, 70043, 700084}, "sign in again": {54005, 501481}, "device sign-in": {70016, 70018, 70019},
		"lacks a parameter": {900144, 9002313}, "set cloud": {900382, 900432, 90038},
	} {
		for _, n := range numbers {
			rows = append(rows, row{400, entraBody("invalid_grant", n), mailerr.Auth, want, ""})
		}
	}
	rows = append(rows, row{400, entraBody("invalid_grant", 50196), mailerr.Throttled, "too often", ""}, row{401, `{"error":"invalid_client"}`, mailerr.Auth, "client_secret", ""})
	check := func(e *endpoint, c *Client, r row) {
		t.Helper()
		e.set(func(url.Values) (int, string) { return r.status, r.body })
		e.mu.Lock()
		e.header = http.Header{}
		if r.retryAfter != "" {
			e.header.Set("Retry-After", r.retryAfter)
		}
		if r.status == 302 {
			e.header.Set("Location", e.URL+"/elsewhere")
		}
		e.mu.Unlock()
		_, err := c.fetch(t.Context(), "m@x.example", secret.Text{})
		f := mailerr.Of(err)
		if f == nil || f.Class != r.class || !strings.Contains(f.Text, r.want) || f.Unsure {
			t.Errorf("%d %.80s: %+v, want %v … %s", r.status, r.body, f, r.class, r.want)
			return
		}
		if strings.Contains(err.Error(), "SECRET") || strings.Contains(err.Error(), "eyJx") {
			t.Errorf("%d: shows a secret: %v", r.status, err)
		}
		if r.retryAfter != "" && f.RetryAt.Sub(e.now()) != 3*time.Second {
			t.Errorf("retry at %v", f.RetryAt)
		}
	}
	e := newEndpoint(t)
	c := e.client(t, secretProfile())
	for _, r := range rows {
		check(e, c, r)
	}
	g := newEndpoint(t)
	gc := g.client(t, Profile{Provider: "gmail", Grant: JWTBearer, JWT: &JWT{Key: key(t), Issuer: "svc@p.example", Subject: "{mailbox}"}, Claims: map[string]any{"scope": "https://mail.google.com/"}})
	for _, r := range []struct{ status, code, text, want string }{
		{"400", "invalid_request", "Bad Request", "check token_endpoint"}, {"400", "unsupported_grant_type", "Invalid grant_type: x", "check token_endpoint"},
		{"400", "invalid_grant", "Invalid JWT Signature.", "keystore, alias and issuer"}, {"400", "invalid_grant", "Invalid grant: account not found", "svc@p.example"},
		{"400", "invalid_grant", "Invalid JWT: Token must be a short-lived token (60 minutes) and in a reasonable timeframe.", "clock"},
		{"400", "invalid_grant", "Invalid JWT: iat (issued at) is not set.", "defect"}, {"400", "invalid_grant", "Invalid JWT: Failed audience check.", "remove audience"},
		{"400", "invalid_grant", "Not a valid email", "mailbox and subject"}, {"400", "invalid_grant", "Invalid email or User ID", "mailbox and subject"},
		{"400", "invalid_grant", "Token has been expired or revoked.", "refresh_token"}, {"400", "invalid_scope", "Invalid OAuth scope or ID token audience provided.", "scope ="},
		{"401", "unauthorized_client", "Client is unauthorized to retrieve access tokens using this method, or client not authorized for any of the scopes requested.", "numeric client id (not its e-mail)"},
		{"401", "unauthorized_client", "Unauthorized client or scope in request.", "Domain-wide delegation"}, {"403", "access_denied", "any", "delegation entry"},
		{"400", "admin_policy_enforced", "", "policy"}, {"401", "disabled_client", "", "disabled"}, {"401", "deleted_client", "", "deleted"}, {"403", "org_internal", "", "another organisation"}, {"401", "invalid_client", "", "client_secret"},
	} {
		body, err := json.Marshal(map[string]string{"error": r.code, "error_description": r.text})
		if err != nil {
			t.Fatal(err)
		}
		var status int
		fmt.Sscan(r.status, &status)
		check(g, gc, row{status, string(body), mailerr.Auth, r.want, ""})
	}
	// The clock's error is measured and told.
	e.mu.Lock()
	e.clock = time.Now().Add(20 * time.Minute)
	e.mu.Unlock()
	check(e, c, row{401, entraBody("invalid_client", 700024), mailerr.Auth, "off by 20m", ""})
}

func TestManyWaitersShareOneRequestAndLeaveAlone(t *testing.T) {
	e := newEndpoint(t)
	release := make(chan struct{})
	e.set(func(url.Values) (int, string) { <-release; return 200, `{"access_token":"one","expires_in":"3600"}` })
	s := e.manager(t, nil).Source(e.client(t, secretProfile()), "m@x.example")
	var wg sync.WaitGroup
	var got atomic.Int32
	for range 50 {
		wg.Go(func() {
			tok, err := s.Token(context.Background())
			if err != nil || tok.Value.Reveal() != "one" {
				t.Errorf("%v, %v", tok, err)
			}
			got.Add(1)
		})
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.Token(ctx); mailerr.Of(err).Class != mailerr.Temporary || !errors.Is(err, context.Canceled) {
		t.Errorf("who leaves: %v", err)
	}
	close(release)
	wg.Wait()
	if n := e.asked(); n != 1 || got.Load() != 50 {
		t.Errorf("%d requests, %d tokens", n, got.Load())
	}
}

func TestTokenIsRenewedEarlyAndGoodOnesOutliveTrouble(t *testing.T) {
	e := newEndpoint(t)
	s := e.manager(t, nil).Source(e.client(t, secretProfile()), "m@x.example")
	token := func() string {
		t.Helper()
		tok, err := s.Token(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return tok.Value.Reveal()
	}
	until := func(what string, cond func() bool) {
		t.Helper()
		for end := time.Now().Add(5 * time.Second); !cond(); {
			if time.Now().After(end) {
				t.Fatal("never came: " + what)
			}
		}
	}
	first := token()
	e.pass(50 * time.Minute)
	if token() != first || e.asked() != 1 {
		t.Error("renewed long before its end")
	}
	e.pass(6 * time.Minute)
	e.set(func(url.Values) (int, string) { return 503, "" })
	if token() != first {
		t.Error("a good token is held back while a new one is asked for")
	}
	until("the request", func() bool { return e.asked() == 2 })
	until("its end", func() bool { s.mu.Lock(); defer s.mu.Unlock(); return s.flight == nil })
	for range 100 {
		if token() != first {
			t.Error("a good token is held back while the endpoint is in trouble")
		}
	}
	if e.asked() != 2 {
		t.Errorf("%d requests during trouble", e.asked())
	}
	e.pass(4 * time.Minute) // now it has ended
	if _, err := s.Token(t.Context()); mailerr.Of(err).Class != mailerr.Temporary {
		t.Errorf("an ended token: %v", err)
	}
	e.set(func(url.Values) (int, string) { return 200, `{"access_token":"new","expires_in":3599}` })
	e.pass(2 * time.Minute)
	if token() != "new" {
		t.Error("not healed")
	}
}

func TestDeadProfileDoesNotHammerTheCloudAndIsRevivedByHand(t *testing.T) {
	e := newEndpoint(t)
	e.set(func(url.Values) (int, string) { return 401, entraBody("invalid_client", 7000222) })
	s := e.manager(t, nil).Source(e.client(t, secretProfile()), "m@x.example")
	for range 3600 {
		if _, err := s.Token(t.Context()); mailerr.Of(err).Class != mailerr.Auth {
			t.Fatal(err)
		}
		e.pass(time.Second)
	}
	if n := e.asked(); n > 25 {
		t.Errorf("%d requests in an hour", n)
	}
	n := e.asked()
	e.set(func(url.Values) (int, string) { return 200, `{"access_token":"new","expires_in":3599}` })
	s.Retry()
	if tok, err := s.Token(t.Context()); err != nil || tok.Value.Reveal() != "new" || e.asked() != n+1 {
		t.Errorf("after somebody acted: %v", err)
	}
}

func TestRejectedTokenIsReplacedOnceAndOldNewsIsIgnored(t *testing.T) {
	e := newEndpoint(t)
	s := e.manager(t, nil).Source(e.client(t, secretProfile()), "m@x.example")
	a, err := s.Token(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	e.pass(time.Minute)
	s.Reject(a)
	b, err := s.Token(t.Context())
	if err != nil || b.Value.Equal(a.Value) {
		t.Fatalf("%v", err)
	}
	s.Reject(a)
	if c, err := s.Token(t.Context()); err != nil || !c.Value.Equal(b.Value) || e.asked() != 2 {
		t.Errorf("the refusal of an old token costs the new one: %v", err)
	}
	// A cloud that refuses everything it is given must not make us ask for tokens for ever.
	for range 50 {
		tok, err := s.Token(t.Context())
		if err != nil {
			if mailerr.Of(err).Class != mailerr.Auth {
				t.Error(err)
			}
			continue
		}
		s.Reject(tok)
	}
	if n := e.asked(); n > 6 {
		t.Errorf("%d tokens for a cloud that refuses all", n)
	}
}

var errMissing = errors.New("missing")

// store is a vault in memory that can fail.
type store struct {
	mu   sync.Mutex
	m    map[string]string
	fail error
}

func (s *store) Get(_ context.Context, name string) (secret.Text, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	v, ok := s.m[name]
	if !ok {
		return secret.Text{}, errMissing
	}
	return secret.New(v), nil
}

func (s *store) Update(_ context.Context, name string, f func(secret.Text) (secret.Text, error)) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fail != nil {
		return s.fail
	}
	v, err := f(secret.New(s.m[name]))
	if err == nil {
		s.m[name] = v.Reveal()
	}
	return err
}

func TestRotatedRefreshTokenIsStoredBeforeUse(t *testing.T) {
	e := newEndpoint(t)
	n := 0
	e.set(func(f url.Values) (int, string) {
		n++
		return 200, fmt.Sprintf(`{"access_token":"a%d","expires_in":3599,"refresh_token":"r%d"}`, n, n)
	})
	p := Profile{Provider: "graph", Grant: RefreshToken, TenantID: "t", ClientID: "app", RefreshToken: secret.New("r0")}
	st := &store{m: map[string]string{}}
	m := e.manager(t, st)
	s := m.Source(e.client(t, p), "m@x.example")
	last := func() string { return e.forms[len(e.forms)-1].Get("refresh_token") }
	get := func(s *Source) (providers.Token, error) { return s.Token(t.Context()) }
	if _, err := get(s); err != nil || last() != "r0" {
		t.Fatalf("%s, %v", last(), err)
	}
	// A new process goes on with the newest; a changed configuration begins anew.
	if _, err := get(e.manager(t, st).Source(e.client(t, p), "m@x.example")); err != nil || last() != "r1" {
		t.Errorf("after a restart: %s, %v", last(), err)
	}
	p.RefreshToken = secret.New("fresh")
	if _, err := get(e.manager(t, st).Source(e.client(t, p), "m@x.example")); err != nil || last() != "fresh" {
		t.Errorf("after a new sign-in: %s, %v", last(), err)
	}
	// What cannot be stored is not used.
	st.fail = errors.New("disk full")
	if tok, err := get(e.manager(t, st).Source(e.client(t, p), "m@x.example")); err == nil || mailerr.Of(err).Class != mailerr.Temporary {
		t.Errorf("used although not stored: %v", tok)
	}
	st.fail = nil
	// Another process rotated while ours was refused.
	e.set(func(f url.Values) (int, string) {
		if f.Get("refresh_token") == "winner" {
			return 200, `{"access_token":"ok","expires_in":3599}`
		}
		st.mu.Lock()
		st.m["oauth/test"] = fingerprint(p.RefreshToken) + "\nwinner"
		st.mu.Unlock()
		return 400, `{"error":"invalid_grant"}`
	})
	if tok, err := get(e.manager(t, st).Source(e.client(t, p), "m@x.example")); err != nil || tok.Value.Reveal() != "ok" {
		t.Errorf("another process's token was not taken: %v", err)
	}
}

func TestMailboxesShareTheirApplicationsTokenAndNotEachOthers(t *testing.T) {
	e := newEndpoint(t)
	m := e.manager(t, nil)
	app := e.client(t, secretProfile())
	if m.Source(app, "a@x.example") != m.Source(app, "b@x.example") {
		t.Error("two tokens for one application")
	}
	user := e.client(t, Profile{Provider: "gmail", Grant: JWTBearer, JWT: &JWT{Key: key(t), Issuer: "i", Subject: "{mailbox}"}, Claims: map[string]any{"scope": "s"}})
	if m.Source(user, "a@x.example") == m.Source(user, "b@x.example") || m.Source(user, "a@x.example") != m.Source(user, "A@x.example") {
		t.Error("one mailbox has another's token")
	}
}

func TestInspectShowsPermissionsAndToleratesOpaqueTokens(t *testing.T) {
	signed, err := jwt.NewWithClaims(jwt.SigningMethodHS256, jwt.MapClaims{"roles": []string{"Mail.Send"}, "tid": "t", "exp": 1790000000}).SignedString([]byte("k"))
	if err != nil {
		t.Fatal(err)
	}
	if c, ok := Inspect(secret.New(signed)); !ok || len(c.Roles) != 1 || c.TenantID != "t" {
		t.Errorf("%+v %v", c, ok)
	}
	for _, s := range []string{"ya29.abc", "", "a.b.c", "a.!!.c"} {
		if _, ok := Inspect(secret.New(s)); ok {
			t.Errorf("%q", s)
		}
	}
}

func FuzzReply(f *testing.F) {
	f.Add([]byte(`{"access_token":"a","expires_in":"3599"}`))
	f.Add([]byte(`{"access_token":"a","expires_in":1e400}`))
	c := &Client{p: Profile{Name: "t"}, now: time.Now}
	f.Fuzz(func(t *testing.T, b []byte) {
		g, err := c.reply(b)
		if (err == nil) == g.token.Value.Empty() {
			t.Errorf("%q: %v", b, err)
		}
	})
}
