// Package identity simulates the token endpoints of Microsoft Entra ID and of Google. Every grant is really
// checked: secrets, signatures, thumbprints, audiences, times, delegation. It is written from the vendors'
// documentation and knows nothing of the bridge.
package identity

import (
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"math"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/golang-jwt/jwt/v5"

	"mailbridge/internal/cloudsim/world"
)

// App is an application registered with Entra ID.
type App struct {
	TenantID, ClientID string
	Secrets            []string
	Expired            []string // secrets that have expired
	Certificates       []*x509.Certificate
	Roles              []string // application permissions with admin consent
	Public             bool
}

// ServiceAccount is one of Google's.
type ServiceAccount struct {
	Email  string
	Keys   map[string]*rsa.PublicKey // by key id
	Scopes []string                  // of the domain-wide delegation; empty is none
}

// Grant is a refresh token that somebody consented to.
type Grant struct {
	Google       bool
	RefreshToken string
	TenantID     string
	ClientID     string
	ClientSecret string // empty for public clients
	Mailbox      string
	Scopes       []string
}

// Claims is what a token lets its bearer do.
type Claims struct {
	Google   bool
	AppID    string
	TenantID string
	Mailbox  string // the user; empty for an application
	Roles    []string
	Scopes   []string
	Expiry   time.Time
}

// Server is both token endpoints.
type Server struct {
	w    *world.World
	host func() string // this server's own https://host:port

	mu       sync.Mutex
	apps     map[string]*App // by tenant/client
	tenants  map[string]bool
	accounts map[string]*ServiceAccount
	users    map[string]bool // Google mailboxes
	grants   map[string]*Grant
	tokens   map[string]Claims
	seen     map[string]bool // jti
	life     time.Duration
	sign     []byte
}

// New makes an empty server; host gives its own base, which audiences may name.
func New(w *world.World, host func() string) *Server {
	key := make([]byte, 32)
	if _, err := rand.Read(key); err != nil {
		panic(err)
	}
	return &Server{w: w, host: host, apps: map[string]*App{}, tenants: map[string]bool{}, accounts: map[string]*ServiceAccount{}, users: map[string]bool{},
		grants: map[string]*Grant{}, tokens: map[string]Claims{}, seen: map[string]bool{}, life: 3599 * time.Second, sign: key}
}

// AddApp registers an application.
func (s *Server) AddApp(a App) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.tenants[strings.ToLower(a.TenantID)] = true
	s.apps[strings.ToLower(a.TenantID+"/"+a.ClientID)] = &a
}

// AddServiceAccount registers a service account.
func (s *Server) AddServiceAccount(a ServiceAccount) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.accounts[a.Email] = &a
}

// AddGoogleUser says that a Workspace mailbox exists.
func (s *Server) AddGoogleUser(mailbox string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.users[world.Fold(mailbox)] = true
}

// AddGrant registers a refresh token.
func (s *Server) AddGrant(g Grant) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.tenants[strings.ToLower(g.TenantID)] = true
	s.grants[g.RefreshToken] = &g
}

// Revoke ends every token and refresh token, as an administrator's "revoke sessions" does.
func (s *Server) Revoke() {
	s.mu.Lock()
	defer s.mu.Unlock()
	clear(s.tokens)
	clear(s.grants)
}

// ExpireTokens makes all access tokens worthless while grants go on.
func (s *Server) ExpireTokens() {
	s.mu.Lock()
	defer s.mu.Unlock()
	clear(s.tokens)
}

// Verify looks a token up.
func (s *Server) Verify(token string) (Claims, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	c, ok := s.tokens[token]
	if !ok {
		return c, errors.New("unknown token")
	}
	if !s.w.Now().Before(c.Expiry) {
		return c, errors.New("expired token")
	}
	return c, nil
}

// Register adds the routes.
func (s *Server) Register(mux *http.ServeMux) {
	mux.HandleFunc("POST /{tenant}/oauth2/v2.0/token", s.entra)
	mux.HandleFunc("POST /token", s.google)
	mux.HandleFunc("GET /{tenant}/v2.0/.well-known/openid-configuration", func(w http.ResponseWriter, r *http.Request) {
		base := s.host() + "/" + r.PathValue("tenant")
		reply := world.JSON(http.StatusOK, map[string]any{"token_endpoint": base + "/oauth2/v2.0/token", "authorization_endpoint": base + "/oauth2/v2.0/authorize", "issuer": base + "/v2.0"})
		w.Header().Set("Content-Type", "application/json")
		_, _ = w.Write(reply.Body)
	})
}

