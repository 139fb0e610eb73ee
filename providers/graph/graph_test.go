package graph

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	netmail "net/mail"
	"strings"
	"sync/atomic"
	"testing"
	"testing/iotest"
	"time"

	"pgregory.net/rapid"

	"mailbridge/internal/mail"
	"mailbridge/internal/mailerr"
	"mailbridge/providers"
	"mailbridge/providers/providertest"
)

func client(t testing.TB, f *fake, change func(*providers.Config)) *Client {
	t.Helper()
	cfg := f.config(t)
	if change != nil {
		change(&cfg)
	}
	c, err := open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestConfigurationsThatCannotWorkAreRefused(t *testing.T) {
	good := providers.Config{Mailbox: "a@x.example", HTTP: http.DefaultClient, Base: "https://graph.microsoft.com/v1.0"}
	if a, err := Open(good); err != nil || a.Sender == nil || a.Sent == nil || a.Prober == nil || a.Bouncer == nil || a.Traits.MaxSize < 2_800_000 || a.Traits.MaxSize > 2_925_000 {
		t.Errorf("%+v, %v", a, err)
	}
	for name, change := range map[string]func(*providers.Config){
		"no client":    func(c *providers.Config) { c.HTTP = nil },
		"no endpoint":  func(c *providers.Config) { c.Base = "" },
		"no host":      func(c *providers.Config) { c.Base = "/v1.0" },
		"other scheme": func(c *providers.Config) { c.Base = "ftp://x/" },
		"no URL":       func(c *providers.Config) { c.Base = "http://a b" },
		"no address":   func(c *providers.Config) { c.Mailbox = "scanner" },
	} {
		cfg := good
		change(&cfg)
		if _, err := Open(cfg); err == nil {
			t.Errorf("%s is taken", name)
		}
	}
}

// A wrong parser here or there must not send confidential mail to strangers.
func TestADraftThatExchangeReadsOtherwiseIsNeverSent(t *testing.T) {
	f := newFake(t)
	f.extra = "stranger@evil.example"
	f.long = 100_000
	c := client(t, f, nil)
	_, err := c.Prepare(t.Context(), letter("To: a@x.example\r\n", "a@x.example"))
	e := mailerr.Of(err)
	if e == nil || e.Class != mailerr.Permanent || e.Code() != "5.6.0" || e.Unsure || !strings.Contains(e.Text, "stranger@evil.example") {
		t.Fatalf("%v", err)
	}
	if f.Staged() != 0 || len(f.Deliveries()) != 0 || f.asked("send") != 0 {
		t.Errorf("%d drafts left, %d delivered", f.Staged(), len(f.Deliveries()))
	}
}

func TestAnAnswerWithoutRecipientsIsAskedFor(t *testing.T) {
	f := newFake(t)
	f.plain = true
	c := client(t, f, nil)
	if _, err := c.Prepare(t.Context(), letter("To: a@x.example\r\n", "a@x.example")); err == nil {
		t.Error("nobody said who would get the message, and it was staged")
	}
	if f.asked("get") == 0 || f.Staged() != 0 {
		t.Errorf("%d look-ups, %d drafts left", f.asked("get"), f.Staged())
	}
}

func TestWithoutDraftsItSendsInOneStep(t *testing.T) {
	f := newFake(t)
	f.fault(fakeFault{route: "createDraft", status: 403, code: "ErrorAccessDenied", text: "Access is denied. Check credentials and try again."})
	c := client(t, f, nil)
	now := time.Now()
	c.now = func() time.Time { return now }
	for range 3 {
		out := letter("To: a@x.example\r\n", "a@x.example")
		h, err := c.Prepare(t.Context(), out)
		if err != nil || h != "" {
			t.Fatalf("%q, %v", h, err)
		}
		if _, err := c.Commit(t.Context(), out, h); err != nil {
			t.Fatal(err)
		}
		if err := c.Abandon(t.Context(), out, ""); err != nil {
			t.Fatal(err)
		}
	}
	if n := f.asked("createDraft"); n != 1 {
		t.Errorf("asked for a draft %d times", n)
	}
	if len(f.Deliveries()) != 3 {
		t.Errorf("%d delivered", len(f.Deliveries()))
	}
	now = now.Add(draftsDenied + time.Second)
	f.Reset()
	if h, err := c.Prepare(t.Context(), letter("To: a@x.example\r\n", "a@x.example")); err != nil || h == "" {
		t.Errorf("a permission that was granted is not noticed: %q, %v", h, err)
	}
}

func TestARefusalOfTheWholeMailboxIsNotRemembered(t *testing.T) {
	f := newFake(t)
	f.fault(fakeFault{status: 403, code: "ErrorAccessDenied", text: "Access to OData is disabled."})
	c := client(t, f, nil)
	out := letter("To: a@x.example\r\n", "a@x.example")
	h, err := c.Prepare(t.Context(), out)
	if err != nil {
		t.Fatal(err)
	}
	_, err = c.Commit(t.Context(), out, h)
	if e := mailerr.Of(err); e == nil || e.Class != mailerr.Auth || e.Unsure || !strings.Contains(e.Text, "Mail.Send") {
		t.Fatalf("%v", err)
	}
	f.Reset()
	if h, err := c.Prepare(t.Context(), out); err != nil || h == "" {
		t.Errorf("after the grant: %q, %v", h, err)
	}
}

func TestSendAsDeniedAtTheDraftIsNoMissingPermission(t *testing.T) {
	f := newFake(t)
	f.fault(fakeFault{route: "createDraft", status: 403, code: "ErrorSendAsDenied"})
	c := client(t, f, nil)
	if _, err := c.Prepare(t.Context(), letter("To: a@x.example\r\n", "a@x.example")); err == nil || mailerr.Of(err).Class != mailerr.Permanent {
		t.Errorf("%v", err)
	}
	if c.direct() {
		t.Error("remembered as a missing permission")
	}
}

func TestA202WithRetryAfterIsNeverSentAgain(t *testing.T) {
	f := newFake(t)
	f.fault(fakeFault{after: true, header: map[string]string{"Retry-After": "30"}})
	c := client(t, f, nil)
	out := letter("To: a@x.example\r\n", "a@x.example")
	h, err := c.Prepare(t.Context(), out)
	if err != nil {
		t.Fatal(err)
	}
	r, err := c.Commit(t.Context(), out, h)
	if err != nil || r.RequestID == "" || r.ID != string(h) {
		t.Errorf("%+v, %v", r, err)
	}
	if len(f.Deliveries()) != 1 {
		t.Errorf("%d copies", len(f.Deliveries()))
	}
}

// TestAPortalOnTheWayIsNoSuccess: a message that a proxy's login page "took" is lost in silence.
func TestAPortalOnTheWayIsNoSuccess(t *testing.T) {
	for name, x := range map[string]fakeFault{
		"page":     {route: "sendMail", status: 200, body: "<html>sign in</html>"},
		"redirect": {route: "sendMail", status: 302, header: map[string]string{"Location": "/v1.0/login"}},
		"moved":    {route: "sendMail", status: 307, header: map[string]string{"Location": "/v1.0/login"}},
	} {
		f := newFake(t)
		f.fault(x)
		c := client(t, f, func(c *providers.Config) { c.NoDrafts = true })
		_, err := c.Commit(t.Context(), letter("To: a@x.example\r\n", "a@x.example"), "")
		if e := mailerr.Of(err); e == nil || e.Class == mailerr.Permanent || e.Unsure != (name == "page") || len(f.requests) != 1 {
			t.Errorf("%s: %v, %v", name, err, f.requests)
		}
	}
}

func TestHalfAnAnswerToADraftIsUnsure(t *testing.T) {
	f := newFake(t)
	f.fault(fakeFault{route: "createDraft", cut: "answer", after: true, times: 1})
	c := client(t, f, nil)
	out := letter("To: a@x.example\r\n", "a@x.example")
	if _, err := c.Prepare(t.Context(), out); err == nil || !mailerr.Of(err).Unsure {
		t.Fatalf("%v", err)
	}
	if err := c.Abandon(t.Context(), out, ""); err != nil || f.Staged() != 0 {
		t.Errorf("%v, %d drafts left", err, f.Staged())
	}
}

// TestASecondCommitOfASentDraftIsNoRefusal: whoever believes the 400 bounces mail that has arrived.
func TestASecondCommitOfASentDraftIsNoRefusal(t *testing.T) {
	f := newFake(t)
	c := client(t, f, nil)
	out := letter("To: a@x.example\r\n", "a@x.example")
	h, err := c.Prepare(t.Context(), out)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if _, err := c.Commit(t.Context(), out, h); err != nil {
			t.Fatal(err)
		}
	}
	if len(f.Deliveries()) != 1 {
		t.Errorf("%d copies", len(f.Deliveries()))
	}
}

