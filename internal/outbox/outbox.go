// Package outbox keeps accepted mail until a cloud has it. It is the one durable point that outgoing mail
// crosses.
//
// Submit returns once body and record are on disk and, if the account has a free slot, the first attempt came
// to an end or took too long to wait for. An attempt is recorded before it is made, and what a provider has
// staged before it is sent, so that a crash at any line leaves either nothing, or a message that waits, or
// one whose outcome is unsure. The unsure are looked up at the provider and never blindly sent again.
//
// What concerns an account (sign-in lost, a daily limit reached) parks the account: its mail waits and goes
// out by itself once a probe with one message succeeds. Permanent refusals, and mail that is too old, go back
// to the sender's own mailbox as a report (RFC 3464) and stay as dead letters until somebody deletes them.
//
//	DIR/outbox.db   records, recipients, bodies up to 64 KiB
//	DIR/spool/ID    larger bodies
package outbox

import (
	"context"
	"crypto/sha256"
	"database/sql"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"mailbridge/internal/db"
	"mailbridge/internal/mail"
	"mailbridge/internal/mailerr"
	"mailbridge/internal/pace"
	"mailbridge/providers"
)

// Account is an account as the outbox sees it.
type Account struct {
	ID       mail.AccountID
	Mailbox  string
	Provider *providers.Account
	Pace     *pace.Scheduler // shared by all who use the mailbox; nil: no bounds

	FirstAttempt time.Duration // how long Submit waits for the first attempt; 0: not at all
	Delivered    bool          // accept = "delivered": take a message only once the cloud has it
	Resend       bool          // unsure = "resend": risk a second copy rather than wait for an operator
	Settle       time.Duration // how long after an unsure attempt the cloud is asked
	GiveUp       time.Duration // age at which a message goes back
}

// Options is what an outbox needs.
type Options struct {
	Dir      string
	Accounts []Account
	Log      *slog.Logger
	Metrics  prometheus.Registerer // nil for none
	Now      func() time.Time
	// Schedule is the wait before each further attempt; the last one repeats. Default: DefaultSchedule.
	Schedule []time.Duration
	// MinFree is the space on disk, in bytes, below which nothing is taken; default 100 MiB.
	MinFree int64
	// KeepSent is how long records (without bodies) of sent mail are kept; default two days. KeepDead is how
	// long dead letters are; default for ever.
	KeepSent, KeepDead time.Duration
	Hostname           string // names this bridge in reports
	// Step, when set, is told of every step that a crash could come behind: see the Step constants. It is for
	// tests that end the process there.
	Step func(step string)
}

// The steps of a message's way, in order.
const (
	StepSpooled  = "spooled"  // the body is a file on disk, nothing else
	StepRecorded = "recorded" // the record is on disk, the client has no answer
	StepPrepared = "prepared" // the cloud has a draft that we have no note of
	StepStaged   = "staged"   // its handle is on disk
	StepSent     = "sent"     // the cloud has sent it, which we have no note of
	StepFinished = "finished" // that is on disk
	StepReported = "reported" // the sender has a report of which we have no note
)

// DefaultSchedule is when a message that could not be sent is tried again.
func DefaultSchedule() []time.Duration {
	return []time.Duration{time.Minute, 5 * time.Minute, 15 * time.Minute, 30 * time.Minute, time.Hour}
}

const (
	// attemptTimeout bounds one attempt. Large uploads take a while.
	attemptTimeout = 30 * time.Minute
	// deliveredWait bounds Submit for accounts that take mail only once the cloud has it: RFC 6409 §5.3 wants
	// an answer in under two minutes.
	deliveredWait = 100 * time.Second
	// window is how long a resubmission is recognised.
	window = time.Hour
	// maxRecent bounds the submissions that are remembered for that.
	maxRecent = 200_000
	// lookOften is how often changes by other processes are looked for.
	lookOften = 2 * time.Second
)

