package cloudsim_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"math/big"
	"net/http"
	"net/textproto"
	"net/url"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v5"

	"mailbridge/internal/cloudsim"
	"mailbridge/internal/cloudsim/identity"
	"mailbridge/internal/cloudsim/world"
)

const (
	tenant  = "11111111-1111-1111-1111-111111111111"
	client  = "22222222-2222-2222-2222-222222222222"
	scanner = "scanner@contoso.example"
	relay   = "relay@workspace.example"
	svc     = "svc@project.iam.gserviceaccount.com"
)

// sim is running clouds and a client that knows nothing but the wire.
type sim struct {
	*cloudsim.Cloud
	t    *testing.T
	http *http.Client
	tls  *tls.Config
	key  *rsa.PrivateKey
	cert *x509.Certificate
}

func start(t *testing.T) *sim {
	t.Helper()
	c, err := cloudsim.Start(cloudsim.Options{Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	pem, err := os.ReadFile(c.CAFile)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(pem)
	s := &sim{Cloud: c, t: t, tls: &tls.Config{RootCAs: pool, ServerName: "localhost"}}
	tr := &http.Transport{TLSClientConfig: s.tls.Clone()}
	s.http = &http.Client{Transport: tr}
	t.Cleanup(func() {
		tr.CloseIdleConnections()
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		if err := c.Shutdown(ctx); err != nil {
			t.Log(err)
		}
	})
	if s.key, err = rsa.GenerateKey(rand.Reader, 2048); err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, s.key.Public(), s.key)
	if err != nil {
		t.Fatal(err)
	}
	if s.cert, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	c.Identity.AddApp(identity.App{TenantID: tenant, ClientID: client, Secrets: []string{"right"}, Expired: []string{"stale"}, Certificates: []*x509.Certificate{s.cert}, Roles: []string{"Mail.Send", "Mail.ReadWrite"}})
	c.Identity.AddApp(identity.App{TenantID: tenant, ClientID: "sender", Secrets: []string{"right"}, Roles: []string{"Mail.Send"}})
	c.Identity.AddApp(identity.App{TenantID: tenant, ClientID: "rbac", Secrets: []string{"right"}})
	c.Identity.AddServiceAccount(identity.ServiceAccount{Email: svc, Keys: map[string]*rsa.PublicKey{"k1": &s.key.PublicKey}, Scopes: []string{"https://mail.google.com/"}})
	c.Identity.AddServiceAccount(identity.ServiceAccount{Email: "nobody@project", Keys: map[string]*rsa.PublicKey{"k1": &s.key.PublicKey}})
	c.Identity.AddGoogleUser(relay)
	c.Graph.AddMailbox(scanner)
	c.Graph.AddMailbox("ann@contoso.example")
	c.Gmail.AddMailbox(relay)
	return s
}

// post sends a form and returns status and JSON.
func (s *sim) post(path string, f url.Values) (int, map[string]any) {
	s.t.Helper()
	resp, err := s.http.PostForm("https://"+s.API+path, f)
	if err != nil {
		s.t.Fatal(err)
	}
	defer resp.Body.Close()
	var v map[string]any
	if err := json.NewDecoder(resp.Body).Decode(&v); err != nil {
		s.t.Fatal(err)
	}
	return resp.StatusCode, v
}

func (s *sim) token(app string) string {
	s.t.Helper()
	code, v := s.post("/"+tenant+"/oauth2/v2.0/token", url.Values{"grant_type": {"client_credentials"}, "client_id": {app}, "client_secret": {"right"}, "scope": {"https://graph.microsoft.com/.default"}})
	if code != 200 {
		s.t.Fatalf("%d %v", code, v)
	}
	return v["access_token"].(string)
}

func (s *sim) sign(m jwt.SigningMethod, header, claims map[string]any, key crypto.PrivateKey) string {
	s.t.Helper()
	t := jwt.NewWithClaims(m, jwt.MapClaims(claims))
	for k, v := range header {
		t.Header[k] = v
	}
	out, err := t.SignedString(key)
	if err != nil {
		s.t.Fatal(err)
	}
	return out
}

func TestEntraChecksSecrets(t *testing.T) {
	s := start(t)
	for _, c := range []struct {
		tenant string
		change url.Values
		status int
		code   string
	}{
		{tenant, nil, 200, ""},
		{tenant, url.Values{"client_secret": {"wrong"}}, 401, "AADSTS7000215"},
		{tenant, url.Values{"client_secret": {"stale"}}, 401, "AADSTS7000222"},
		{tenant, url.Values{"client_secret": nil}, 401, "AADSTS7000218"},
		{tenant, url.Values{"client_id": {"unknown"}}, 400, "AADSTS700016"},
		{tenant, url.Values{"client_id": nil}, 400, "AADSTS900144"},
		{tenant, url.Values{"scope": {"Mail.Send"}}, 400, "AADSTS70011"},
		{tenant, url.Values{"grant_type": {"password"}}, 400, "AADSTS70003"},
		{tenant, url.Values{"grant_type": {"refresh_token"}, "refresh_token": {"none"}}, 400, "AADSTS70008"},
		{"elsewhere", nil, 400, "AADSTS90002"},
		{"common", nil, 400, "AADSTS9001023"},
	} {
		f := url.Values{"grant_type": {"client_credentials"}, "client_id": {client}, "client_secret": {"right"}, "scope": {"https://graph.microsoft.com/.default"}}
		for k, v := range c.change {
			f[k] = v
		}
		status, v := s.post("/"+c.tenant+"/oauth2/v2.0/token", f)
		text, _ := v["error_description"].(string)
		if status != c.status || !strings.HasPrefix(text, c.code) || (status == 200) != (v["access_token"] != nil) {
			t.Errorf("%s %v: %d %v", c.tenant, c.change, status, v)
		}
	}
}

func TestEntraChecksAssertions(t *testing.T) {
	s := start(t)
	aud := "https://" + s.API + "/" + tenant + "/oauth2/v2.0/token"
	s1, s256 := sha1.Sum(s.cert.Raw), sha256.Sum256(s.cert.Raw)
	x5t, x5t256 := base64.RawURLEncoding.EncodeToString(s1[:]), base64.RawURLEncoding.EncodeToString(s256[:])
	other, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	good := func() map[string]any {
		return map[string]any{"aud": aud, "iss": client, "sub": client, "jti": rand.Text(), "nbf": time.Now().Unix(), "exp": time.Now().Add(5 * time.Minute).Unix()}
	}
	with := func(k string, v any) map[string]any {
		m := good()
		m[k] = v
		return m
	}
	ask := func(assertion string) (int, string) {
		status, v := s.post("/"+tenant+"/oauth2/v2.0/token", url.Values{"grant_type": {"client_credentials"}, "client_id": {client}, "client_assertion": {assertion},
			"client_assertion_type": {"urn:ietf:params:oauth:client-assertion-type:jwt-bearer"}, "scope": {"https://graph.microsoft.com/.default"}})
		text, _ := v["error_description"].(string)
		return status, text
	}
	once := s.sign(jwt.SigningMethodPS256, map[string]any{"x5t#S256": x5t256}, good(), s.key)
	for name, c := range map[string]struct {
		assertion string
		code      string // empty: taken
	}{
		"PS256":             {once, ""},
		"RS256 with x5t":    {s.sign(jwt.SigningMethodRS256, map[string]any{"x5t": x5t}, good(), s.key), ""},
		"another key":       {s.sign(jwt.SigningMethodPS256, map[string]any{"x5t#S256": x5t256}, good(), other), "AADSTS700027"},
		"no thumbprint":     {s.sign(jwt.SigningMethodPS256, nil, good(), s.key), "AADSTS700027"},
		"expired":           {s.sign(jwt.SigningMethodPS256, map[string]any{"x5t#S256": x5t256}, with("exp", time.Now().Add(-time.Hour).Unix()), s.key), "AADSTS700024"},
		"not yet":           {s.sign(jwt.SigningMethodPS256, map[string]any{"x5t#S256": x5t256}, with("nbf", time.Now().Add(time.Hour).Unix()), s.key), "AADSTS700024"},
		"another audience":  {s.sign(jwt.SigningMethodPS256, map[string]any{"x5t#S256": x5t256}, with("aud", "https://elsewhere/"), s.key), "AADSTS700023"},
		"another issuer":    {s.sign(jwt.SigningMethodPS256, map[string]any{"x5t#S256": x5t256}, with("iss", "x"), s.key), "AADSTS700021"},
		"another subject":   {s.sign(jwt.SigningMethodPS256, map[string]any{"x5t#S256": x5t256}, with("sub", "x"), s.key), "AADSTS700021"},
		"shared secret":     {s.sign(jwt.SigningMethodHS256, map[string]any{"x5t#S256": x5t256}, good(), []byte("right")), "AADSTS700027"},
		"not a token":       {"x.y.z", "AADSTS50013"},
		"without a time":    {s.sign(jwt.SigningMethodPS256, map[string]any{"x5t#S256": x5t256}, with("exp", nil), s.key), "AADSTS"},
		"without an id":     {s.sign(jwt.SigningMethodPS256, map[string]any{"x5t#S256": x5t256}, with("jti", ""), s.key), "AADSTS50013"},
		"padded thumbprint": {s.sign(jwt.SigningMethodRS256, map[string]any{"x5t": base64.StdEncoding.EncodeToString(s1[:])}, good(), s.key), ""},
	} {
		if status, text := ask(c.assertion); (status == 200) != (c.code == "") || !strings.HasPrefix(text, c.code) {
			t.Errorf("%s: %d %s", name, status, text)
		}
	}
	if status, text := ask(once); status == 200 {
		t.Errorf("used twice: %d %s", status, text)
	}
}

func TestGoogleChecksAssertions(t *testing.T) {
	s := start(t)
	good := func() map[string]any {
		return map[string]any{"aud": "https://" + s.API + "/token", "iss": svc, "sub": relay, "scope": "https://mail.google.com/", "iat": time.Now().Unix(), "exp": time.Now().Add(time.Hour).Unix()}
	}
	ec, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		change map[string]any
		header map[string]any
		method jwt.SigningMethod
		key    crypto.PrivateKey
		status int
		text   string
	}{
		"good":                  {status: 200},
		"named key":             {header: map[string]any{"kid": "k1"}, status: 200},
		"times as strings":      {change: map[string]any{"iat": fmt.Sprint(time.Now().Unix())}, status: 200},
		"unknown key":           {header: map[string]any{"kid": "k2"}, status: 400, text: "Invalid JWT Signature."},
		"another algorithm":     {method: jwt.SigningMethodES256, key: ec, status: 400, text: "Invalid JWT Signature."},
		"unknown issuer":        {change: map[string]any{"iss": "x"}, status: 400, text: "account not found"},
		"too long a life":       {change: map[string]any{"exp": time.Now().Add(2 * time.Hour).Unix()}, status: 400, text: "short-lived token"},
		"expired":               {change: map[string]any{"iat": time.Now().Add(-2 * time.Hour).Unix(), "exp": time.Now().Add(-time.Hour).Unix()}, status: 400, text: "short-lived token"},
		"without iat":           {change: map[string]any{"iat": nil}, status: 400, text: "iat"},
		"another audience":      {change: map[string]any{"aud": "https://elsewhere"}, status: 400, text: "audience"},
		"several audiences":     {change: map[string]any{"aud": []string{"https://" + s.API + "/token"}}, status: 400, text: "audience"},
		"comma between scopes":  {change: map[string]any{"scope": "a,b"}, status: 400, text: "Invalid OAuth scope"},
		"scope not delegated":   {change: map[string]any{"scope": "https://www.googleapis.com/auth/gmail.send"}, status: 403},
		"no delegation":         {change: map[string]any{"iss": "nobody@project"}, status: 401, text: "unauthorized to retrieve"},
		"unknown mailbox":       {change: map[string]any{"sub": "ghost@workspace.example"}, status: 400, text: "Invalid email or User ID"},
		"scope without a slash": {change: map[string]any{"scope": "https://mail.google.com"}, status: 200},
	} {
		m := good()
		for k, v := range c.change {
			m[k] = v
		}
		method, key := c.method, c.key
		if method == nil {
			method, key = jwt.SigningMethodRS256, s.key
		}
		status, v := s.post("/token", url.Values{"grant_type": {"urn:ietf:params:oauth:grant-type:jwt-bearer"}, "assertion": {s.sign(method, c.header, m, key)}})
		text, _ := v["error_description"].(string)
		if status != c.status || !strings.Contains(text, c.text) {
			t.Errorf("%s: %d %v", name, status, v)
		}
		// Google answers a scope that it doesn't know with 200 and no access token.
		if name == "scope without a slash" && v["access_token"] != nil {
			t.Errorf("%s: %v", name, v)
		}
	}
}

