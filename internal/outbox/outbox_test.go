package outbox

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"mailbridge/internal/mail"
	"mailbridge/internal/mailerr"
	"mailbridge/providers"
	"mailbridge/providers/memory"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// world is an outbox with a clock of its own and clouds in memory.
type world struct {
	*Outbox
	t      testing.TB
	dir    string
	clouds map[mail.AccountID]*memory.Cloud
	opts   Options

	mu  sync.Mutex
	now time.Time
}

func (w *world) clock() time.Time {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.now
}

// pass lets time go by.
func (w *world) pass(d time.Duration) {
	w.mu.Lock()
	w.now = w.now.Add(d)
	w.mu.Unlock()
	w.Outbox.mu.Lock()
	for _, a := range w.accounts {
		a.due = time.Time{}
	}
	w.Outbox.mu.Unlock()
	w.Kick()
}

func newWorld(t testing.TB, change func(*Account)) *world {
	t.Helper()
	w := &world{t: t, dir: t.TempDir(), clouds: map[mail.AccountID]*memory.Cloud{}, now: time.Date(2040, 11, 24, 10, 0, 0, 0, time.UTC)}
	w.opts = Options{Dir: w.dir, Log: slog.New(slog.DiscardHandler), Now: w.clock, MinFree: 1}
	for _, id := range []mail.AccountID{"a", "b"} {
		c := memory.New()
		w.clouds[id] = c
		a := Account{ID: id, Mailbox: string(id) + "@x.example", Provider: c.Account(), FirstAttempt: 10 * time.Second, Settle: 2 * time.Minute, GiveUp: 5 * 24 * time.Hour}
		if change != nil {
			change(&a)
		}
		w.opts.Accounts = append(w.opts.Accounts, a)
	}
	w.open()
	t.Cleanup(func() { w.stop() })
	return w
}

func (w *world) open() {
	w.t.Helper()
	o, err := Open(context.Background(), w.opts)
	if err != nil {
		w.t.Fatal(err)
	}
	if err := o.Start(context.Background()); err != nil {
		w.t.Fatal(err)
	}
	w.Outbox = o
}

func (w *world) stop() {
	w.t.Helper()
	if err := w.Stop(context.Background()); err != nil {
		w.t.Error(err)
	}
}

var message = "From: a@x.example\r\nMessage-ID: <m1@client.example>\r\nSubject: x\r\n\r\nhello\r\n"

func (w *world) submission(account mail.AccountID, to ...string) (Submission, io.Reader) {
	id := w.NewID()
	body := fmt.Sprintf("Received: from c by b with ESMTPSA id %s; now\r\n%s", id, message)
	return Submission{ID: id, Account: account, Envelope: mail.Envelope{From: string(account) + "@x.example", To: to}, MessageID: "<m1@client.example>",
		ClientDigest: func() [32]byte { return [32]byte{1} }}, strings.NewReader(body)
}

// send submits and says that the client has read the answer.
func (w *world) send(account mail.AccountID, to ...string) (Result, error) {
	s, r := w.submission(account, to...)
	res, err := w.Submit(context.Background(), s, r)
	w.Answered(s.ID, true)
	return res, err
}

// until waits for a condition that something running makes true.
func (w *world) until(what string, cond func() bool) {
	w.t.Helper()
	deadline := time.After(10 * time.Second)
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for !cond() {
		select {
		case <-tick.C:
		case <-deadline:
			list, _ := w.Queue().List(context.Background(), Filter{})
			short := ""
			for _, e := range list {
				short += fmt.Sprintf("\n%s %s next %v after %d: %s", e.ID, e.State, e.NextAt, e.Attempts, e.Reason)
			}
			w.t.Fatalf("never came: %s; the queue at %v:%s", what, w.clock(), short)
		}
	}
}

func (w *world) in(id ID, s State) func() bool {
	return func() bool {
		e, err := w.Queue().Show(context.Background(), id)
		return err == nil && e.State == s
	}
}

func (w *world) empty() bool {
	list, err := w.Queue().List(context.Background(), Filter{})
	return err == nil && len(list) == 0
}

func (w *world) copies(account mail.AccountID) int { return len(w.clouds[account].Deliveries()) }

