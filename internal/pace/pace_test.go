package pace

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"
)

func TestRequestsAtOnceInTheOrderOfTheirComing(t *testing.T) {
	for _, limit := range []int{1, 4} {
		synctest.Test(t, func(t *testing.T) {
			s := New(Limits{Concurrent: limit}, time.Now)
			var mu sync.Mutex
			running, most := 0, 0
			var order []int
			for i := range 20 {
				go func() {
					release, err := s.Request(t.Context(), 0)
					if err != nil {
						t.Error(err)
						return
					}
					mu.Lock()
					running++
					most = max(most, running)
					order = append(order, i)
					mu.Unlock()
					time.Sleep(time.Second)
					mu.Lock()
					running--
					mu.Unlock()
					release()
				}()
				synctest.Wait()
			}
			time.Sleep(time.Minute)
			synctest.Wait()
			if most != limit || len(order) != 20 || limit == 1 && !slices.IsSorted(order) {
				t.Errorf("%d at once, in the order %v", most, order)
			}
		})
	}
}

func TestWaitingEndsWithTheContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := New(Limits{Concurrent: 1}, time.Now)
		release, err := s.Request(t.Context(), 0)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if _, err := s.Request(ctx, 0); !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
		release()
		s.NotBefore(time.Now().Add(time.Second))
		ctx, cancel = context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		if _, err := s.Request(ctx, 0); !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
		if _, err := s.Request(t.Context(), 0); err != nil {
			t.Error("the slot of one that gave up is not free:", err)
		}
	})
}

func TestTimesThatTheCloudNames(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := New(Graph(), time.Now)
		// A time that is near is waited for.
		s.NotBefore(time.Now().Add(1500 * time.Millisecond))
		start := time.Now()
		release, err := s.Request(t.Context(), 10)
		if err != nil || time.Since(start) != 1500*time.Millisecond {
			t.Errorf("%v after %v", err, time.Since(start))
		}
		release()
		// One that is far is told, and nothing waits.
		s.NotBefore(time.Now().Add(time.Minute))
		s.NotBefore(time.Now().Add(time.Second)) // an earlier one changes nothing
		start = time.Now()
		_, err = s.Request(t.Context(), 10)
		w, ok := errors.AsType[*Wait](fmt.Errorf("post: %w", err))
		if !ok || w.At.Sub(start) != time.Minute || time.Since(start) != 0 {
			t.Errorf("%v after %v", err, time.Since(start))
		}
		if s.Begin() || s.Until().Sub(start) != time.Minute {
			t.Error("a message may begin")
		}
		s.Clear()
		if !s.Begin() {
			t.Error("no message may begin after Clear")
		}
		s.End(true)
		// Whatever is named, a day is the most.
		s.NotBefore(time.Now().AddDate(10, 0, 0))
		if d := time.Until(s.Until()); d != longest {
			t.Errorf("%v", d)
		}
	})
}

func TestAClockSetBackDoesNotStopTheMailbox(t *testing.T) {
	now := time.Date(2040, 1, 1, 0, 0, 0, 0, time.UTC)
	s := New(Limits{RequestsPer10Min: 1, MessagesPerDay: 1}, func() time.Time { return now })
	s.NotBefore(now.Add(time.Hour))
	s.Begin()
	s.End(true)
	s.requests.add(now, 1)
	now = now.AddDate(-14, 0, 0)
	if !s.Begin() {
		t.Error("no message may begin, as", s.Until())
	}
	if at, why := s.count(1); !at.IsZero() {
		t.Error(at, why)
	}
}

func TestMessagesUnderWayCountAgainstTheLimit(t *testing.T) {
	now := time.Date(2040, 1, 1, 0, 0, 0, 0, time.UTC)
	s := New(Limits{MessagesPerMinute: 3}, func() time.Time { return now })
	for range 3 {
		if !s.Begin() {
			t.Fatal("three a minute")
		}
	}
	if s.Begin() {
		t.Error("a fourth began while three are under way")
	}
	s.End(false)
	if !s.Begin() {
		t.Error("one that was not sent counts")
	}
	s.End(true)
	s.End(true)
	s.End(true)
	if s.Begin() {
		t.Error("a fourth in the minute")
	}
	now = s.Until()
	if d := now.Sub(time.Date(2040, 1, 1, 0, 0, 0, 0, time.UTC)); d < time.Minute || d > 61*time.Second {
		t.Errorf("the next after %v", d)
	}
	if !s.Begin() {
		t.Error("none after a minute")
	}
	s = New(Limits{MessagesPerDay: 10}, func() time.Time { return now })
	for range 10 {
		s.Seed(now.Add(-23 * time.Hour))
	}
	if s.Begin() {
		t.Error("what an earlier process sent does not count")
	}
	now = now.Add(73 * time.Minute)
	if !s.Begin() {
		t.Error("it counts for longer than a day")
	}
}

func TestUploadLargerThanTheLimitGoesIntoAnEmptyWindow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := New(Limits{UploadPer5Min: 100}, time.Now)
		for range 2 {
			release, err := s.Request(t.Context(), 1000)
			if err != nil {
				t.Fatal(err)
			}
			release()
			_, err = s.Request(t.Context(), 1)
			w, ok := errors.AsType[*Wait](err)
			if !ok || time.Until(w.At) > 5*time.Minute+3*time.Second {
				t.Fatal(err)
			}
			time.Sleep(time.Until(w.At))
		}
	})
}

// TestWindowAgainstALog compares the window with a log of everything: never more than the limit in any span, and
// never refused for longer than a part beyond what the log would.
func TestWindowAgainstALog(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		limit := rapid.Int64Range(1, 50).Draw(t, "limit")
		w := window{limit: limit, span: 10 * time.Minute}
		now := time.Date(2040, 1, 1, 0, 0, 0, 0, time.UTC)
		type entry struct {
			at time.Time
			n  int64
		}
		var log []entry
		sum := func(at time.Time, span time.Duration) (n int64) {
			for _, e := range log {
				if at.Sub(e.at) < span {
					n += e.n
				}
			}
			return n
		}
		for range rapid.IntRange(1, 200).Draw(t, "steps") {
			now = now.Add(time.Duration(rapid.Int64Range(0, int64(time.Minute)).Draw(t, "pass")))
			n := rapid.Int64Range(1, limit).Draw(t, "n")
			at := w.fits(now, n)
			if !at.After(now) {
				w.add(now, n)
				log = append(log, entry{now, n})
				if got := sum(now, w.span); got > limit {
					t.Fatalf("%d in a span, %d allowed", got, limit)
				}
				continue
			}
			if sum(now, w.span+2*w.span/fineness)+n <= limit {
				t.Fatalf("refused although it would fit even with two parts more")
			}
			later := w
			later.parts = slices.Clone(w.parts)
			if again := later.fits(at, n); again.After(at) {
				t.Fatalf("promised for %v, and then for %v", at, again)
			}
		}
		if len(w.parts) > fineness+2 {
			t.Fatalf("%d parts", len(w.parts))
		}
	})
}
