package providertest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"mailbridge/internal/mail"
	"mailbridge/internal/mailerr"
	"mailbridge/providers"
)

// patience is the longest that anything in the suite may take; only a defect lasts that long.
const patience = 20 * time.Second

// Run holds the provider against the contract. Open gives a fresh account on a fresh cloud.
func Run(t *testing.T, open func(t *testing.T) Harness) {
	tests := []struct {
		name string
		run  func(t *testing.T, h Harness)
	}{
		{"Account/RolesFitTogether", rolesFit},
		{"Probe/SaysSomethingAndSendsNothing", probe},
		{"Send/ReturnsOnceTaken", returnsOnceTaken},
		{"Send/BytesAreKept", bytesAreKept},
		{"Send/SameMessageIDTwiceIsTwoMessages", reusedMessageID},
		{"Send/LostAnswerIsUnsure", lostAnswer},
		{"Send/PrepareNeverSends", prepareNeverSends},
		{"Send/LostPrepareIsUnsureAndSendsNothing", lostPrepare},
		{"Send/AbandonLeavesNothing", abandonLeavesNothing},
		{"Send/AbandonNeverTouchesWhatWasSent", abandonAfterSend},
		{"Send/BccReachesButIsNotShown", bccHidden},
		{"Send/EnvelopeIsTheOnlyAuthority", envelopeShapes},
		{"Send/RandomEnvelopes", envelopeRandom},
		{"Send/PartialRefusal", partialRefusal},
		{"Send/ManyAtOnce", manyAtOnce},
		{"Errors/UnreachableIsTemporaryAndSure", unreachable},
		{"Errors/EveryStatus", everyStatus},
		{"Errors/TextLeaksNoSecret", leaksNoSecret},
		{"Throttled/RetryAtIsAbsolute", throttled},
		{"Cancel/Promptly", cancelPromptly},
		{"Cancel/BeforeAnythingIsSure", cancelBefore},
		{"FindSent/NotSentThenCommitAgain", notSentThenAgain},
		{"FindSent/UnknownIsInconclusive", unknownInconclusive},
	}
	for _, tc := range tests {
		t.Run(tc.name, func(t *testing.T) {
			h := open(t)
			if h.Account == nil || h.Account.Sender == nil || h.Cloud == nil {
				t.Skip("the account has no Sender or the harness shows no deliveries")
			}
			if h.Account.Close != nil {
				t.Cleanup(func() {
					if err := h.Account.Close(); err != nil {
						t.Errorf("Close: %v", err)
					}
				})
			}
			if h.Faults != nil {
				t.Cleanup(h.Faults.Reset)
			}
			tc.run(t, h)
		})
	}
}

// within is a context for one step.
func within(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	return ctx
}

// fault turns a knob or skips.
func (h Harness) fault(t *testing.T, f Fault, arg string) {
	t.Helper()
	if h.Faults == nil || !h.Faults.Set(f, arg) {
		t.Skipf("this cloud cannot %s", f)
	}
}

func (h Harness) settle() {
	if h.Settle != nil {
		h.Settle()
	}
}

// send prepares and commits.
func (h Harness) send(t testing.TB, out *mail.Outgoing) (mail.Receipt, error) {
	t.Helper()
	ctx := within(t)
	handle, err := h.Account.Sender.Prepare(ctx, out)
	if err != nil {
		return mail.Receipt{}, err
	}
	return h.Account.Sender.Commit(ctx, out, handle)
}

func (h Harness) mustPrepare(t testing.TB, out *mail.Outgoing) mail.Handle {
	t.Helper()
	handle, err := h.Account.Sender.Prepare(within(t), out)
	if err != nil {
		t.Fatalf("Prepare: %v", err)
	}
	return handle
}

// copies lists who got a message with this trace id, sorted, and one of the copies.
func (h Harness) copies(trace string) (to []string, raw []byte) {
	for _, d := range h.Cloud.Deliveries() {
		if bytes.Contains(d.Raw, []byte(" id "+trace+";")) { // our Received line
			to = append(to, fold(d.To))
			raw = d.Raw
		}
	}
	slices.Sort(to)
	return to, raw
}