func failure(c mailerr.Class) *mailerr.Error {
	return &mailerr.Error{Class: c, Status: mailerr.Status{Subject: 4, Detail: 1}, Op: "test", Text: "because of the test"}
}

func lost() *mailerr.Error {
	e := failure(mailerr.Temporary)
	e.Unsure = true
	return e
}

func TestSentInsideOfTheClientsWaitAndItsBodyIsGone(t *testing.T) {
	w := newWorld(t, nil)
	for _, size := range []int{10, inRow, inRow + 1, 3 << 20} {
		s, _ := w.submission("a", "r@y.example")
		raw := append([]byte("Message-ID: <m>\r\n\r\n"), bytes.Repeat([]byte("x"), size)...)
		res, err := w.Submit(t.Context(), s, bytes.NewReader(raw))
		if err != nil || res.State != Sent {
			t.Fatalf("%+v, %v", res, err)
		}
		d := w.clouds["a"].Deliveries()
		if got := d[len(d)-1]; !bytes.Equal(got.Raw, raw) || got.To != "r@y.example" {
			t.Errorf("%d bytes: the copy has %d", len(raw), len(got.Raw))
		}
		w.Answered(s.ID, true)
		w.until("recorded", w.in(res.ID, Sent))
	}
	w.until("bodies gone", func() bool {
		var n int
		err := w.db.QueryRow("SELECT count(*) FROM bodies").Scan(&n)
		files, ferr := os.ReadDir(filepath.Join(w.dir, "spool"))
		return err == nil && ferr == nil && n == 0 && len(files) == 0
	})
}

func TestLostAnswerIsLookedUpAndNeverSentTwice(t *testing.T) {
	w := newWorld(t, nil)
	w.clouds["a"].Fail(memory.Commit, memory.Fault{Err: lost(), Act: true, Times: 1})
	res, err := w.send("a", "r@y.example")
	if err != nil || res.State != Queued {
		t.Fatalf("%+v, %v", res, err)
	}
	w.until("unsure", w.in(res.ID, Unsure))
	w.pass(time.Minute)
	if n := w.clouds["a"].Calls(memory.Find); n != 0 {
		t.Errorf("looked up %d times before it had settled", n)
	}
	w.pass(2 * time.Minute)
	w.until("sent", w.in(res.ID, Sent))
	if n := w.copies("a"); n != 1 {
		t.Errorf("%d copies", n)
	}
}

func TestUnsureButNotSentGoesOutWithItsHandle(t *testing.T) {
	w := newWorld(t, nil)
	w.clouds["a"].Fail(memory.Commit, memory.Fault{Err: lost(), Times: 1})
	res, err := w.send("a", "r@y.example")
	if err != nil {
		t.Fatal(err)
	}
	w.until("unsure", w.in(res.ID, Unsure))
	w.pass(3 * time.Minute)
	w.until("sent", w.in(res.ID, Sent))
	if n, p := w.copies("a"), w.clouds["a"].Calls(memory.Prepare); n != 1 || p != 1 {
		t.Errorf("%d copies after %d drafts", n, p)
	}
}

func TestUnsureAtPrepareIsClearedUpBeforeTheNextDraft(t *testing.T) {
	w := newWorld(t, nil)
	w.clouds["a"].Fail(memory.Prepare, memory.Fault{Err: lost(), Act: true, Times: 1})
	res, err := w.send("a", "r@y.example")
	if err != nil {
		t.Fatal(err)
	}
	w.until("waiting", w.in(res.ID, Queued))
	w.pass(2 * time.Minute)
	w.until("sent", w.in(res.ID, Sent))
	if n, d := w.copies("a"), w.clouds["a"].Staged(); n != 1 || d != 0 {
		t.Errorf("%d copies, %d drafts left behind", n, d)
	}
}

// blind is a provider that cannot look anything up.
func blind(c *memory.Cloud) *providers.Account {
	c.Staging = false
	a := c.Account()
	a.Sent = nil
	a.Traits.OneStep = true
	return a
}