// Outbox is an open outbox. It is safe for concurrent use.
type Outbox struct {
	dir      string
	db       *sql.DB
	w        *writer
	log      *slog.Logger
	now      func() time.Time
	schedule []time.Duration
	minFree  int64
	keepSent time.Duration
	keepDead time.Duration
	hostname string
	metrics  *metrics
	freeDisk func(dir string) (int64, error)
	step     func(string)
	stopped  sync.Once

	ctx    context.Context // of attempts; ends when Stop's patience does
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu       sync.Mutex
	accounts map[mail.AccountID]*account
	recent   map[[32]byte]*recent
	recentID map[ID]*recent
	busy     map[ID]bool // items that are being attempted
	stopping bool
	steady   time.Time // when the process started or its clock jumped last
	kick     chan struct{}
}

// recent is a submission of the last hour, as far as resubmissions are concerned.
type recent struct {
	id       ID
	digest   [32]byte
	created  time.Time
	live     bool          // its client, or a repetition's, is connected and has not been told, as far as is known
	read     bool          // the client has read our answer
	doubt    bool          // the answer was that nobody knows: a client that has read it sends again
	repeated bool          // a repetition was answered, and that answer was read
	alias    ID            // the repetition that has or is about to get this one's answer
	done     chan struct{} // closed when its Submit came to an end
}

// account is an account with what is known of it now.
type account struct {
	Account
	inFlight  int
	due       time.Time // when something is due at the earliest; zero: unknown, look
	throttles int       // in a row, without a time named by the cloud
	park      *park
}

// park says that an account's mail waits for somebody or for a limit to pass.
type park struct {
	class  mailerr.Class
	until  time.Time
	since  time.Time
	tries  int
	reason string
}

// Open opens or creates the outbox in dir. It sends nothing before Start.
func Open(ctx context.Context, o Options) (*Outbox, error) {
	if err := os.MkdirAll(filepath.Join(o.Dir, "spool"), 0o700); err != nil {
		return nil, err
	}
	d, err := db.Open(ctx, filepath.Join(o.Dir, "outbox.db"), []string{schema})
	if err != nil {
		return nil, err
	}
	b := &Outbox{
		dir: o.Dir, db: d, log: o.Log, now: o.Now, schedule: o.Schedule, minFree: o.MinFree, hostname: o.Hostname, keepSent: o.KeepSent, keepDead: o.KeepDead,
		freeDisk: free, accounts: map[mail.AccountID]*account{}, recent: map[[32]byte]*recent{}, recentID: map[ID]*recent{},
		busy: map[ID]bool{}, kick: make(chan struct{}, 1),
	}
	if b.now == nil {
		b.now = time.Now
	}
	if len(b.schedule) == 0 {
		b.schedule = DefaultSchedule()
	}
	if b.minFree == 0 {
		b.minFree = 100 << 20
	}
	if b.keepSent == 0 {
		b.keepSent = 48 * time.Hour
	}
	if b.hostname == "" {
		b.hostname = "localhost"
	}
	for _, a := range o.Accounts {
		if a.Pace == nil {
			a.Pace = pace.New(pace.Limits{}, b.now)
		}
		b.accounts[a.ID] = &account{Account: a}
	}
	if b.w, err = newWriter(ctx, d); err != nil {
		return nil, errors.Join(err, d.Close())
	}
	if b.step = o.Step; b.step == nil {
		b.step = func(string) {}
	}
	b.metrics = newMetrics(o.Metrics, b)
	b.ctx, b.cancel = context.WithCancel(context.Background())
	return b, nil
}

// Start takes up what an earlier process left and begins to send. Only one process may do so.
func (o *Outbox) Start(ctx context.Context) error {
	o.steady = o.now()
	if err := o.recover(ctx); err != nil {
		return err
	}
	if err := o.sweep(ctx); err != nil {
		return err
	}
	o.nearTimes(o.now()) // the clock may have been set back while nobody looked
	if err := o.loadRecent(ctx); err != nil {
		return err
	}
	if err := o.loadParks(ctx); err != nil {
		return err
	}
	if err := o.seedPace(ctx); err != nil {
		return err
	}
	o.wg.Go(o.run)
	return nil
}