func fold(s string) string { return strings.ToLower(s) }

// wantCopies fails unless exactly the recipients have exactly one copy each.
func (h Harness) wantCopies(t testing.TB, out *mail.Outgoing, want []string) {
	t.Helper()
	h.settle()
	var fw []string
	for _, w := range want {
		fw = append(fw, fold(w))
	}
	slices.Sort(fw)
	if got, _ := h.copies(out.TraceID); !slices.Equal(got, fw) {
		t.Fatalf("copies went to %v, want one each to %v", got, fw)
	}
}

// classified fails unless err is a complete *mailerr.Error and gives it.
func classified(t testing.TB, err error) *mailerr.Error {
	t.Helper()
	if err == nil {
		t.Fatal("no error")
	}
	e, ok := errors.AsType[*mailerr.Error](err)
	if !ok {
		t.Fatalf("nobody classified %T: %v", err, err)
	}
	if e.Op == "" || e.Text == "" {
		t.Errorf("Op %q and Text %q must both say something", e.Op, e.Text)
	}
	for i := range len(e.Text) {
		if e.Text[i] < ' ' || e.Text[i] > '~' {
			t.Errorf("Text is not one ASCII line: %q", e.Text)
			break
		}
	}
	return e
}

func simple(h Harness, to ...string) *mail.Outgoing {
	if len(to) == 0 {
		to = []string{"pat@example.net"}
	}
	return Message{From: h.Mailbox, To: to}.Outgoing()
}

func rolesFit(t *testing.T, h Harness) {
	if h.Account.Traits.MaxSize < 0 || h.Account.Traits.MaxRecipients < 0 || h.Account.Traits.Parallel < 0 {
		t.Errorf("negative traits: %+v", h.Account.Traits)
	}
	if h.Stager != nil && h.Account.Sent == nil {
		t.Error("an account that stages can always look its drafts up, but Sent is nil")
	}
}

func probe(t *testing.T, h Harness) {
	if h.Account.Prober == nil {
		t.Skip("the account has no Prober")
	}
	detail, err := h.Account.Prober.Probe(within(t))
	if err != nil || detail == "" {
		t.Errorf("Probe: %q, %v", detail, err)
	}
	if d := h.Cloud.Deliveries(); len(d) != 0 {
		t.Errorf("probing delivered %d messages", len(d))
	}
	if h.Stager != nil && h.Stager.Staged() != 0 {
		t.Error("probing staged something")
	}
}

func returnsOnceTaken(t *testing.T, h Harness) {
	out := simple(h, "pat@example.net", "kim@example.org")
	r, err := h.send(t, out)
	if err != nil {
		t.Fatal(err)
	}
	if len(r.Refused) != 0 {
		t.Errorf("refused: %v", r.Refused)
	}
	h.wantCopies(t, out, out.To)
	if h.Stager != nil && h.Stager.Staged() != 0 {
		t.Error("a draft is left in the mailbox of somebody whose message was sent")
	}
}

func bytesAreKept(t *testing.T, h Harness) {
	bodies := map[string]string{
		"dots":        ".\r\n..\r\n.x\r\nend\r\n",
		"8bit":        "gr\xc3\xbc\xc3\x9fe \xff\xfe\r\n",
		"empty lines": "\r\n\r\n\r\n",
		"no last eol": "no end of line",
		"From line":   "From the start\r\n",
		"long line":   strings.Repeat("0123456789", 90) + "\r\n",
		"big":         strings.Repeat("All work and no play makes Jack a dull boy.\r\n", 4000),
	}
	for _, name := range slices.Sorted(maps.Keys(bodies)) {
		out := Message{From: h.Mailbox, To: []string{"pat@example.net"}, Body: bodies[name]}.Outgoing()
		if _, err := h.send(t, out); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		h.settle()
		_, got := h.copies(out.TraceID)
		wantHeader, wantBody := split(out.Content.(Bytes))
		gotHeader, gotBody := split(got)
		if name == "no last eol" { // SMTP cannot carry it (RFC 5321 §4.1.1.4)
			gotBody = strings.TrimSuffix(gotBody, "\r\n")
		}
		if gotBody != wantBody {
			t.Errorf("%s: the body changed: got %d bytes, want %d", name, len(gotBody), len(wantBody))
		}
		// Clouds add trace fields of their own on top; ours must be there as they were.
		if !strings.Contains(gotHeader, wantHeader) {
			t.Errorf("%s: the header changed:\n%s\nwant within it:\n%s", name, gotHeader, wantHeader)
		}
	}
}

