// Package oauth gets access tokens: profiles of OAuth 2.0 grants, one signer and one token request for both
// clouds, and a manager that keeps tokens fresh for everybody who needs them.
package oauth

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"time"

	"mailbridge/internal/secret"
)

// Grant is how a profile gets tokens.
type Grant string

const (
	ClientCredentials Grant = "client_credentials" // RFC 6749 §4.4
	JWTBearer         Grant = "jwt_bearer"         // RFC 7523 §2.1
	RefreshToken      Grant = "refresh_token"      // RFC 6749 §6
)

// Key signs assertions. Certificate may be nil where none is needed; else its public key is the signer's.
type Key struct {
	Signer      crypto.Signer
	Certificate *x509.Certificate
	KeyID       string
}

// Assertion is a client assertion (RFC 7523 §2.2), which stands in place of a client secret.
type Assertion struct {
	Key       Key
	Algorithm string // "PS256" (with x5t#S256, the default) or "RS256" (with x5t)
	Audience  string // default: the token endpoint
}

// JWT is the assertion of a JWT bearer grant.
type JWT struct {
	Key       Key
	Issuer    string
	Subject   string // "{mailbox}" stands for the account's mailbox
	Audience  string // default: the token endpoint
	Algorithm string // default "RS256"
	Lifetime  time.Duration
}

// Profile is an OAuth 2.0 authentication profile.
type Profile struct {
	Name          string
	Provider      string // "graph" or "gmail": decides defaults and how refusals are worded
	Grant         Grant
	Cloud         string // national cloud of Microsoft; empty is "global"
	TenantID      string
	ClientID      string
	ClientSecret  secret.Text
	Assertion     *Assertion
	JWT           *JWT
	Claims        map[string]any // custom claims of the JWT
	Scopes        []string
	RefreshToken  secret.Text // where it enters; newer ones are kept in the store
	TokenEndpoint string      // default: the vendor's; "{tenant_id}" is put in
}

// Cloud is a pair of hosts of Microsoft (https://learn.microsoft.com/graph/deployments). A token of one
// cloud is worth nothing in another.
type Cloud struct{ Login, Graph string }

// CloudByName knows Microsoft's clouds; "" is "global".
func CloudByName(name string) (Cloud, bool) {
	c, ok := map[string]Cloud{
		"":          {"login.microsoftonline.com", "graph.microsoft.com"},
		"global":    {"login.microsoftonline.com", "graph.microsoft.com"},
		"us-gov-l4": {"login.microsoftonline.us", "graph.microsoft.us"},
		"us-gov-l5": {"login.microsoftonline.us", "dod-graph.microsoft.us"},
		"china":     {"login.chinacloudapi.cn", "microsoftgraph.chinacloudapi.cn"},
	}[name]
	return c, ok
}

const (
	googleTokenEndpoint = "https://oauth2.googleapis.com/token"
	gmailScope          = "https://mail.google.com/"
	// maxLifetime of a JWT bearer assertion (https://developers.google.com/identity/protocols/oauth2/service-account).
	maxLifetime = time.Hour
	// assertionLife of a client assertion (https://learn.microsoft.com/entra/identity-platform/certificate-credentials).
	assertionLife = 10 * time.Minute
	// backdate makes up for clocks that are a little apart.
	backdate = 10 * time.Second
	mailbox  = "{mailbox}"
)

// registered are the claims that have settings of their own (RFC 7519 §4.1).
var registered = [...]string{"iss", "sub", "aud", "exp", "iat", "nbf", "jti"}

