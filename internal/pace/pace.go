// Package pace spreads what the bridge asks of one mailbox under one application, for sending and receiving
// together: requests at once, requests and uploaded bytes per time, messages per time, and the times that the
// cloud itself names. Every mailbox has a scheduler of its own, so that one that is throttled delays no other.
package pace

import (
	"context"
	"fmt"
	"sync"
	"time"
)

// Limits bounds a scheduler. Zero is no bound.
type Limits struct {
	Concurrent        int   // requests at once
	RequestsPer10Min  int   // requests in ten minutes
	UploadPer5Min     int64 // bytes of request bodies in five minutes
	MessagesPerMinute int
	MessagesPerDay    int // in any 24 hours
}

// Graph is what Microsoft documents for one application and one mailbox
// (https://learn.microsoft.com/graph/throttling-limits#outlook-service-limits).
func Graph() Limits {
	return Limits{Concurrent: 4, RequestsPer10Min: 10_000, UploadPer5Min: 150_000_000}
}

// patience is how long a request waits for a time that is near rather than come again.
const patience = 2 * time.Second

// longest bounds what a cloud may name: a slip of its clock must not stop a mailbox for a year.
const longest = 24 * time.Hour

// Wait says that nothing may be asked before At. Nothing was.
type Wait struct {
	At     time.Time
	Reason string
}

func (w *Wait) Error() string {
	return fmt.Sprintf("%s, not before %s", w.Reason, w.At.UTC().Format(time.RFC3339))
}

// Scheduler paces one mailbox. It is safe for concurrent use; those who wait for a free request are served in
// the order of their coming.
type Scheduler struct {
	now   func() time.Time
	slots chan struct{} // nil: no bound

	mu        sync.Mutex
	notBefore time.Time
	requests  window
	upload    window
	minute    window
	day       window
	open      int64 // messages under way
}

// New makes a scheduler.
func New(l Limits, now func() time.Time) *Scheduler {
	s := &Scheduler{now: now,
		requests: window{limit: int64(l.RequestsPer10Min), span: 10 * time.Minute},
		upload:   window{limit: l.UploadPer5Min, span: 5 * time.Minute},
		minute:   window{limit: int64(l.MessagesPerMinute), span: time.Minute},
		day:      window{limit: int64(l.MessagesPerDay), span: 24 * time.Hour},
	}
	if l.Concurrent > 0 {
		s.slots = make(chan struct{}, l.Concurrent)
	}
	return s
}

// Request waits until one request with a body of so many bytes may be made; release ends it. It fails with a
// *Wait when that is not soon.
func (s *Scheduler) Request(ctx context.Context, bytes int64) (release func(), err error) {
	if s.slots != nil {
		select {
		case s.slots <- struct{}{}:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	free := func() {
		if s.slots != nil {
			<-s.slots
		}
	}
	for {
		at, reason := s.count(max(bytes, 0))
		d := at.Sub(s.now())
		if d <= 0 {
			return free, nil
		}
		if d > patience {
			free()
			return nil, &Wait{At: at, Reason: reason}
		}
		timer := time.NewTimer(d)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			free()
			return nil, ctx.Err()
		}
	}
}

// count counts a request if it may be made now; else it tells when.
func (s *Scheduler) count(bytes int64) (at time.Time, reason string) {
	now := s.now()
	s.mu.Lock()
	defer s.mu.Unlock()
	at, reason = s.named(now)
	if t := s.requests.fits(now, 1); t.After(at) {
		at, reason = t, "the mailbox's requests for these ten minutes are used up"
	}
	if t := s.upload.fits(now, bytes); t.After(at) {
		at, reason = t, "the mailbox's uploads for these five minutes are used up"
	}
	if at.After(now) {
		return at, reason
	}
	s.requests.add(now, 1)
	s.upload.add(now, bytes)
	return time.Time{}, ""
}

// named is the time that the cloud has named, if it is still to come; the caller holds the lock.
func (s *Scheduler) named(now time.Time) (time.Time, string) {
	if s.notBefore.Sub(now) > longest {
		s.notBefore = now // the clock was set back
	}
	return s.notBefore, "the cloud wants us to wait"
}

// NotBefore notes a time that the cloud has named.
func (s *Scheduler) NotBefore(t time.Time) {
	now := s.now()
	s.mu.Lock()
	defer s.mu.Unlock()
	if t.Sub(now) > longest {
		t = now.Add(longest)
	}
	if t.After(s.notBefore) {
		s.notBefore = t
	}
}

// Clear forgets the times that the cloud has named: somebody wants it asked now.
func (s *Scheduler) Clear() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.notBefore = time.Time{}
}

