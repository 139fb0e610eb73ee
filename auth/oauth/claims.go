package oauth

import (
	"encoding/base64"
	"encoding/json"
	"strings"
	"time"

	"mailbridge/internal/secret"
)

// Claims is what a look into an access token shows, for diagnosis alone: tokens are opaque to clients
// (https://learn.microsoft.com/entra/identity-platform/access-tokens).
type Claims struct {
	Audience string
	TenantID string
	AppID    string
	User     string
	Scopes   []string // delegated permissions
	Roles    []string // application permissions; those granted by RBAC do not show
	Expiry   time.Time
}

// Inspect looks into a token. ok is false for those that show nothing: Google's, and personal accounts'.
func Inspect(t secret.Text) (c Claims, ok bool) {
	parts := strings.Split(t.Reveal(), ".")
	if len(parts) != 3 {
		return c, false
	}
	b, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil {
		return c, false
	}
	var v struct {
		Aud   string   `json:"aud"`
		Tid   string   `json:"tid"`
		AppID string   `json:"appid"`
		Upn   string   `json:"upn"`
		Scp   string   `json:"scp"`
		Roles []string `json:"roles"`
		Exp   int64    `json:"exp"`
	}
	if json.Unmarshal(b, &v) != nil {
		return c, false
	}
	return Claims{v.Aud, v.Tid, v.AppID, v.Upn, strings.Fields(v.Scp), v.Roles, time.Unix(v.Exp, 0)}, true
}