// reusedMessageID: scanners reuse Message-IDs; their second message is no duplicate.
func reusedMessageID(t *testing.T, h Harness) {
	first, second := simple(h), simple(h)
	second.Content = Bytes(strings.ReplaceAll(string(second.Content.(Bytes)), second.MessageID, first.MessageID))
	second.MessageID = first.MessageID
	if _, err := h.send(t, first); err != nil {
		t.Fatal(err)
	}
	h.settle()
	if h.Account.Sent != nil { // the first one's copy is no proof of the second
		handle := h.mustPrepare(t, second)
		if _, f, err := h.Account.Sent.FindSent(within(t), second, handle); f == providers.WasSent {
			t.Fatalf("a message that was never sent is found by another's Message-ID (%v)", err)
		}
		if _, err := h.Account.Sender.Commit(within(t), second, handle); err != nil {
			t.Fatal(err)
		}
	} else if _, err := h.send(t, second); err != nil {
		t.Fatal(err)
	}
	h.wantCopies(t, first, first.To)
	h.wantCopies(t, second, second.To)
}

// lostAnswer is the night on which mail is doubled: the cloud has it, and nobody heard.
func lostAnswer(t *testing.T, h Harness) {
	out := simple(h)
	handle := h.mustPrepare(t, out)
	h.fault(t, LoseCommitAnswer, "")
	_, err := h.Account.Sender.Commit(within(t), out, handle)
	if e := classified(t, err); !e.Unsure {
		t.Fatalf("the cloud has the message, but the failure does not say that it may: %+v", e)
	} else if e.Class == mailerr.Permanent {
		t.Fatalf("a lost answer is no refusal: %+v", e)
	}
	h.Faults.Reset()
	h.wantCopies(t, out, out.To)
	if h.Account.Sent == nil {
		t.Skip("the account has no SentFinder: unsure stays unsure")
	}
	_, found, err := h.Account.Sent.FindSent(within(t), out, handle)
	if err != nil || found != providers.WasSent {
		t.Fatalf("FindSent says %d, %v; the cloud has the message", found, err)
	}
	h.wantCopies(t, out, out.To)
}

func prepareNeverSends(t *testing.T, h Harness) {
	out := simple(h)
	handle := h.mustPrepare(t, out)
	h.wantCopies(t, out, nil)
	if handle != "" && h.Account.Sent != nil {
		_, found, err := h.Account.Sent.FindSent(within(t), out, handle)
		if err != nil || found != providers.NotSent {
			t.Errorf("FindSent of a draft that was never committed says %d, %v", found, err)
		}
	}
}

func lostPrepare(t *testing.T, h Harness) {
	h.fault(t, LosePrepareAnswer, "")
	out := simple(h)
	_, err := h.Account.Sender.Prepare(within(t), out)
	if e := classified(t, err); !e.Unsure {
		t.Fatalf("an orphan may lie in Drafts, but the failure does not say so: %+v", e)
	}
	h.Faults.Reset()
	h.wantCopies(t, out, nil)
	if err := h.Account.Sender.Abandon(within(t), out, ""); err != nil {
		t.Fatalf("Abandon: %v", err)
	}
	if h.Stager != nil && h.Stager.Staged() != 0 {
		t.Error("the orphan is still in Drafts")
	}
	if _, err := h.send(t, out); err != nil {
		t.Fatal(err)
	}
	h.wantCopies(t, out, out.To)
}

