package graph

import (
	"bytes"
	"io"
	netmail "net/mail"
	"slices"
	"strings"
	"testing"
	"testing/iotest"

	"pgregory.net/rapid"

	"mailbridge/internal/mail"
	"mailbridge/internal/mailerr"
	"mailbridge/providers"
	"mailbridge/providers/providertest"
)

func letter(header string, to ...string) *mail.Outgoing {
	return providertest.Message{From: mailbox, To: to, Header: header}.Outgoing()
}

func rewritten(t testing.TB, out *mail.Outgoing, m providers.Mismatch) ([]byte, error) {
	t.Helper()
	p, err := plan(out, m, "")
	if err != nil {
		return nil, err
	}
	return append(p.prefix, out.Content.(providertest.Bytes)[p.skip:]...), nil
}

// TestRecipientsFollowTheEnvelope shows each edit as the lines that come out.
func TestRecipientsFollowTheEnvelope(t *testing.T) {
	rows := []struct {
		name   string
		header string
		to     string
		top    string // added above
		want   string // what becomes of the header
		refuse bool   // with Refuse the message is refused; want is what Rewrite makes
	}{
		{"nothing to do", "To: A <a@x.example>,\r\n\t\"B, b\" <b@x.example>\r\n", "a@x.example b@x.example", "", "To: A <a@x.example>,\r\n\t\"B, b\" <b@x.example>\r\n", false},
		{"case and order", "tO: B@X.EXAMPLE, A@x.example\r\n", "a@x.example b@x.example", "", "tO: B@X.EXAMPLE, A@x.example\r\n", false},
		{"one hidden", "To: a@x.example\r\n", "a@x.example b@x.example", "Bcc: b@x.example\r\n", "To: a@x.example\r\n", false},
		{"Bcc of the client", "To: a@x.example\r\nBCC : z@x.example,\r\n y@x.example\r\nX-A: 1\r\n", "a@x.example", "", "To: a@x.example\r\nX-A: 1\r\n", false},
		{"Bcc in the envelope", "To: a@x.example\r\nBcc: b@x.example\r\n", "a@x.example b@x.example", "Bcc: b@x.example\r\n", "To: a@x.example\r\n", false},
		{"Resent-Bcc", "To: a@x.example\r\nResent-Bcc: z@x.example\r\nResent-To: z@x.example\r\n", "a@x.example", "", "To: a@x.example\r\nResent-To: z@x.example\r\n", false},
		{"undisclosed", "To: undisclosed-recipients:;\r\nX-A: 1\r\n", "a@x.example", "Bcc: a@x.example\r\n", "X-A: 1\r\n", false},
		{"undisclosed as text", "To: Undisclosed recipients\r\n", "a@x.example", "Bcc: a@x.example\r\n", "", false},
		{"empty", "To:\r\nCc: \r\n", "a@x.example", "Bcc: a@x.example\r\n", "", false},
		{"root", "To: root\r\n", "ops@x.example", "Bcc: ops@x.example\r\n", "", false},
		{"root and one", "To: root, Pat <a@x.example>\r\n", "a@x.example", "", "To: Pat <a@x.example>\r\n", false},
		{"somebody else", "To: list@l.example\r\nCc: Pat <a@x.example>\r\n", "a@x.example", "", "Cc: Pat <a@x.example>\r\n", true},
		{"one of two", "To: Ann <a@x.example>, z@x.example\r\n", "a@x.example", "", "To: Ann <a@x.example>\r\n", true},
		{"group", "To: Team: a@x.example, b@x.example;\r\n", "a@x.example b@x.example", "", "To: Team: a@x.example, b@x.example;\r\n", false},
		{"group with another", "To: Team: a@x.example, z@x.example;\r\n", "a@x.example", "", "To: a@x.example\r\n", true},
		{"semicolons", "To: a@x.example; b@x.example\r\n", "a@x.example b@x.example", "", "To: a@x.example, b@x.example\r\n", false},
		{"two fields", "To: a@x.example\r\nX-A: 1\r\nTo: B <b@x.example>\r\n", "a@x.example b@x.example", "", "To: a@x.example, B <b@x.example>\r\nX-A: 1\r\n", false},
		{"encoded word kept", "To: =?iso-8859-1?q?J=FCrgen?= <a@x.example>\r\n", "a@x.example", "", "To: =?iso-8859-1?q?J=FCrgen?= <a@x.example>\r\n", false},
		{"raw latin-1 kept", "To: J\xfcrgen <a@x.example>\r\n", "a@x.example", "", "To: J\xfcrgen <a@x.example>\r\n", false},
		{"encoded word rewritten", "To: =?iso-8859-1?q?J=FCrgen?= <a@x.example>, z@x.example\r\n", "a@x.example", "", "To: =?utf-8?q?J=C3=BCrgen?= <a@x.example>\r\n", true},
		{"quoted local part", "To: \"a\"@x.example\r\n", "a@x.example", "", "To: \"a\"@x.example\r\n", false},
		{"idn", "To: a@b\xc3\xbccher.example\r\n", "a@xn--bcher-kva.example", "", "To: a@b\xc3\xbccher.example\r\n", false},
		{"duplicates", "To: a@x.example, A@x.example\r\nCc: a@x.example\r\n", "a@x.example A@X.example", "", "To: a@x.example, A@x.example\r\nCc: a@x.example\r\n", false},
		{"address as name", "To: \"z@x.example\" <a@x.example>\r\n", "a@x.example", "", "To: \"z@x.example\" <a@x.example>\r\n", false},
		{"two addresses without a comma", "To: <a@x.example> <b@x.example>\r\n", "a@x.example b@x.example", "", "To: a@x.example, b@x.example\r\n", false},
		{"an address and a tab in a name", "To: \"z@x.example,\ty\" <a@x.example>; b@x.example\r\n", "a@x.example b@x.example", "", "To: \"z@x.example, y\" <a@x.example>, b@x.example\r\n", false},
		{"after a line that is no field", "no field here\r\nTo: a@x.example\r\n", "a@x.example", "Bcc: a@x.example\r\n", "no field here\r\nTo: a@x.example\r\n", false},
		{"a Bcc after such a line", "no field here\r\nBcc: z@x.example\r\n", "a@x.example", "Bcc: a@x.example\r\n", "no field here\r\n", false},
	}
	for _, r := range rows {
		t.Run(r.name, func(t *testing.T) {
			out := letter(r.header, strings.Fields(r.to)...)
			raw := string(out.Content.(providertest.Bytes))
			want := r.top + strings.Replace(raw, r.header, r.want, 1)
			got, err := rewritten(t, out, providers.Rewrite)
			if err != nil {
				t.Fatal(err)
			}
			if string(got) != want {
				t.Errorf("got\n%s\nwant\n%s", got, want)
			}
			got, err = rewritten(t, out, providers.Refuse)
			switch e := mailerr.Of(err); {
			case !r.refuse && (err != nil || string(got) != want):
				t.Errorf("with refuse: %v\n%s", err, got)
			case r.refuse && (err == nil || e.Class != mailerr.Permanent || e.Code() != "5.6.0" || !strings.Contains(e.Text, "z@x.example") && !strings.Contains(e.Text, "list@l.example")):
				t.Errorf("with refuse: %v", err)
			}
		})
	}
}