// graph asks the Graph cloud.
func (s *sim) graph(method, path, token, contentType string, body []byte) (*http.Response, string) {
	s.t.Helper()
	req, err := http.NewRequestWithContext(s.t.Context(), method, s.GraphURL()+path, bytes.NewReader(body))
	if err != nil {
		s.t.Fatal(err)
	}
	if token != "" {
		req.Header.Set("Authorization", "Bearer "+token)
	}
	req.Header.Set("Content-Type", contentType)
	req.Header.Set("Prefer", `IdType="ImmutableId"`)
	resp, err := s.http.Do(req)
	if err != nil {
		return nil, err.Error()
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		return nil, err.Error()
	}
	return resp, string(b)
}

const letter = "From: scanner@contoso.example\r\nTo: ann@contoso.example\r\nBcc: ben@elsewhere.example\r\nSubject: x\r\nMessage-ID: <1@x>\r\n\r\nhello\r\n"

func mime(raw string) []byte { return []byte(base64.StdEncoding.EncodeToString([]byte(raw))) }

func TestGraphHoldsRequestsAgainstPermissions(t *testing.T) {
	s := start(t)
	s.Graph.Allow(scanner, "rbac", "Mail.Send")
	for _, c := range []struct {
		token, method, path string
		status              int
		code                string
	}{
		{"", "POST", "/users/" + scanner + "/sendMail", 401, "InvalidAuthenticationToken"},
		{"made.up.token", "POST", "/users/" + scanner + "/sendMail", 401, "InvalidAuthenticationToken"},
		{s.token("sender"), "POST", "/users/" + scanner + "/sendMail", 202, ""},
		{s.token("sender"), "POST", "/users/" + scanner + "/messages", 403, "ErrorAccessDenied"},
		{s.token("sender"), "GET", "/users/" + scanner + "/messages", 403, "ErrorAccessDenied"},
		{s.token("rbac"), "POST", "/users/" + scanner + "/sendMail", 202, ""},
		{s.token("rbac"), "POST", "/users/ann@contoso.example/sendMail", 403, "ErrorAccessDenied"},
		{s.token(client), "POST", "/users/ghost@contoso.example/sendMail", 404, "ErrorInvalidUser"},
		{s.token(client), "POST", "/me/sendMail", 400, "BadRequest"},
		{s.token(client), "POST", "/users/" + scanner + "/messages", 201, ""},
	} {
		resp, body := s.graph(c.method, c.path, c.token, "text/plain", mime(letter))
		if resp == nil || resp.StatusCode != c.status || c.code != "" && !strings.Contains(body, `"code":"`+c.code+`"`) || resp.Header.Get("request-id") == "" {
			t.Errorf("%s %s: %v %s", c.method, c.path, resp, body)
		}
	}
	s.Identity.ExpireTokens()
	if resp, body := s.graph("POST", "/users/"+scanner+"/sendMail", s.token(client)+"x", "text/plain", mime(letter)); resp == nil || resp.StatusCode != 401 {
		t.Errorf("%v %s", resp, body)
	}
}