func abandonLeavesNothing(t *testing.T, h Harness) {
	out := simple(h)
	handle := h.mustPrepare(t, out)
	for range 2 { // calling it twice is harmless
		if err := h.Account.Sender.Abandon(within(t), out, handle); err != nil {
			t.Fatalf("Abandon: %v", err)
		}
	}
	if h.Stager != nil && h.Stager.Staged() != 0 {
		t.Error("the draft is still there")
	}
	h.wantCopies(t, out, nil)
}

func abandonAfterSend(t *testing.T, h Harness) {
	out := simple(h)
	handle := h.mustPrepare(t, out)
	if _, err := h.Account.Sender.Commit(within(t), out, handle); err != nil {
		t.Fatal(err)
	}
	h.settle()
	for _, hd := range []mail.Handle{handle, ""} {
		if err := h.Account.Sender.Abandon(within(t), out, hd); err != nil {
			t.Errorf("Abandon of what was sent: %v", err)
		}
	}
	if h.Account.Sent != nil {
		if _, found, err := h.Account.Sent.FindSent(within(t), out, handle); err != nil || found != providers.WasSent {
			t.Errorf("after Abandon the sent copy is gone: FindSent says %d, %v", found, err)
		}
	}
}

func bccHidden(t *testing.T, h Harness) {
	secret := "auditor@example.net"
	out := Message{From: h.Mailbox, To: []string{"pat@example.net", secret}, Header: "To: Pat <pat@example.net>\r\n"}.Outgoing()
	if _, err := h.send(t, out); err != nil {
		t.Fatal(err)
	}
	h.wantCopies(t, out, out.To)
	for _, d := range h.Cloud.Deliveries() {
		if bytes.Contains(bytes.ToLower(d.Raw), []byte(secret)) {
			t.Errorf("%s sees the Bcc recipient:\n%s", d.To, d.Raw)
		}
	}
}

func envelopeShapes(t *testing.T, h Harness) {
	if !h.Account.Traits.SMTPUTF8 {
		t.Log("no SMTPUTF8: shapes with UTF-8 addresses are left out")
	}
	shapes := []struct{ name, header, to string }{
		{"no recipients in the header", "X-None: 1\r\n", "a@x.example"},
		{"nothing but Bcc", "Bcc: a@x.example, b@x.example\r\n", "a@x.example b@x.example"},
		{"undisclosed", "To: undisclosed-recipients:;\r\n", "a@x.example"},
		{"empty To", "To: \r\n", "a@x.example"},
		{"quoted comma", "To: \"Last, First\" <a@x.example>, b@x.example\r\n", "a@x.example b@x.example"},
		{"address in the name", "To: \"z@x.example\" <a@x.example>\r\n", "a@x.example"},
		{"encoded word", "To: =?utf-8?q?J=C3=BCrgen=2C_z=40x=2Eexample?= <a@x.example>\r\n", "a@x.example"},
		{"case", "To: A@X.Example\r\n", "a@x.example"},
		{"duplicates", "To: a@x.example, a@x.example\r\nCc: A@x.example\r\n", "a@x.example"},
		{"folded", "To:\r\n a@x.example,\r\n\tb@x.example\r\n", "a@x.example b@x.example"},
		{"two To fields", "To: a@x.example\r\nSubject2: x\r\nTo: b@x.example\r\n", "a@x.example b@x.example"},
		{"group", "To: team: a@x.example, b@x.example;\r\n", "a@x.example b@x.example"},
		{"comment", "To: a@x.example (z@x.example)\r\n", "a@x.example"},
		{"resent", "To: a@x.example\r\nResent-To: z@x.example\r\nResent-Bcc: y@x.example\r\n", "a@x.example"},
		{"Bcc that is not in the envelope", "To: a@x.example\r\nBcc: z@x.example\r\n", "a@x.example"},
		{"To to somebody else", "To: list@lists.example\r\n", "a@x.example"},
		{"one of two", "To: a@x.example, z@x.example\r\nCc: y@x.example\r\n", "a@x.example b@x.example"},
	}
	for _, s := range shapes {
		if !h.HeaderRecipients && strings.Contains(s.header, "Bcc:") {
			continue // the edge takes Bcc out; a cloud that is given the envelope need not look at the header
		}
		to := strings.Fields(s.to)
		out := Message{From: h.Mailbox, To: to, Header: s.header}.Outgoing()
		_, err := h.send(t, out)
		if err != nil {
			if e := classified(t, err); !h.HeaderRecipients || h.Rewriting || e.Class != mailerr.Permanent || e.Unsure {
				t.Errorf("%s: %v", s.name, err)
			}
			to = nil // whoever refuses delivers to nobody
		}
		h.settle()
		got, raw := h.copies(out.TraceID)
		want := slices.Sorted(slices.Values(to))
		if !slices.Equal(got, want) {
			t.Errorf("%s: reached %v, want %v", s.name, got, want)
		}
		if raw != nil {
			noBcc(t, raw)
		}
	}
}

