package outbox

import (
	"context"
	"errors"
	"io/fs"
	"math/rand/v2"
	"slices"
	"time"

	"mailbridge/internal/mail"
	"mailbridge/internal/mailerr"
	"mailbridge/providers"
)

// item is one submission, as far as an attempt needs it.
type item struct {
	id        ID
	account   mail.AccountID
	state     State
	created   time.Time
	nextAt    time.Time
	envelope  mail.Envelope // To is not used: recipients are
	messageID string
	size      int64
	spool     bool
	digest    [32]byte
	client    string
	fixes     string
	attempts  int
	phase     string
	handle    mail.Handle
	stray     bool
	lookups   int
	class     mailerr.Class
	code      string
	reason    string
	requestID string

	rcpts   []recipient
	content *content // of a new item; else read when needed
	waiter  *waiter
	kept    bool // the client's 250 stands for this item
	posted  bool // the attempt counts as a message of the mailbox: it was sent, or may have been
}

// States of a recipient.
const (
	pending = "pending" // not yet
	trying  = "trying"  // part of the attempt under way or unsure
	sent    = "sent"
	refused = "refused"
)

type recipient struct {
	n            int
	addr         string
	state        string
	code, reason string
}

// fresh reports whether no attempt was made for the recipient yet.
func (r recipient) fresh() bool { return r.state == pending && r.code == "" }

// Phases of an attempt.
const (
	preparing  = "prepare" // the provider stages; nothing can have been sent
	committing = "commit"  // the provider sends
)

const (
	// maxLookups is how often an unsure outcome is looked up before the account's policy decides.
	maxLookups = 5
	// firstPark and longestPark bound the probes of a parked account.
	firstPark   = time.Minute
	longestPark = 30 * time.Minute
	// firstBackOff and longestBackOff bound the wait of a throttled account where the cloud names no time.
	firstBackOff   = 2 * time.Second
	longestBackOff = 5 * time.Minute
	// quotaPark is how long a used-up allowance waits where the provider names no time.
	quotaPark = time.Hour
)

// acquire takes a slot of the account for the item, if the account may send now.
func (o *Outbox) acquire(a *account, id ID, now time.Time) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.stopping || o.busy[id] || a.inFlight >= a.slots(now) || !a.Pace.Begin() {
		return false
	}
	a.inFlight++
	o.busy[id] = true
	return true
}

// slots is how many attempts the account may have under way: one, as a probe, while it is parked and the
// park's time has come.
func (a *account) slots(now time.Time) int {
	if a.park != nil {
		// A clock set back must not park an account for longer than the longest park.
		if now.Before(a.park.until) && a.park.until.Sub(now) <= 24*time.Hour {
			return 0
		}
		return 1
	}
	return max(1, a.Provider.Traits.Parallel)
}

// release gives the item's slot back and looks for the account's next item.
func (o *Outbox) release(a *account, it *item) {
	a.Pace.End(it.posted)
	o.mu.Lock()
	a.inFlight--
	delete(o.busy, it.id)
	a.due = time.Time{}
	o.mu.Unlock()
	o.Kick()
}

// wake notes that something of the account is due at t.
func (o *Outbox) wake(a *account, t time.Time) {
	o.mu.Lock()
	if t.Before(a.due) {
		a.due = time.Time{}
	}
	o.mu.Unlock()
	o.Kick()
}

// begin prepares the record of an attempt: which recipients it is for and in which phase it starts.
func (o *Outbox) begin(a *account, it *item) (phase string) {
	limit := a.Provider.Traits.MaxRecipients
	// Those who were not tried yet come before those whom the cloud has put off.
	fresh := slices.ContainsFunc(it.rcpts, recipient.fresh)
	n := 0
	for i := range it.rcpts {
		r := &it.rcpts[i]
		if r.state == pending && r.fresh() == fresh && (limit == 0 || n < limit) {
			r.state = trying
			n++
		}
	}
	it.phase = preparing
	if a.Provider.Traits.OneStep || it.handle != "" {
		it.phase = committing
	}
	return it.phase
}