func TestGraphDeliversToHeaderRecipientsAndHidesBcc(t *testing.T) {
	s := start(t)
	resp, body := s.graph("POST", "/users/"+scanner+"/sendMail", s.token(client), "text/plain", mime(letter))
	if resp == nil || resp.StatusCode != 202 || body != "" {
		t.Fatalf("%v %s", resp, body)
	}
	s.Graph.Settle()
	var to []string
	for _, d := range s.World.Deliveries() {
		to = append(to, d.To)
		if bytes.Contains(d.Raw, []byte("Bcc")) || bytes.Contains(d.Raw, []byte("ben@")) || !bytes.HasSuffix(d.Raw, []byte("\r\n\r\nhello\r\n")) {
			t.Errorf("copy of %s:\n%s", d.To, d.Raw)
		}
	}
	slices.Sort(to)
	if !slices.Equal(to, []string{"ann@contoso.example", "ben@elsewhere.example"}) {
		t.Errorf("delivered to %v", to)
	}
	if n := s.Graph.Count(scanner, "sentitems"); n != 1 {
		t.Errorf("%d in Sent Items", n)
	}
	if n := s.Graph.Count("ann@contoso.example", "inbox"); n != 1 {
		t.Errorf("%d in the recipient's Inbox", n)
	}
	for what, b := range map[string][]byte{"not base64": []byte("!!!"), "empty": nil, "url alphabet": []byte("_-_-")} {
		if resp, body := s.graph("POST", "/users/"+scanner+"/sendMail", s.token(client), "text/plain", b); resp == nil || resp.StatusCode != 400 {
			t.Errorf("%s: %v %s", what, resp, body)
		}
	}
	big := mime(letter + strings.Repeat("x", 4<<20))
	if resp, body := s.graph("POST", "/users/"+scanner+"/sendMail", s.token(client), "text/plain", big); resp == nil || resp.StatusCode != 413 {
		t.Errorf("too large: %v %.200s", resp, body)
	}
}

