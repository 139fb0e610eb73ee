package oauth

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"regexp"
	"strconv"
	"strings"
	"time"

	"mailbridge/internal/mailerr"
	"mailbridge/internal/secret"
)

// refused is an error body of a token endpoint (RFC 6749 §5.2, with Entra's members).
type refused struct {
	Error       string `json:"error"`
	Description string `json:"error_description"`
	Codes       []int  `json:"error_codes"`
	Subtype     string `json:"error_subtype"`
	TraceID     string `json:"trace_id"`
}

// maxWait is the longest wait that a token endpoint is granted.
const maxWait = time.Hour

// tellSkew is the difference of clocks from which it is told.
const tellSkew = time.Minute

// refusal classifies an answer that is no success. Whatever a profile does wrong is of class Auth and never
// Permanent: it concerns the account, and no message may bounce for it.
func (c *Client) refusal(resp *http.Response, body []byte) error {
	var r refused
	known := json.Unmarshal(body, &r) == nil && r.Error != ""
	number := r.number()
	detail := fmt.Errorf("HTTP %d %s: %s", resp.StatusCode, r.Error, clip(secret.Scrub(r.Description)))
	wait, asked := mailerr.RetryAfter(resp.Header, c.now())
	fail := func(class mailerr.Class, text string) *mailerr.Error {
		e := c.fail(class, mailerr.Status{Subject: 7}, text, detail)
		if class == mailerr.Temporary || class == mailerr.Throttled {
			e.Status = mailerr.Status{Subject: 4, Detail: 5}
			if asked {
				e.Class, e.RetryAt = mailerr.Throttled, c.now().Add(min(wait, maxWait))
			}
		}
		return e
	}
	switch {
	case resp.StatusCode == http.StatusTooManyRequests:
		return fail(mailerr.Throttled, "the token endpoint asks to be asked less often")
	case resp.StatusCode >= 500, resp.StatusCode == http.StatusRequestTimeout, r.Error == "temporarily_unavailable", r.Error == "server_error", transient(number):
		return fail(mailerr.Temporary, "the token endpoint has trouble of its own at the moment")
	case resp.StatusCode >= 300 && resp.StatusCode < 400:
		return fail(mailerr.Auth, "the token endpoint sends on to another address, which is not followed with secrets: check token_endpoint")
	case !known:
		return fail(mailerr.Auth, fmt.Sprintf("the token endpoint answers HTTP %d and no OAuth error: check token_endpoint", resp.StatusCode))
	}
	text := ""
	if c.p.Provider == "graph" {
		text = entraText(r.Error, number)
		if number != 0 {
			text = fmt.Sprintf("Microsoft refuses (AADSTS%d): %s", number, text)
		} else {
			text = fmt.Sprintf("Microsoft refuses (%s): %s", clip(r.Error), text)
		}
	} else {
		text = fmt.Sprintf("Google refuses (%s): %s", clip(r.Error), c.googleText(&r))
	}
	if number == 700024 || strings.Contains(r.Description, "short-lived token") {
		if skew := c.skew(resp); skew.Abs() >= tellSkew {
			text += fmt.Sprintf("; this machine's clock is off by %v", skew)
		}
	}
	if number == 50196 { // the client is in a loop
		return fail(mailerr.Throttled, text)
	}
	return fail(mailerr.Auth, text)
}

// skew is how far this machine's clock is ahead of the endpoint's, to the second.
func (c *Client) skew(resp *http.Response) time.Duration {
	date, err := http.ParseTime(resp.Header.Get("Date"))
	if err != nil {
		return 0
	}
	return c.now().Sub(date).Round(time.Second)
}

var aadsts = regexp.MustCompile(`AADSTS(\d{4,9})`)

// number is Entra's number of the error; 0 when there is none.
func (r *refused) number() int {
	if len(r.Codes) > 0 {
		return r.Codes[0]
	}
	if m := aadsts.FindStringSubmatch(r.Description); m != nil {
		n, err := strconv.Atoi(m[1])
		if err == nil {
			return n
		}
	}
	return 0
}

// transient are the numbers that Microsoft says to try again
// (https://learn.microsoft.com/entra/identity-platform/reference-error-codes).
func transient(number int) bool {
	switch number {
	case 90033, 90006, 90012, 90024, 90055:
		return true
	}
	return false
}

