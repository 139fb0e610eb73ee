package mime

import (
	stdmime "mime"
	"strings"

	"github.com/emersion/go-message/charset"
)

// Address is one mailbox of an address field.
type Address struct {
	Name string // display name, encoded words decoded
	Addr string // addr-spec without angle brackets
}

// ParseAddresses reads an address list (RFC 5322 §3.4) as mail from the wild has it: obsolete routes, comments
// anywhere, groups (whose members are listed and whose names are not), raw 8-bit names, semicolons for
// commas. ok is false when something in it could not be read; the list still holds what could.
func ParseAddresses(s string) (list []Address, ok bool) {
	p := addressParser{s: s, ok: true}
	p.list()
	return p.out, p.ok
}

type addressParser struct {
	s   string
	i   int
	out []Address
	ok  bool

	phrase  strings.Builder // words so far, for a display name
	raw     strings.Builder // the same as an addr-spec: no white space, quotes kept
	comment string          // the last comment: the name in "user@host (Name)"
	angle   string          // what stood in angle brackets
	angled  bool
	inGroup bool
}

// list walks over the text once; separators finish an address.
func (p *addressParser) list() {
	for p.i < len(p.s) {
		switch c := p.s[p.i]; c {
		case ',':
			p.i++
			p.finish()
		case ';':
			p.i++
			p.finish()
			p.inGroup = false
		case ':':
			p.i++
			// RFC 5322 §3.4: "name: member, member;"
			p.phrase.Reset()
			p.raw.Reset()
			p.comment = ""
			if p.inGroup || p.angled {
				p.ok = false
			}
			p.inGroup = true
		case '(':
			p.comment = p.commentText()
		case '<':
			p.bracket()
		case '"':
			p.quoted()
		case ' ', '\t', '\r', '\n':
			p.i++
			if p.phrase.Len() > 0 {
				p.phrase.WriteByte(' ')
			}
		default:
			p.phrase.WriteByte(c)
			p.raw.WriteByte(c)
			p.i++
		}
	}
	p.finish()
}

// commentText takes a comment, nested ones and escapes included.
func (p *addressParser) commentText() string {
	start, depth := p.i+1, 0
	for ; p.i < len(p.s); p.i++ {
		switch p.s[p.i] {
		case '\\':
			p.i++
		case '(':
			depth++
		case ')':
			if depth--; depth == 0 {
				text := p.s[start:p.i]
				p.i++
				return text
			}
		}
	}
	p.i = len(p.s)
	p.ok = false
	return p.s[min(start, len(p.s)):]
}

// quoted takes a quoted string: its content for a name, itself for a local part.
func (p *addressParser) quoted() {
	start := p.i
	for p.i++; p.i < len(p.s); p.i++ {
		switch p.s[p.i] {
		case '\\':
			if p.i+1 < len(p.s) {
				p.i++
				p.phrase.WriteByte(p.s[p.i])
			}
		case '"':
			p.i++
			p.raw.WriteString(p.s[start:p.i])
			return
		default:
			p.phrase.WriteByte(p.s[p.i])
		}
	}
	p.ok = false
	p.raw.WriteString(p.s[start:])
}

// bracket takes an angle-addr; quotes in it may hide its end.
func (p *addressParser) bracket() {
	start, quoted := p.i+1, false
	if p.angled {
		p.ok = false // two addresses without a comma
		p.finish()
	}
	for p.i++; p.i < len(p.s); p.i++ {
		switch c := p.s[p.i]; {
		case c == '\\' && quoted:
			p.i++
		case c == '"':
			quoted = !quoted
		case c == '>' && !quoted:
			p.angle, p.angled = p.s[start:p.i], true
			p.i++
			return
		}
	}
	p.ok = false
	p.angle, p.angled = p.s[min(start, len(p.s)):], true
	p.i = len(p.s)
}

