package oauth

import (
	"context"
	"crypto/rand"
	"crypto/sha1"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/golang-jwt/jwt/v5"

	"mailbridge/internal/mailerr"
	"mailbridge/internal/secret"
	"mailbridge/providers"
)

const (
	// maxReply bounds a token endpoint's answer in bytes.
	maxReply = 256 << 10
	// requestTimeout bounds one token request.
	requestTimeout = 30 * time.Second
	// defaultLife is what a token lives whose reply does not say.
	defaultLife = time.Hour
)

// Client asks one profile's token endpoint.
type Client struct {
	p    Profile
	http *http.Client
	now  func() time.Time
}

// NewClient checks the profile. The client needs no authority beyond trust in the endpoint's certificate.
func NewClient(p Profile, h *http.Client, now func() time.Time) (*Client, error) {
	if err := p.complete(); err != nil {
		return nil, fmt.Errorf("profile %s: %w", p.Name, err)
	}
	c := *h
	// A redirect would carry secrets to another address.
	c.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	return &Client{p: p, http: &c, now: now}, nil
}

// Endpoint is the token endpoint's URL.
func (c *Client) Endpoint() string { return c.p.TokenEndpoint }

// grant is what a token endpoint gave.
type grant struct {
	token   providers.Token
	refresh secret.Text // empty: the old one stays
}

// sign makes a JWT (RFC 7519). The audience is a string: an array is not known to be taken by Google.
func sign(key Key, algorithm string, claims jwt.MapClaims) (secret.Text, error) {
	t := jwt.NewWithClaims(jwt.GetSigningMethod(algorithm), claims)
	if key.KeyID != "" {
		t.Header["kid"] = key.KeyID
	}
	if c := key.Certificate; c != nil {
		// https://learn.microsoft.com/entra/identity-platform/certificate-credentials
		if algorithm == "RS256" {
			sum := sha1.Sum(c.Raw)
			t.Header["x5t"] = base64.RawURLEncoding.EncodeToString(sum[:])
		} else {
			sum := sha256.Sum256(c.Raw)
			t.Header["x5t#S256"] = base64.RawURLEncoding.EncodeToString(sum[:])
		}
	}
	s, err := t.SignedString(key.Signer)
	return secret.New(s), err
}

// form is the body of the token request.
func (c *Client) form(addr string, refresh secret.Text) (url.Values, error) {
	p, f, now := &c.p, url.Values{}, c.now()
	switch p.Grant {
	case ClientCredentials:
		f.Set("grant_type", "client_credentials")
		f.Set("scope", strings.Join(p.Scopes, " "))
	case RefreshToken:
		f.Set("grant_type", "refresh_token")
		f.Set("refresh_token", refresh.Reveal())
		if len(p.Scopes) > 0 {
			f.Set("scope", strings.Join(p.Scopes, " "))
		}
	case JWTBearer:
		iat := now.Add(-backdate)
		claims := jwt.MapClaims{}
		for name, v := range p.Claims {
			if s, ok := v.(string); ok {
				v = strings.ReplaceAll(s, mailbox, addr)
			}
			claims[name] = v
		}
		claims["iss"], claims["aud"] = p.JWT.Issuer, p.JWT.Audience
		claims["iat"], claims["exp"] = iat.Unix(), iat.Add(p.JWT.Lifetime).Unix()
		if p.JWT.Subject != "" {
			claims["sub"] = strings.ReplaceAll(p.JWT.Subject, mailbox, addr)
		}
		key := p.JWT.Key
		key.Certificate = nil // Google knows the key by kid or by trying
		a, err := sign(key, p.JWT.Algorithm, claims)
		if err != nil {
			return nil, err
		}
		f.Set("grant_type", "urn:ietf:params:oauth:grant-type:jwt-bearer")
		f.Set("assertion", a.Reveal())
		return f, nil
	}
	f.Set("client_id", p.ClientID)
	switch {
	case p.Assertion != nil:
		key := p.Assertion.Key
		key.KeyID = ""
		a, err := sign(key, p.Assertion.Algorithm, jwt.MapClaims{
			"aud": p.Assertion.Audience, "iss": p.ClientID, "sub": p.ClientID, "jti": rand.Text(),
			"iat": now.Add(-backdate).Unix(), "nbf": now.Add(-backdate).Unix(), "exp": now.Add(assertionLife).Unix(),
		})
		if err != nil {
			return nil, err
		}
		f.Set("client_assertion_type", "urn:ietf:params:oauth:client-assertion-type:jwt-bearer")
		f.Set("client_assertion", a.Reveal())
	case !p.ClientSecret.Empty():
		f.Set("client_secret", p.ClientSecret.Reveal())
	}
	return f, nil
}

