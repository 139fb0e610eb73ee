package outbox

import (
	"context"
	"errors"
	"time"

	"mailbridge/internal/mail"
	"mailbridge/internal/mailerr"
	"mailbridge/internal/pace"
)

// active are the states in which something happens by itself when it is due. Those of which there are few come
// first: a long queue must not keep what is unsure from being looked up.
var active = [...]State{Unsure, Bouncing, Queued}

const (
	// purgeEvery is how often records that are done with are deleted.
	purgeEvery = 10 * time.Minute
	// purgeBatch bounds one deletion, so that it does not hold up submissions.
	purgeBatch = 500
	// maxGap is more than ever lies between two looks of a process that runs.
	maxGap = 20 * time.Minute
	// grace is how long nothing is given up after a start or a jump of the clock: the network may not be up yet,
	// and the clock may be wrong.
	grace = time.Hour
	// maxStart bounds the attempts of one account that one look starts.
	maxStart = 64
)

// run looks for what is due until the outbox stops.
func (o *Outbox) run() {
	var seen int64
	last, lastPurge := o.now(), time.Time{}
	for {
		now := o.now()
		switch d := now.Sub(last); {
		case d < -time.Minute:
			o.clockSetBack(now, -d)
		case d > maxGap:
			o.mu.Lock()
			o.steady = now
			o.mu.Unlock()
			o.log.Warn("time has jumped ahead: the machine slept, or its clock was set", "by", d.Round(time.Second))
		}
		last = now
		o.mu.Lock()
		stopping := o.stopping
		o.mu.Unlock()
		if stopping {
			return
		}
		if n, err := o.changes(); err == nil && n != seen {
			seen = n
			o.mu.Lock()
			for _, a := range o.accounts {
				a.due = time.Time{}
			}
			o.mu.Unlock()
		}
		wait := min(o.dispatch(now), lookOften)
		if now.Sub(lastPurge).Abs() > purgeEvery {
			lastPurge = now
			o.mu.Lock()
			o.prune(now)
			o.mu.Unlock()
			o.purge(now)
		}
		timer := time.NewTimer(wait)
		select {
		case <-o.kick:
		case <-timer.C:
		case <-o.ctx.Done():
			timer.Stop()
			return
		}
		timer.Stop()
	}
}

// changes counts what other processes did to the queue.
func (o *Outbox) changes() (n int64, err error) {
	return n, o.db.QueryRowContext(o.ctx, "SELECT n FROM changes").Scan(&n)
}

// dispatch starts what is due and tells how long nothing else will be.
func (o *Outbox) dispatch(now time.Time) time.Duration {
	next := now.Add(time.Hour)
	o.mu.Lock()
	var due []*account
	for _, a := range o.accounts {
		if !a.due.After(now) {
			due = append(due, a)
			a.due = now.Add(time.Hour) // release and wake set it back while serve reads
		} else if a.due.Before(next) {
			next = a.due
		}
	}
	o.mu.Unlock()
	for _, a := range due {
		at, err := o.serve(a, now)
		if err != nil {
			if o.ctx.Err() == nil {
				o.log.Error("the queue cannot be read", "account", string(a.ID), "err", err)
			}
			at = now.Add(lookOften)
		}
		o.mu.Lock()
		if a.due.IsZero() {
			at = now
		} else {
			a.due = at
		}
		o.mu.Unlock()
		if at.Before(next) {
			next = at
		}
	}
	return max(next.Sub(now), time.Millisecond)
}

// serve starts as many of the account's due items as it has slots, and tells when to look again.
func (o *Outbox) serve(a *account, now time.Time) (time.Time, error) {
	o.mu.Lock()
	slots := min(a.slots(now)-a.inFlight, maxStart)
	busy := a.inFlight
	blocked := a.Pace.Until()
	if a.park != nil && a.park.until.After(blocked) && a.park.until.Sub(now) <= 24*time.Hour {
		blocked = a.park.until
	}
	o.mu.Unlock()
	far := now.Add(time.Hour)
	if blocked.After(now) {
		if blocked.Before(far) {
			return blocked, nil
		}
		return far, nil
	}
	if slots <= 0 {
		return far, nil // release looks again
	}
	for _, state := range active {
		ids, err := o.dueIDs(a.ID, state, now, slots+busy)
		if err != nil {
			return far, err
		}
		for _, id := range ids {
			if slots == 0 {
				return far, nil
			}
			if o.acquire(a, id, now) {
				slots--
				o.wg.Go(func() { o.again(a, id) })
			}
		}
	}
	for _, state := range active {
		at, err := o.nextAfter(a.ID, state, now)
		if err != nil {
			return far, err
		}
		if !at.IsZero() && at.Before(far) {
			far = at
		}
	}
	return far, nil
}