func TestMessagesThatCannotBeAddressedAreRefused(t *testing.T) {
	for name, out := range map[string]*mail.Outgoing{
		"no recipients":          letter("To: a@x.example\r\n"),
		"no header":              {Envelope: mail.Envelope{To: []string{"a@x.example"}}, Content: providertest.Bytes("\r\nhello\r\n")},
		"only text":              {Envelope: mail.Envelope{To: []string{"a@x.example"}}, Content: providertest.Bytes("hello\r\nyou\r\n")},
		"empty":                  {Envelope: mail.Envelope{To: []string{"a@x.example"}}, Content: providertest.Bytes("")},
		"begins folded":          {Envelope: mail.Envelope{To: []string{"a@x.example"}}, Content: providertest.Bytes(" x\r\nSubject: y\r\n\r\n")},
		"header over a megabyte": {Envelope: mail.Envelope{To: []string{"a@x.example"}}, Content: providertest.Bytes("A: " + strings.Repeat("x", 2<<20))},
		"a list as recipient":    letter("To: a@x.example\r\n", "a@x.example, z@x.example"),
		"a line end in one":      letter("To: a@x.example\r\n", "a@x.example\r\nBcc: z@x.example"),
		"a group as recipient":   letter("To: a@x.example\r\n", "g: z@x.example;"),
	} {
		if _, err := plan(out, providers.Rewrite, ""); err == nil || mailerr.Of(err).Class != mailerr.Permanent {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestALongRecipientListIsFolded(t *testing.T) {
	var to []string
	for i := range 500 {
		to = append(to, strings.Repeat("r", 1+i%60)+"."+strings.Repeat("q", 1+i/60)+"@department.contoso.example")
	}
	got, err := rewritten(t, letter("X-A: 1\r\n", to...), providers.Refuse)
	if err != nil {
		t.Fatal(err)
	}
	for line := range bytes.SplitSeq(got, []byte("\r\n")) {
		if len(line) > 998 { // RFC 5322 §2.1.1
			t.Fatalf("a line of %d bytes", len(line))
		}
	}
	if r, err := fakeRecipients(got); err != nil || len(r.bcc) != 500 {
		t.Errorf("%d recipients, %v", len(r.bcc), err)
	}
}

type slow struct{ providertest.Bytes }

func (s slow) Open() (io.ReadCloser, error) {
	return io.NopCloser(iotest.OneByteReader(bytes.NewReader(s.Bytes))), nil
}

func TestTheHeaderIsFoundHoweverItIsRead(t *testing.T) {
	out := letter("To: a@x.example\r\n", "b@x.example", "a@x.example")
	want, err := rewritten(t, out, providers.Refuse)
	if err != nil {
		t.Fatal(err)
	}
	raw := out.Content.(providertest.Bytes)
	out.Content = slow{raw}
	p, err := plan(out, providers.Refuse, "")
	if err != nil || !bytes.Equal(append(p.prefix, raw[p.skip:]...), want) {
		t.Errorf("%v", err)
	}
}

// checkRewriting is the property: whatever the header, Graph would see the envelope's recipients and nobody
// else, no Bcc of the client is left, the body is untouched.
func checkRewriting(t rapid.TB, raw []byte, to []string) {
	out := &mail.Outgoing{Envelope: mail.Envelope{To: to}, Content: providertest.Bytes(raw)}
	p, err := plan(out, providers.Rewrite, "")
	if err != nil {
		if mailerr.Of(err).Class == mailerr.Unknown {
			t.Fatalf("%v", err)
		}
		return
	}
	got := append(slices.Clone(p.prefix), raw[p.skip:]...)
	if !bytes.HasSuffix(got, raw[p.skip:]) {
		t.Fatal("the body changed")
	}
	want := map[string]bool{}
	for _, a := range to {
		want[fold(a)] = true
	}
	// A second round finds nothing to take out: the rule holds for its own result, by our reader.
	h := map[string]int{}
	m, err := netmail.ReadMessage(bytes.NewReader(got))
	if err != nil {
		return // a header that the standard library gives up on; Graph's answer is compared there
	}
	seen := map[string]bool{}
	for _, name := range []string{"To", "Cc", "Bcc"} {
		for _, v := range m.Header[name] {
			h[name]++
			list, err := netmail.ParseAddressList(asciiOnlyBytes(v))
			if err != nil {
				if strings.Contains(err.Error(), "charset not supported") {
					return
				}
				t.Fatalf("%s is left as %q, which a strict reader cannot read: %v", name, v, err)
			}
			for _, a := range list {
				k := strings.ToLower(a.Address)
				if at := strings.LastIndexByte(k, '@'); at >= 0 {
					k = k[:at] + fold("x" + k[at:])[1:]
				}
				if !want[k] {
					t.Fatalf("%s would get the message, the envelope has %v:\n%q", a.Address, to, got)
				}
				seen[k] = true
			}
		}
	}
	if len(m.Header["Resent-Bcc"]) > 0 || h["To"] > 1 || h["Cc"] > 1 || h["Bcc"] > 1 {
		t.Fatalf("fields are left twice, or a Bcc is: %q", p.prefix)
	}
	for k := range want {
		if !seen[k] {
			t.Fatalf("%s would not get the message:\n%q", k, got)
		}
	}
}

func asciiOnlyBytes(s string) string {
	b := []byte(s)
	for i := range b {
		if b[i] >= 0x80 {
			b[i] = 'x'
		}
	}
	return string(b)
}

func TestNobodyElseIsReached(t *testing.T) {
	piece := rapid.SampledFrom([]string{
		"a@x.example", "b@x.example", "z@x.example", "A@X.EXAMPLE", "<", ">", ",", ";", ":", "\"", "\\", "(", ")", " ", "\r\n ", "\r\n\t", "=?utf-8?q?z=40x?=",
		"team:", "root", "\xfc", "é", "@", ".", "\"q q\"@x.example", "<@r.example:a@x.example>", "[", "\r\n", "To: ", "Bcc: ", "Cc:", "Bcc :", "junk\r\n", "bcc", "x@",
	})
	rapid.Check(t, func(t *rapid.T) {
		header := strings.Join(rapid.SliceOfN(piece, 0, 14).Draw(t, "header"), "")
		to := rapid.SliceOfNDistinct(rapid.SampledFrom([]string{"a@x.example", "b@x.example", "c@y.example"}), 1, 3, rapid.ID[string]).Draw(t, "to")
		checkRewriting(t, []byte("Received: by x id 1; now\r\nTo: "+header+"\r\nSubject: s\r\n\r\nTo: body@x.example\r\n"), to)
	})
}

func FuzzRewriting(f *testing.F) {
	for _, h := range []string{
		"To: a@x.example\r\n", "To: \"q, q\" <a@x.example>\r\nBcc: z@x.example\r\n", "To: g: a@x.example;\r\nCc:\r\n", "From x\r\nTo: <a@x.example\r\n",
		" folded\r\nTo: (c) a@x.example (d(e))\r\n", "To: =?utf-8?q?a=2C?= <a@x.example>; z@x.example\r\nTo: b@x.example\r\n", "Bcc : z@x.example\r\n b\r\n", "To : \xfc <a@x.example>\r\n",
		"To: \\\xfc<@r.example:a@x.example>\r\n", "To: a@x.example(\r\n\ta@x.example\r\n", "To: =?utf-8?q?z=40x.example=2C=09y?= <a@x.example>; b@x.example\r\n",
	} {
		f.Add([]byte("Received: by x; now\r\n" + h + "\r\nbody\r\n"))
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		// Contents are CRLF alone, as the edge hands them over.
		raw = bytes.ReplaceAll(raw, []byte("\r"), nil)
		raw = bytes.ReplaceAll(raw, []byte("\n"), []byte("\r\n"))
		checkRewriting(t, raw, []string{"a@x.example", "b@x.example"})
	})
}
