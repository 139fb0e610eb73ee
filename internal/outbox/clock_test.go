package outbox

import (
	"testing"
	"time"

	"mailbridge/internal/mailerr"
	"mailbridge/internal/pace"
	"mailbridge/providers/memory"
)

func TestClockSetBackMakesNothingWaitLonger(t *testing.T) {
	for _, class := range []mailerr.Class{mailerr.Temporary, mailerr.Throttled, mailerr.Auth, mailerr.Quota} {
		for _, back := range []time.Duration{2 * time.Minute, 24 * time.Hour, 20 * 365 * 24 * time.Hour} {
			w := newWorld(t, nil)
			w.stop()
			w.opts.Accounts[0].Pace = pace.New(pace.Limits{MessagesPerDay: 1}, w.clock)
			w.open()
			e := failure(class)
			if class == mailerr.Throttled {
				e.RetryAt = w.clock().Add(90 * time.Second)
			}
			w.clouds["a"].Fail(memory.Commit, memory.Fault{Err: e, Times: 1})
			res, err := w.send("a", "r@y.example")
			if err != nil || res.State != Queued {
				t.Fatalf("%+v, %v", res, err)
			}
			w.until("its end", func() bool {
				w.Outbox.mu.Lock()
				defer w.Outbox.mu.Unlock()
				return w.accounts["a"].inFlight == 0
			})
			w.pass(-back)
			w.until("noticed", func() bool {
				w.Outbox.mu.Lock()
				defer w.Outbox.mu.Unlock()
				return w.steady.Equal(w.now)
			})
			wait := 2 * time.Minute
			if class == mailerr.Quota {
				wait = quotaPark
			}
			w.pass(wait)
			w.until("sent", w.in(res.ID, Sent))
		}
	}
}