func (o *Outbox) dueIDs(id mail.AccountID, state State, now time.Time, limit int) ([]ID, error) {
	rows, err := o.db.QueryContext(o.ctx, "SELECT id FROM items WHERE account = ? AND state = ? AND next_at > 0 AND next_at <= ? AND (phase = '' OR state <> 'queued') ORDER BY next_at LIMIT ?", string(id), string(state), now.UnixMilli(), limit)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var ids []ID
	for rows.Next() {
		var id ID
		if err := rows.Scan(&id); err != nil {
			return nil, err
		}
		ids = append(ids, id)
	}
	return ids, rows.Err()
}

func (o *Outbox) nextAfter(id mail.AccountID, state State, now time.Time) (time.Time, error) {
	rows, err := o.db.QueryContext(o.ctx, "SELECT next_at FROM items WHERE account = ? AND state = ? AND next_at > ? ORDER BY next_at LIMIT 1", string(id), string(state), now.UnixMilli())
	if err != nil {
		return time.Time{}, err
	}
	defer rows.Close()
	var n int64
	if rows.Next() {
		if err := rows.Scan(&n); err != nil {
			return time.Time{}, err
		}
	}
	return fromMillis(n), rows.Err()
}

// again makes a further attempt at an item, for which it holds a slot.
func (o *Outbox) again(a *account, id ID) {
	it, err := o.load(o.ctx, id)
	// Another process may have held or deleted it since it was found due, or its outcome may just have been recorded.
	if err != nil || it.state == Queued && it.phase != "" || it.nextAt.IsZero() || it.nextAt.After(o.now()) || (it.state != Queued && it.state != Unsure && it.state != Bouncing) {
		if err != nil && o.ctx.Err() == nil {
			o.log.Error("a queued message cannot be read", "item", string(id), "err", err)
		}
		o.release(a, &item{id: id})
		return
	}
	ctx, cancel := context.WithTimeout(o.ctx, attemptTimeout)
	defer cancel()
	if it.state == Bouncing {
		it.posted = true // the report is a message too
		defer o.release(a, it)
		o.bounce(ctx, a, it)
		return
	}
	it.attempts++
	if it.state == Queued {
		o.begin(a, it)
		if err := o.w.do(it.claim); err != nil {
			if !errors.Is(err, errGone) {
				o.log.Error("an attempt cannot be recorded, so it is not made", "item", string(id), "err", err)
			}
			o.release(a, it)
			return
		}
	}
	o.attempt(ctx, a, it)
}

// load reads an item with its recipients.
func (o *Outbox) load(ctx context.Context, id ID) (*item, error) {
	it := &item{id: id}
	var created, nextAt int64
	var class string
	err := o.db.QueryRowContext(ctx, `SELECT account, state, created, next_at, sender, utf8, message_id, size, spool, client, fixes, attempts, phase, handle, stray, lookups, class, code, reason, request_id
		FROM items WHERE id = ?`, string(id)).Scan(&it.account, &it.state, &created, &nextAt, &it.envelope.From, &it.envelope.UTF8, &it.messageID, &it.size, &it.spool, &it.client, &it.fixes,
		&it.attempts, &it.phase, &it.handle, &it.stray, &it.lookups, &class, &it.code, &it.reason, &it.requestID)
	if err != nil {
		return nil, err
	}
	it.created, it.nextAt, it.class = fromMillis(created), fromMillis(nextAt), mailerr.ParseClass(class)
	rows, err := o.db.QueryContext(ctx, "SELECT n, addr, state, code, reason FROM recipients WHERE item = ? ORDER BY n", string(id))
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	for rows.Next() {
		var r recipient
		if err := rows.Scan(&r.n, &r.addr, &r.state, &r.code, &r.reason); err != nil {
			return nil, err
		}
		it.rcpts = append(it.rcpts, r)
	}
	return it, rows.Err()
}

