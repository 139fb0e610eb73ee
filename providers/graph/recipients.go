package graph

import (
	"errors"
	"fmt"
	"io"
	stdmime "mime"
	netmail "net/mail"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	"golang.org/x/net/idna"

	"mailbridge/internal/mail"
	"mailbridge/internal/mailerr"
	"mailbridge/internal/mime"
	"mailbridge/providers"
)

// maxHeader is the largest header block that is taken, in bytes.
const maxHeader = 1 << 20

// rewriting is a message whose header names exactly the envelope's recipients: prefix, then the content
// from skip on.
type rewriting struct {
	prefix []byte
	skip   int64
	fixes  []string // what was edited, by name
}

// plan edits the header in place so that To, Cc and Bcc together are the envelope's recipients. Fields that
// need no edit keep their bytes, and so does everything else.
//
//   - A Bcc or Resent-Bcc field is dropped; it names nobody and is no reason to refuse.
//   - A recipient of the header that is not in the envelope refuses the message, or is taken out of its
//     field, as m says. What is no address, such as "To: root", names nobody and is taken out.
//   - A field without any address left is dropped: Exchange refuses "undisclosed-recipients:;".
//   - Several To or Cc fields become one each (RFC 5322 §3.6 allows one), and what a strict reader would
//     read otherwise is written anew, so that Exchange has no choice how to read it.
//   - Recipients that To and Cc do not show travel in a Bcc field on top, where no defect of the header can
//     hide it. Exchange sends to them and shows the field to nobody.
//
// A from that is not empty replaces From and Sender.
func plan(out *mail.Outgoing, m providers.Mismatch, from string) (*rewriting, error) {
	head, err := readHead(out.Content)
	if err != nil {
		return nil, err
	}
	env, err := newEnvelope(out.To)
	if err != nil {
		return nil, err
	}
	h := mime.ScanHeader(head)
	if len(h.Fields) == 0 {
		return nil, badHeader("the message has no header")
	}
	firstDefect := len(head)
	if len(h.Defects) > 0 {
		firstDefect = h.Defects[0].Start
	}
	e := edit{head: head}
	var foreign []string
	shown := map[string]bool{}
	for _, name := range []string{"To", "Cc"} {
		var fields []mime.Field
		for _, f := range h.Fields {
			if f.Is(name) {
				fields = append(fields, f)
			}
		}
		var keep []mime.Address
		again := len(fields) > 1
		for _, f := range fields {
			value := f.Value(head)
			list, ok := mime.ParseAddresses(value)
			spaced := f.ValueStart != f.Start+len(f.Name)+1 // "To :", RFC 5322 §4.5.3, which not everybody reads
			if !ok || spaced || !readsTheSame(value, list) {
				again = true
			}
			for _, a := range list {
				key := fold(a.Addr)
				if spelled, ours := env.spelled[key]; ours {
					keep = append(keep, mime.Address{Name: oneLine(a.Name), Addr: spelled})
					continue
				}
				again = true
				if strings.Contains(a.Addr, "@") {
					foreign = append(foreign, a.Addr)
				}
			}
		}
		switch {
		case len(fields) == 0:
			continue
		case len(keep) == 0:
			e.cut(fields, "no recipient left in "+name)
		case again:
			e.cut(fields[1:], "several "+name+" fields made one")
			e.replace(fields[0], name+": "+format(keep, len(name)+2)+"\r\n", name+" written anew")
		}
		if len(fields) > 0 && fields[0].Start < firstDefect { // behind a defect Exchange may see a body
			for _, a := range keep {
				shown[fold(a.Addr)] = true
			}
		}
	}
	if len(foreign) > 0 && m != providers.Rewrite {
		return nil, &mailerr.Error{Class: mailerr.Permanent, Status: st(6, 0),
			Text: "the header names recipients that the envelope does not (" + names(foreign) +
				"), and Microsoft 365 would send to them: take them out of To and Cc, or set envelope_mismatch = \"rewrite\" for the account"}
	}
	if len(foreign) > 0 {
		e.fixes = append(e.fixes, "recipients not in the envelope taken out")
	}
	for _, f := range h.Fields {
		switch {
		case f.Is("Bcc"), f.Is("Resent-Bcc"):
			e.cut([]mime.Field{f}, f.Name+" dropped")
		case from != "" && (f.Is("From") || f.Is("Sender")):
			e.cut([]mime.Field{f}, f.Name+" replaced")
		}
	}
	top := ""
	if hidden := env.without(shown); len(hidden) > 0 {
		top = "Bcc: " + mime.FormatAddresses(hidden, len("Bcc: ")) + "\r\n"
		e.fixes = append(e.fixes, fmt.Sprintf("%d recipients added as Bcc", len(hidden)))
	}
	if from != "" {
		top += "From: " + mime.FormatAddress(mime.Address{Name: "Mail Delivery System", Addr: from}) + "\r\n"
	}
	if top != "" && (head[0] == ' ' || head[0] == '\t') {
		return nil, badHeader("the message begins with a folded line") // it would become part of the new field
	}
	return &rewriting{prefix: e.apply(top), skip: int64(len(head)), fixes: e.fixes}, nil
}