// outgoing is what the provider gets: the recipients of this attempt.
func (it *item) outgoing(c mail.Content) *mail.Outgoing {
	out := &mail.Outgoing{Envelope: mail.Envelope{From: it.envelope.From, UTF8: it.envelope.UTF8}, Content: c, TraceID: string(it.id), MessageID: it.messageID}
	for _, r := range it.rcpts {
		if r.state == trying {
			out.To = append(out.To, r.addr)
		}
	}
	return out
}

// attempt makes one attempt that is recorded already, and records its outcome.
func (o *Outbox) attempt(ctx context.Context, a *account, it *item) {
	defer o.release(a, it)
	defer func() {
		// Whatever is still open then, the client need not wait for.
		if it.waiter.claim() {
			it.waiter.finish(Queued, nil, true)
		}
	}()
	out := it.outgoing(nil)
	sender := a.Provider.Sender
	// The look-up first: it needs no body, which may be gone when a crash came between sending and recording.
	if it.state == Unsure && !o.lookUp(ctx, a, it, out) {
		return
	}
	if it.content != nil {
		out.Content = it.content
	} else {
		c, err := o.body(ctx, it)
		if err != nil {
			class := mailerr.Temporary
			if errors.Is(err, fs.ErrNotExist) {
				class = mailerr.Permanent
			}
			o.failed(a, it, &mailerr.Error{Class: class, Status: mailerr.Status{Subject: 3}, Op: "outbox.body", Text: "the stored message cannot be read", Err: err})
			return
		}
		out.Content = c
	}
	if it.handle == "" {
		if it.stray {
			if err := sender.Abandon(ctx, out, ""); err != nil {
				o.failed(a, it, err)
				return
			}
			it.stray = false
		}
		h, err := sender.Prepare(ctx, out)
		if err != nil {
			it.stray = mailerr.Of(err).Unsure
			if it.stray {
				err = withoutUnsure(err)
			}
			o.failed(a, it, err)
			return
		}
		it.handle = h
		o.step(StepPrepared)
		if it.phase != committing {
			it.phase = committing
			// Durable before Commit: after a crash the handle is what tells whether it was sent.
			if err := o.w.do(it.save); err != nil {
				o.failed(a, it, o.diskError(err))
				return
			}
			o.step(StepStaged)
		}
	}
	receipt, err := sender.Commit(ctx, out, it.handle)
	it.posted = err == nil || mailerr.Of(err).Unsure
	if err != nil {
		o.failed(a, it, err)
		return
	}
	o.step(StepSent)
	o.succeeded(a, it, receipt)
}

// withoutUnsure: what Prepare left behind is no copy that anybody got.
func withoutUnsure(err error) error {
	e := *mailerr.Of(err)
	e.Unsure = false
	return &e
}

