// Package secret holds values that must not be seen: a type whose every printed form is a fixed mark, and
// a scrubber for texts of others that may carry tokens.
package secret

import (
	"crypto/subtle"
	"log/slog"
	"regexp"
)

const mark = "[redacted]"

// Text is a secret string. However it is printed, logged or marshalled, it shows a fixed mark; only
// Reveal gives the value.
type Text struct{ v string }

// New wraps v.
func New(v string) Text { return Text{v} }

// Reveal gives the value, at the place that needs it and nowhere before.
func (t Text) Reveal() string { return t.v }

// Empty reports whether there is no value.
func (t Text) Empty() bool { return t.v == "" }

// Equal compares in constant time for equal lengths.
func (t Text) Equal(o Text) bool { return subtle.ConstantTimeCompare([]byte(t.v), []byte(o.v)) == 1 }

func (t Text) String() string               { return mark }
func (t Text) GoString() string             { return mark }
func (t Text) MarshalText() ([]byte, error) { return []byte(mark), nil }
func (t Text) LogValue() slog.Value         { return slog.StringValue(mark) }

// patterns find what clouds and libraries print: bearer headers, form and JSON members of token requests,
// Google access tokens (ya29.), JWTs (eyJ…), SASL initial responses, upload URLs' own tokens.
var patterns = []struct {
	re   *regexp.Regexp
	with string
}{
	{regexp.MustCompile(`(?i)(bearer\s+)[A-Za-z0-9._~+/=-]+`), "${1}" + mark},
	{regexp.MustCompile(`(?i)((?:client_secret|client_assertion|assertion|refresh_token|access_token|id_token|code_verifier|device_code|password|authtoken)["']?\s*[=:]\s*["']?)[^"'&\s,}]+`), "${1}" + mark},
	{regexp.MustCompile(`(?i)([?&"']code["']?\s*[=:]\s*["']?)[^"'&\s,}]+`), "${1}" + mark},
	{regexp.MustCompile(`(?i)(\bAUTH(?:ENTICATE)?\s+(?:PLAIN|LOGIN|XOAUTH2|OAUTHBEARER)\s+)\S+`), "${1}" + mark},
	{regexp.MustCompile(`ya29\.[A-Za-z0-9._-]+`), mark},
	{regexp.MustCompile(`eyJ[A-Za-z0-9_-]{8,}(?:\.[A-Za-z0-9_-]+)*`), mark},
}

// Scrub replaces everything in s that looks like a token, an assertion, a password member or an
// authentication line. It is the last net, not a substitute for Text.
func Scrub(s string) string {
	for _, p := range patterns {
		s = p.re.ReplaceAllString(s, p.with)
	}
	return s
}