// complete checks a profile and fills in its defaults.
func (p *Profile) complete() error {
	cloud, ok := CloudByName(p.Cloud)
	if !ok {
		return fmt.Errorf("there is no cloud %q", p.Cloud)
	}
	if p.TokenEndpoint == "" {
		p.TokenEndpoint = googleTokenEndpoint
		if p.Provider == "graph" {
			p.TokenEndpoint = "https://" + cloud.Login + "/{tenant_id}/oauth2/v2.0/token"
		}
	}
	p.TokenEndpoint = strings.ReplaceAll(p.TokenEndpoint, "{tenant_id}", url.PathEscape(p.TenantID))
	if u, err := url.Parse(p.TokenEndpoint); err != nil || u.Scheme != "https" || u.Host == "" {
		return fmt.Errorf("the token endpoint %q is not an https:// address", p.TokenEndpoint)
	}
	switch p.Grant {
	case ClientCredentials:
		if p.ClientSecret.Empty() == (p.Assertion == nil) {
			return errors.New("client_credentials needs either a client secret or an assertion")
		}
		if len(p.Scopes) == 0 {
			p.Scopes = []string{"https://" + cloud.Graph + "/.default"}
		}
	case JWTBearer:
		if p.JWT == nil {
			return errors.New("jwt_bearer needs a jwt")
		}
		if err := p.JWT.complete(p.TokenEndpoint); err != nil {
			return err
		}
		for name := range p.Claims {
			if slices.Contains(registered[:], name) {
				return fmt.Errorf("the claim %q is set by jwt itself; claims holds custom ones only", name)
			}
		}
		if s, ok := p.Claims["scope"].(string); p.Provider == "gmail" && (!ok || s == "") {
			return fmt.Errorf("claims needs scope = %q: Google grants nothing without it", gmailScope)
		}
	case RefreshToken:
		if p.ClientID == "" {
			return errors.New("refresh_token needs a client id")
		}
	default:
		return fmt.Errorf("there is no grant %q", p.Grant)
	}
	if p.Assertion != nil {
		return p.Assertion.complete(p.TokenEndpoint)
	}
	return nil
}

func (a *Assertion) complete(endpoint string) error {
	if a.Algorithm == "" {
		a.Algorithm = "PS256"
	}
	if a.Audience == "" {
		a.Audience = endpoint
	}
	if a.Algorithm != "PS256" && a.Algorithm != "RS256" {
		return fmt.Errorf("client assertions are signed with PS256 or RS256, not %s", a.Algorithm)
	}
	if a.Key.Certificate == nil {
		return errors.New("the key of the assertion has no certificate in its keystore: Microsoft knows the key by it")
	}
	if err := a.Key.fits(a.Algorithm); err != nil {
		return err
	}
	if pub, ok := a.Key.Signer.Public().(interface{ Equal(crypto.PublicKey) bool }); !ok || !pub.Equal(a.Key.Certificate.PublicKey) {
		return errors.New("the certificate does not belong to the key")
	}
	return nil
}

func (j *JWT) complete(endpoint string) error {
	if j.Algorithm == "" {
		j.Algorithm = "RS256"
	}
	if j.Audience == "" {
		j.Audience = endpoint
	}
	if j.Lifetime == 0 {
		j.Lifetime = maxLifetime
	}
	if j.Lifetime < time.Minute || j.Lifetime > maxLifetime {
		return fmt.Errorf("an assertion lives between a minute and an hour, not %v", j.Lifetime)
	}
	if j.Issuer == "" {
		return errors.New("jwt needs an issuer: the service account's e-mail address")
	}
	return j.Key.fits(j.Algorithm)
}

// fits checks that the key can sign with the algorithm.
func (k Key) fits(algorithm string) error {
	ok := false
	switch k.Signer.(type) {
	case *rsa.PrivateKey:
		ok = algorithm == "RS256" || algorithm == "PS256"
	case *ecdsa.PrivateKey:
		ok = algorithm == "ES256"
	}
	if !ok {
		return fmt.Errorf("a key of type %T cannot sign with %s", k.Signer, algorithm)
	}
	return nil
}

// subject is whom a token of this profile is for: tokens of an application are the same for every mailbox.
func (p *Profile) subject(addr string) string {
	if p.JWT != nil && strings.Contains(p.JWT.Subject, mailbox) {
		return addr
	}
	return ""
}