// lookUp finds out about an unsure attempt. It reports whether the attempt may go on to Commit with its handle;
// else it has recorded what comes next.
func (o *Outbox) lookUp(ctx context.Context, a *account, it *item, out *mail.Outgoing) bool {
	finding, receipt := providers.Inconclusive, mail.Receipt{}
	if f := a.Provider.Sent; f != nil {
		var err error
		receipt, finding, err = f.FindSent(ctx, out, it.handle)
		if err != nil {
			e := *mailerr.Of(err)
			e.Unsure = true // still
			it.lookups++
			o.failed(a, it, &e)
			return false
		}
	} else {
		it.lookups = maxLookups
	}
	o.metrics.lookups.WithLabelValues(findings[finding]).Inc()
	switch finding {
	case providers.WasSent:
		o.log.Info("looked up: it was sent", "item", string(it.id), "account", string(it.account))
		o.succeeded(a, it, receipt)
		return false
	case providers.NotSent:
		o.log.Info("looked up: it was not sent, sending it", "item", string(it.id), "account", string(it.account))
		it.state = Queued
		return true
	}
	it.lookups++
	now := o.now()
	if it.lookups < maxLookups {
		it.nextAt = now.Add(max(a.Settle, time.Second) << min(it.lookups, 6))
		o.record(a, it)
		return false
	}
	if !a.Resend {
		it.nextAt = time.Time{}
		it.reason = "whether it was sent cannot be found out: look into the mailbox's sent mail for this id, then queue retry or queue delete"
		o.log.Error("unsure whether a message was sent: it is held for an operator", "item", string(it.id), "account", string(it.account))
		o.record(a, it)
		return false
	}
	o.log.Warn("unsure whether a message was sent: sending it again, as the account's policy says", "item", string(it.id), "account", string(it.account))
	it.state, it.lookups, it.stray, it.handle, it.phase = Queued, 0, !a.Provider.Traits.OneStep, "", preparing
	if a.Provider.Traits.OneStep {
		it.phase = committing
	}
	if err := o.w.do(it.save); err != nil {
		o.failed(a, it, o.diskError(err))
		return false
	}
	return true
}

var findings = map[providers.Finding]string{providers.Inconclusive: "inconclusive", providers.WasSent: "sent", providers.NotSent: "not_sent"}

// succeeded records that the cloud has the message, for the recipients of this attempt.
func (o *Outbox) succeeded(a *account, it *item, r mail.Receipt) {
	now := o.now()
	refusals := map[string]*mailerr.Error{}
	for _, x := range r.Refused {
		refusals[x.Recipient] = mailerr.Of(x.Err)
	}
	again, lost := false, false
	for i := range it.rcpts {
		rc := &it.rcpts[i]
		if rc.state != trying {
			again = again || rc.state == pending
			lost = lost || rc.state == refused
			continue
		}
		e := refusals[rc.addr]
		switch {
		case e == nil:
			rc.state = sent
		case e.Class == mailerr.Permanent:
			rc.state, rc.code, rc.reason = refused, e.Code(), e.Text
			lost = true
		default:
			rc.state, rc.code, rc.reason = pending, e.Code(), e.Text
			it.class, it.code, it.reason = e.Class, e.Code(), e.Text
			again = true
		}
	}
	it.phase, it.handle, it.stray, it.lookups, it.requestID = "", "", false, 0, r.RequestID
	o.unpark(a)
	o.mu.Lock()
	a.throttles = 0
	o.mu.Unlock()
	o.metrics.attempts.WithLabelValues("ok").Inc()
	o.log.Info("message sent", "item", string(it.id), "account", string(it.account), "attempt", it.attempts, "request_id", r.RequestID, "bytes", it.size, "refused", len(r.Refused), "took", now.Sub(it.created).Round(time.Millisecond))
	switch {
	case again:
		// More recipients than one transaction takes go on at once; those put off wait.
		it.state, it.nextAt = Queued, now
		if !slices.ContainsFunc(it.rcpts, recipient.fresh) {
			it.nextAt = o.next(it, now)
		}
		if o.expired(a, it, now) {
			o.giveUp(a, it)
			return
		}
		o.record(a, it)
	case lost:
		it.state, it.nextAt = Bouncing, now
		o.record(a, it)
	default:
		it.state, it.nextAt = Sent, time.Time{}
		claimed := it.waiter.claim()
		if claimed {
			it.waiter.finish(Sent, nil, true)
		}
		// A crash before this is written makes the attempt unsure, and the look-up finds it sent.
		if a.Provider.Sent != nil && claimed && !it.spool {
			o.w.later(it.finish(now))
		} else if err := o.w.do(it.finish(now)); err != nil {
			o.log.Error("a sent message could not be recorded as sent; it will be looked up", "item", string(it.id), "err", err)
			return
		}
		o.step(StepFinished)
		o.dropFile(it)
	}
}