// fetch asks for a token for the mailbox. Its errors are classified.
func (c *Client) fetch(ctx context.Context, addr string, refresh secret.Text) (grant, error) {
	f, err := c.form(addr, refresh)
	if err != nil {
		return grant{}, c.fail(mailerr.Auth, mailerr.Status{Subject: 7}, "the assertion cannot be signed; run mailbridge doctor", err)
	}
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, c.p.TokenEndpoint, strings.NewReader(f.Encode()))
	if err != nil {
		return grant{}, c.fail(mailerr.Auth, mailerr.Status{Subject: 7}, "the token endpoint is no usable address", err)
	}
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	req.Header.Set("Accept", "application/json")
	resp, err := c.http.Do(req)
	if err != nil {
		return grant{}, c.fail(mailerr.Temporary, mailerr.Status{Subject: 4, Detail: 1}, "the token endpoint "+req.URL.Host+" cannot be reached", errors.New(secret.Scrub(err.Error())))
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxReply+1))
	if err != nil {
		return grant{}, c.fail(mailerr.Temporary, mailerr.Status{Subject: 4, Detail: 2}, "the token endpoint's answer broke off", err)
	}
	if resp.StatusCode != http.StatusOK {
		return grant{}, c.refusal(resp, body)
	}
	return c.reply(body)
}

// reply reads a success.
func (c *Client) reply(body []byte) (grant, error) {
	var r struct {
		AccessToken  string          `json:"access_token"`
		RefreshToken string          `json:"refresh_token"`
		ExpiresIn    json.RawMessage `json:"expires_in"`
		IDToken      string          `json:"id_token"`
	}
	if len(body) > maxReply || json.Unmarshal(body, &r) != nil {
		return grant{}, c.fail(mailerr.Temporary, mailerr.Status{Subject: 4}, "the token endpoint's answer is no token reply; something else may answer in its place: check token_endpoint", nil)
	}
	if r.AccessToken == "" {
		text := "the token endpoint gave no access token"
		if r.IDToken != "" {
			// Seen at Google for a well-formed scope that it does not know.
			text += " but an id token alone: a scope is misspelt; for Gmail it is " + gmailScope + ", with its slash at the end"
		}
		return grant{}, c.fail(mailerr.Auth, mailerr.Status{Subject: 7}, text, nil)
	}
	if strings.ContainsFunc(r.AccessToken, func(r rune) bool { return r <= ' ' || r >= 0x7f }) {
		return grant{}, c.fail(mailerr.Auth, mailerr.Status{Subject: 7}, "the token endpoint gave an access token that cannot be one", nil)
	}
	life := defaultLife
	// RFC 6749 §5.1 has a number; some endpoints send a string.
	if s := strings.Trim(string(r.ExpiresIn), `"`); s != "" && s != "null" {
		n, err := strconv.ParseFloat(s, 64)
		if err != nil || n <= 0 || n > 10*365*24*3600 {
			return grant{}, c.fail(mailerr.Temporary, mailerr.Status{Subject: 4}, "the token endpoint gave a token that lives for no time", nil)
		}
		life = time.Duration(n * float64(time.Second))
	}
	return grant{providers.Token{Value: secret.New(r.AccessToken), Expiry: c.now().Add(life)}, secret.New(r.RefreshToken)}, nil
}

// fail makes a classified failure of this profile.
func (c *Client) fail(class mailerr.Class, status mailerr.Status, text string, err error) *mailerr.Error {
	return &mailerr.Error{Class: class, Status: status, Op: "oauth.token", Text: "profile " + c.p.Name + ": " + text, Err: err}
}