// oneLine is a display name without control characters: a name that is written anew must not be read as
// anything but a name.
func oneLine(name string) string {
	return strings.Join(strings.FieldsFunc(name, func(r rune) bool { return unicode.IsSpace(r) || unicode.IsControl(r) }), " ")
}

// format writes an address list. Names that a strict reader would stumble over are left out.
func format(list []mime.Address, used int) string {
	s := mime.FormatAddresses(list, used)
	if readsTheSame(strings.ReplaceAll(s, "\r\n", ""), list) {
		return s
	}
	bare := make([]mime.Address, len(list))
	for i, a := range list {
		bare[i].Addr = a.Addr
	}
	return mime.FormatAddresses(bare, used)
}

func badHeader(text string) error {
	return &mailerr.Error{Class: mailerr.Permanent, Status: st(6, 0), Text: text}
}

// names lists addresses for a reply.
func names(list []string) string {
	const most = 5
	more := ""
	if len(list) > most {
		more = fmt.Sprintf(" and %d more", len(list)-most)
		list = list[:most]
	}
	s := strings.Join(list, ", ")
	if len(s) > 200 {
		s = s[:200] + "..."
	}
	return printable(s) + more
}

// readHead reads the header block with its blank line, or the whole message when it has none.
func readHead(c mail.Content) (head []byte, err error) {
	unreadable := func(err error) error {
		return &mailerr.Error{Class: mailerr.Temporary, Status: st(3, 0), Text: "the stored message cannot be read at the moment", Err: err}
	}
	r, err := c.Open()
	if err != nil {
		return nil, unreadable(err)
	}
	defer func() {
		if cerr := r.Close(); cerr != nil && err == nil {
			err = unreadable(cerr)
		}
	}()
	head = make([]byte, 0, 4<<10)
	for scanned := 0; ; {
		n, rerr := r.Read(head[len(head):cap(head)])
		head = head[:len(head)+n]
		// A blank line may begin in what was looked at before.
		from := max(0, scanned-2)
		for from > 0 && head[from-1] != '\n' {
			from--
		}
		if end := mime.HeaderEnd(head[from:]); end >= 0 {
			return head[: from+end : from+end], nil
		}
		scanned = len(head)
		switch {
		case errors.Is(rerr, io.EOF):
			return head, nil
		case rerr != nil:
			return nil, unreadable(rerr)
		case len(head) >= maxHeader:
			return nil, badHeader("the header of the message is larger than a megabyte")
		case len(head) == cap(head):
			head = slices.Grow(head, cap(head))
		}
	}
}

// edit collects edits of single fields.
type edit struct {
	head  []byte
	fixes []string
	spans []span
}

type span struct {
	start, end int
	with       string
}

func (e *edit) replace(f mime.Field, with, fix string) {
	e.spans = append(e.spans, span{f.Start, f.End, with})
	e.fixes = append(e.fixes, fix)
}

func (e *edit) cut(fields []mime.Field, fix string) {
	for _, f := range fields {
		e.replace(f, "", fix)
	}
}

// apply gives the header block with top before it.
func (e *edit) apply(top string) []byte {
	slices.SortFunc(e.spans, func(a, b span) int { return a.start - b.start })
	out := make([]byte, 0, len(e.head)+len(top)+256)
	out = append(out, top...)
	at := 0
	for _, s := range e.spans {
		out = append(out, e.head[at:s.start]...)
		out = append(out, s.with...)
		at = s.end
	}
	return append(out, e.head[at:]...)
}