// failed decides what a failure means for the message and for its account.
func (o *Outbox) failed(a *account, it *item, err error) {
	e, now := mailerr.Of(err), o.now()
	it.class, it.code, it.reason = e.Class, e.Code(), e.Text
	o.metrics.attempts.WithLabelValues(e.Class.String()).Inc()
	level := o.log.Warn
	if e.Class == mailerr.Unknown {
		level = o.log.Error
	}
	level("message not sent", "item", string(it.id), "account", string(it.account), "attempt", it.attempts, "class", e.Class.String(), "unsure", e.Unsure, "op", e.Op, "retry_at", e.RetryAt, "err", err)

	// The account first: what it must wait for, all its mail waits for.
	switch e.Class {
	case mailerr.Auth, mailerr.Quota:
		o.parkAccount(a, e, now)
	case mailerr.Throttled:
		o.throttled(a, e, now)
	}
	if e.Unsure {
		it.state, it.nextAt = Unsure, now.Add(max(a.Settle, time.Second)<<min(it.lookups, 6))
		if e.RetryAt.After(it.nextAt) {
			it.nextAt = e.RetryAt
		}
		if a.Delivered && it.waiter.claim() {
			o.record(a, it)
			it.waiter.finish(Unsure, answer(e), true)
			return
		}
		o.record(a, it)
		return
	}
	left := false // recipients whom this attempt was not for
	for i := range it.rcpts {
		rc := &it.rcpts[i]
		left = left || rc.state == pending
		if rc.state != trying {
			continue
		}
		rc.state, rc.code, rc.reason = pending, e.Code(), e.Text
		if e.Class == mailerr.Permanent {
			rc.state = refused
		}
	}
	it.state, it.phase, it.lookups = Queued, "", 0
	switch e.Class {
	case mailerr.Permanent:
		if it.handle != "" {
			it.abandon(o.ctx, a, o)
		}
		if left {
			it.nextAt = now
			o.record(a, it)
			return
		}
		if it.noneSent() && it.waiter.claim() {
			// The client hears it now, so nothing stays behind.
			o.discard(it)
			it.waiter.finish(Dead, e, false)
			return
		}
		o.giveUp(a, it)
		return
	case mailerr.Auth, mailerr.Quota:
		it.nextAt = o.parkedUntil(a, now)
	case mailerr.Throttled:
		it.nextAt = e.RetryAt
		if !it.nextAt.After(now) {
			it.nextAt = o.next(it, now)
		}
	default:
		it.nextAt = o.next(it, now)
	}
	if a.Delivered && it.waiter.claim() {
		if it.handle != "" {
			it.abandon(o.ctx, a, o)
		}
		o.discard(it)
		it.waiter.finish(Queued, answer(e), false)
		return
	}
	if e.Class != mailerr.Auth && e.Class != mailerr.Quota && o.expired(a, it, now) {
		o.giveUp(a, it)
		return
	}
	o.record(a, it)
}

// throttled lets the mailbox wait: until the time that the cloud names, else for longer and longer
// (https://learn.microsoft.com/graph/throttling#best-practices-to-handle-throttling).
func (o *Outbox) throttled(a *account, e *mailerr.Error, now time.Time) {
	if e.RetryAt.After(now) {
		a.Pace.NotBefore(e.RetryAt)
		return
	}
	if a.Pace.Until().After(now) {
		return // attempts that were under way together are throttled together
	}
	o.mu.Lock()
	d := min(firstBackOff<<min(a.throttles, 10), longestBackOff)
	a.throttles++
	o.mu.Unlock()
	a.Pace.NotBefore(now.Add(d + rand.N(d/4)))
}

// answer is a failure as a client may hear it that should try again.
func answer(e *mailerr.Error) error {
	c := *e
	if c.Class == mailerr.Permanent {
		c.Class = mailerr.Temporary
	}
	return &c
}