func TestGraphDraftKeepsItsImmutableID(t *testing.T) {
	s := start(t)
	tok := s.token(client)
	resp, body := s.graph("POST", "/users/"+scanner+"/messages", tok, "text/plain", mime(letter))
	if resp == nil || resp.StatusCode != 201 {
		t.Fatalf("%v %s", resp, body)
	}
	var m struct {
		ID            string
		IsDraft       bool
		BccRecipients []any
	}
	if err := json.Unmarshal([]byte(body), &m); err != nil || !m.IsDraft || len(m.BccRecipients) != 1 {
		t.Fatalf("%v %s", err, body)
	}
	if resp, body := s.graph("POST", "/users/"+scanner+"/messages/"+m.ID+"/send", tok, "", nil); resp == nil || resp.StatusCode != 202 {
		t.Fatalf("%v %s", resp, body)
	}
	s.Graph.Settle()
	resp, body = s.graph("GET", "/users/"+scanner+"/messages/"+m.ID, tok, "", nil)
	if resp == nil || resp.StatusCode != 200 || !strings.Contains(body, `"isDraft":false`) {
		t.Errorf("after sending: %v %s", resp, body)
	}
	if resp, body := s.graph("POST", "/users/"+scanner+"/messages/"+m.ID+"/send", tok, "", nil); resp == nil || resp.StatusCode == 202 {
		t.Errorf("sent twice: %v %s", resp, body)
	}
	q := url.Values{"$filter": {"internetMessageId eq '<1@x>'"}}
	if resp, body := s.graph("GET", "/users/"+scanner+"/mailFolders/sentitems/messages?"+q.Encode(), tok, "", nil); resp == nil || strings.Count(body, m.ID) != 1 {
		t.Errorf("found: %v %s", resp, body)
	}
}

