package graph

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"runtime"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"mailbridge/internal/mail"
	"mailbridge/internal/mailerr"
	"mailbridge/providers"
	"mailbridge/providers/providertest"
)

// testChunk is a small piece: what happens to pieces does not depend on their size.
const testChunk = 6_000

func largeClient(t testing.TB, f *fake) *Client {
	c := client(t, f, func(cfg *providers.Config) {
		cfg.Uploads = f.client(t)
		cfg.HTTP.Transport = authorised{cfg.HTTP.Transport}
	})
	c.pause = time.Microsecond
	c.limits = limits{encoded: 8_000, inOne: 5_000, chunk: testChunk}
	return c
}

// authorised adds what must not reach the upload host.
type authorised struct{ http.RoundTripper }

func (a authorised) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	r.Header.Set("Authorization", "Bearer x")
	return a.RoundTripper.RoundTrip(r)
}

func (a authorised) CloseIdleConnections() { a.RoundTripper.(*http.Transport).CloseIdleConnections() }

// wrapped is base64 in lines.
func wrapped(b []byte) string {
	s := base64.StdEncoding.EncodeToString(b)
	var out strings.Builder
	for len(s) > 76 {
		out.WriteString(s[:76] + "\r\n")
		s = s[76:]
	}
	return out.String() + s + "\r\n"
}

func pattern(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i * 7 >> 3)
	}
	return b
}

func largeMessage(big []byte, mixed string) *mail.Outgoing {
	out := providertest.Message{From: mailbox, To: []string{"a@x.example", "hidden@x.example"}, Body: ""}.Outgoing()
	raw := "Received: from p by bridge.example with ESMTPSA id " + out.TraceID + "; Tue, 24 Nov 2026 10:00:00 +0000\r\n" +
		"From: Scanner <" + mailbox + ">\r\nTo: \"Ann, A\" <a@x.example>\r\nBcc: z@x.example\r\nReply-To: desk@x.example\r\nMessage-ID: " + out.MessageID + "\r\n" +
		"Subject: =?utf-8?q?Gr=C3=BC=C3=9Fe?=\r\nIn-Reply-To: <1@x>\r\nReferences: <0@x> <1@x>\r\nImportance: High\r\n" +
		"X-One: 1\r\nX-Two: 2\r\nX-Three: 3\r\nX-Four: 4\r\nX-Five: 5\r\nMIME-Version: 1.0\r\n" +
		"Content-Type: multipart/" + mixed + "; boundary=b1\r\n\r\n--b1\r\n" +
		"Content-Type: multipart/related; boundary=b2\r\n\r\n--b2\r\nContent-Type: text/html; charset=iso-8859-1\r\nContent-Transfer-Encoding: quoted-printable\r\n\r\n" +
		"<p>gr=FC=\r\nn</p><img src=3D\"cid:p1\">\r\n--b2\r\nContent-Type: image/png\r\nContent-ID: <p1>\r\nContent-Transfer-Encoding: base64\r\n\r\n" + wrapped([]byte("PNG!")) +
		"--b2--\r\n--b1\r\nContent-Type: application/zip\r\nContent-Disposition: attachment; filename*=utf-8''%C3%BC.zip\r\nContent-Transfer-Encoding: base64\r\n\r\n" + wrapped(big) +
		"--b1\r\nContent-Type: message/rfc822\r\n\r\nSubject: inner\r\n\r\ninner body\r\n--b1--\r\n"
	out.Content = providertest.Bytes(raw)
	return out
}

func (f *fake) only(t testing.TB) *fakeItem {
	t.Helper()
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.items) != 1 {
		t.Fatalf("%d items", len(f.items))
	}
	for _, it := range f.items {
		return it
	}
	return nil
}

