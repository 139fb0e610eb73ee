package outbox

import (
	"testing"
	"time"

	"mailbridge/internal/mailerr"
	"mailbridge/internal/pace"
	"mailbridge/providers/memory"
)

func TestThrottledWithoutATimeBacksOffForTheWholeMailbox(t *testing.T) {
	w := newWorld(t, func(a *Account) { a.FirstAttempt = 0 })
	w.clouds["a"].Fail(memory.Commit, memory.Fault{Err: failure(mailerr.Throttled), Times: 3})
	for range 50 {
		if _, err := w.send("a", "r@y.example"); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := w.send("b", "r@y.example"); err != nil {
		t.Fatal(err)
	}
	w.until("the other account's mail is sent", func() bool { return w.copies("b") == 1 })
	w.until("throttled", func() bool { return w.clouds["a"].Calls(memory.Commit) > 0 })
	// Those that were under way together may all be refused, and nobody after them.
	if n := w.clouds["a"].Calls(memory.Commit); n > w.accounts["a"].Provider.Traits.Parallel {
		t.Errorf("%d attempts of a throttled mailbox", n)
	}
	w.until("all sent", func() bool { w.pass(time.Minute); return w.copies("a") == 50 })
}

func TestMessagesPerMinuteAndDay(t *testing.T) {
	w := newWorld(t, nil)
	w.stop()
	for i := range w.opts.Accounts {
		w.opts.Accounts[i].Pace = pace.New(pace.Limits{MessagesPerMinute: 3, MessagesPerDay: 5}, w.clock)
	}
	w.open()
	for i := range 10 {
		res, err := w.send("a", "r@y.example")
		if err != nil || (res.State == Sent) != (i < 3) {
			t.Fatalf("message %d: %+v, %v", i, res, err)
		}
	}
	w.pass(61 * time.Second)
	w.until("five a day", func() bool { return w.copies("a") == 5 })
	w.pass(61 * time.Second)
	// A restart is no way around it.
	w.stop()
	w.opts.Accounts[0].Pace = pace.New(pace.Limits{MessagesPerDay: 5}, w.clock)
	w.open()
	w.pass(time.Minute)
	if res, err := w.send("a", "r@y.example"); err != nil || res.State != Queued {
		t.Errorf("%+v, %v", res, err)
	}
	if n := w.copies("a"); n != 5 {
		t.Errorf("%d copies on the first day", n)
	}
	w.pass(25 * time.Hour)
	w.until("five more", func() bool { return w.copies("a") == 10 })
	w.pass(25 * time.Hour)
	w.until("the last", func() bool { return w.copies("a") == 11 })
}

func TestAccountsOnOneMailboxShareItsPace(t *testing.T) {
	w := newWorld(t, nil)
	w.stop()
	shared := pace.New(pace.Limits{}, w.clock)
	w.opts.Accounts[0].Pace, w.opts.Accounts[1].Pace = shared, shared
	w.open()
	e := failure(mailerr.Throttled)
	e.RetryAt = w.clock().Add(10 * time.Minute)
	w.clouds["a"].Fail(memory.Commit, memory.Fault{Err: e, Times: 1})
	if res, err := w.send("a", "r@y.example"); err != nil || res.State != Queued {
		t.Fatalf("%+v, %v", res, err)
	}
	w.until("throttled", func() bool { return shared.Until().After(w.clock()) })
	if res, err := w.send("b", "r@y.example"); err != nil || res.State != Queued || w.clouds["b"].Calls(memory.Commit) != 0 {
		t.Errorf("%+v, %v", res, err)
	}
	w.pass(11 * time.Minute)
	w.until("both sent", func() bool { return w.copies("a") == 1 && w.copies("b") == 1 })
}