func TestADraftThatIsGoneLeavesTheOutcomeOpen(t *testing.T) {
	f := newFake(t)
	c := client(t, f, nil)
	out := letter("To: a@x.example\r\n", "a@x.example")
	_, err := c.Commit(t.Context(), out, "AAkGone")
	if e := mailerr.Of(err); e == nil || e.Class != mailerr.Temporary || !e.Unsure || !errors.Is(err, mail.ErrNoMessage) {
		t.Fatalf("%v", err)
	}
	if _, found, err := c.FindSent(t.Context(), out, "AAkGone"); err != nil || found != providers.Inconclusive {
		t.Errorf("gone is no proof: %d, %v", found, err)
	}
}

func TestFindSentTellsLingeringFromNotSent(t *testing.T) {
	f := newFake(t)
	f.linger = true
	c := client(t, f, nil)
	out := letter("To: a@x.example\r\n", "a@x.example")
	h, err := c.Prepare(t.Context(), out)
	if err != nil {
		t.Fatal(err)
	}
	want := func(step string, finding providers.Finding) {
		t.Helper()
		if _, got, err := c.FindSent(t.Context(), out, h); err != nil || got != finding {
			t.Errorf("%s: %d, %v, want %d", step, got, err, finding)
		}
	}
	want("staged", providers.NotSent)
	if _, err := c.Commit(t.Context(), out, h); err != nil {
		t.Fatal(err)
	}
	want("submitted, still in Drafts", providers.Inconclusive)
	if err := c.Abandon(t.Context(), out, h); err != nil || f.Staged() != 1 {
		t.Errorf("Abandon took a message that is being sent: %v", err)
	}
	f.settle()
	want("in Sent Items", providers.WasSent)
	f.fault(fakeFault{route: "get", status: 503})
	if _, got, err := c.FindSent(t.Context(), out, h); err == nil || got != providers.Inconclusive || mailerr.Of(err).Unsure {
		t.Errorf("a failed look-up is no finding: %d, %v", got, err)
	}
}