// Stop ends the outbox: no new attempts, running ones get until ctx ends. Nothing is lost by whatever is cut
// off then.
func (o *Outbox) Stop(ctx context.Context) error {
	o.mu.Lock()
	o.stopping = true
	o.mu.Unlock()
	o.Kick()
	done := make(chan struct{})
	go func() {
		o.wg.Wait()
		close(done)
	}()
	select {
	case <-done:
	case <-ctx.Done():
	}
	o.cancel()
	<-done
	var err error
	o.stopped.Do(func() { err = errors.Join(o.w.close(), o.db.Close()) })
	return err
}

// Kick makes the outbox look at its records: something was changed.
func (o *Outbox) Kick() {
	select {
	case o.kick <- struct{}{}:
	default:
	}
}

// Ready reports whether the outbox takes mail.
func (o *Outbox) Ready(context.Context) error { return o.room() }

// room refuses when the disk is nearly full.
func (o *Outbox) room() error {
	n, err := o.freeDisk(o.dir)
	if err != nil {
		return o.diskError(err)
	}
	if n < o.minFree {
		return o.diskError(fmt.Errorf("%d bytes free in %s, %d wanted", n, o.dir, o.minFree))
	}
	return nil
}

// diskError is what a client hears when mail cannot be stored: 452 4.3.1, so that it keeps the message.
func (o *Outbox) diskError(err error) error {
	return &mailerr.Error{Class: mailerr.Temporary, Status: mailerr.Status{Subject: 3, Detail: 1}, Op: "outbox.store", Text: "no space to store the message, try again later", Err: err}
}

// NewID makes an id for a submission.
func (o *Outbox) NewID() ID { return newID(o.now()) }

// Submit takes a message. When it returns without an error the message is durable, and the client deserves a
// 250. An error that is a *mailerr.Error tells what to answer; nothing of the message is kept then, but for
// one that may have been sent.
func (o *Outbox) Submit(ctx context.Context, s Submission, r io.Reader) (Result, error) {
	o.mu.Lock()
	a, stopping := o.accounts[s.Account], o.stopping
	o.mu.Unlock()
	if a == nil {
		return Result{}, fmt.Errorf("no account %q", s.Account)
	}
	if stopping {
		return Result{}, &mailerr.Error{Class: mailerr.Temporary, Status: mailerr.Status{Subject: 3, Detail: 2}, Op: "outbox.submit", Text: "the bridge is stopping, try again later"}
	}
	if err := o.room(); err != nil {
		return Result{}, err
	}
	c, err := o.spoolIn(s.ID, r)
	if err != nil {
		return Result{}, err
	}
	it := &item{
		id: s.ID, account: s.Account, state: Queued, created: o.now(), envelope: s.Envelope, messageID: s.MessageID,
		size: c.size, spool: c.path != "", content: c, client: s.Client, fixes: strings.Join(s.Fixes, " "),
	}
	it.digest = digest(s)
	it.rcpts = make([]recipient, len(s.Envelope.To))
	for i, addr := range s.Envelope.To {
		it.rcpts[i] = recipient{n: i, addr: addr, state: pending}
	}
	first, res, err := o.remember(ctx, it)
	if first != nil {
		o.dropFile(it)
		return res, err
	}
	res, err = o.take(ctx, a, it)
	o.mu.Lock()
	if rec := o.recentID[it.id]; rec != nil {
		close(rec.done)
		if err != nil && !it.kept {
			o.forget(rec)
		}
		rec.doubt = err != nil
	}
	o.mu.Unlock()
	return res, err
}

// digest tells a resubmission from any other message.
func digest(s Submission) [32]byte {
	h := sha256.New()
	fmt.Fprintf(h, "%s\n%s\n%d\n", s.Account, s.Envelope.From, len(s.Envelope.To))
	for _, to := range s.Envelope.To {
		fmt.Fprintf(h, "%s\n", to)
	}
	if s.ClientDigest != nil {
		d := s.ClientDigest()
		h.Write(d[:])
	} else {
		h.Write([]byte(s.ID)) // no two are alike
	}
	return [32]byte(h.Sum(nil))
}

