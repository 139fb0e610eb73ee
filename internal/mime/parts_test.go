package mime

import (
	"bytes"
	"encoding/base64"
	"fmt"
	"io"
	"mime/quotedprintable"
	"strings"
	"testing"
	"testing/iotest"
)

func scanString(t *testing.T, s string) *Part {
	t.Helper()
	p, err := ScanParts(iotest.OneByteReader(strings.NewReader(s)))
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// outline writes a structure as type[body] lines.
func outline(s string, p *Part, depth int) string {
	out := fmt.Sprintf("%s%s %q\n", strings.Repeat(" ", depth), p.Type, s[p.Body:p.End])
	if len(p.Children) > 0 {
		out = fmt.Sprintf("%s%s\n", strings.Repeat(" ", depth), p.Type)
	}
	for _, c := range p.Children {
		out += outline(s, c, depth+1)
	}
	return out
}

func TestStructureOfOrdinaryAndOddMessages(t *testing.T) {
	for _, c := range []struct{ name, in, want string }{
		{"no MIME", "Subject: x\r\n\r\nbody\r\n", "text/plain \"body\\r\\n\"\n"},
		{"header only", "Subject: x\r\n", "text/plain \"\"\n"},
		{"empty", "", "text/plain \"\"\n"},
		{"multipart", "Content-Type: multipart/mixed; boundary=b\r\n\r\npreamble\r\n--b\r\n\r\none\r\n--b\r\nContent-Type: text/html\r\n\r\n<p>\r\n\r\n--b--\r\nepilogue\r\n--b\r\nno part\r\n",
			"multipart/mixed\n text/plain \"one\"\n text/html \"<p>\\r\\n\"\n"},
		{"last boundary missing", "Content-Type: multipart/mixed; boundary=b\r\n\r\n--b\r\n\r\none", "multipart/mixed\n text/plain \"one\"\n"},
		{"inner never closed", "Content-Type: multipart/mixed; boundary=o\r\n\r\n--o\r\nContent-Type: multipart/alternative; boundary=i\r\n\r\n--i\r\n\r\none\r\n--o\r\n\r\ntwo\r\n--o--\r\n",
			"multipart/mixed\n multipart/alternative\n  text/plain \"one\"\n text/plain \"two\"\n"},
		{"same boundary twice", "Content-Type: multipart/mixed; boundary=b\r\n\r\n--b\r\nContent-Type: multipart/alternative; boundary=b\r\n\r\n--b\r\n\r\none\r\n--b--\r\n",
			"multipart/mixed\n multipart/alternative\n  text/plain \"one\"\n"},
		{"message", "Content-Type: multipart/digest; boundary=b\r\n\r\n--b\r\n\r\nSubject: in\r\n\r\ninner\r\n--b--\r\n",
			"multipart/digest\n message/rfc822\n  text/plain \"inner\"\n"},
		{"message in base64 is no message", "Content-Type: message/rfc822\r\nContent-Transfer-Encoding: base64\r\n\r\nU3ViamVjdA==\r\n", "message/rfc822 \"U3ViamVjdA==\\r\\n\"\n"},
		{"multipart without boundary", "Content-Type: multipart/mixed\r\n\r\n--b\r\n\r\none\r\n", "multipart/mixed \"--b\\r\\n\\r\\none\\r\\n\"\n"},
		{"bare line feeds", "Content-Type: multipart/mixed; boundary=\"b c\"\n\n--b c\n\none\n--b c--\n", "multipart/mixed\n text/plain \"one\"\n"},
		{"part without blank line", "Content-Type: multipart/mixed; boundary=b\r\n\r\n--b\r\nContent-Type: text/html\r\n--b--\r\n", "multipart/mixed\n text/html \"\"\n"},
		{"longer boundary is another", "Content-Type: multipart/mixed; boundary=b\r\n\r\n--b\r\n\r\n--bc\r\n--b--\r\n", "multipart/mixed\n text/plain \"--bc\"\n"},
	} {
		if got := outline(c.in, scanString(t, c.in), 0); got != c.want {
			t.Errorf("%s:\n%s\nwant\n%s", c.name, got, c.want)
		}
	}
}

func TestDeepNestingCostsNoMoreThanItsSize(t *testing.T) {
	var b strings.Builder
	for i := range 5000 {
		fmt.Fprintf(&b, "Content-Type: multipart/mixed; boundary=b%d\r\n\r\n--b%d\r\n", i, i)
	}
	p, err := ScanParts(strings.NewReader(b.String()))
	if err != nil {
		t.Fatal(err)
	}
	depth := 0
	for ; len(p.Children) > 0; p = p.Children[0] {
		depth++
	}
	if depth >= maxDepth || depth < maxDepth-2 {
		t.Errorf("depth %d", depth)
	}
}

func TestParamsFromTheWild(t *testing.T) {
	for _, c := range []struct{ in, value, name, want string }{
		{`attachment; filename=scan 1.pdf; size=3`, "attachment", "filename", "scan 1.pdf"},
		{`attachment; filename="a\"b;c.txt"`, "attachment", "filename", `a"b;c.txt`},
		{`attachment; filename="never ends`, "attachment", "filename", "never ends"},
		{`attachment; filename*=UTF-8''na%C3%AFve%20file.txt; filename="plain"`, "attachment", "filename", "naïve file.txt"},
		{`attachment; filename*0*=iso-8859-1'de'Gr%FC; filename*1*=%DFe; filename*2=.txt`, "attachment", "filename", "Grüße.txt"},
		{`attachment; filename*1=b; filename*0=a`, "attachment", "filename", "ab"},
		{`Text/HTML; CharSet=utf-8`, "text/html", "charset", "utf-8"},
		{`application/pdf; name="=?utf-8?q?Gr=C3=BC=C3=9Fe.pdf?="`, "application/pdf", "name", "Grüße.pdf"},
		{`attachment; filename*=''%zz%4`, "attachment", "filename", "%zz%4"},
		{`;;=;x`, "", "", ""},
	} {
		v, ps := ParseParams(c.in)
		if v != c.value || ps[c.name] != c.want {
			t.Errorf("%s: %q %q", c.in, v, ps)
		}
	}
}

func TestDecodersNeverFailAndAgreeWithTheRule(t *testing.T) {
	data := bytes.Repeat([]byte("Grüße \x00\xff=\r\n.tail \t\r\n"), 5000)
	enc := base64.StdEncoding.EncodeToString(data)
	var lines strings.Builder
	for i := 0; i < len(enc); i += 76 {
		lines.WriteString(enc[i:min(i+76, len(enc))] + "\r\n")
	}
	for _, in := range []string{enc, lines.String(), strings.TrimRight(enc, "="), "!!" + strings.Join(strings.Split(enc, ""), " ")} {
		if got, err := io.ReadAll(Decode(strings.NewReader(in), "base64")); err != nil || !bytes.Equal(got, data) {
			t.Fatalf("base64: %d bytes of %d, %v", len(got), len(data), err)
		}
	}
	joined := base64.StdEncoding.EncodeToString([]byte("a")) + base64.StdEncoding.EncodeToString([]byte("bc"))
	if got, err := io.ReadAll(Decode(strings.NewReader(joined), "base64")); err != nil || string(got) != "abc" {
		t.Errorf("joined blocks: %q, %v", got, err)
	}
	var qp bytes.Buffer
	w := quotedprintable.NewWriter(&qp)
	w.Binary = true
	if _, err := w.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	long := strings.Repeat("=C3=BC", 20_000) // one line, longer than any buffer
	for in, want := range map[string]string{
		qp.String():                         string(data),
		long:                                strings.Repeat("ü", 20_000),
		"a =\r\nb =zz =4 \r\nc=":            "a b =zz =4\r\nc",
		"=3d=3D\n":                          "==\n",
		strings.Repeat("x", 32<<10) + "=41": strings.Repeat("x", 32<<10) + "A",
	} {
		if got, err := io.ReadAll(Decode(strings.NewReader(in), "quoted-printable")); err != nil || string(got) != want {
			t.Errorf("quoted-printable %.40q: %.60q, %v", in, got, err)
		}
	}
}

func FuzzScanParts(f *testing.F) {
	f.Add([]byte("Content-Type: multipart/mixed; boundary=b\r\n\r\n--b\r\nContent-Type: message/rfc822\r\n\r\nA: b\r\n\r\nx\r\n--b--\r\n"))
	f.Add([]byte("Content-Type: multipart/digest; boundary*0=a; boundary*1=b\n\n--ab\n\n\n--ab--"))
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := ScanParts(bytes.NewReader(b))
		if err != nil {
			t.Fatal(err)
		}
		var check func(p *Part, from, to int64)
		check = func(p *Part, from, to int64) {
			if p.Start < from || p.Body < p.Start || p.End < p.Body || p.End > to {
				t.Fatalf("offsets %d %d %d outside of %d-%d", p.Start, p.Body, p.End, from, to)
			}
			at := p.Body
			for _, c := range p.Children {
				check(c, at, p.End)
				at = c.End
			}
			for _, enc := range []string{p.Encoding, "base64", "quoted-printable"} {
				if _, err := io.ReadAll(Decode(bytes.NewReader(b[p.Body:p.End]), enc)); err != nil {
					t.Fatal(err)
				}
			}
		}
		check(p, 0, int64(len(b)))
	})
}

func BenchmarkScanParts(b *testing.B) {
	msg := "Content-Type: multipart/mixed; boundary=b\r\n\r\n--b\r\n\r\nhello\r\n--b\r\nContent-Type: application/pdf\r\nContent-Transfer-Encoding: base64\r\n\r\n" +
		strings.Repeat(strings.Repeat("A", 76)+"\r\n", 20_000) + "--b--\r\n"
	b.SetBytes(int64(len(msg)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := ScanParts(strings.NewReader(msg)); err != nil {
			b.Fatal(err)
		}
	}
}