func TestALargeMessageKeepsWhatItHas(t *testing.T) {
	f := newFake(t)
	c := largeClient(t, f)
	big := pattern(2*testChunk + 1234)
	out := largeMessage(big, "mixed")
	h, err := c.Prepare(t.Context(), out)
	if err != nil {
		t.Fatal(err)
	}
	it := f.only(t)
	j := fmt.Sprint(it.json)
	for _, want := range []string{"subject:Grüße", "contentType:html", `<p>grün</p><img src="cid:p1">`, "importance:high", "desk@x.example", "String 0x1042 value:<1@x>",
		"String 0x1039 value:<0@x> <1@x>", "Ann, A", "name:X-One value:1", "name:X-Four value:4", traceField, out.MessageID} {
		if !strings.Contains(j, want) {
			t.Errorf("%q is missing in %s", want, j)
		}
	}
	if r := it.rcpt(); fmt.Sprint(r.to, r.cc, r.bcc) != "[a@x.example] [] [hidden@x.example]" {
		t.Errorf("recipients %v", r)
	}
	if len(it.files) != 3 {
		t.Fatalf("%d files", len(it.files))
	}
	for i, want := range []fakeFile{
		{name: it.files[0].name, kind: "image/png", cid: "p1", inline: true, data: []byte("PNG!")},
		{name: "ü.zip", kind: "application/zip", data: big},
		{name: "part-3.eml", kind: "message/rfc822", data: []byte("Subject: inner\r\n\r\ninner body")},
	} {
		got := it.files[i]
		if got.name != want.name || got.kind != want.kind || got.cid != want.cid || got.inline != want.inline || !got.done || !bytes.Equal(got.data, want.data) {
			t.Errorf("file %d: %q %q %q inline=%v done=%v %d bytes", i, got.name, got.kind, got.cid, got.inline, got.done, len(got.data))
		}
	}
	if _, err := c.Commit(t.Context(), out, h); err != nil {
		t.Fatal(err)
	}
	for _, hd := range []mail.Handle{h, ""} {
		if _, found, err := c.FindSent(t.Context(), out, hd); err != nil || found != providers.WasSent {
			t.Errorf("FindSent(%q): %d, %v", hd, found, err)
		}
	}
	if f.asked("upload PUT") != 3 {
		t.Errorf("%d pieces", f.asked("upload PUT"))
	}
}

// TestAnUploadGoesOnAfterACut: before, in the middle of and after a piece.
func TestAnUploadGoesOnAfterACut(t *testing.T) {
	for _, cut := range []string{"before", "half", "after"} {
		f := newFake(t)
		c := largeClient(t, f)
		f.fault(fakeFault{route: "upload PUT", cut: cut, times: 1})
		big := pattern(2*testChunk + 1)
		if _, err := c.Prepare(t.Context(), largeMessage(big, "mixed")); err != nil {
			t.Errorf("%s: %v", cut, err)
			continue
		}
		if got := f.only(t).files[1]; !got.done || !bytes.Equal(got.data, big) {
			t.Errorf("%s: other bytes arrived", cut)
		}
	}
}

func TestAFailedUploadLeavesNothingBehind(t *testing.T) {
	for name, x := range map[string]fakeFault{
		"session expired": {route: "upload PUT", status: 404},
		"token refused":   {route: "upload PUT", status: 401},
		"cut for ever":    {route: "upload PUT", cut: "before"},
		"throttled":       {route: "upload PUT", status: 429},
		"no session":      {route: "createUploadSession", status: 503},
		"attachment":      {route: "attach", status: 500},
	} {
		f := newFake(t)
		c := largeClient(t, f)
		f.fault(x)
		_, err := c.Prepare(t.Context(), largeMessage(pattern(testChunk*2), "mixed"))
		e := mailerr.Of(err)
		if e == nil || e.Class != mailerr.Temporary && e.Class != mailerr.Throttled || e.Unsure || f.Staged() != 0 {
			t.Errorf("%s: %v, %d drafts", name, err, f.Staged())
		}
		if err != nil && strings.Contains(err.Error(), "eyJ") {
			t.Errorf("%s: the upload URL's token is in %v", name, err)
		}
		if strings.HasPrefix(x.route, "upload") && f.asked("upload DELETE") != 1 {
			t.Errorf("%s: the session was not cancelled", name)
		}
	}
}