// remember notes a submission, or finds the one that it repeats: identical bytes and envelope, taken within the
// hour, whose answer the client may not have read. That one's answer is given until a client has read it.
func (o *Outbox) remember(ctx context.Context, it *item) (*recent, Result, error) {
	for {
		o.mu.Lock()
		first := o.recent[it.digest]
		if first == nil || first.repeated || first.live || it.created.Sub(first.created).Abs() >= window {
			o.note(it)
			o.mu.Unlock()
			return nil, Result{}, nil
		}
		delivered := o.accounts[it.account].Delivered
		first.live = true
		delete(o.recentID, first.alias)
		first.alias = it.id
		o.recentID[it.id] = first
		o.mu.Unlock()
		// It may still be on its way: its answer is ours.
		select {
		case <-first.done:
		case <-ctx.Done():
			return first, Result{}, ctx.Err()
		}
		state, err := o.state(ctx, first.id)
		gone := errors.Is(err, sql.ErrNoRows) // refused with nothing kept, so this is no repetition of anything
		if err != nil && !gone {
			return first, Result{}, o.diskError(err)
		}
		o.mu.Lock()
		switch {
		case gone, first.read && !first.doubt && state != Unsure:
			// What the client knows to be taken it sends anew, unless we do not know ourselves whether it was sent.
			o.forget(first)
			o.mu.Unlock()
			continue
		case delivered && state != Sent:
			first.doubt = true
			o.mu.Unlock()
			return first, Result{}, &mailerr.Error{Class: mailerr.Temporary, Status: mailerr.Status{Subject: 4, Detail: 2}, Op: "outbox.submit", Text: "whether the message was sent is being found out"}
		}
		first.doubt = false
		o.mu.Unlock()
		o.log.Info("resubmission of a message whose answer may not have been read: answered like the first", "item", string(first.id), "account", string(it.account), "repeat", string(it.id))
		o.metrics.duplicates.Inc()
		return first, Result{ID: first.id, State: Duplicate}, nil
	}
}

// note remembers a submission as one of its own; the caller holds the lock.
func (o *Outbox) note(it *item) {
	if len(o.recentID) >= maxRecent {
		o.prune(it.created)
	}
	r := &recent{id: it.id, digest: it.digest, created: it.created, live: true, done: make(chan struct{})}
	o.recent[it.digest], o.recentID[it.id] = r, r
}

// forget drops a remembered submission; the caller holds the lock.
func (o *Outbox) forget(r *recent) {
	delete(o.recentID, r.id)
	delete(o.recentID, r.alias)
	if o.recent[r.digest] == r {
		delete(o.recent, r.digest)
	}
}

// prune drops what no resubmission is recognised for any more; the caller holds the lock.
func (o *Outbox) prune(now time.Time) {
	for _, r := range o.recentID {
		if !r.live && (r.repeated || now.Sub(r.created).Abs() > window) || len(o.recentID) >= maxRecent && r.read {
			o.forget(r)
		}
	}
}

// Answered says what became of the answer to a submission: read, when anything proves that the client has it
// (a further command, an orderly close), or not, when the connection broke without a sign of life after the
// answer had left. What was never said counts as not read; so a crash loses nothing but the knowledge that
// an answer was read, and for an hour the same bytes again would be answered once without being sent.
func (o *Outbox) Answered(id ID, read bool) {
	o.mu.Lock()
	r := o.recentID[id]
	if r == nil {
		o.mu.Unlock()
		return
	}
	read = read && !r.doubt
	r.live = false
	column := "answered"
	if id == r.id {
		r.read = read
	} else {
		column = "repeated"
		r.repeated, r.alias = read, ""
		delete(o.recentID, id)
	}
	first := r.id
	o.mu.Unlock()
	if read {
		o.w.later(func(t tx) error {
			_, err := t.exec("UPDATE items SET "+column+" = 1 WHERE id = ?", string(first))
			return err
		})
	}
}

func (o *Outbox) state(ctx context.Context, id ID) (s State, err error) {
	return s, o.db.QueryRowContext(ctx, "SELECT state FROM items WHERE id = ?", string(id)).Scan(&s)
}