// recover turns attempts that an earlier process did not finish into what they are: nothing, while it was only
// staging; unsure, once it may have been sending.
func (o *Outbox) recover(ctx context.Context) error {
	rows, err := o.db.QueryContext(ctx, "SELECT id, account, phase, state FROM items WHERE phase <> ''")
	if err != nil {
		return err
	}
	type cut struct {
		id, account, phase string
		state              State
	}
	var cuts []cut
	for rows.Next() {
		var c cut
		if err := rows.Scan(&c.id, &c.account, &c.phase, &c.state); err != nil {
			rows.Close()
			return err
		}
		cuts = append(cuts, c)
	}
	rows.Close()
	if err := rows.Err(); err != nil {
		return err
	}
	now := o.now()
	for _, c := range cuts {
		if c.state != Queued {
			continue // an unsure one waits for its look-up as it did
		}
		settle := 2 * time.Minute
		if a := o.accounts[mail.AccountID(c.account)]; a != nil {
			settle = a.Settle
		}
		o.log.Info("an attempt was cut off", "item", c.id, "account", c.account, "phase", c.phase)
		err := o.w.do(func(t tx) error {
			if c.phase == committing {
				_, err := t.exec("UPDATE items SET state = ?, next_at = ?, class = 'temporary', code = '4.4.2', reason = 'the bridge ended while the message was being sent' WHERE id = ?", string(Unsure), max(now.Add(settle).UnixMilli(), 1), c.id)
				return err
			}
			if _, err := t.exec("UPDATE items SET phase = '', stray = 1, next_at = ? WHERE id = ?", now.UnixMilli(), c.id); err != nil {
				return err
			}
			_, err := t.exec("UPDATE recipients SET state = ? WHERE item = ? AND state = ?", pending, c.id, trying)
			return err
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// loadRecent remembers the submissions of the last hour whose answers may not have been read.
func (o *Outbox) loadRecent(ctx context.Context) error {
	rows, err := o.db.QueryContext(ctx, "SELECT id, digest, created, answered FROM items WHERE created > ? AND (answered = 0 OR state = 'unsure') AND repeated = 0 ORDER BY created", o.now().Add(-window).UnixMilli())
	if err != nil {
		return err
	}
	defer rows.Close()
	closed := make(chan struct{})
	close(closed)
	o.mu.Lock()
	defer o.mu.Unlock()
	for rows.Next() {
		var r recent
		var digest []byte
		var created int64
		if err := rows.Scan(&r.id, &digest, &created, &r.read); err != nil {
			return err
		}
		if len(digest) != len(r.digest) {
			continue
		}
		r.digest, r.created, r.done = [32]byte(digest), fromMillis(created), closed
		o.recent[r.digest], o.recentID[r.id] = &r, &r
	}
	return rows.Err()
}

func (o *Outbox) loadParks(ctx context.Context) error {
	rows, err := o.db.QueryContext(ctx, "SELECT account, class, until, since, tries, reason FROM parks")
	if err != nil {
		return err
	}
	defer rows.Close()
	for rows.Next() {
		var id, class string
		var until, since int64
		p := &park{}
		if err := rows.Scan(&id, &class, &until, &since, &p.tries, &p.reason); err != nil {
			return err
		}
		p.class, p.until, p.since = mailerr.ParseClass(class), fromMillis(until), fromMillis(since)
		if a := o.accounts[mail.AccountID(id)]; a != nil {
			a.park = p
		}
	}
	return rows.Err()
}

// seedPace counts what was sent in the last day, for limits on messages per time.
func (o *Outbox) seedPace(ctx context.Context) error {
	limited := false
	for _, a := range o.accounts {
		limited = limited || a.Pace.CountsMessages()
	}
	if !limited {
		return nil
	}
	rows, err := o.db.QueryContext(ctx, "SELECT account, finished FROM items WHERE state = 'sent' AND finished > ? ORDER BY finished", o.now().Add(-24*time.Hour).UnixMilli())
	if err != nil {
		return err
	}
	defer rows.Close()
	for rows.Next() {
		var id mail.AccountID
		var finished int64
		if err := rows.Scan(&id, &finished); err != nil {
			return err
		}
		if a := o.accounts[id]; a != nil {
			a.Pace.Seed(fromMillis(finished))
		}
	}
	return rows.Err()
}

// Resume lets a parked account try at once: somebody signed in, or an administrator acted.
func (o *Outbox) Resume(id mail.AccountID) {
	now := o.now()
	o.mu.Lock()
	a := o.accounts[id]
	if a != nil {
		if a.park != nil {
			a.park.until = now
		}
		a.Pace.Clear()
	}
	o.mu.Unlock()
	if a == nil {
		return
	}
	if err := o.w.do(func(t tx) error {
		_, err := t.exec("UPDATE items SET next_at = ? WHERE account = ? AND state = ? AND phase = '' AND next_at > ?", now.UnixMilli(), string(id), string(Queued), now.UnixMilli())
		return err
	}); err != nil {
		o.log.Error("the account's mail could not be hurried", "account", string(id), "err", err)
	}
	o.wake(a, now)
}

// clockSetBack moves everything that waits back by as much.
func (o *Outbox) clockSetBack(now time.Time, by time.Duration) {
	o.log.Warn("the clock was set back", "by", by.Round(time.Second))
	paces := map[*pace.Scheduler]bool{}
	o.mu.Lock()
	o.steady = now
	for _, a := range o.accounts {
		a.due = time.Time{}
		paces[a.Pace] = true
		if a.park != nil {
			a.park.until = a.park.until.Add(-by)
		}
	}
	o.mu.Unlock()
	for p := range paces {
		p.SetBack(by)
	}
	if err := o.w.do(func(t tx) error {
		_, err := t.exec("UPDATE items SET next_at = next_at - ? WHERE next_at > ? AND state IN ('queued', 'unsure', 'bouncing')", by.Milliseconds(), by.Milliseconds())
		return err
	}); err != nil {
		o.log.Error("waiting mail keeps its old times", "err", err)
	}
}

// nearTimes lets nothing wait for longer than the schedule has it.
func (o *Outbox) nearTimes(now time.Time) {
	longest := o.schedule[len(o.schedule)-1]*5/4 + time.Hour
	if err := o.w.do(func(t tx) error {
		_, err := t.exec("UPDATE items SET next_at = ? WHERE next_at > ? AND class NOT IN ('quota', 'throttled') AND lookups = 0 AND state IN ('queued', 'unsure', 'bouncing')", now.UnixMilli(), now.Add(longest).UnixMilli())
		return err
	}); err != nil {
		o.log.Error("waiting mail keeps its old times", "err", err)
	}
}

// purge deletes records that are done with.
func (o *Outbox) purge(now time.Time) {
	for _, p := range []struct {
		state State
		keep  time.Duration
	}{{Sent, o.keepSent}, {Dead, o.keepDead}} {
		if p.keep <= 0 {
			continue
		}
		rows, err := o.db.QueryContext(o.ctx, "SELECT id, spool FROM items WHERE state = ? AND id < ? AND created < ? ORDER BY id LIMIT ?", string(p.state), string(firstID(now.Add(-p.keep))), now.Add(-p.keep).UnixMilli(), purgeBatch)
		if err != nil {
			return
		}
		var old []*item
		for rows.Next() {
			it := &item{}
			if err := rows.Scan(&it.id, &it.spool); err != nil {
				break
			}
			old = append(old, it)
		}
		rows.Close()
		if len(old) == 0 {
			continue
		}
		err = o.w.do(func(t tx) error {
			for _, it := range old {
				if err := remove(t, it.id); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			o.log.Warn("old records could not be deleted", "err", err)
			continue
		}
		for _, it := range old {
			o.dropFile(it)
		}
		if len(old) == purgeBatch {
			o.Kick()
		}
	}
}