// finish ends one address.
func (p *addressParser) finish() {
	name, addr := strings.TrimSpace(p.phrase.String()), p.raw.String()
	if p.angled {
		addr = strings.Join(strings.Fields(p.angle), "")
		// RFC 5322 §4.4: an obsolete route before the address is dropped.
		if strings.HasPrefix(addr, "@") {
			if _, after, found := strings.Cut(addr, ":"); found {
				addr = after
			}
		}
	} else {
		name = p.comment
	}
	empty := !p.angled && addr == ""
	p.phrase.Reset()
	p.raw.Reset()
	p.comment, p.angle, p.angled = "", "", false
	if empty {
		return
	}
	at := strings.LastIndexByte(addr, '@')
	if at <= 0 || at == len(addr)-1 {
		p.ok = false
		if addr == "" {
			return
		}
	}
	// Folding inside of a quoted local part: the line end is no part of it (RFC 5322 §2.2.3).
	addr = strings.NewReplacer("\r", "", "\n", "").Replace(addr)
	p.out = append(p.out, Address{Name: DecodeWords(name), Addr: addr})
}

// ParseMessageID reads a Message-ID field: the id with its angle brackets. ok is false when it is none by
// RFC 5322 §3.6.4, taken leniently: one pair of brackets, one @, no white space, ASCII.
func ParseMessageID(s string) (id string, ok bool) {
	s = strings.TrimSpace(s)
	if len(s) < 5 || s[0] != '<' || s[len(s)-1] != '>' {
		return s, false
	}
	in := s[1 : len(s)-1]
	at := strings.IndexByte(in, '@')
	if at <= 0 || at == len(in)-1 || strings.IndexByte(in[at+1:], '@') >= 0 || strings.HasSuffix(in, ".") {
		return s, false
	}
	for i := range len(in) {
		if c := in[i]; c <= ' ' || c >= 0x7f || c == '<' || c == '>' {
			return s, false
		}
	}
	return s, true
}

// DecodeWords decodes encoded words (RFC 2047); what is none, or has an unknown charset, stays as it is.
func DecodeWords(s string) string {
	if !strings.Contains(s, "=?") {
		return strings.ToValidUTF8(s, "\uFFFD")
	}
	d := stdmime.WordDecoder{CharsetReader: charset.Reader}
	if out, err := d.DecodeHeader(s); err == nil {
		return strings.ToValidUTF8(out, "\uFFFD")
	}
	return strings.ToValidUTF8(s, "\uFFFD")
}

// FormatAddress writes an address for a header field: the name quoted or as encoded words where it must be
// (RFC 5322 §3.4, RFC 2047 §5).
func FormatAddress(a Address) string {
	if a.Name == "" {
		return a.Addr
	}
	return formatPhrase(a.Name) + " <" + a.Addr + ">"
}

func formatPhrase(name string) string {
	// A tab or another control character in a name could end it (and begin an address).
	name = strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return ' '
		}
		return r
	}, name)
	plain := true
	for _, r := range name {
		if r > 0x7e {
			// RFC 2047 §5 (3): in a phrase the Q form may hold letters, digits and a few signs alone.
			if strings.ContainsAny(name, "\"#$%&'(),.:;<>@[\\]^`{|}~") {
				return stdmime.BEncoding.Encode("utf-8", name)
			}
			return stdmime.QEncoding.Encode("utf-8", name)
		}
		// RFC 5322 §3.2.3: atext and white space need no quotes.
		if !(r == ' ' || r >= '0' && r <= '9' || r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || strings.ContainsRune("!#$%&'*+-/=?^_`{|}~", r)) {
			plain = false
		}
	}
	if plain {
		return name
	}
	return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(name) + `"`
}

// FormatAddresses writes an address list, folded so that no line passes 78 characters where that can be
// helped (RFC 5322 §2.1.1). used is how much of the first line is taken.
func FormatAddresses(list []Address, used int) string {
	var b strings.Builder
	for i, a := range list {
		s := FormatAddress(a)
		if i > 0 {
			b.WriteByte(',')
			used++
			if used+1+len(s) > 78 {
				b.WriteString("\r\n")
				used = 0
			}
			b.WriteByte(' ')
			used++
		}
		b.WriteString(s)
		used += len(s)
	}
	return b.String()
}
