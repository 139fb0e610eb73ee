package mime

import (
	"io"
	"slices"
	"strconv"
	"strings"

	"github.com/emersion/go-message/charset"
)

// ParseParams reads a structured field such as Content-Type or Content-Disposition: its value in lower case
// and its parameters, names in lower case. It takes what mail from the wild holds: continuations and
// charsets (RFC 2231), encoded words where they should not be, names with spaces and no quotes, quotes
// that never end.
func ParseParams(s string) (value string, params map[string]string) {
	value, rest, _ := strings.Cut(s, ";")
	value = strings.ToLower(strings.TrimSpace(value))
	params = map[string]string{}
	type piece struct {
		n       int
		encoded bool
		text    string
	}
	pieces := map[string][]piece{}
	for rest != "" {
		var name, v string
		name, v, rest = nextParam(rest)
		if name == "" {
			continue
		}
		base, section, split := strings.Cut(name, "*")
		if !split {
			if _, twice := params[name]; !twice {
				params[name] = DecodeWords(v)
			}
			continue
		}
		// RFC 2231: name*=charset'lang'%xx, name*0=…, name*1*=…
		p := piece{encoded: section == "" || strings.HasSuffix(section, "*"), text: v}
		if n := strings.TrimSuffix(section, "*"); n != "" {
			i, err := strconv.Atoi(n)
			if err != nil || i < 0 {
				continue
			}
			p.n = i
		}
		pieces[base] = append(pieces[base], p)
	}
	for name, ps := range pieces {
		slices.SortStableFunc(ps, func(a, b piece) int { return a.n - b.n })
		var b strings.Builder
		set := ""
		for i, p := range ps {
			t := p.text
			if p.encoded {
				if i == 0 {
					if cs, after, ok := strings.Cut(t, "'"); ok {
						if _, text, ok := strings.Cut(after, "'"); ok {
							set, t = cs, text
						}
					}
				}
				t = unescape(t)
			}
			b.WriteString(t)
		}
		// RFC 2231 §3: the extended form wins over the plain one.
		params[name] = toUTF8(b.String(), set)
	}
	return value, params
}

// nextParam takes "name=value" off the front of s, up to the next semicolon outside of quotes.
func nextParam(s string) (name, value, rest string) {
	s = strings.TrimLeft(s, " \t\r\n;")
	eq := strings.IndexAny(s, "=;")
	if eq < 0 || s[eq] == ';' {
		if eq < 0 {
			return "", "", ""
		}
		return "", "", s[eq+1:]
	}
	name = strings.ToLower(strings.TrimSpace(s[:eq]))
	s = strings.TrimLeft(s[eq+1:], " \t\r\n")
	if !strings.HasPrefix(s, `"`) {
		value, rest, _ = strings.Cut(s, ";")
		return name, strings.TrimSpace(value), rest
	}
	var b strings.Builder
	for i := 1; i < len(s); i++ {
		switch {
		case s[i] == '\\' && i+1 < len(s):
			i++
			b.WriteByte(s[i])
		case s[i] == '"':
			_, rest, _ = strings.Cut(s[i+1:], ";")
			return name, b.String(), rest
		default:
			b.WriteByte(s[i])
		}
	}
	return name, b.String(), ""
}

// unescape decodes %xx and leaves what is not that.
func unescape(s string) string {
	if !strings.Contains(s, "%") {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '%' && i+2 < len(s) {
			if v, err := strconv.ParseUint(s[i+1:i+3], 16, 8); err == nil {
				b.WriteByte(byte(v))
				i += 2
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// toUTF8 converts s from a charset; unknown charsets leave it as it is, with what is no UTF-8 replaced.
func toUTF8(s, set string) string {
	if set != "" && !strings.EqualFold(set, "utf-8") && !strings.EqualFold(set, "us-ascii") {
		if r, err := charset.Reader(set, strings.NewReader(s)); err == nil {
			if b, err := io.ReadAll(r); err == nil {
				return string(b)
			}
		}
	}
	return strings.ToValidUTF8(s, "\uFFFD")
}

// TextReader converts a text part's bytes, its transfer encoding undone, to UTF-8. Unknown charsets pass as
// they are, with what is no UTF-8 replaced.
func TextReader(r io.Reader, set string) io.Reader {
	if set != "" && !strings.EqualFold(set, "utf-8") && !strings.EqualFold(set, "us-ascii") {
		if c, err := charset.Reader(set, r); err == nil {
			return c
		}
	}
	return r
}
