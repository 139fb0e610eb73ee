package mime

import (
	"errors"
	"strings"
	"testing"
)

func part(header, body string) string { return header + "\r\n\r\n" + body }

func multi(kind, boundary string, parts ...string) string {
	s := "Content-Type: multipart/" + kind + "; boundary=" + boundary + "\r\n\r\n"
	for _, p := range parts {
		s += "--" + boundary + "\r\n" + p + "\r\n"
	}
	return s + "--" + boundary + "--\r\n"
}

func TestFlattenKeepsEveryPart(t *testing.T) {
	text := part("Content-Type: text/plain; charset=utf-8", "plain")
	html := part("Content-Type: text/html", "<p><img src=cid:i1>")
	img := part("Content-Type: image/png; name=\"a.png\"\r\nContent-ID: <i1>", "PNG")
	pdf := part("Content-Type: application/pdf\r\nContent-Disposition: attachment; filename*=utf-8''Gr%C3%BC%C3%9Fe.pdf", "PDF")
	cal := part("Content-Type: text/calendar; method=REQUEST", "BEGIN:VCALENDAR")
	eml := part("Content-Type: message/rfc822", part("Subject: in\r\nContent-Type: multipart/signed; boundary=s", "x"))
	for _, c := range []struct{ name, in, want string }{
		{"plain", text, "text"},
		{"html alone", html, "html"},
		{"alternative", multi("alternative", "a", text, html), "text html"},
		{"related in mixed", multi("mixed", "m", multi("alternative", "a", text, multi("related", "r", html, img)), pdf), "text html +a.png Grüße.pdf"},
		{"calendar and message", multi("mixed", "m", text, cal, eml), "text part-1.ics part-2.eml"},
		{"text after attachment", multi("mixed", "m", text, pdf, part("Content-Type: text/plain", "more"), part("Content-Type: text/plain", "")), "text Grüße.pdf part-2.txt"},
		{"text as attachment first", multi("mixed", "m", part("Content-Disposition: attachment; filename=../../a\\b.txt", "x"), text), "text b.txt"},
		{"only a file", part("Content-Type: image/tiff", "II"), "part-1.tif"},
		{"winmail", multi("mixed", "m", text, part("Content-Type: application/ms-tnef; name=winmail.dat", "x")), "text winmail.dat"},
		{"cid but attachment", multi("related", "r", html, part("Content-Type: image/png\r\nContent-ID: <x>\r\nContent-Disposition: attachment; filename=b.png", "x")), "html b.png"},
	} {
		l, err := Flatten(scanString(t, c.in))
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		var got []string
		if l.Text != nil {
			got = append(got, "text")
		}
		if l.HTML != nil {
			got = append(got, "html")
		}
		for _, f := range l.Files {
			n := f.Name
			if f.Inline {
				n = "+" + n
			}
			got = append(got, n)
		}
		if s := strings.Join(got, " "); s != c.want {
			t.Errorf("%s: %s, want %s", c.name, s, c.want)
		}
	}
}

func TestSealedMessagesAreNotTakenApart(t *testing.T) {
	text := part("Content-Type: text/plain", "x")
	for _, in := range []string{multi("signed", "s", text, text), multi("mixed", "m", multi("encrypted", "e", text)), part("Content-Type: application/pkcs7-mime; smime-type=enveloped-data", "x")} {
		if _, err := Flatten(scanString(t, in)); !errors.Is(err, ErrSealed) {
			t.Errorf("%.60q: %v", in, err)
		}
	}
}
