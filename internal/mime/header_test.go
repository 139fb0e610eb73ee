package mime

import (
	"net/mail"
	"strings"
	"testing"
)

func TestOneBadLineDoesNotHideTheRest(t *testing.T) {
	b := []byte("From x Tue\r\n leading\r\nFrom: a@x.example\r\nno colon here\r\nSubject: one\r\n two\r\n\tthree\r\nX Y: spaces\r\nTo : b@x.example\r\r\n\r\nBody: no header\r\n")
	h := ScanHeader(b)
	var names []string
	for _, f := range h.Fields {
		names = append(names, f.Name)
	}
	if got := strings.Join(names, " "); got != "From Subject To" {
		t.Errorf("fields %s", got)
	}
	if got := h.Get(b, "subject"); got != "one two\tthree" {
		t.Errorf("subject %q", got)
	}
	if got := h.Get(b, "TO"); got != "b@x.example" {
		t.Errorf("to %q", got)
	}
	if len(h.Defects) != 4 || h.Defects[0].What != "mbox line" {
		t.Errorf("defects %+v", h.Defects)
	}
	if string(b[h.End:]) != "Body: no header\r\n" || HeaderEnd(b) != h.End {
		t.Errorf("body at %d and %d: %q", h.End, HeaderEnd(b), b[h.End:])
	}
	if HeaderEnd([]byte("A: b\r\nC: d\r\n")) != -1 || HeaderEnd([]byte("A: b\n\nx")) != 6 || HeaderEnd([]byte("\r\nx")) != 2 {
		t.Error("HeaderEnd")
	}
}

func TestAddressesFromTheWild(t *testing.T) {
	for _, c := range []struct {
		in, want string
		ok       bool
	}{
		{"a@x.example", "|a@x.example", true},
		{"Ann Lee <a@x.example>, b@x.example", "Ann Lee|a@x.example b@x.example", true},
		{`"Lee, Ann" <a@x.example>`, "Lee, Ann|a@x.example", true},
		{`a@x.example (Ann (the) Lee)`, "Ann (the) Lee|a@x.example", true},
		{`=?utf-8?q?Gr=C3=BC=C3=9Fe?= <a@x.example>`, "Grüße|a@x.example", true},
		{"Grüße <a@x.example>", "Grüße|a@x.example", true},
		{"Gr\xfc\xdfe <a@x.example>", "Gr\uFFFDe|a@x.example", true},
		{"team: a@x.example, B <b@x.example>;, c@x.example", "|a@x.example B|b@x.example |c@x.example", true},
		{"undisclosed-recipients:;", "", true},
		{"<@r1,@r2:a@x.example>", "|a@x.example", true},
		{`"a b"@x.example`, `|"a b"@x.example`, true},
		{`<"a>b,c"@x.example>`, `|"a>b,c"@x.example`, true},
		{"a@x.example; b@x.example", "|a@x.example |b@x.example", true},
		{"a@x.example,, ,b@x.example,", "|a@x.example |b@x.example", true},
		{"Ann <a@x.example> <b@x.example>", "Ann|a@x.example |b@x.example", false},
		{"Ann <a@x.example", "Ann|a@x.example", false},
		{`"never ends <a@x.example>`, "", false},
		{"root", "|root", false},
		{"MAILER-DAEMON <>", "", false},
		{"", "", true},
	} {
		list, ok := ParseAddresses(c.in)
		var got []string
		for i, a := range list {
			s := a.Name + "|" + a.Addr
			if i > 0 && a.Name == "" && !strings.Contains(c.want, " |") {
				s = a.Addr
			}
			got = append(got, s)
		}
		if s := strings.Join(got, " "); (s != c.want && c.want != "") || ok != c.ok {
			t.Errorf("%q: %q %v, want %q %v", c.in, s, ok, c.want, c.ok)
		}
	}
}

func TestFormattedAddressesAreReadBackByTheStandardLibrary(t *testing.T) {
	list := []Address{{"Ann Lee", "a@x.example"}, {"Lee, Ann \"A\\\"", "b@x.example"}, {"Grüße, an", "c@x.example"}, {"", "d@x.example"}, {"evil@z,\tx", "f@x.example"}, {"b\\ü", "g@x.example"}, {strings.Repeat("long ", 20), "e@x.example"}}
	s := FormatAddresses(list, 4)
	back, err := mail.ParseAddressList(strings.ReplaceAll(s, "\r\n", ""))
	if err != nil {
		t.Fatal(err)
	}
	ours, ok := ParseAddresses(s)
	if !ok || len(back) != len(list) || len(ours) != len(list) {
		t.Fatalf("%d and %d of %d", len(back), len(ours), len(list))
	}
	for i := range list {
		if back[i].Address != list[i].Addr || back[i].Name != strings.ReplaceAll(strings.TrimSpace(list[i].Name), "\t", " ") || ours[i].Addr != list[i].Addr || ours[i].Name != back[i].Name {
			t.Errorf("%+v became %+v and %+v", list[i], back[i], ours[i])
		}
	}
}

func TestMessageIDs(t *testing.T) {
	for in, ok := range map[string]bool{"<a@b>": true, " <a.b$c@[1.2.3.4]> ": true, "<a@b@c>": false, "a@b": false, "<a b@c>": false, "<ab>": false, "<a@b.>": false, "": false, "<>": false, "<ü@b>": false} {
		if _, got := ParseMessageID(in); got != ok {
			t.Errorf("%q: %v", in, got)
		}
	}
}

func FuzzHeader(f *testing.F) {
	f.Add([]byte("From x\r\nA: b\r\n c\r\n\r\nbody"))
	f.Add([]byte("a:b\n\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		h := ScanHeader(b)
		at := 0
		for _, fd := range h.Fields {
			if fd.Start < at || fd.ValueStart <= fd.Start || fd.End < fd.ValueStart || fd.End > h.End {
				t.Fatalf("%+v after %d", fd, at)
			}
			at = fd.End
			fd.Value(b)
		}
		if e := HeaderEnd(b); e >= 0 && e != h.End {
			t.Fatalf("HeaderEnd %d, End %d", e, h.End)
		}
	})
}

// Every address that the standard library reads is read here too, and the same.
func FuzzAddresses(f *testing.F) {
	for _, s := range []string{"a@b.c", `"x, y" <a@b.c>, d@e.f`, "g: a@b.c;", "a@b.c (x)", "=?utf-8?q?=41?= <a@b>"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		list, _ := ParseAddresses(s)
		for _, a := range list {
			if strings.ContainsAny(a.Addr, "\r\n") {
				t.Fatalf("%q: a line end in %q", s, a.Addr)
			}
		}
	})
}

func BenchmarkScanHeader(b *testing.B) {
	for _, n := range []int{10, 1000} {
		h := []byte(strings.Repeat("Received: from a by b;\r\n\tTue, 24 Nov 2026\r\n", n) + "\r\n")
		b.Run(strings.Repeat("x", n/1000)+"fields", func(b *testing.B) {
			b.SetBytes(int64(len(h)))
			b.ReportAllocs()
			for b.Loop() {
				ScanHeader(h)
			}
		})
	}
}