func TestWithoutALookUpThePolicyDecides(t *testing.T) {
	for _, resend := range []bool{false, true} {
		cloud := memory.New()
		w := newWorld(t, func(a *Account) {
			if a.ID == "a" {
				a.Provider, a.Resend = blind(cloud), resend
			}
		})
		cloud.Fail(memory.Commit, memory.Fault{Err: lost(), Act: true, Times: 1})
		res, err := w.send("a", "r@y.example")
		if err != nil {
			t.Fatal(err)
		}
		w.until("unsure", w.in(res.ID, Unsure))
		w.pass(3 * time.Minute)
		if resend {
			w.until("sent again", w.in(res.ID, Sent))
			continue
		}
		w.until("held for an operator", func() bool {
			e, err := w.Queue().Show(t.Context(), res.ID)
			return err == nil && e.State == Unsure && e.NextAt == nil && e.Stuck() && strings.Contains(e.Reason, "queue retry")
		})
		if n := len(cloud.Deliveries()); n != 1 {
			t.Errorf("%d copies while nobody knows", n)
		}
		if err := w.Queue().Retry(t.Context(), res.ID); err != nil {
			t.Fatal(err)
		}
		w.pass(time.Second)
		w.until("sent as the operator said", w.in(res.ID, Sent))
	}
}

func TestRefusalInTheWaitLeavesNothingAndLaterComesBack(t *testing.T) {
	w := newWorld(t, nil)
	w.clouds["a"].Fail(memory.Commit, memory.Fault{Err: failure(mailerr.Permanent), Times: 1})
	_, err := w.send("a", "r@y.example")
	if mailerr.Of(err).Class != mailerr.Permanent {
		t.Fatalf("%v", err)
	}
	if all, err := w.Queue().List(t.Context(), Filter{}); err != nil || len(all) != 0 || w.clouds["a"].Staged() != 0 {
		t.Errorf("kept %+v, %d drafts, %v", all, w.clouds["a"].Staged(), err)
	}
	w.clouds["a"].Fail(memory.Commit, memory.Fault{Err: failure(mailerr.Temporary), Times: 1})
	w.clouds["a"].Fail(memory.Commit, memory.Fault{Err: failure(mailerr.Permanent), Times: 1})
	res, err := w.send("a", "r@y.example", "s@y.example")
	if err != nil {
		t.Fatal(err)
	}
	w.until("waiting", w.in(res.ID, Queued))
	w.pass(2 * time.Minute)
	w.until("dead letter", w.in(res.ID, Dead))
	reports := w.clouds["a"].Reports()
	if len(reports) != 1 {
		t.Fatalf("%d reports", len(reports))
	}
	for _, want := range []string{"Final-Recipient: rfc822; r@y.example\r\nAction: failed\r\nStatus: 5.4.1\r\n", "s@y.example", "because of the test", string(res.ID), "In-Reply-To: <m1@client.example>", "Subject: x\r\n", "multipart/report"} {
		if !strings.Contains(string(reports[0].Raw), want) {
			t.Errorf("no %q in\n%s", want, reports[0].Raw)
		}
	}
	if w.copies("a") != 0 {
		t.Error("and yet it was sent")
	}
}

func TestNullSenderIsNeverAnsweredAndOldMailIsGivenUp(t *testing.T) {
	w := newWorld(t, nil)
	w.clouds["a"].Fail(memory.Commit, memory.Fault{Err: failure(mailerr.Temporary)})
	s, r := w.submission("a", "r@y.example")
	s.Envelope.From = ""
	res, err := w.Submit(t.Context(), s, r)
	if err != nil {
		t.Fatal(err)
	}
	w.until("waiting", w.in(res.ID, Queued))
	// A laptop that slept for a week, and whose network is not up yet, gives nothing up.
	calls := w.clouds["a"].Calls(memory.Commit)
	w.pass(6 * 24 * time.Hour)
	w.until("tried again", func() bool { return w.clouds["a"].Calls(memory.Commit) > calls })
	w.until("waiting on", func() bool {
		e, err := w.Queue().Show(t.Context(), res.ID)
		return err == nil && e.State == Queued && e.NextAt != nil && e.NextAt.After(w.clock())
	})
	for range 8 {
		w.pass(15 * time.Minute)
		w.until("the next look", func() bool { return len(w.kick) == 0 })
	}
	w.until("dead letter", func() bool { w.pass(10 * time.Minute); return w.in(res.ID, Dead)() })
	if n := len(w.clouds["a"].Reports()); n != 0 {
		t.Errorf("%d reports", n)
	}
	if e, _ := w.Queue().Show(t.Context(), res.ID); !e.Stuck() {
		t.Error("a dead letter is not shown as stuck")
	}
	// An operator may still have it sent, or delete it.
	w.clouds["a"].Reset()
	if err := w.Queue().Retry(t.Context(), res.ID); err != nil {
		t.Fatal(err)
	}
	w.pass(time.Second)
	w.until("sent", w.in(res.ID, Sent))
}