// noBcc fails when a recipient could see a Bcc field.
func noBcc(t testing.TB, raw []byte) {
	t.Helper()
	head, _ := split(raw)
	for line := range strings.SplitSeq(strings.ToLower(head), "\r\n") {
		name, _, _ := strings.Cut(line, ":")
		if n := strings.TrimSpace(name); n == "bcc" || n == "resent-bcc" {
			t.Errorf("a Bcc field is shown: %q", line)
		}
	}
}

// envelopeRandom draws envelopes and headers at random; exactly the envelope's recipients receive, or the
// message is refused and nobody does.
func envelopeRandom(t *testing.T, h Harness) {
	people := []string{"a@x.example", "B.b@X.example", "c+tag@y.example", "o'hara@y.example", "e@sub.x.example", "f@z.example"}
	names := []string{"To", "Cc", "tO", "CC", "Resent-To"}
	if h.HeaderRecipients {
		names = append(names, "Bcc", "bCC")
	}
	runs := 0
	rapid.Check(t, func(rt *rapid.T) {
		if runs++; runs > 40 {
			return // a cloud behind sockets: forty are enough here, the packages' own fuzz tests do the rest
		}
		to := rapid.SliceOfNDistinct(rapid.SampledFrom(people), 1, 4, rapid.ID[string]).Draw(rt, "envelope")
		header := ""
		for i := range rapid.IntRange(0, 4).Draw(rt, "fields") {
			name := rapid.SampledFrom(names).Draw(rt, fmt.Sprint("name", i))
			var vals []string
			for j := range rapid.IntRange(0, 3).Draw(rt, "n") {
				a := rapid.SampledFrom(people).Draw(rt, fmt.Sprint("addr", i, j))
				form := rapid.SampledFrom([]string{"%s", "<%s>", "\"Last, First\" <%s>", "=?utf-8?b?w7w=?= <%s>", "g: %s;", "%s (note)"}).Draw(rt, "form")
				vals = append(vals, fmt.Sprintf(form, a))
			}
			header += name + ": " + strings.Join(vals, rapid.SampledFrom([]string{", ", ",\r\n ", ",\r\n\t"}).Draw(rt, "sep")) + "\r\n"
		}
		if header == "" {
			header = "X-None: 1\r\n"
		}
		out := Message{From: h.Mailbox, To: to, Header: header}.Outgoing()
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		handle, err := h.Account.Sender.Prepare(ctx, out)
		if err == nil {
			_, err = h.Account.Sender.Commit(ctx, out, handle)
		}
		want := slices.Clone(to)
		if err != nil {
			if e := mailerr.Of(err); !h.HeaderRecipients || h.Rewriting || e.Class != mailerr.Permanent || e.Unsure {
				rt.Fatalf("%v\n%s", err, header)
			}
			want = nil
		}
		h.settle()
		got, raw := h.copies(out.TraceID)
		for i := range want {
			want[i] = fold(want[i])
		}
		slices.Sort(want)
		if !slices.Equal(got, want) {
			rt.Fatalf("reached %v, want %v\n%s", got, want, header)
		}
		if raw != nil {
			if m, err := parsed(raw); err != nil || m.Header.Get("Bcc") != "" || m.Header.Get("Resent-Bcc") != "" {
				rt.Fatalf("a Bcc is shown, or the header does not parse (%v):\n%s", err, raw)
			}
		}
	})
}