func (it *item) noneSent() bool {
	for _, r := range it.rcpts {
		if r.state == sent {
			return false
		}
	}
	return true
}

// abandon clears up what was staged; what can't be cleared up stays noted as stray.
func (it *item) abandon(ctx context.Context, a *account, o *Outbox) {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	if err := a.Provider.Sender.Abandon(ctx, it.outgoing(nil), it.handle); err != nil {
		o.log.Warn("what was staged for a message could not be removed", "item", string(it.id), "account", string(it.account), "err", err)
	}
	it.handle = ""
}

// next is when a message is tried again, by the schedule with jitter.
func (o *Outbox) next(it *item, now time.Time) time.Time {
	d := o.schedule[min(max(it.attempts, 1), len(o.schedule))-1]
	return now.Add(d + rand.N(d/4+1))
}

// expired reports whether a message is too old to be tried again.
func (o *Outbox) expired(a *account, it *item, now time.Time) bool {
	o.mu.Lock()
	steady := o.steady
	o.mu.Unlock()
	return a.GiveUp > 0 && now.Sub(it.created) > a.GiveUp && now.Sub(steady) > min(grace, a.GiveUp)
}

// giveUp makes a dead letter of what could not be sent, and a report to the sender.
func (o *Outbox) giveUp(a *account, it *item) {
	for i := range it.rcpts {
		if it.rcpts[i].state == pending {
			it.rcpts[i].state = refused
		}
	}
	it.state, it.nextAt, it.phase = Bouncing, o.now(), ""
	o.log.Error("message given up", "item", string(it.id), "account", string(it.account), "class", it.class.String(), "attempts", it.attempts)
	o.record(a, it)
}

// parkAccount stops the account's mail until somebody acts or a limit has passed.
func (o *Outbox) parkAccount(a *account, e *mailerr.Error, now time.Time) {
	o.mu.Lock()
	p := a.park
	if p == nil {
		p = &park{since: now}
		a.park = p
	}
	if p.tries > 0 && now.Before(p.until) && p.class == e.Class {
		o.mu.Unlock() // attempts that were under way together fail together: that is one failure
		return
	}
	wait := min(firstPark<<min(p.tries, 10), longestPark)
	if e.Class == mailerr.Quota {
		wait = quotaPark
	}
	p.tries++
	p.class, p.reason, p.until = e.Class, e.Text, now.Add(wait)
	if e.RetryAt.After(p.until) {
		p.until = e.RetryAt
	}
	row := *p
	o.mu.Unlock()
	o.w.later(func(t tx) error {
		_, err := t.exec(`INSERT INTO parks (account, class, until, since, tries, reason) VALUES (?, ?, ?, ?, ?, ?)
			ON CONFLICT (account) DO UPDATE SET class = excluded.class, until = excluded.until, tries = excluded.tries, reason = excluded.reason`,
			string(a.ID), row.class.String(), row.until.UnixMilli(), row.since.UnixMilli(), row.tries, row.reason)
		return err
	})
}

func (o *Outbox) parkedUntil(a *account, now time.Time) time.Time {
	o.mu.Lock()
	defer o.mu.Unlock()
	if a.park == nil {
		return now
	}
	return a.park.until
}

// unpark lets the account's mail go: a message was sent.
func (o *Outbox) unpark(a *account) {
	o.mu.Lock()
	parked := a.park != nil
	a.park = nil
	o.mu.Unlock()
	if !parked {
		return
	}
	o.log.Info("the account sends again", "account", string(a.ID))
	now := o.now()
	o.w.later(func(t tx) error {
		if _, err := t.exec("DELETE FROM parks WHERE account = ?", string(a.ID)); err != nil {
			return err
		}
		_, err := t.exec("UPDATE items SET next_at = ? WHERE account = ? AND state = ? AND class IN ('auth', 'quota') AND phase = ''", now.UnixMilli(), string(a.ID), string(Queued))
		return err
	})
	// The mail that waited is due once that is written.
	time.AfterFunc(2*lazyWait, func() { o.wake(a, now) })
}