// TestFindSentAmongReusedMessageIDs: a scanner that sends one Message-ID for ever.
func TestFindSentAmongReusedMessageIDs(t *testing.T) {
	for _, headers := range []bool{false, true} {
		t.Run(fmt.Sprintf("headers in the page: %v", headers), func(t *testing.T) {
			f := newFake(t)
			f.headers = headers
			c := client(t, f, func(c *providers.Config) { c.NoDrafts = true })
			id := "<it's@scanner>"
			var outs []*mail.Outgoing
			for range 7 {
				out := letter("To: a@x.example\r\n", "a@x.example")
				out.Content = providertest.Bytes(strings.ReplaceAll(string(out.Content.(providertest.Bytes)), out.MessageID, id))
				out.MessageID = id
				outs = append(outs, out)
			}
			for _, out := range outs[:6] {
				if _, err := c.Commit(t.Context(), out, ""); err != nil {
					t.Fatal(err)
				}
			}
			for i, out := range outs {
				want := providers.WasSent
				if i == 6 {
					want = providers.Inconclusive
				}
				if _, found, err := c.FindSent(t.Context(), out, ""); err != nil || found != want {
					t.Errorf("message %d: %d, %v", i, found, err)
				}
			}
			if headers && f.asked("value") > 0 {
				t.Error("the page had the headers, but messages were fetched")
			}
		})
	}
}

func TestFindSentWithoutPermissionIsInconclusive(t *testing.T) {
	f := newFake(t)
	f.fault(fakeFault{route: "list", status: 403, code: "ErrorAccessDenied"})
	c := client(t, f, func(c *providers.Config) { c.NoDrafts = true })
	if _, found, err := c.FindSent(t.Context(), letter("To: a@x.example\r\n", "a@x.example"), ""); err != nil || found != providers.Inconclusive {
		t.Errorf("%d, %v", found, err)
	}
}