func partialRefusal(t *testing.T, h Harness) {
	h.fault(t, RefuseRecipient, "nobody@example.net")
	out := simple(h, "pat@example.net", "nobody@example.net", "kim@example.net")
	r, err := h.send(t, out)
	if err != nil {
		t.Fatalf("two of three can have it: %v", err)
	}
	h.wantCopies(t, out, []string{"pat@example.net", "kim@example.net"})
	if len(r.Refused) != 1 || fold(r.Refused[0].Recipient) != "nobody@example.net" {
		t.Fatalf("refused: %+v", r.Refused)
	}
	if e := classified(t, r.Refused[0].Err); e.Class != mailerr.Permanent || e.Unsure {
		t.Errorf("refusal: %+v", e)
	}
	alone := simple(h, "nobody@example.net")
	if _, err := h.send(t, alone); err == nil {
		t.Error("the only recipient was refused, but Commit returned nil: the message is lost in silence")
	} else if e := classified(t, err); e.Class != mailerr.Permanent || e.Unsure {
		t.Errorf("%+v", e)
	}
}

func manyAtOnce(t *testing.T, h Harness) {
	const n = 12
	outs := make([]*mail.Outgoing, n)
	errs := make(chan error, n)
	for i := range outs {
		outs[i] = simple(h, fmt.Sprintf("p%d@example.net", i))
	}
	ctx := within(t)
	slots := make(chan struct{}, max(1, h.Account.Traits.Parallel))
	for _, out := range outs {
		go func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			handle, err := h.Account.Sender.Prepare(ctx, out)
			if err == nil {
				_, err = h.Account.Sender.Commit(ctx, out, handle)
			}
			errs <- err
		}()
	}
	for range outs {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	for _, out := range outs {
		h.wantCopies(t, out, out.To)
	}
}

func unreachable(t *testing.T, h Harness) {
	h.fault(t, Unreachable, "")
	_, err := h.send(t, simple(h))
	if e := classified(t, err); e.Class != mailerr.Temporary || e.Unsure {
		t.Errorf("nothing was sent, so the failure is temporary and sure: %+v", e)
	}
	if h.Account.Prober != nil {
		if _, err := h.Account.Prober.Probe(within(t)); err == nil {
			t.Error("Probe finds nothing wrong")
		}
	}
}

func everyStatus(t *testing.T, h Harness) {
	if len(h.Errors) == 0 {
		t.Skip("the harness names no refusals")
	}
	for _, c := range h.Errors {
		t.Run(c.Name, func(t *testing.T) {
			h.Faults.Reset()
			c.Set()
			start := time.Now()
			out := simple(h)
			_, err := h.send(t, out)
			h.Faults.Reset()
			e := classified(t, err)
			if e.Class != c.Class || e.Unsure != c.Unsure || c.Code != "" && e.Code() != c.Code {
				t.Errorf("got %s %s unsure=%v, want %s %s unsure=%v (%v)", e.Class, e.Code(), e.Unsure, c.Class, c.Code, c.Unsure, e)
			}
			if c.RetryIn != 0 {
				ahead(t, e, start, c.RetryIn)
			}
			if !e.Unsure {
				h.wantCopies(t, out, nil)
			}
		})
	}
}

// ahead fails unless RetryAt lies d ahead of some moment between start and now.
func ahead(t testing.TB, e *mailerr.Error, start time.Time, d time.Duration) {
	t.Helper()
	if e.RetryAt.Before(start.Add(d-time.Second)) || e.RetryAt.After(time.Now().Add(d+time.Second)) {
		t.Errorf("RetryAt is %v, want %v after %v", e.RetryAt, d, start)
	}
}