func TestGraphTakesFourRequestsAtOnce(t *testing.T) {
	s := start(t)
	tok := s.token(client)
	s.World.Add(world.Rule{Service: "graph", Route: "sendMail", Hang: true, Times: 4})
	var wg sync.WaitGroup
	defer wg.Wait()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	for range 4 {
		wg.Go(func() {
			req, err := http.NewRequestWithContext(ctx, "POST", s.GraphURL()+"/users/"+scanner+"/sendMail", bytes.NewReader(mime(letter)))
			if err != nil {
				t.Error(err)
				return
			}
			req.Header.Set("Authorization", "Bearer "+tok)
			req.Header.Set("Content-Type", "text/plain")
			if resp, err := s.http.Do(req); err == nil {
				resp.Body.Close()
				t.Error("a request that hangs was answered")
			}
		})
	}
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for len(s.World.Deliveries()) < 8 {
		<-tick.C
	}
	if resp, body := s.graph("POST", "/users/"+scanner+"/sendMail", tok, "text/plain", mime(letter)); resp == nil || resp.StatusCode != 429 || !strings.Contains(body, "MailboxConcurrency") {
		t.Errorf("the fifth: %v %s", resp, body)
	}
	if resp, body := s.graph("POST", "/users/ann@contoso.example/sendMail", tok, "text/plain", mime("To: x@y.example\r\n\r\n")); resp == nil || resp.StatusCode != 202 {
		t.Errorf("another mailbox: %v %s", resp, body)
	}
}