func TestALinkToAnotherHostIsNotFollowed(t *testing.T) {
	var stolen atomic.Bool
	evil := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { stolen.Store(true) }))
	t.Cleanup(evil.Close)
	f := newFake(t)
	f.fault(fakeFault{route: "list", status: 200, body: `{"value":[],"@odata.nextLink":"` + evil.URL + `/v1.0/users/x"}`})
	c := client(t, f, nil)
	if _, _, err := c.FindSent(t.Context(), letter("To: a@x.example\r\n", "a@x.example"), ""); err != nil || stolen.Load() {
		t.Errorf("followed: %v, %v", stolen.Load(), err)
	}
}

func TestABounceComesFromTheMailboxItself(t *testing.T) {
	f := newFake(t)
	c := client(t, f, nil)
	report := providertest.Bytes("From: MAILER-DAEMON@bridge.example\r\nSender: x@y.example\r\nTo: somebody@else.example\r\nSubject: Undelivered\r\n\r\nSorry.\r\n")
	if err := c.Bounce(t.Context(), report, ""); err != nil {
		t.Fatal(err)
	}
	d := f.Deliveries()
	if len(d) != 1 || d[0].To != mailbox {
		t.Fatalf("delivered %v", d)
	}
	m, err := netmail.ReadMessage(bytes.NewReader(d[0].Raw))
	if err != nil {
		t.Fatal(err)
	}
	if from, err := netmail.ParseAddress(m.Header.Get("From")); err != nil || from.Address != mailbox || len(m.Header["Sender"]) > 0 || len(m.Header["From"]) != 1 {
		t.Errorf("from %v (%v)", m.Header, err)
	}
	f.fault(fakeFault{route: "sendMail", status: 504})
	if err := c.Bounce(t.Context(), report, mailbox); err == nil || !mailerr.Of(err).Unsure || mailerr.Of(err).Op != "graph.bounce" {
		t.Errorf("%v", err)
	}
}

func TestProbeNamesWhatIsMissing(t *testing.T) {
	f := newFake(t)
	c := client(t, f, nil)
	if s, err := c.Probe(t.Context()); err != nil || !strings.Contains(s, mailbox) {
		t.Errorf("%q, %v", s, err)
	}
	f.fault(fakeFault{route: "inbox", status: 403, code: "ErrorAccessDenied"})
	if _, err := c.Probe(t.Context()); err == nil || !strings.Contains(mailerr.Of(err).Text, "Mail.ReadWrite") {
		t.Errorf("%v", err)
	}
	c.noDrafts = true
	if s, err := c.Probe(t.Context()); err != nil || !strings.Contains(s, "cannot be checked") {
		t.Errorf("%q, %v", s, err)
	}
	f.Reset()
	f.fault(fakeFault{route: "inbox", status: 404, code: "ErrorInvalidUser"})
	if _, err := c.Probe(t.Context()); !errors.Is(err, mail.ErrNoMailbox) {
		t.Errorf("%v", err)
	}
}

func TestAMessageTooLargeForOneRequestIsRefusedBeforeItIsSent(t *testing.T) {
	f := newFake(t)
	c := client(t, f, nil)
	out := providertest.Message{From: mailbox, To: []string{"a@x.example"}, Body: strings.Repeat("0123456789abcde\r\n", 200_000)}.Outgoing()
	_, err := c.Prepare(t.Context(), out)
	if e := mailerr.Of(err); !errors.Is(err, ErrTooLarge) || e.Code() != "5.3.4" || e.Unsure || f.asked("createDraft") != 0 {
		t.Errorf("%v", err)
	}
	a, err := Open(f.config(t))
	if err != nil {
		t.Fatal(err)
	}
	out = providertest.Message{From: mailbox, To: []string{"a@x.example"}}.Outgoing()
	raw := out.Content.(providertest.Bytes)
	out.Content = append(raw, bytes.Repeat([]byte("x"), int(a.Traits.MaxSize)-len(raw))...)
	if _, err := c.Prepare(t.Context(), out); err != nil {
		t.Errorf("a message of MaxSize: %v", err)
	}
}