func TestAccountTroubleParksTheAccountBouncesNothingAndHealsByItself(t *testing.T) {
	for _, class := range []mailerr.Class{mailerr.Auth, mailerr.Quota} {
		w := newWorld(t, nil)
		w.clouds["a"].Fail(memory.Commit, memory.Fault{Err: failure(class)})
		for range 10 {
			if _, err := w.send("a", "r@y.example"); err != nil {
				t.Fatal(err)
			}
		}
		w.until("parked", func() bool { p, err := w.Queue().Parks(t.Context()); return err == nil && len(p) == 1 })
		if res, err := w.send("b", "r@y.example"); err != nil || res.State != Sent {
			t.Errorf("the other account: %+v, %v", res, err)
		}
		// Weeks go by: probes, not a storm, and no bounce.
		for range 30 {
			before := w.clouds["a"].Calls(memory.Commit)
			w.pass(24 * time.Hour)
			w.until("a probe", func() bool { return w.clouds["a"].Calls(memory.Commit) > before })
			w.until("its end", func() bool {
				w.Outbox.mu.Lock()
				defer w.Outbox.mu.Unlock()
				return w.accounts["a"].inFlight == 0
			})
		}
		if n := w.clouds["a"].Calls(memory.Commit); n > 50 {
			t.Errorf("%d attempts while the account was parked", n)
		}
		w.clouds["a"].Reset()
		w.pass(24 * time.Hour)
		w.until("one sent", func() bool { return w.copies("a") > 0 })
		w.until("all sent", func() bool { w.pass(time.Second); return w.empty() })
		if p, err := w.Queue().Parks(t.Context()); err != nil || len(p) != 0 || len(w.clouds["a"].Reports()) != 0 || w.copies("a") != 10 {
			t.Errorf("parks %v, %v; %d reports, %d copies", p, err, len(w.clouds["a"].Reports()), w.copies("a"))
		}
	}
}

func TestThrottledAccountIsLeftAloneUntilItsTime(t *testing.T) {
	w := newWorld(t, nil)
	e := failure(mailerr.Throttled)
	e.RetryAt = w.clock().Add(10 * time.Minute)
	w.clouds["a"].Fail(memory.Commit, memory.Fault{Err: e, Times: 1})
	first, err := w.send("a", "r@y.example")
	if err != nil {
		t.Fatal(err)
	}
	w.until("waiting", w.in(first.ID, Queued))
	second, err := w.send("a", "s@y.example")
	if err != nil || second.State != Queued {
		t.Fatalf("%+v, %v", second, err)
	}
	w.pass(9 * time.Minute)
	if n := w.clouds["a"].Calls(memory.Commit); n != 1 {
		t.Errorf("%d requests before the time that the cloud named", n)
	}
	w.pass(2 * time.Minute)
	w.until("first", w.in(first.ID, Sent))
	w.until("second", w.in(second.ID, Sent))
}