func TestSignedMailIsNotTakenApart(t *testing.T) {
	f := newFake(t)
	c := largeClient(t, f)
	_, err := c.Prepare(t.Context(), largeMessage(pattern(testChunk*2), "signed"))
	if e := mailerr.Of(err); e == nil || e.Class != mailerr.Permanent || e.Code() != "5.3.4" || !strings.Contains(e.Text, "signed") || f.asked("createDraft") != 0 {
		t.Errorf("%v", err)
	}
}

func TestA413TakesTheOtherRoute(t *testing.T) {
	f := newFake(t)
	c := largeClient(t, f)
	f.fault(fakeFault{route: "createDraft", status: 413, times: 1})
	if _, err := c.Prepare(t.Context(), largeMessage(pattern(1000), "mixed")); err != nil {
		t.Fatal(err)
	}
	if it := f.only(t); it.json == nil || len(it.files) != 3 {
		t.Error("no structured draft")
	}
}

func TestASessionThatIsTooSmallBecomesOneRequest(t *testing.T) {
	f := newFake(t)
	f.minUpload = 6_000
	c := largeClient(t, f)
	big := pattern(5_500)
	if _, err := c.Prepare(t.Context(), largeMessage(big, "mixed")); err != nil {
		t.Fatal(err)
	}
	if got := f.only(t).files[1]; !bytes.Equal(got.data, big) || f.asked("upload PUT") != 0 {
		t.Error("other bytes arrived")
	}
}

func TestAMismatchRefusesOnTheLargeRouteToo(t *testing.T) {
	f := newFake(t)
	f.extra = "stranger@evil.example"
	c := largeClient(t, f)
	_, err := c.Prepare(t.Context(), largeMessage(pattern(testChunk*2), "mixed"))
	if e := mailerr.Of(err); e == nil || e.Code() != "5.6.0" || f.Staged() != 0 {
		t.Errorf("%v", err)
	}
}

func TestWithoutUploadsOrDraftsThereIsNoLargeRoute(t *testing.T) {
	f := newFake(t)
	for _, c := range []*Client{client(t, f, nil), client(t, f, func(cfg *providers.Config) { cfg.NoDrafts, cfg.Uploads = true, cfg.HTTP })} {
		c.limits.encoded = 8_000
		if _, err := c.Prepare(t.Context(), largeMessage(pattern(testChunk*2), "mixed")); !errors.Is(err, ErrTooLarge) {
			t.Errorf("%v", err)
		}
	}
	if len(f.requests) != 0 {
		t.Error("Graph was asked")
	}
}

// TestNobodyElseIsReachedOnTheLargeRoute: exactly the envelope, whatever the header says.
func TestNobodyElseIsReachedOnTheLargeRoute(t *testing.T) {
	c := client(t, newFake(t), nil)
	people := []string{"a@x.example", "B@x.example", "\"q q\"@x.example", "z@y.example"}
	rapid.Check(t, func(t *rapid.T) {
		to := rapid.SliceOfNDistinct(rapid.SampledFrom(people), 1, 3, rapid.ID[string]).Draw(t, "to")
		head := ""
		for _, name := range []string{"To", "Cc", "Bcc", "To", "Resent-Bcc"} {
			list := rapid.SliceOfN(rapid.SampledFrom(append(people, "g: a@x.example;", "root", "<z@y.example", "N, M <b@x.example>")), 0, 3).Draw(t, name)
			head += name + ": " + strings.Join(list, ",\r\n ") + "\r\n"
		}
		out := providertest.Message{From: mailbox, To: to, Header: head}.Outgoing()
		p, err := plan(out, providers.Rewrite, "")
		if err != nil {
			t.Fatal(err)
		}
		l, err := takeApart(out.Content)
		if err != nil {
			t.Fatal(err)
		}
		b, err := c.draftJSON(out, p, l)
		if err != nil {
			t.Fatal(err)
		}
		var d item
		if err := json.Unmarshal(b, &d); err != nil {
			t.Fatal(err)
		}
		if diff := compare(to, &d); diff != "" {
			t.Fatalf("%s\n%s\n%s", diff, head, b)
		}
	})
}