func TestLogsHoldNoRecipientsAndNoSecret(t *testing.T) {
	var logged bytes.Buffer
	f := newFake(t)
	f.fault(fakeFault{route: "createDraft", status: 403, code: "ErrorAccessDenied", text: "Bearer eyJhbGciOiJub25lIn0.c2VjcmV0.x", times: 1})
	c := client(t, f, func(c *providers.Config) {
		c.Log = slog.New(slog.NewTextHandler(&logged, &slog.HandlerOptions{Level: slog.LevelDebug}))
		c.Mismatch = providers.Rewrite
	})
	if _, err := c.Prepare(t.Context(), letter("To: z@x.example\r\nBcc: y@x.example\r\n", "a@x.example")); err != nil {
		t.Fatal(err)
	}
	for _, s := range []string{"eyJ", "c2VjcmV0", "z@x.example", "y@x.example"} {
		if strings.Contains(logged.String(), s) {
			t.Errorf("%q is in the log:\n%s", s, logged.String())
		}
	}
	if !strings.Contains(logged.String(), "Bcc dropped") {
		t.Errorf("fix-ups are not logged by name:\n%s", logged.String())
	}
}

// TestAMessageThatCannotBeReadIsNotSentInHalf: a disk that fails in mid-message.
func TestAMessageThatCannotBeReadIsNotSentInHalf(t *testing.T) {
	head := "To: a@x.example\r\nSubject: s\r\n\r\n"
	for name, c := range map[string]func() io.Reader{
		"fails": func() io.Reader {
			return io.MultiReader(strings.NewReader(head+strings.Repeat("x", 9000)), iotest.ErrReader(errors.New("input/output error")))
		},
		"is too short": func() io.Reader { return strings.NewReader(head + strings.Repeat("x", 9000)) },
	} {
		f := newFake(t)
		cl := client(t, f, nil)
		out := &mail.Outgoing{Envelope: mail.Envelope{To: []string{"a@x.example"}}, Content: reopen{c, 200_000}}
		_, err := cl.Prepare(t.Context(), out)
		if e := mailerr.Of(err); e == nil || e.Class != mailerr.Temporary || e.Unsure || f.Staged() != 0 {
			t.Errorf("%s: %v, %d drafts", name, err, f.Staged())
		}
	}
}

type reopen struct {
	make func() io.Reader
	size int64
}

func (r reopen) Open() (io.ReadCloser, error) { return io.NopCloser(r.make()), nil }
func (r reopen) Size() int64                  { return r.size }

func TestTheBodyIsTheMessageInBase64(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		content := providertest.Bytes(rapid.SliceOfN(rapid.Byte(), 0, 200).Draw(t, "content"))
		if n := rapid.IntRange(0, 3).Draw(t, "blocks"); n > 0 {
			content = append(content, bytes.Repeat([]byte("0123456789ab"), n*2048+rapid.IntRange(0, 3).Draw(t, "odd"))...)
		}
		prefix := rapid.SliceOfN(rapid.Byte(), 1, 50).Draw(t, "prefix")
		skip := int64(rapid.IntRange(0, len(content)).Draw(t, "skip"))
		e := mimeBody(prefix, content, skip)
		var sent atomic.Bool
		for range 2 { // GetBody: the same again
			r, err := e.reader(&sent)
			if err != nil {
				t.Fatal(err)
			}
			got, err := io.ReadAll(iotest.OneByteReader(r))
			if err != nil || int64(len(got)) != e.size || !sent.Load() {
				t.Fatalf("%d bytes, said %d, sent %v: %v", len(got), e.size, sent.Load(), err)
			}
			raw, err := base64.StdEncoding.DecodeString(string(got))
			if err != nil || !bytes.Equal(raw, append(bytes.Clone(prefix), content[skip:]...)) {
				t.Fatalf("other bytes (%v)", err)
			}
		}
	})
}