func TestLongListsAreSplitAndPartialRefusalsComeBackAlone(t *testing.T) {
	w := newWorld(t, func(a *Account) { a.Provider.Traits.MaxRecipients = 100 })
	var to []string
	for i := range 250 {
		to = append(to, fmt.Sprintf("r%d@y.example", i))
	}
	w.clouds["a"].Refuse("r150@y.example", failure(mailerr.Permanent))
	w.clouds["a"].Refuse("r160@y.example", failure(mailerr.Temporary))
	res, err := w.send("a", to...)
	if err != nil {
		t.Fatal(err)
	}
	w.until("all but two", func() bool { return w.copies("a") == 248 })
	w.clouds["a"].Reset()
	w.pass(time.Hour)
	w.until("dead letter for the refused one", w.in(res.ID, Dead))
	seen := map[string]int{}
	for _, d := range w.clouds["a"].Deliveries() {
		seen[d.To]++
	}
	for i, r := range to {
		want := 1
		if i == 150 {
			want = 0
		}
		if seen[r] != want {
			t.Errorf("%s got %d copies, want %d", r, seen[r], want)
		}
	}
	if rep := w.clouds["a"].Reports(); len(rep) != 1 || !strings.Contains(string(rep[0].Raw), "r150@") || strings.Contains(string(rep[0].Raw), "r160@") {
		t.Errorf("%d reports: %s", len(rep), rep)
	}
}

func TestResubmissionAfterAnUnreadAnswerIsAnsweredOnceAndEverythingElseIsDelivered(t *testing.T) {
	w := newWorld(t, nil)
	submit := func(read bool, mark byte, to string) Result {
		t.Helper()
		s, r := w.submission("a", to)
		s.ClientDigest = func() [32]byte { return [32]byte{mark} }
		res, err := w.Submit(t.Context(), s, r)
		if err != nil {
			t.Fatal(err)
		}
		w.Answered(s.ID, read)
		return res
	}
	first := submit(false, 1, "r@y.example")
	if again := submit(true, 1, "r@y.example"); again.State != Duplicate || again.ID != first.ID {
		t.Errorf("resubmitted: %+v, first %+v", again, first)
	}
	if third := submit(true, 1, "r@y.example"); third.State != Sent {
		t.Errorf("a second resubmission: %+v", third)
	}
	for _, c := range []struct {
		read bool
		mark byte
		to   string
	}{{true, 2, "r@y.example"}, {true, 2, "r@y.example"}, {false, 2, "r@y.example"}, {true, 2, "other@y.example"}, {true, 3, "r@y.example"}} {
		if res := submit(c.read, c.mark, c.to); res.State != Sent {
			t.Errorf("%+v: %+v", c, res)
		}
	}
	// After a restart nobody knows what was read; a clean stop has recorded it.
	unread := submit(false, 9, "r@y.example")
	submit(true, 8, "r@y.example")
	n := w.copies("a")
	w.stop()
	w.open()
	if res := submit(true, 9, "r@y.example"); res.ID != unread.ID {
		t.Errorf("after a restart: %+v", res)
	}
	if res := submit(true, 8, "r@y.example"); res.State != Sent {
		t.Errorf("read before the restart: %+v", res)
	}
	if w.copies("a") != n+1 {
		t.Errorf("%d copies, want %d", w.copies("a"), n+1)
	}
	late := submit(false, 7, "r@y.example")
	w.pass(2 * window)
	if res := submit(true, 7, "r@y.example"); res.ID == late.ID {
		t.Error("recognised after hours")
	}
}

func TestDeliveredAccountsAnswerOnlyWhatTheCloudHas(t *testing.T) {
	w := newWorld(t, func(a *Account) { a.Delivered = true })
	if res, err := w.send("a", "r@y.example"); err != nil || res.State != Sent {
		t.Fatalf("%+v, %v", res, err)
	}
	for _, class := range []mailerr.Class{mailerr.Temporary, mailerr.Permanent, mailerr.Unknown} {
		w.clouds["a"].Fail(memory.Commit, memory.Fault{Err: failure(class), Times: 1})
		if _, err := w.send("a", "r@y.example"); mailerr.Of(err).Class != class {
			t.Errorf("%v: %v", class, err)
		}
		if list, err := w.Queue().List(t.Context(), Filter{}); err != nil || len(list) != 0 || w.clouds["a"].Staged() != 0 {
			t.Errorf("%v: kept %+v, %v, %d drafts", class, list, err, w.clouds["a"].Staged())
		}
	}
	// An unsure one is kept, and its resubmission is not sent a second time.
	w.clouds["a"].Fail(memory.Commit, memory.Fault{Err: lost(), Act: true, Times: 1})
	s, r := w.submission("a", "r@y.example")
	_, err := w.Submit(t.Context(), s, r)
	w.Answered(s.ID, false)
	if err == nil {
		t.Fatal("250 for a message that the cloud may not have")
	}
	s2, r2 := w.submission("a", "r@y.example")
	_, err = w.Submit(t.Context(), s2, r2)
	if mailerr.Of(err).Class != mailerr.Temporary {
		t.Errorf("resubmitted while unsure: %v", err)
	}
	w.pass(3 * time.Minute)
	w.until("found sent", w.in(s.ID, Sent))
	if n := w.copies("a"); n != 2 {
		t.Errorf("%d copies in all, want 2", n)
	}
}