// insert stores a new item; attempt is the phase in which its first attempt begins at once, or empty.
func insert(it *item, attempt string) func(tx) error {
	return func(t tx) error {
		_, err := t.exec(`INSERT INTO items (id, account, state, created, next_at, sender, utf8, message_id, size, spool, client, fixes, digest, attempts, phase)
			VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)`,
			string(it.id), string(it.account), string(it.state), it.created.UnixMilli(), millis(it.nextAt), it.envelope.From, it.envelope.UTF8, it.messageID, it.size, it.spool,
			it.client, it.fixes, it.digest[:], it.attempts, attempt)
		if err != nil {
			return err
		}
		for _, r := range it.rcpts {
			if _, err := t.exec("INSERT INTO recipients (item, n, addr, state) VALUES (?, ?, ?, ?)", string(it.id), r.n, r.addr, r.state); err != nil {
				return err
			}
		}
		if !it.spool {
			_, err = t.exec("INSERT INTO bodies (item, data) VALUES (?, ?)", string(it.id), it.content.data)
		}
		return err
	}
}

// take stores a new item and makes the first attempt inside of the client's wait.
func (o *Outbox) take(ctx context.Context, a *account, it *item) (Result, error) {
	now := o.now()
	wait := a.FirstAttempt
	if a.Delivered {
		wait = deliveredWait
	}
	slot := wait > 0 && o.acquire(a, it.id, now)
	if a.Delivered && !slot {
		o.dropFile(it)
		return Result{}, o.cannotNow(a, now)
	}
	phase := ""
	it.nextAt = now
	if slot {
		it.attempts = 1
		phase = o.begin(a, it)
	}
	if err := o.w.do(insert(it, phase)); err != nil {
		if slot {
			o.release(a, it)
		}
		o.dropFile(it)
		return Result{}, o.diskError(err)
	}
	o.step(StepRecorded)
	o.metrics.submitted.Inc()
	if !slot {
		it.kept = true
		o.wake(a, it.nextAt)
		return Result{ID: it.id, State: Queued}, nil
	}
	w := &waiter{done: make(chan struct{})}
	it.waiter = w
	actx, cancel := context.WithTimeout(o.ctx, attemptTimeout)
	o.wg.Go(func() {
		defer cancel()
		o.attempt(actx, a, it)
	})
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-w.done:
	case <-timer.C:
		if a.Delivered {
			cancel() // the client will not wait any longer: better unsure now than sent after a 451
			<-w.done
		}
	case <-ctx.Done():
		if a.Delivered {
			cancel()
			<-w.done
		}
	}
	return w.leave(it)
}

// cannotNow is what a client hears whose account takes mail only once the cloud has it, and cannot now.
func (o *Outbox) cannotNow(a *account, now time.Time) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	e := &mailerr.Error{Class: mailerr.Temporary, Status: mailerr.Status{Subject: 3, Detail: 2}, Op: "outbox.submit", Text: "too many messages are on their way for this account, try again later"}
	if a.park != nil && now.Before(a.park.until) {
		e.Status, e.Text = mailerr.Status{Subject: 7}, "the bridge cannot send for this account at the moment"
	}
	return e
}

// waiter is a client that waits for the first attempt.
type waiter struct {
	done chan struct{} // closed with the outcome

	mu      sync.Mutex
	left    bool // the client has its answer
	claimed bool // the outcome will be the client's answer
	state   State
	err     error
	kept    bool // the item stays stored although the client hears an error
}

// leave gives the client its answer: the outcome, when there is one or is about to be.
func (w *waiter) leave(it *item) (Result, error) {
	w.mu.Lock()
	claimed := w.claimed
	w.left = !claimed
	w.mu.Unlock()
	if !claimed {
		it.kept = true
		return Result{ID: it.id, State: Queued}, nil
	}
	<-w.done
	it.kept = w.err == nil || w.kept
	if w.err != nil {
		return Result{}, w.err
	}
	return Result{ID: it.id, State: w.state}, nil
}

// claim reports whether the client still waits; if so it waits on until finish.
func (w *waiter) claim() bool {
	if w == nil {
		return false
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.left || w.claimed {
		return false
	}
	w.claimed = true
	return true
}

// finish gives the outcome to the client that claim found waiting.
func (w *waiter) finish(state State, err error, kept bool) {
	w.state, w.err, w.kept = state, err, kept
	close(w.done)
}

func millis(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixMilli()
}

func fromMillis(n int64) time.Time {
	if n == 0 {
		return time.Time{}
	}
	return time.UnixMilli(n)
}