func TestKnobs(t *testing.T) {
	s := start(t)
	tok := s.token(client)
	send := func() (*http.Response, string) {
		return s.graph("POST", "/users/"+scanner+"/sendMail", tok, "text/plain", mime(letter))
	}
	for _, c := range []struct {
		name   string
		rule   world.Rule
		status int // 0: no answer
		sent   int // copies of two recipients
	}{
		{"throttled, integer", world.Rule{Status: 429, RetryAfter: "7"}, 429, 0},
		{"throttled, fraction", world.Rule{Status: 429, RetryAfter: "2.128"}, 429, 0},
		{"throttled, no time", world.Rule{Status: 429}, 429, 0},
		{"taken, with a time", world.Rule{RetryAfter: "30"}, 202, 2},
		{"taken, then 504", world.Rule{Status: 504, After: true}, 504, 2},
		{"garbage", world.Rule{Status: 502, Body: "<html>bad gateway</html>"}, 502, 0},
		{"cut before", world.Rule{Cut: "before"}, 0, 0},
		{"cut during", world.Rule{Cut: "during"}, 0, 0},
		{"cut after", world.Rule{Cut: "after"}, 0, 2},
	} {
		t.Run(c.name, func(t *testing.T) {
			before := len(s.World.Deliveries())
			c.rule.Service, c.rule.Route, c.rule.Times = "graph", "sendMail", 1
			s.World.Add(c.rule)
			resp, body := send()
			s.Graph.Settle()
			switch {
			case c.status == 0 && resp != nil:
				t.Errorf("an answer: %v %s", resp, body)
			case c.status != 0 && (resp == nil || resp.StatusCode != c.status || resp.Header.Get("Retry-After") != c.rule.RetryAfter):
				t.Errorf("%v %s", resp, body)
			}
			if n := len(s.World.Deliveries()) - before; n != c.sent {
				t.Errorf("%d copies", n)
			}
			s.World.Reset()
			if resp, body := send(); resp == nil || resp.StatusCode != 202 {
				t.Errorf("afterwards: %v %s", resp, body)
			}
			s.Graph.Settle()
		})
	}
	reqs := s.World.Requests()
	if len(reqs) < 18 || reqs[len(reqs)-1].Route != "sendMail" || reqs[len(reqs)-1].Mailbox != scanner {
		t.Errorf("%d requests on record, the last %+v", len(reqs), reqs[len(reqs)-1])
	}
	for _, r := range reqs {
		if strings.Contains(fmt.Sprint(r), tok) {
			t.Fatal("a token is on record")
		}
	}
}

// gmail opens an authenticated connection to the SMTP cloud.
func (s *sim) gmail(token string) (*textproto.Conn, string) {
	s.t.Helper()
	conn, err := tls.Dial("tcp", s.SMTPS, s.tls)
	if err != nil {
		s.t.Fatal(err)
	}
	if err := conn.SetDeadline(time.Now().Add(time.Minute)); err != nil {
		s.t.Fatal(err)
	}
	c := textproto.NewConn(conn)
	s.t.Cleanup(func() { _ = c.Close() })
	s.say(c, "", 220)
	s.say(c, "EHLO test", 250)
	ir := base64.StdEncoding.EncodeToString([]byte("user=" + relay + "\x01auth=Bearer " + token + "\x01\x01"))
	if err := c.PrintfLine("AUTH XOAUTH2 %s", ir); err != nil {
		s.t.Fatal(err)
	}
	_, text, _ := c.ReadResponse(0)
	return c, text
}