// SetBack tells that the clock was set back: what was named and counted moves with it.
func (s *Scheduler) SetBack(by time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.notBefore.IsZero() {
		s.notBefore = s.notBefore.Add(-by)
	}
	for _, w := range []*window{&s.requests, &s.upload, &s.minute, &s.day} {
		for i := range w.parts {
			w.parts[i].at = w.parts[i].at.Add(-by)
		}
	}
}

// Until tells when the next message may begin; a time that is not in the future is now.
func (s *Scheduler) Until() time.Time {
	now := s.now()
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.until(now)
}

func (s *Scheduler) until(now time.Time) time.Time {
	at, _ := s.named(now)
	for _, w := range []*window{&s.minute, &s.day} {
		t := w.fits(now, s.open+1)
		if w.limit > 0 && s.open >= w.limit {
			t = now.Add(time.Second) // or when one of them ends, which its owner sees
		}
		if t.After(at) {
			at = t
		}
	}
	return at
}

// Begin reserves a message, if one may begin now.
func (s *Scheduler) Begin() bool {
	now := s.now()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.until(now).After(now) {
		return false
	}
	s.open++
	return true
}

// End ends what Begin reserved. Sent, or perhaps sent, it counts; else it does not.
func (s *Scheduler) End(sent bool) {
	now := s.now()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.open--
	if sent {
		s.minute.add(now, 1)
		s.day.add(now, 1)
	}
}

// Seed counts a message that an earlier process sent at t.
func (s *Scheduler) Seed(t time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.minute.add(t, 1)
	s.day.add(t, 1)
}

// CountsMessages reports whether messages per time are bounded.
func (s *Scheduler) CountsMessages() bool { return s.minute.limit > 0 || s.day.limit > 0 }

// window counts what happened in a sliding span of time, in parts, so that it needs little memory whatever the
// limit. It errs on the careful side by at most one part.
type window struct {
	limit int64 // 0: none, and nothing is counted
	span  time.Duration
	parts []part
	sum   int64
}

type part struct {
	at time.Time // of its first
	n  int64
}

// fineness is how many parts a span has.
const fineness = 120

// fits tells when n more fit. What is larger than the limit fits into an empty window.
func (w *window) fits(now time.Time, n int64) time.Time {
	if w.limit == 0 || n <= 0 {
		return time.Time{}
	}
	w.expire(now)
	if w.sum == 0 || w.sum+n <= w.limit {
		return time.Time{}
	}
	sum := w.sum
	for _, p := range w.parts {
		if sum -= p.n; sum == 0 || sum+n <= w.limit {
			return p.at.Add(w.span + w.span/fineness)
		}
	}
	return time.Time{}
}

func (w *window) add(now time.Time, n int64) {
	if w.limit == 0 || n <= 0 {
		return
	}
	w.expire(now)
	if k := len(w.parts); k > 0 && now.Sub(w.parts[k-1].at).Abs() < w.span/fineness {
		w.parts[k-1].n += n
	} else {
		w.parts = append(w.parts, part{now, n})
	}
	w.sum += n
}

// expire drops what is over, and what a clock that was set back has put into the future.
func (w *window) expire(now time.Time) {
	keep := w.parts[:0]
	for _, p := range w.parts {
		age := now.Sub(p.at)
		if age >= w.span+w.span/fineness || age < -w.span {
			w.sum -= p.n
			continue
		}
		keep = append(keep, p)
	}
	w.parts = keep
}