// hugeContent is a message of one attachment that exists nowhere as a whole.
type hugeContent struct {
	head string
	n    int64 // lines
	tail string
}

const hugeLine = "QUJDREVGR0hJSktMTU5PUFFSU1RVVldYWVphYmNkZWZnaGlqa2xtbm9wcXJzdHV2d3h5ejAx\r\n"

func (h hugeContent) Size() int64 { return int64(len(h.head)+len(h.tail)) + h.n*int64(len(hugeLine)) }
func (h hugeContent) Open() (io.ReadCloser, error) {
	return io.NopCloser(io.MultiReader(strings.NewReader(h.head), &lines{left: h.n}, strings.NewReader(h.tail))), nil
}

type lines struct {
	left int64
	todo string
}

func (l *lines) Read(p []byte) (int, error) {
	total := 0
	for total < len(p) {
		if l.todo == "" {
			if l.left == 0 {
				break
			}
			l.left--
			l.todo = hugeLine
		}
		n := copy(p[total:], l.todo)
		l.todo = l.todo[n:]
		total += n
	}
	if total == 0 && len(p) > 0 {
		return 0, io.EOF
	}
	return total, nil
}

// TestAHugeMessageNeedsLittleMemory: the server throws the bytes away, so that what is allocated is ours.
func TestAHugeMessageNeedsLittleMemory(t *testing.T) {
	f := newFake(t)
	c := largeClient(t, f)
	c.limits = client(t, f, nil).limits
	c.http = &http.Client{Transport: roundTrip(func(r *http.Request) (string, int) {
		if strings.HasSuffix(r.URL.Path, "createUploadSession") {
			return `{"uploadUrl":"http://uploads.example/u"}`, 201
		}
		return `{"id":"AAk1","isDraft":true,"toRecipients":[{"emailAddress":{"address":"a@x.example"}}]}`, 201
	})}
	var uploaded int64
	c.uploads = &http.Client{Transport: roundTrip(func(r *http.Request) (string, int) {
		n, err := io.Copy(io.Discard, r.Body)
		if err != nil {
			return "", 500
		}
		uploaded += n
		return `{}`, 200
	})}
	out := letter("To: a@x.example\r\n", "a@x.example")
	content := hugeContent{
		head: "Received: by b id " + out.TraceID + "; now\r\nFrom: " + mailbox + "\r\nTo: a@x.example\r\nContent-Type: multipart/mixed; boundary=b\r\n\r\n--b\r\n\r\nhi\r\n--b\r\n" +
			"Content-Type: application/zip\r\nContent-Disposition: attachment; filename=a.zip\r\nContent-Transfer-Encoding: base64\r\n\r\n",
		n: 150_000, tail: "--b--\r\n"}
	out.Content = content
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	if _, err := c.Prepare(t.Context(), out); err != nil {
		t.Fatal(err)
	}
	runtime.ReadMemStats(&after)
	if want := content.n * 54; uploaded != want {
		t.Errorf("%d bytes uploaded, want %d", uploaded, want)
	}
	if used := after.TotalAlloc - before.TotalAlloc; used > 5<<20 {
		t.Errorf("%d bytes were allocated for a message of %d", used, content.Size())
	}
}

type roundTrip func(*http.Request) (string, int)

func (f roundTrip) RoundTrip(r *http.Request) (*http.Response, error) {
	body, status := f(r)
	return &http.Response{StatusCode: status, Header: http.Header{}, Body: io.NopCloser(strings.NewReader(body)), Request: r}, nil
}