// record stores what an attempt came to. When that fails, the attempt counts as cut off: after the disk has
// healed and the bridge was started again, the record on disk says what to look up.
func (o *Outbox) record(a *account, it *item) {
	switch err := o.w.do(it.save); {
	case errors.Is(err, errGone):
		o.log.Warn("a message was deleted while it was attempted", "item", string(it.id))
	case err != nil:
		o.log.Error("the outcome of an attempt could not be recorded", "item", string(it.id), "err", err)
		o.retrySave(it)
	}
	o.wake(a, it.nextAt)
}

// retrySave tries to record an outcome until it works or the outbox stops: the disk may heal.
func (o *Outbox) retrySave(it *item) {
	for wait := time.Second; o.ctx.Err() == nil; wait = min(2*wait, time.Minute) {
		select {
		case <-o.ctx.Done():
			return
		case <-time.After(wait):
		}
		if err := o.w.do(it.save); err == nil || errors.Is(err, errGone) {
			return
		}
		o.mu.Lock()
		stopping := o.stopping
		o.mu.Unlock()
		if stopping {
			return
		}
	}
}

// errGone says that somebody deleted a message, or took it out of the queue, meanwhile.
var errGone = errors.New("the record is gone")

// claim is save for the begin of an attempt: it fails with errGone when an operator was quicker.
func (it *item) claim(t tx) error {
	n, err := t.exec("UPDATE items SET phase = phase WHERE id = ? AND state = 'queued' AND phase = '' AND next_at > 0", string(it.id))
	if err != nil {
		return err
	}
	if n == 0 {
		return errGone
	}
	return it.save(t)
}

// save writes the item's changing columns and its recipients.
func (it *item) save(t tx) error {
	n, err := t.exec(`UPDATE items SET state = ?, next_at = ?, attempts = ?, phase = ?, handle = ?, stray = ?, lookups = ?, class = ?, code = ?, reason = ?, request_id = ? WHERE id = ?`,
		string(it.state), millis(it.nextAt), it.attempts, it.phase, string(it.handle), it.stray, it.lookups, it.class.String(), it.code, it.reason, it.requestID, string(it.id))
	if err != nil {
		return err
	}
	if n == 0 {
		return errGone
	}
	for _, r := range it.rcpts {
		if _, err := t.exec("UPDATE recipients SET state = ?, code = ?, reason = ? WHERE item = ? AND n = ? AND (state <> ? OR reason <> ?)", r.state, r.code, r.reason, string(it.id), r.n, r.state, r.reason); err != nil {
			return err
		}
	}
	return nil
}

// finish is save for a sent item: its body goes.
func (it *item) finish(now time.Time) func(tx) error {
	return func(t tx) error {
		if err := it.save(t); err != nil {
			return err
		}
		if _, err := t.exec("UPDATE items SET finished = ? WHERE id = ?", now.UnixMilli(), string(it.id)); err != nil {
			return err
		}
		_, err := t.exec("DELETE FROM bodies WHERE item = ?", string(it.id))
		return err
	}
}

// discard removes every trace of an item.
func (o *Outbox) discard(it *item) {
	if err := o.w.do(func(t tx) error { return remove(t, it.id) }); err != nil {
		o.log.Error("a refused message could not be removed from the outbox", "item", string(it.id), "err", err)
	}
	o.dropFile(it)
}

func remove(t tx, id ID) error {
	for _, q := range []string{"DELETE FROM bodies WHERE item = ?", "DELETE FROM recipients WHERE item = ?", "DELETE FROM items WHERE id = ?"} {
		if _, err := t.exec(q, string(id)); err != nil {
			return err
		}
	}
	return nil
}