func TestLongStringsOfAnAnswerAreNotKept(t *testing.T) {
	long := strings.Repeat("\\u00e9\\\"\\\\é", 60_000)
	for _, size := range []int{1, 7, 4096} {
		in := `{"body":{"content":"` + long + `"},"id":"AAk\"1","toRecipients":[{"emailAddress":{"address":"a\u0040x.example"}}]}`
		var m item
		r := &shortStrings{r: &chunks{[]byte(in), size}}
		out, err := io.ReadAll(r)
		if err != nil || len(out) > maxString+1000 {
			t.Fatalf("%d bytes are kept, %v", len(out), err)
		}
		if err := json.Unmarshal(out, &m); err != nil || m.ID != `AAk"1` || len(m.To) != 1 || m.To[0].EmailAddress.Address != "a@x.example" {
			t.Errorf("%+v, %v", m, err)
		}
	}
	rapid.Check(t, func(t *rapid.T) { // short strings pass unchanged
		in, err := json.Marshal(rapid.MapOf(rapid.String(), rapid.String()).Draw(t, "v"))
		if err != nil {
			t.Fatal(err)
		}
		out, err := io.ReadAll(&shortStrings{r: bytes.NewReader(in)})
		if err != nil || !bytes.Equal(in, out) {
			t.Fatalf("%s became %s (%v)", in, out, err)
		}
	})
}

type chunks struct {
	b    []byte
	size int
}

func (c *chunks) Read(p []byte) (int, error) {
	if len(c.b) == 0 {
		return 0, io.EOF
	}
	n := copy(p, c.b[:min(c.size, len(c.b))])
	c.b = c.b[n:]
	return n, nil
}

func TestOurReceivedLineIsToldFromOthers(t *testing.T) {
	for value, want := range map[string]bool{
		"from a by b with ESMTPSA id T1;\r\n\tTue, 24 Nov 2026 10:00:00 +0000": true,
		"by b id T1; now":              true,
		"by b ID T1":                   true,
		"by b id T12; now":             false,
		"by T1 id X; now":              false,
		"by b id":                      false,
		"by b with id-T1 id X (id T2)": false,
	} {
		if got := hasID(value, "T1"); got != want {
			t.Errorf("%q: %v", value, got)
		}
	}
	if hasID("by b id ; now", "") {
		t.Error("an empty trace id finds itself everywhere")
	}
}

func TestAnEndedContextNeverReachesTheCloud(t *testing.T) {
	f := newFake(t)
	c := client(t, f, nil)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := c.Prepare(ctx, letter("To: a@x.example\r\n", "a@x.example")); err == nil || mailerr.Of(err).Unsure {
		t.Errorf("%v", err)
	}
	if f.asked("createDraft") != 0 {
		t.Error("asked all the same")
	}
}

func BenchmarkSend(b *testing.B) {
	for _, size := range []int{10 << 10, 1 << 20} {
		b.Run(fmt.Sprintf("%dKiB", size>>10), func(b *testing.B) {
			// A server that reads and answers: the figures are the client's and net/http's.
			srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				_, _ = io.Copy(io.Discard, r.Body)
				if strings.HasSuffix(r.URL.Path, "/send") {
					w.WriteHeader(202)
					return
				}
				w.WriteHeader(201)
				_, _ = io.WriteString(w, `{"id":"AAk1","isDraft":true,"toRecipients":[{"emailAddress":{"address":"a@x.example"}}]}`)
			}))
			defer srv.Close()
			hc := srv.Client()
			defer hc.CloseIdleConnections()
			c, err := open(providers.Config{Mailbox: mailbox, HTTP: hc, Base: srv.URL})
			if err != nil {
				b.Fatal(err)
			}
			out := providertest.Message{From: mailbox, To: []string{"a@x.example"}, Body: strings.Repeat("0123456789abcde\r\n", size/17)}.Outgoing()
			b.SetBytes(out.Content.Size())
			b.ReportAllocs()
			peer := time.Duration(0)
			ready := []byte(base64.StdEncoding.EncodeToString(out.Content.(providertest.Bytes)))
			for b.Loop() {
				h, err := c.Prepare(b.Context(), out)
				if err != nil {
					b.Fatal(err)
				}
				if _, err := c.Commit(b.Context(), out, h); err != nil {
					b.Fatal(err)
				}
				// The peer: net/http alone, with the body encoded beforehand.
				b.StopTimer()
				start := time.Now()
				for path, body := range map[string][]byte{"/messages": ready, "/messages/1/send": nil} {
					resp, err := hc.Post(srv.URL+path, "text/plain", bytes.NewReader(body))
					if err != nil {
						b.Fatal(err)
					}
					finish(resp)
				}
				peer += time.Since(start)
				b.StartTimer()
			}
			b.ReportMetric(float64(b.Elapsed())/float64(peer), "x-net/http")
		})
	}
}