func (s *sim) say(c *textproto.Conn, line string, want int) string {
	s.t.Helper()
	if line != "" {
		if err := c.PrintfLine("%s", line); err != nil {
			s.t.Fatal(err)
		}
	}
	code, text, err := c.ReadResponse(0)
	if code != want {
		s.t.Fatalf("%s: %d %s %v", line, code, text, err)
	}
	return text
}

func (s *sim) googleToken() string {
	s.t.Helper()
	a := s.sign(jwt.SigningMethodRS256, nil, map[string]any{"aud": "https://" + s.API + "/token", "iss": svc, "sub": relay, "scope": "https://mail.google.com/", "iat": time.Now().Unix(), "exp": time.Now().Add(time.Hour).Unix()}, s.key)
	code, v := s.post("/token", url.Values{"grant_type": {"urn:ietf:params:oauth:grant-type:jwt-bearer"}, "assertion": {a}})
	if code != 200 {
		s.t.Fatalf("%d %v", code, v)
	}
	return v["access_token"].(string)
}

func TestGmailAnswersAWrongTokenInTwoSteps(t *testing.T) {
	s := start(t)
	c, text := s.gmail("wrong")
	challenge, err := base64.StdEncoding.DecodeString(text)
	if err != nil || !strings.Contains(string(challenge), `"status":"400"`) {
		t.Errorf("a wrong token is answered %q", text)
	}
	if err := c.PrintfLine(""); err != nil {
		t.Fatal(err)
	}
	s.say(c, "", 535) // after the client's empty answer
}

func TestGmailDeliversByEnvelopeAndFilesSentMail(t *testing.T) {
	s := start(t)
	c, text := s.gmail(s.googleToken())
	if !strings.HasPrefix(text, "2.7.0") {
		t.Fatal(text)
	}
	s.say(c, "MAIL FROM:<"+relay+">", 250)
	s.say(c, "RCPT TO:<ann@elsewhere.example>", 250)
	s.say(c, "DATA", 354)
	w := c.DotWriter()
	if _, err := io.WriteString(w, "From: Boss <boss@workspace.example>\r\nTo: somebody@else.example\r\nMessage-ID: <2@x>\r\n\r\n.dot\r\n"); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	s.say(c, "", 250)
	d := s.World.Deliveries()
	if len(d) != 1 || d[0].To != "ann@elsewhere.example" || !bytes.Contains(d[0].Raw, []byte("\r\n\r\n.dot\r\n")) {
		t.Fatalf("%+v", d)
	}
	// A From that is none of the mailbox's own is rewritten, without an error.
	if bytes.Contains(d[0].Raw, []byte("\r\nFrom: Boss <boss@")) || !bytes.Contains(d[0].Raw, []byte(relay)) {
		t.Errorf("From:\n%s", d[0].Raw)
	}
	// It is in Sent Mail, found over IMAP with the same token.
	conn, err := tls.Dial("tcp", s.IMAPS, s.tls)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	r := bufio.NewReader(conn)
	ask := func(tag, line string) string {
		t.Helper()
		if line != "" {
			if _, err := fmt.Fprintf(conn, "%s %s\r\n", tag, line); err != nil {
				t.Fatal(err)
			}
		}
		var all strings.Builder
		for {
			l, err := r.ReadString('\n')
			if err != nil {
				t.Fatal(err)
			}
			all.WriteString(l)
			if strings.HasPrefix(l, tag+" ") {
				return all.String()
			}
		}
	}
	if got := ask("*", ""); !strings.HasPrefix(got, "* OK") {
		t.Fatal(got)
	}
	ir := base64.StdEncoding.EncodeToString([]byte("user=" + relay + "\x01auth=Bearer " + s.googleToken() + "\x01\x01"))
	if got := ask("a1", "AUTHENTICATE XOAUTH2 "+ir); !strings.Contains(got, "a1 OK") {
		t.Fatal(got)
	}
	if got := ask("a2", `EXAMINE "[Gmail]/Sent Mail"`); !strings.Contains(got, "a2 OK") {
		t.Fatal(got)
	}
	if got := ask("a3", `UID SEARCH HEADER Message-ID "2@x"`); !strings.Contains(got, "SEARCH 1") && !strings.Contains(got, "ALL 1") {
		t.Error(got)
	}
}
