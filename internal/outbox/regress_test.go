package outbox

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"mailbridge/internal/mailerr"
	"mailbridge/providers/memory"
)

func TestResubmissionOfAMessageInDoubtIsNeverSentTwice(t *testing.T) {
	for _, delivered := range []bool{false, true} {
		for _, read := range []bool{false, true} {
			w := newWorld(t, func(a *Account) { a.Delivered = delivered })
			w.clouds["a"].Fail(memory.Commit, memory.Fault{Err: lost(), Act: true, Times: 1})
			s, r := w.submission("a", "r@y.example")
			_, err := w.Submit(t.Context(), s, r)
			if (err != nil) != delivered {
				t.Fatalf("delivered %v: %v", delivered, err)
			}
			w.Answered(s.ID, read)
			w.until("unsure", w.in(s.ID, Unsure))
			for range 2 { // a client that hears 451 comes again and again
				s2, r2 := w.submission("a", "r@y.example")
				res, err := w.Submit(t.Context(), s2, r2)
				w.Answered(s2.ID, read)
				if delivered && mailerr.Of(err).Class != mailerr.Temporary || !delivered && (err != nil || res.ID != s.ID) {
					t.Fatalf("delivered %v, read %v: %+v, %v", delivered, read, res, err)
				}
				if !delivered {
					break
				}
			}
			w.pass(3 * time.Minute)
			w.until("found sent", w.in(s.ID, Sent))
			if delivered {
				s3, r3 := w.submission("a", "r@y.example")
				if res, err := w.Submit(t.Context(), s3, r3); err != nil || res.ID != s.ID {
					t.Errorf("after it was found: %+v, %v", res, err)
				}
			}
			if n := w.copies("a"); n != 1 {
				t.Errorf("delivered %v, read %v: %d copies", delivered, read, n)
			}
		}
	}
}

func TestQueueDrainsWithoutWaitingForTheClock(t *testing.T) {
	w := newWorld(t, func(a *Account) { a.FirstAttempt = 0 })
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 50 {
				if _, err := w.send("a", "r@y.example"); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	w.until("all sent", func() bool { return w.copies("a") == 200 })
}

func TestRefusedPartOfALongListDoesNotCondemnTheRest(t *testing.T) {
	w := newWorld(t, func(a *Account) { a.Provider.Traits.MaxRecipients = 2 })
	w.clouds["a"].Fail(memory.Commit, memory.Fault{Err: failure(mailerr.Permanent), Times: 1})
	res, err := w.send("a", "r1@y.example", "r2@y.example", "r3@y.example")
	if err != nil {
		t.Fatal(err)
	}
	w.until("dead letter for the first two", w.in(res.ID, Dead))
	d := w.clouds["a"].Deliveries()
	if len(d) != 1 || d[0].To != "r3@y.example" {
		t.Errorf("delivered: %+v", d)
	}
	rep := w.clouds["a"].Reports()
	if len(rep) != 1 || !strings.Contains(string(rep[0].Raw), "r1@") || strings.Contains(string(rep[0].Raw), "r3@") {
		t.Errorf("reports: %s", rep)
	}
}

func TestDeletingAMessageUnderWayCostsTheAccountNoSlot(t *testing.T) {
	w := newWorld(t, func(a *Account) { a.FirstAttempt, a.Provider.Traits.Parallel = time.Millisecond, 1 })
	wait := make(chan struct{})
	w.clouds["a"].Fail(memory.Commit, memory.Fault{Err: lost(), Times: 1})
	w.clouds["a"].Fail(memory.Find, memory.Fault{Wait: wait, Times: 1})
	res, err := w.send("a", "r@y.example")
	if err != nil {
		t.Fatal(err)
	}
	w.until("unsure", w.in(res.ID, Unsure))
	w.pass(3 * time.Minute)
	w.until("being looked up", func() bool { return w.clouds["a"].Calls(memory.Find) == 1 })
	if err := w.Queue().Delete(t.Context(), res.ID); err != nil {
		t.Fatal(err)
	}
	close(wait)
	w.until("the slot is free", func() bool {
		res, err := w.send("a", "s@y.example")
		return err == nil && res.State == Sent
	})
}

func TestHeldMessageIsNotSentByAnAttemptThatWasAboutToBegin(t *testing.T) {
	w := newWorld(t, nil)
	w.clouds["a"].Fail(memory.Commit, memory.Fault{Err: failure(mailerr.Temporary), Times: 1})
	res, err := w.send("a", "r@y.example")
	if err != nil {
		t.Fatal(err)
	}
	w.until("waiting", w.in(res.ID, Queued))
	it, err := w.load(t.Context(), res.ID) // as an attempt does first
	if err != nil {
		t.Fatal(err)
	}
	w.until("held", func() bool { return w.Queue().Hold(t.Context(), res.ID) == nil })
	it.attempts++
	w.begin(w.accounts["a"], it)
	if err := w.w.do(it.claim); err == nil {
		t.Error("the attempt overwrote the hold")
	}
	if e, err := w.Queue().Show(t.Context(), res.ID); err != nil || e.State != Held {
		t.Errorf("%+v, %v", e, err)
	}
}

func TestLargeMessageSentBeforeACrashIsNoDeadLetter(t *testing.T) {
	w := newWorld(t, nil)
	w.clouds["a"].Fail(memory.Commit, memory.Fault{Err: lost(), Act: true, Times: 1})
	s, _ := w.submission("a", "r@y.example")
	raw := append([]byte("Received: by b id "+string(s.ID)+";\r\nMessage-ID: <m1@client.example>\r\n\r\n"), bytes.Repeat([]byte("x"), 2*inRow)...)
	if _, err := w.Submit(t.Context(), s, bytes.NewReader(raw)); err != nil {
		t.Fatal(err)
	}
	w.until("unsure", w.in(s.ID, Unsure))
	if err := os.Remove(w.spoolPath(s.ID)); err != nil {
		t.Fatal(err)
	}
	w.pass(3 * time.Minute)
	w.until("found sent", w.in(s.ID, Sent))
}

func TestFailuresOfAttemptsUnderWayTogetherCountOnce(t *testing.T) {
	w := newWorld(t, func(a *Account) { a.FirstAttempt = time.Millisecond })
	wait := make(chan struct{})
	w.clouds["a"].Fail(memory.Commit, memory.Fault{Err: failure(mailerr.Auth), Wait: wait, Times: 4})
	for range 4 {
		if _, err := w.send("a", "r@y.example"); err != nil {
			t.Fatal(err)
		}
	}
	w.until("four under way", func() bool { return w.clouds["a"].Calls(memory.Commit) == 4 })
	close(wait)
	w.until("parked", func() bool { p, err := w.Queue().Parks(t.Context()); return err == nil && len(p) == 1 })
	w.until("all recorded", func() bool {
		w.Outbox.mu.Lock()
		defer w.Outbox.mu.Unlock()
		return w.accounts["a"].inFlight == 0
	})
	p, err := w.Queue().Parks(t.Context())
	if err != nil || p[0].Until.Sub(w.clock()) > firstPark {
		t.Errorf("parked for %v, %v", p[0].Until.Sub(w.clock()), err)
	}
}

func BenchmarkSubmit(b *testing.B) {
	for _, clients := range []int{1, 8, 64} {
		b.Run(fmt.Sprint(clients), func(b *testing.B) {
			w := newWorld(b, func(a *Account) { a.Provider.Traits.OneStep, a.Provider.Traits.Parallel = true, 128 })
			body := bytes.Repeat([]byte("x"), 10_000)
			b.ReportAllocs()
			b.SetParallelism((clients + 1) / 2)
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					s, _ := w.submission("a", "r@y.example")
					s.ClientDigest = nil
					if _, err := w.Submit(b.Context(), s, bytes.NewReader(body)); err != nil {
						b.Error(err)
						return
					}
					w.Answered(s.ID, true)
				}
			})
		})
	}
}