func TestFullDiskRefusesForNowAndLosesNothing(t *testing.T) {
	w := newWorld(t, nil)
	w.freeDisk = func(string) (int64, error) { return 0, nil }
	_, err := w.send("a", "r@y.example")
	if e := mailerr.Of(err); e.Class != mailerr.Temporary || e.Code() != "4.3.1" {
		t.Fatalf("%v", err)
	}
	w.freeDisk = free
	if res, err := w.send("a", "r@y.example"); err != nil || res.State != Sent {
		t.Errorf("healed: %+v, %v", res, err)
	}
	// A reader that breaks leaves nothing either.
	boom := errors.New("connection reset")
	s, _ := w.submission("a", "r@y.example")
	if _, err := w.Submit(t.Context(), s, io.MultiReader(bytes.NewReader(make([]byte, 2*inRow)), &broken{boom})); !errors.Is(err, boom) {
		t.Errorf("%v", err)
	}
	w.until("recorded", w.empty)
	if files, err := os.ReadDir(filepath.Join(w.dir, "spool")); err != nil || len(files) != 0 {
		t.Errorf("left behind: %v, %v", files, err)
	}
}

type broken struct{ err error }

func (b *broken) Read([]byte) (int, error) { return 0, b.err }

func TestSlowCloudHoldsNobodyUp(t *testing.T) {
	w := newWorld(t, func(a *Account) { a.FirstAttempt = 50 * time.Millisecond })
	wait := make(chan struct{})
	w.clouds["a"].Fail(memory.Commit, memory.Fault{Wait: wait, Times: 4})
	var ids []ID
	for range 20 { // four slots are taken, the rest is answered at once
		res, err := w.send("a", "r@y.example")
		if err != nil || res.State != Queued {
			t.Fatalf("%+v, %v", res, err)
		}
		ids = append(ids, res.ID)
	}
	if res, err := w.send("b", "r@y.example"); err != nil || res.State != Sent {
		t.Errorf("the other account: %+v, %v", res, err)
	}
	close(wait)
	for _, id := range ids {
		w.until("sent", w.in(id, Sent))
	}
	if n := w.copies("a"); n != 20 {
		t.Errorf("%d copies", n)
	}
}

func TestOperatorsHoldReleaseDelete(t *testing.T) {
	w := newWorld(t, nil)
	w.clouds["a"].Fail(memory.Commit, memory.Fault{Err: failure(mailerr.Temporary)})
	res, err := w.send("a", "r@y.example")
	if err != nil {
		t.Fatal(err)
	}
	w.until("waiting", w.in(res.ID, Queued))
	other, err := OpenQueue(t.Context(), w.dir) // as another process does
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	w.until("not busy", func() bool { return other.Hold(t.Context(), res.ID) == nil })
	w.clouds["a"].Reset()
	w.pass(time.Hour)
	if e, err := other.Show(t.Context(), res.ID); err != nil || e.State != Held || w.copies("a") != 0 {
		t.Errorf("held: %+v, %v", e, err)
	}
	if err := other.Release(t.Context(), res.ID); err != nil {
		t.Fatal(err)
	}
	w.until("sent without being told", func() bool { w.pass(time.Second); return w.in(res.ID, Sent)() })
	if err := other.Retry(t.Context(), res.ID); err == nil {
		t.Error("a sent message can be sent again")
	}
	if err := other.Delete(t.Context(), res.ID); err != nil {
		t.Error(err)
	}
	if err := other.Delete(t.Context(), res.ID); err == nil {
		t.Error("deleted twice")
	}
}

func readerOf(head string, body []byte) io.Reader {
	return io.MultiReader(strings.NewReader(head), bytes.NewReader(body))
}