func leaksNoSecret(t *testing.T, h Harness) {
	const secret = "eyJhbGciOiJub25lIn0.c2VjcmV0LXNlY3JldA.x"
	h.fault(t, EchoSecret, "Bearer "+secret)
	_, err := h.send(t, simple(h))
	e := classified(t, err)
	for _, s := range []string{e.Text, e.Error(), fmt.Sprintf("%+v", e.Err)} {
		if strings.Contains(s, secret) || strings.Contains(s, "c2VjcmV0LXNlY3JldA") {
			t.Errorf("the token is in %q", s)
		}
	}
}

func throttled(t *testing.T, h Harness) {
	h.fault(t, Throttle, "60")
	start := time.Now()
	out := simple(h)
	_, err := h.send(t, out)
	e := classified(t, err)
	if e.Class != mailerr.Throttled || e.Unsure {
		t.Fatalf("%+v", e)
	}
	ahead(t, e, start, time.Minute)
	h.Faults.Reset()
	h.wantCopies(t, out, nil)
}

func cancelPromptly(t *testing.T, h Harness) {
	for _, f := range []Fault{HangCommit, HangPrepare} {
		t.Run(string(f), func(t *testing.T) {
			h.Faults.Reset()
			out := simple(h)
			ctx, cancel := context.WithTimeout(within(t), 300*time.Millisecond)
			defer cancel()
			done := make(chan error, 1)
			var handle mail.Handle
			if f == HangCommit {
				handle = h.mustPrepare(t, out)
			}
			h.fault(t, f, "")
			start := time.Now()
			go func() {
				var err error
				if f == HangPrepare {
					_, err = h.Account.Sender.Prepare(ctx, out)
				} else {
					_, err = h.Account.Sender.Commit(ctx, out, handle)
				}
				done <- err
			}()
			select {
			case err := <-done:
				e := classified(t, err)
				if !e.Unsure || e.Class != mailerr.Temporary {
					t.Errorf("the request had arrived when the wait ended: %+v", e)
				}
				if took := time.Since(start); took > 5*time.Second {
					t.Errorf("took %v to notice", took)
				}
			case <-time.After(patience):
				t.Fatal("the end of the context is not noticed")
			}
		})
	}
}

func cancelBefore(t *testing.T, h Harness) {
	ctx, cancel := context.WithCancel(within(t))
	cancel()
	out := simple(h)
	_, err := h.Account.Sender.Prepare(ctx, out)
	if err == nil {
		_, err = h.Account.Sender.Commit(ctx, out, "")
	}
	if e := mailerr.Of(err); e == nil || e.Unsure || e.Class != mailerr.Temporary {
		t.Errorf("nothing was sent under a cancelled context: %+v", e)
	}
	h.wantCopies(t, out, nil)
}

func notSentThenAgain(t *testing.T, h Harness) {
	if h.Account.Sent == nil {
		t.Skip("the account has no SentFinder")
	}
	out := simple(h)
	handle := h.mustPrepare(t, out)
	h.fault(t, LoseCommit, "")
	_, err := h.Account.Sender.Commit(within(t), out, handle)
	if e := classified(t, err); !e.Unsure {
		t.Fatalf("the request arrived whole and no answer came: %+v", e)
	}
	h.Faults.Reset()
	h.settle()
	h.wantCopies(t, out, nil)
	_, found, err := h.Account.Sent.FindSent(within(t), out, handle)
	if err != nil || found == providers.WasSent {
		t.Fatalf("FindSent says %d, %v; nothing was sent", found, err)
	}
	if found != providers.NotSent {
		t.Skip("without a draft nothing is certain: FindSent is inconclusive")
	}
	if _, err := h.Account.Sender.Commit(within(t), out, handle); err != nil {
		t.Fatalf("Commit again: %v", err)
	}
	h.wantCopies(t, out, out.To)
}

func unknownInconclusive(t *testing.T, h Harness) {
	if h.Account.Sent == nil {
		t.Skip("the account has no SentFinder")
	}
	_, found, err := h.Account.Sent.FindSent(within(t), simple(h), "")
	if err != nil || found == providers.WasSent {
		t.Errorf("a message that nobody sent: %d, %v", found, err)
	}
}