// maxForm bounds a token request.
const maxForm = 1 << 20

func guid() string {
	var b [16]byte
	if _, err := rand.Read(b[:]); err != nil {
		panic(err)
	}
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

// entraError is the error body of Entra ID
// (https://learn.microsoft.com/entra/identity-platform/v2-oauth2-client-creds-grant-flow).
func (s *Server) entraError(status int, code string, number int, text string) world.Reply {
	now := s.w.Now().UTC().Format("2006-01-02 15:04:05Z")
	trace, corr := guid(), guid()
	r := world.JSON(status, map[string]any{
		"error": code, "error_description": fmt.Sprintf("AADSTS%d: %s Trace ID: %s Correlation ID: %s Timestamp: %s", number, text, trace, corr, now),
		"error_codes": []int{number}, "timestamp": now, "trace_id": trace, "correlation_id": corr, "error_uri": s.host() + "/error?code=" + strconv.Itoa(number),
	})
	return r
}

func (s *Server) entra(w http.ResponseWriter, r *http.Request) {
	tenant := r.PathValue("tenant")
	id := guid()
	w.Header().Set("Cache-Control", "no-store, no-cache")
	w.Header().Set("Pragma", "no-cache")
	w.Header().Set("x-ms-request-id", id)
	s.w.Serve(w, r, world.Meet{Service: "entra", Route: "token", ID: id, MaxBody: maxForm,
		Refuse: func(status int, code, text string) world.Reply {
			if code == "" {
				code = "temporarily_unavailable"
			}
			number := map[string]int{"invalid_client": 7000222, "invalid_grant": 70008, "interaction_required": 50076, "unauthorized_client": 700016}[code]
			if number == 0 {
				number = 90033
			}
			return s.entraError(status, code, number, text)
		},
		Act: func(body []byte) world.Reply {
			form, err := url.ParseQuery(string(body))
			if err != nil {
				return s.entraError(400, "invalid_request", 9002313, "Invalid request. Request is malformed or invalid.")
			}
			if u, p, ok := r.BasicAuth(); ok {
				cid, err1 := url.QueryUnescape(u)
				sec, err2 := url.QueryUnescape(p)
				if err1 == nil && err2 == nil {
					form.Set("client_id", cid)
					form.Set("client_secret", sec)
				}
			}
			return s.entraToken(tenant, form)
		}})
}

func (s *Server) entraToken(tenant string, f url.Values) world.Reply {
	s.mu.Lock()
	defer s.mu.Unlock()
	grant := f.Get("grant_type")
	switch strings.ToLower(tenant) {
	case "common", "organizations", "consumers":
		if grant == "client_credentials" {
			return s.entraError(400, "invalid_request", 9001023, "The grant type is not supported over the /common or /consumers endpoints.")
		}
	default:
		if !s.tenants[strings.ToLower(tenant)] {
			return s.entraError(400, "invalid_request", 90002, "Tenant '"+tenant+"' not found.")
		}
	}
	client := f.Get("client_id")
	if client == "" {
		return s.entraError(400, "invalid_request", 900144, "The request body must contain the following parameter: 'client_id'.")
	}
	switch grant {
	case "client_credentials":
		app := s.apps[strings.ToLower(tenant+"/"+client)]
		if app == nil {
			return s.entraError(400, "unauthorized_client", 700016, "Application with identifier '"+client+"' was not found in the directory '"+tenant+"'.")
		}
		if e := s.authenticate(tenant, app, f); e != nil {
			return *e
		}
		scope := f.Get("scope")
		if !strings.HasSuffix(scope, "/.default") || strings.Contains(scope, " ") {
			return s.entraError(400, "invalid_scope", 70011, "The provided request must include a 'scope' input parameter. The provided value is not valid.")
		}
		acr := "1"
		if f.Get("client_assertion") != "" {
			acr = "2"
		}
		return s.issue(Claims{AppID: client, TenantID: tenant, Roles: app.Roles}, strings.TrimSuffix(scope, "/.default"), acr, "")
	case "refresh_token":
		g := s.grants[f.Get("refresh_token")]
		if g == nil || g.Google || !strings.EqualFold(g.ClientID, client) {
			return s.entraError(400, "invalid_grant", 70008, "The provided authorization code or refresh token has expired due to inactivity. Send a new interactive authorization request for this user and resource.")
		}
		if g.ClientSecret != f.Get("client_secret") {
			return s.entraError(401, "invalid_client", 7000215, "Invalid client secret provided.")
		}
		// The old one goes on to work (https://learn.microsoft.com/entra/identity-platform/refresh-tokens).
		next := *g
		next.RefreshToken = "0.R" + rand.Text() + rand.Text()
		s.grants[next.RefreshToken] = &next
		return s.issue(Claims{AppID: client, TenantID: tenant, Mailbox: g.Mailbox, Scopes: g.Scopes}, "https://graph.microsoft.com", "0", next.RefreshToken)
	}
	return s.entraError(400, "unsupported_grant_type", 70003, "The app requested an unsupported grant type '"+grant+"'.")
}

// authenticate checks the application's credential.
func (s *Server) authenticate(tenant string, app *App, f url.Values) *world.Reply {
	fail := func(status int, code string, number int, text string) *world.Reply {
		r := s.entraError(status, code, number, text)
		return &r
	}
	secret, assertion := f.Get("client_secret"), f.Get("client_assertion")
	switch {
	case app.Public && (secret != "" || assertion != ""):
		return fail(401, "invalid_client", 700025, "Client is public so neither 'client_assertion' nor 'client_secret' should be presented.")
	case assertion != "":
		if f.Get("client_assertion_type") != "urn:ietf:params:oauth:client-assertion-type:jwt-bearer" {
			return fail(400, "invalid_request", 900144, "The request body must contain the parameter 'client_assertion_type'.")
		}
		return s.checkAssertion(tenant, app, assertion)
	case secret == "":
		return fail(401, "invalid_client", 7000218, "The request body must contain the following parameter: 'client_assertion' or 'client_secret'.")
	}
	for _, x := range app.Secrets {
		if x == secret {
			return nil
		}
	}
	for _, x := range app.Expired {
		if x == secret {
			return fail(401, "invalid_client", 7000222, "The provided client secret keys for app '"+app.ClientID+"' are expired.")
		}
	}
	return fail(401, "invalid_client", 7000215, "Invalid client secret provided. Ensure the secret being sent in the request is the client secret value, not the client secret ID.")
}

// checkAssertion checks a client assertion
// (https://learn.microsoft.com/entra/identity-platform/certificate-credentials).
func (s *Server) checkAssertion(tenant string, app *App, assertion string) *world.Reply {
	fail := func(number int, text string) *world.Reply {
		r := s.entraError(401, "invalid_client", number, text)
		return &r
	}
	var cert *x509.Certificate
	keyFor := func(t *jwt.Token) (any, error) {
		for _, c := range app.Certificates {
			s1, s256 := sha1.Sum(c.Raw), sha256.Sum256(c.Raw)
			if thumb(t.Header["x5t#S256"], s256[:]) || thumb(t.Header["x5t"], s1[:]) {
				cert = c
				return c.PublicKey, nil
			}
		}
		return nil, errors.New("no such certificate")
	}
	claims := jwt.MapClaims{}
	_, err := jwt.NewParser(jwt.WithValidMethods([]string{"PS256", "RS256"}), jwt.WithTimeFunc(s.w.Now), jwt.WithExpirationRequired(), jwt.WithLeeway(5*time.Minute)).ParseWithClaims(assertion, claims, keyFor)
	switch {
	case errors.Is(err, jwt.ErrTokenExpired), errors.Is(err, jwt.ErrTokenNotValidYet):
		return fail(700024, "Client assertion is not within its valid time range.")
	case errors.Is(err, jwt.ErrTokenMalformed):
		return fail(50013, "Assertion failed signature validation. [Reason - The token is malformed.]")
	case err != nil || cert == nil:
		return fail(700027, "The certificate with identifier used to sign the client assertion is not registered on application.")
	}
	aud, _ := claims["aud"].(string)
	own := s.host() + "/" + tenant + "/oauth2/v2.0/token"
	if !strings.EqualFold(aud, own) && !strings.EqualFold(aud, "https://login.microsoftonline.com/"+tenant+"/oauth2/v2.0/token") {
		return fail(700023, "Client assertion audience claim does not match Realm issuer.")
	}
	if iss, _ := claims["iss"].(string); iss != app.ClientID {
		return fail(700021, "Client assertion application identifier doesn't match 'client_id' parameter.")
	}
	if sub, _ := claims["sub"].(string); sub != app.ClientID {
		return fail(700021, "Client assertion application identifier doesn't match 'client_id' parameter.")
	}
	jti, _ := claims["jti"].(string)
	if jti == "" || s.seen[jti] {
		return fail(50013, "Assertion is invalid: its jti is missing or was used before.")
	}
	s.seen[jti] = true
	return nil
}

// thumb compares a thumbprint in base64url or in standard base64, padded or not.
func thumb(v any, sum []byte) bool {
	t, ok := v.(string)
	if !ok {
		return false
	}
	t = strings.NewReplacer("+", "-", "/", "_").Replace(strings.TrimRight(t, "="))
	return t == base64.RawURLEncoding.EncodeToString(sum)
}

// issue makes an access token of Microsoft's form; the caller holds the lock.
func (s *Server) issue(c Claims, audience, acr, refresh string) world.Reply {
	c.Expiry = s.w.Now().Add(s.life)
	m := jwt.MapClaims{"aud": audience, "iss": "https://sts.windows.net/" + c.TenantID + "/", "appid": c.AppID, "appidacr": acr, "tid": c.TenantID, "oid": guid(),
		"iat": s.w.Now().Unix(), "nbf": s.w.Now().Unix(), "exp": c.Expiry.Unix(), "ver": "1.0", "uti": rand.Text()}
	if c.Mailbox == "" {
		m["idtyp"] = "app"
		if len(c.Roles) > 0 {
			m["roles"] = c.Roles
		}
	} else {
		m["scp"], m["upn"] = strings.Join(c.Scopes, " "), c.Mailbox
	}
	t, err := jwt.NewWithClaims(jwt.SigningMethodHS256, m).SignedString(s.sign)
	if err != nil {
		return world.Reply{Status: http.StatusInternalServerError}
	}
	s.tokens[t] = c
	out := map[string]any{"token_type": "Bearer", "expires_in": int(s.life.Seconds()), "ext_expires_in": int(s.life.Seconds()), "access_token": t}
	if refresh != "" {
		out["refresh_token"], out["scope"] = refresh, strings.Join(c.Scopes, " ")
	}
	return world.JSON(http.StatusOK, out)
}

func googleError(status int, code, text string) world.Reply {
	return world.JSON(status, map[string]any{"error": code, "error_description": text})
}

func (s *Server) google(w http.ResponseWriter, r *http.Request) {
	s.w.Serve(w, r, world.Meet{Service: "google", Route: "token", MaxBody: maxForm,
		Refuse: func(status int, code, text string) world.Reply {
			if code == "" {
				code = "internal_failure"
			}
			return googleError(status, code, text)
		},
		Act: func(body []byte) world.Reply {
			f, err := url.ParseQuery(string(body))
			if err != nil {
				return googleError(400, "invalid_request", "Bad Request")
			}
			s.mu.Lock()
			defer s.mu.Unlock()
			switch g := f.Get("grant_type"); g {
			case "urn:ietf:params:oauth:grant-type:jwt-bearer":
				return s.googleJWT(f.Get("assertion"))
			case "refresh_token":
				gr := s.grants[f.Get("refresh_token")]
				if gr == nil || !gr.Google {
					return googleError(400, "invalid_grant", "Token has been expired or revoked.")
				}
				if gr.ClientID != f.Get("client_id") || gr.ClientSecret != f.Get("client_secret") {
					return googleError(401, "invalid_client", "Unauthorized")
				}
				return s.googleToken(gr.Mailbox, gr.Scopes)
			default:
				return googleError(400, "unsupported_grant_type", "Invalid grant_type: "+g)
			}
		}})
}

// maxGoogleLife is the longest life of an assertion, with the tolerance seen at Google.
const maxGoogleLife = 65 * time.Minute

// googleJWT checks an assertion in Google's order: structure, signature, issuer, presence of times, window,
// scope, audience, delegation, subject (https://developers.google.com/identity/protocols/oauth2/service-account).
func (s *Server) googleJWT(assertion string) world.Reply {
	claims := jwt.MapClaims{}
	p := jwt.NewParser(jwt.WithoutClaimsValidation())
	tok, parts, err := p.ParseUnverified(assertion, claims)
	if err != nil || len(parts) != 3 {
		return googleError(400, "invalid_request", "Bad Request")
	}
	iss, _ := claims["iss"].(string)
	acct := s.accounts[iss]
	good := false
	if acct != nil && tok.Method.Alg() == "RS256" {
		sig, err := base64.RawURLEncoding.DecodeString(parts[2])
		for kid, key := range acct.Keys {
			if want, named := tok.Header["kid"].(string); named && want != kid {
				continue
			}
			good = good || err == nil && tok.Method.Verify(parts[0]+"."+parts[1], sig, key) == nil
		}
	}
	switch {
	case acct == nil:
		return googleError(400, "invalid_grant", "Invalid grant: account not found")
	case !good:
		return googleError(400, "invalid_grant", "Invalid JWT Signature.")
	}
	iat, ok1 := seconds(claims["iat"])
	exp, ok2 := seconds(claims["exp"])
	now := s.w.Now()
	switch {
	case !ok1:
		return googleError(400, "invalid_grant", "Invalid JWT: iat (issued at) is not set.")
	case !ok2:
		return googleError(400, "invalid_grant", "Invalid JWT: exp (expiration time) is not set.")
	case exp.Sub(iat) > maxGoogleLife || exp.Before(iat) || now.After(exp) || iat.After(now.Add(5*time.Minute)):
		return googleError(400, "invalid_grant", "Invalid JWT: Token must be a short-lived token (60 minutes) and in a reasonable timeframe. Check your iat and exp values in the JWT claim.")
	}
	scope, _ := claims["scope"].(string)
	if scope == "" || strings.Contains(scope, ",") {
		return googleError(400, "invalid_scope", "Invalid OAuth scope or ID token audience provided.")
	}
	if aud, _ := claims["aud"].(string); aud != "https://oauth2.googleapis.com/token" && aud != s.host()+"/token" {
		return googleError(400, "invalid_grant", "Invalid JWT: Failed audience check.")
	}
	scopes := strings.Fields(scope)
	for _, sc := range scopes {
		if sc != "https://mail.google.com/" && !strings.HasPrefix(sc, "https://www.googleapis.com/auth/") {
			// A scope that Google does not know: no access token, and no error either.
			return world.JSON(http.StatusOK, map[string]any{"id_token": "eyJ.eyJ." + rand.Text()})
		}
	}
	sub, _ := claims["sub"].(string)
	if sub == "" || len(acct.Scopes) == 0 {
		return googleError(401, "unauthorized_client", "Client is unauthorized to retrieve access tokens using this method, or client not authorized for any of the scopes requested.")
	}
	for _, sc := range scopes {
		if !contains(acct.Scopes, sc) {
			return googleError(403, "access_denied", "Requested scope is not in the delegation.")
		}
	}
	if !s.users[world.Fold(sub)] {
		return googleError(400, "invalid_grant", "Invalid email or User ID")
	}
	return s.googleToken(sub, scopes)
}

func (s *Server) googleToken(mailbox string, scopes []string) world.Reply {
	t := "ya29." + rand.Text() + rand.Text()
	s.tokens[t] = Claims{Google: true, Mailbox: world.Fold(mailbox), Scopes: scopes, Expiry: s.w.Now().Add(s.life)}
	return world.JSON(http.StatusOK, map[string]any{"access_token": t, "expires_in": int(s.life.Seconds()), "token_type": "Bearer"})
}

// seconds reads a time claim: a number, or digits in a string.
func seconds(v any) (time.Time, bool) {
	switch x := v.(type) {
	case float64:
		return time.Unix(int64(math.Floor(x)), 0), true
	case string:
		if n, err := strconv.ParseInt(x, 10, 64); err == nil {
			return time.Unix(n, 0), true
		}
	}
	return time.Time{}, false
}

func contains(list []string, s string) bool {
	for _, x := range list {
		if x == s {
			return true
		}
	}
	return false
}