// entraText words the numbers that an administrator meets, with the next step.
func entraText(code string, number int) string {
	switch number {
	case 700016:
		return "the application is not known in this tenant; check tenant_id and client_id, and grant admin consent there"
	case 7000215:
		return "the client secret is wrong; set client_secret to the secret's value, not to its id"
	case 7000222:
		return "the client secret has expired; make a new one under Certificates & secrets and set client_secret to it"
	case 7000216, 7000218:
		return "a credential is missing; set client_secret or assertion, or allow public client flows for the application"
	case 700025:
		return "the application is a public client and must send no credential; remove client_secret and assertion"
	case 700027:
		return "the certificate is not registered with the application, or the signature is not its; upload the keystore's certificate under Certificates & secrets"
	case 700024:
		return "the assertion is outside of its time; set this machine's clock"
	case 50013, 500133:
		return "the assertion is not valid; check the keystore and this machine's clock"
	case 7000112, 70001:
		return "the application is disabled or unknown; enable it under Enterprise applications, or check client_id"
	case 700229:
		return "the federated assertion is not one of an application"
	case 90002, 50059, 900023:
		return "the tenant does not exist; check tenant_id"
	case 9001023, 50194:
		return "this grant needs the tenant itself; set tenant_id to its GUID or one of its domains, not to common"
	case 500011:
		return "the resource is not known in this tenant; check scopes and cloud"
	case 70011, 28002, 28003, 1002012:
		return "the scope is not valid; an application asks for https://graph.microsoft.com/.default"
	case 65001, 65004, 90094, 90095:
		return "consent is missing; let an administrator grant it under API permissions"
	case 65005, 650056, 650057:
		return "the application lacks permissions for the resource; add them under API permissions"
	case 50034:
		return "there is no such user in the tenant"
	case 50053:
		return "the user is locked, or signs in from a blocked address"
	case 50055, 50056, 50126:
		return "the user's password has expired, is missing or wrong"
	case 50057:
		return "the user is disabled; enable the account"
	case 50072, 50074, 50076, 50078, 50079, 50158:
		return "the user must confirm a second factor; sign in again to get a new refresh token"
	case 50105:
		return "the user is not assigned to the application; assign it under Enterprise applications"
	case 53000, 53001, 53002, 53003, 53004, 530036:
		return "a Conditional Access policy blocks the sign-in; let an administrator exclude this application or meet the policy"
	case 530035:
		return "security defaults block the sign-in"
	case 50173, 50132, 50133, 50089, 70008, 700082, 70043, 700084:
		return "the refresh token has ended; sign in again and set refresh_token to the new one"
	case 54005, 501481:
		return "the sign-in's code was used before or belongs to another sign-in; sign in again"
	case 70016, 70018, 70019:
		return "the device sign-in is not finished or has expired; start it again"
	case 50196:
		return "the same request came too often; waiting"
	case 900144, 9002313:
		return "the request lacks a parameter; check the profile"
	case 900382, 900432, 90038:
		return "the tenant is in another national cloud; set cloud"
	}
	switch code {
	case "invalid_client":
		return "the application's credential is not accepted; check client_id and client_secret or assertion"
	case "unauthorized_client":
		return "the application may not use this grant in this tenant; check tenant_id and client_id"
	case "invalid_grant", "interaction_required":
		return "the grant has ended or needs the user; sign in again"
	case "consent_required":
		return "consent is missing; let an administrator grant it under API permissions"
	case "invalid_scope", "invalid_resource":
		return "scope or resource is not valid; check scopes and cloud"
	case "access_denied":
		return "a policy blocks the sign-in; ask the tenant's administrator"
	}
	return "check the profile; run mailbridge doctor"
}

// googleText words Google's refusals, with the next step. Descriptions change over time: they refine the
// advice and decide nothing.
func (c *Client) googleText(r *refused) string {
	has := func(s string) bool { return strings.Contains(strings.ToLower(r.Description), s) }
	switch r.Error {
	case "invalid_grant":
		switch {
		case has("signature"):
			return "the key is not one of the service account's; it may have been deleted: check keystore, alias and issuer"
		case has("account not found"):
			return "there is no service account " + c.issuer() + "; check issuer"
		case has("short-lived"):
			return "the assertion is outside of its time; set this machine's clock"
		case has("audience"):
			return "the audience is not the token endpoint; remove audience from jwt"
		case has("is not set"):
			return "the assertion lacks a time; this is a defect of the bridge"
		case has("email") || has("user id"):
			return "the mailbox does not exist or is suspended; check mailbox and subject"
		case r.Subtype == "invalid_rapt":
			return "the organisation wants the user to sign in again; set refresh_token to a new one"
		}
		return "the grant has ended or was revoked; sign in again and set refresh_token to the new one"
	case "unauthorized_client":
		if has("unauthorized client or scope") {
			return "the service account is not authorised in this domain; add its numeric client id under Domain-wide delegation"
		}
		return "there is no domain-wide delegation for this service account; add its numeric client id (not its e-mail) with the scope " + gmailScope + " in the Admin console. Changes take minutes, up to a day"
	case "access_denied":
		return "the scope is not in the delegation entry; add " + gmailScope + " to it in the Admin console"
	case "invalid_scope":
		return "the scope is not valid; set claims = { scope = \"" + gmailScope + "\" }, several with spaces between"
	case "admin_policy_enforced":
		return "a policy of the organisation forbids the application; let an administrator trust it"
	case "disabled_client", "deleted_client", "invalid_client":
		return "the OAuth client is disabled, deleted or its secret wrong; check client_id and client_secret"
	case "org_internal":
		return "the OAuth client belongs to another organisation"
	case "unsupported_grant_type", "invalid_request":
		return "the token endpoint does not understand the request; check token_endpoint"
	}
	return "check the profile; run mailbridge doctor"
}

func (c *Client) issuer() string {
	if c.p.JWT != nil {
		return c.p.JWT.Issuer
	}
	return c.p.ClientID
}

// clip makes s one short line of ASCII.
func clip(s string) string {
	s = strings.Map(func(r rune) rune {
		switch {
		case r >= ' ' && r < 0x7f:
			return r
		case r == '\r':
			return -1
		}
		return ' '
	}, s)
	if len(s) > 400 {
		s = s[:400] + "..."
	}
	return s
}

var errLoop = errors.New("the cloud refuses tokens that it has just issued")