func TestRepetitionIsAnsweredUntilItsAnswerIsRead(t *testing.T) {
	w := newWorld(t, nil)
	s, r := w.submission("a", "r@y.example")
	if _, err := w.Submit(t.Context(), s, r); err != nil {
		t.Fatal(err)
	}
	w.Answered(s.ID, false)
	for _, read := range []bool{false, false, true} {
		s2, r2 := w.submission("a", "r@y.example")
		res, err := w.Submit(t.Context(), s2, r2)
		if err != nil || res.State != Duplicate || res.ID != s.ID {
			t.Fatalf("%+v, %v", res, err)
		}
		w.Answered(s2.ID, read)
		// A crash forgets what is in memory.
		w.stop()
		w.open()
	}
	if res, err := w.send("a", "r@y.example"); err != nil || res.State != Sent || res.ID == s.ID {
		t.Errorf("after the answer was read it is a message of its own: %+v, %v", res, err)
	}
	if n := w.copies("a"); n != 2 {
		t.Errorf("%d copies", n)
	}
}

func TestClientThatLeavesAndComesBackBeforeItsAnswerIsNoSecondMessage(t *testing.T) {
	w := newWorld(t, nil)
	wait := make(chan struct{})
	w.clouds["a"].Fail(memory.Commit, memory.Fault{Wait: wait, Times: 1})
	s, r := w.submission("a", "r@y.example")
	var wg sync.WaitGroup
	wg.Go(func() {
		if _, err := w.Submit(context.Background(), s, r); err != nil {
			t.Error(err)
		}
		w.Answered(s.ID, false)
	})
	w.until("being sent", func() bool { return w.clouds["a"].Calls(memory.Commit) == 1 })
	w.Answered(s.ID, false) // it has gone
	s2, r2 := w.submission("a", "r@y.example")
	wg.Go(func() {
		if res, err := w.Submit(context.Background(), s2, r2); err != nil || res.ID != s.ID {
			t.Errorf("%+v, %v", res, err)
		}
		w.Answered(s2.ID, true)
	})
	w.until("back", func() bool {
		w.Outbox.mu.Lock()
		defer w.Outbox.mu.Unlock()
		return w.recentID[s2.ID] != nil
	})
	close(wait)
	wg.Wait()
	if n := w.copies("a"); n != 1 {
		t.Errorf("%d copies", n)
	}
}