// envelope is the recipients by their folded form.
type envelope struct {
	order   []string          // folded, without duplicates
	spelled map[string]string // folded to as the envelope has it
}

func newEnvelope(to []string) (*envelope, error) {
	if len(to) == 0 {
		return nil, &mailerr.Error{Class: mailerr.Permanent, Status: st(5, 4), Text: "the message has no recipients"}
	}
	env := &envelope{spelled: make(map[string]string, len(to))}
	for _, a := range to {
		// What would be read as something else in a header field must not get there.
		list, ok := mime.ParseAddresses(a)
		if !ok || len(list) != 1 || list[0].Addr != a || strings.ContainsFunc(a, func(r rune) bool { return r < ' ' || r == 0x7f }) {
			return nil, &mailerr.Error{Class: mailerr.Permanent, Status: st(1, 3), Text: "a recipient address is not valid: " + names([]string{a})}
		}
		key := fold(a)
		if _, twice := env.spelled[key]; !twice {
			env.order = append(env.order, key)
			env.spelled[key] = a
		}
	}
	return env, nil
}

// without lists the recipients that are not in shown.
func (env *envelope) without(shown map[string]bool) (list []mime.Address) {
	for _, key := range env.order {
		if !shown[key] {
			list = append(list, mime.Address{Addr: env.spelled[key]})
		}
	}
	return list
}

// fold is the form in which addresses are compared. Domains know no case (RFC 5321 §2.4) and may be written
// in two alphabets (RFC 5891); Exchange ignores the case of local parts too; needless quotes mean nothing
// (RFC 5322 §3.4.1).
func fold(addr string) string {
	at := strings.LastIndexByte(addr, '@')
	if at < 0 {
		return strings.ToLower(addr)
	}
	local, domain := addr[:at], strings.ToLower(addr[at+1:])
	if len(local) >= 2 && local[0] == '"' && local[len(local)-1] == '"' {
		var b strings.Builder
		for i := 1; i < len(local)-1; i++ {
			if local[i] == '\\' && i+1 < len(local)-1 {
				i++
			}
			b.WriteByte(local[i])
		}
		local = b.String()
	}
	if strings.ContainsFunc(domain, func(r rune) bool { return r > '~' }) {
		if ascii, err := idna.Lookup.ToASCII(domain); err == nil {
			domain = ascii
		}
	}
	return strings.ToLower(local) + "@" + domain
}

// readsTheSame reports whether the standard library's strict reader finds the same addresses in an address
// field. Bytes beyond ASCII are left out of the comparison: it would refuse the names that old programs write.
func readsTheSame(value string, list []mime.Address) bool {
	strict := netmail.AddressParser{WordDecoder: &stdmime.WordDecoder{
		CharsetReader: func(_ string, r io.Reader) (io.Reader, error) { return r, nil },
	}}
	got, err := strict.ParseList(asciiOnly(value))
	if err != nil || len(got) != len(list) {
		return false
	}
	for i, a := range got {
		// net/mail gives local parts without quotes, as fold does.
		if strings.ToLower(a.Address) != fold(asciiOnly(list[i].Addr)) {
			return false
		}
	}
	return true
}

func asciiOnly(s string) string {
	return strings.Map(func(r rune) rune {
		if r >= utf8.RuneSelf {
			return 'x'
		}
		return r
	}, s)
}

// compare says how the recipients that Exchange read differ from the envelope; empty when they do not.
func compare(to []string, d *item) string {
	want, got := map[string]bool{}, map[string]bool{}
	for _, a := range to {
		want[fold(a)] = true
	}
	var extra, missing []string
	for _, row := range [][]recipient{d.To, d.Cc, d.Bcc} {
		for _, r := range row {
			key := fold(strings.TrimSpace(r.EmailAddress.Address))
			if !want[key] && !got[key] {
				extra = append(extra, r.EmailAddress.Address)
			}
			got[key] = true
		}
	}
	for _, a := range to {
		if !got[fold(a)] {
			missing = append(missing, a)
		}
	}
	var parts []string
	if len(extra) > 0 {
		parts = append(parts, "it adds "+names(extra))
	}
	if len(missing) > 0 {
		parts = append(parts, "it misses "+names(missing))
	}
	return strings.Join(parts, "; ")
}
