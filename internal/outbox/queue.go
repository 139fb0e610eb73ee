package outbox

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"mailbridge/internal/db"
	"mailbridge/internal/mail"
)

// Queue is an operator's view of an outbox: on the same files, from any process, also while a service sends
// from it.
type Queue struct{ o *Outbox }

// OpenQueue opens the queue in dir for the queue commands.
func OpenQueue(ctx context.Context, dir string) (*Queue, error) {
	d, err := db.Open(ctx, filepath.Join(dir, "outbox.db"), []string{schema})
	if err != nil {
		return nil, err
	}
	return &Queue{&Outbox{dir: dir, db: d, now: time.Now}}, nil
}

// Close closes the view.
func (q *Queue) Close() error { return q.o.db.Close() }

// Queue gives the operator's view of this outbox. It is not closed.
func (o *Outbox) Queue() *Queue { return &Queue{o} }

// Entry is one submission, for people and scripts.
type Entry struct {
	ID         ID          `json:"id"`
	Account    string      `json:"account"`
	State      State       `json:"state"`
	Created    time.Time   `json:"created"`
	NextAt     *time.Time  `json:"next_at,omitempty"` // absent: nothing happens by itself
	From       string      `json:"from"`
	Size       int64       `json:"size"`
	Attempts   int         `json:"attempts"`
	Lookups    int         `json:"lookups,omitempty"` // of an outcome that is unsure
	Class      string      `json:"class,omitempty"`
	Code       string      `json:"code,omitempty"`
	Reason     string      `json:"reason,omitempty"`
	MessageID  string      `json:"message_id,omitempty"`
	Client     string      `json:"client,omitempty"`
	Fixes      string      `json:"fixes,omitempty"`
	RequestID  string      `json:"request_id,omitempty"`
	Recipients []Recipient `json:"recipients"`
}

// Recipient is where one recipient of a submission stands.
type Recipient struct {
	Address string `json:"address"`
	State   string `json:"state"`
	Code    string `json:"code,omitempty"`
	Reason  string `json:"reason,omitempty"`
}

// Stuck reports whether a person has to do something about the entry.
func (e *Entry) Stuck() bool {
	return e.State == Dead || e.State == Unsure && (e.NextAt == nil || e.Lookups > maxLookups) || e.State == Queued && e.Class == "auth"
}

// Filter narrows a listing or a bulk operation. Zero fields do not.
type Filter struct {
	Account string
	State   State // default: all that is not sent
	Older   time.Duration
	Limit   int // default 1000
	After   ID  // for paging: entries behind this one
}

// states are those that the filter lets pass.
func (f Filter) states() []State {
	if f.State != "" {
		return []State{f.State}
	}
	return []State{Queued, Unsure, Held, Bouncing, Dead}
}

// List lists submissions, oldest first.
func (q *Queue) List(ctx context.Context, f Filter) ([]Entry, error) {
	ids, err := q.ids(ctx, f)
	if err != nil {
		return nil, err
	}
	list := make([]Entry, 0, len(ids))
	for _, id := range ids {
		e, err := q.Show(ctx, id)
		if errors.Is(err, sql.ErrNoRows) {
			continue // gone since
		}
		if err != nil {
			return nil, err
		}
		list = append(list, *e)
	}
	return list, nil
}

// ids lists the matching ids in order. Each state is read by its index, so that a page costs what a page
// holds, however long the queue is.
func (q *Queue) ids(ctx context.Context, f Filter) ([]ID, error) {
	if f.Limit <= 0 {
		f.Limit = 1000
	}
	conds, args := "id > ?", []any{string(f.After)}
	if f.Account != "" {
		conds, args = conds+" AND account = ?", append(args, f.Account)
	}
	if f.Older > 0 {
		conds, args = conds+" AND id < ?", append(args, string(firstID(q.o.now().Add(-f.Older))))
	}
	var ids []ID
	for _, s := range f.states() {
		rows, err := q.o.db.QueryContext(ctx, "SELECT id FROM items WHERE state = ? AND "+conds+" ORDER BY id LIMIT ?", append(append([]any{string(s)}, args...), f.Limit)...)
		if err != nil {
			return nil, err
		}
		for rows.Next() {
			var id ID
			if err := rows.Scan(&id); err != nil {
				return nil, errors.Join(err, rows.Close())
			}
			ids = append(ids, id)
		}
		if err := errors.Join(rows.Err(), rows.Close()); err != nil {
			return nil, err
		}
	}
	slices.Sort(ids)
	return ids[:min(len(ids), f.Limit)], nil
}

// Show gives one submission.
func (q *Queue) Show(ctx context.Context, id ID) (*Entry, error) {
	it, err := q.o.load(ctx, id)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", id, err)
	}
	e := &Entry{ID: id, Account: string(it.account), State: it.state, Created: it.created, From: it.envelope.From, Size: it.size, Attempts: it.attempts, Lookups: it.lookups,
		Code: it.code, Reason: it.reason, MessageID: it.messageID, Client: it.client, Fixes: it.fixes, RequestID: it.requestID, Recipients: []Recipient{}}
	if !it.nextAt.IsZero() {
		e.NextAt = &it.nextAt
	}
	if it.code != "" {
		e.Class = it.class.String()
	}
	for _, r := range it.rcpts {
		e.Recipients = append(e.Recipients, Recipient{r.addr, r.state, r.code, r.reason})
	}
	return e, nil
}

// Body copies the stored message to w.
func (q *Queue) Body(ctx context.Context, id ID, w io.Writer) error {
	it, err := q.o.load(ctx, id)
	if err != nil {
		return err
	}
	c, err := q.o.body(ctx, it)
	if err != nil {
		return err
	}
	r, err := c.Open()
	if err != nil {
		return err
	}
	_, err = io.Copy(w, r)
	return errors.Join(err, r.Close())
}

// ErrBusy refuses to change a submission that is being sent at this moment.
var ErrBusy = errors.New("it is being sent at this moment")

// Retry makes a submission due now: a waiting or held one, a dead letter (to the recipients that were refused),
// or one in doubt, which the operator so declares not sent.
func (q *Queue) Retry(ctx context.Context, id ID) error {
	return q.change(ctx, id, func(t *sql.Tx, it *item) error {
		switch it.state {
		case Sent, Bouncing:
			return fmt.Errorf("it is %s", it.state)
		case Unsure:
			if !it.nextAt.IsZero() {
				return fmt.Errorf("it is being looked up, next at %s: a retry now could send it twice", it.nextAt.Format(time.DateTime))
			}
			// The operator has looked: a fresh attempt, after what may be staged was cleared up.
			if _, err := t.ExecContext(ctx, "UPDATE items SET handle = '', stray = 1, lookups = 0 WHERE id = ?", string(id)); err != nil {
				return err
			}
		}
		if _, err := t.ExecContext(ctx, "UPDATE recipients SET state = 'pending' WHERE item = ? AND state IN ('trying', 'refused')", string(id)); err != nil {
			return err
		}
		// A dead letter's age counts from now, else it would be given up again at once.
		_, err := t.ExecContext(ctx, "UPDATE items SET state = 'queued', phase = '', next_at = ?, finished = 0, created = CASE WHEN state = 'dead' THEN ? ELSE created END WHERE id = ?",
			q.o.now().UnixMilli(), q.o.now().UnixMilli(), string(id))
		return err
	})
}

// Hold keeps a waiting submission from being sent until Release.
func (q *Queue) Hold(ctx context.Context, id ID) error {
	return q.change(ctx, id, func(t *sql.Tx, it *item) error {
		if it.state != Queued {
			return fmt.Errorf("it is %s: only waiting mail can be held", it.state)
		}
		_, err := t.ExecContext(ctx, "UPDATE items SET state = 'held', next_at = 0 WHERE id = ?", string(id))
		return err
	})
}

// Release lets a held submission go.
func (q *Queue) Release(ctx context.Context, id ID) error {
	return q.change(ctx, id, func(t *sql.Tx, it *item) error {
		if it.state != Held {
			return fmt.Errorf("it is %s, not held", it.state)
		}
		_, err := t.ExecContext(ctx, "UPDATE items SET state = 'queued', next_at = ? WHERE id = ?", q.o.now().UnixMilli(), string(id))
		return err
	})
}

// Delete forgets a submission for good, without a report.
func (q *Queue) Delete(ctx context.Context, id ID) error {
	var gone item
	err := q.change(ctx, id, func(t *sql.Tx, it *item) error {
		gone = *it
		for _, s := range []string{"DELETE FROM bodies WHERE item = ?", "DELETE FROM recipients WHERE item = ?", "DELETE FROM items WHERE id = ?"} {
			if _, err := t.ExecContext(ctx, s, string(id)); err != nil {
				return err
			}
		}
		return nil
	})
	if err == nil && gone.spool {
		if err = os.Remove(q.o.spoolPath(id)); errors.Is(err, fs.ErrNotExist) {
			err = nil
		}
	}
	return err
}

// change runs f on one submission that is not being sent, and lets a running service know.
func (q *Queue) change(ctx context.Context, id ID, f func(*sql.Tx, *item) error) error {
	tx, err := q.o.db.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	defer tx.Rollback()
	it := &item{id: id}
	var next int64
	err = tx.QueryRowContext(ctx, "SELECT account, state, phase, next_at, spool FROM items WHERE id = ?", string(id)).Scan(&it.account, &it.state, &it.phase, &next, &it.spool)
	it.nextAt = fromMillis(next)
	if errors.Is(err, sql.ErrNoRows) {
		return fmt.Errorf("%s: there is no such message in the queue", id)
	}
	if err != nil {
		return err
	}
	if it.phase != "" && it.state == Queued {
		return fmt.Errorf("%s: %w", id, ErrBusy)
	}
	if err := f(tx, it); err != nil {
		return fmt.Errorf("%s: %w", id, err)
	}
	if _, err := tx.ExecContext(ctx, "UPDATE changes SET n = n + 1"); err != nil {
		return err
	}
	return tx.Commit()
}

// Counts counts the submissions by state.
func (q *Queue) Counts(ctx context.Context) (map[State]int, error) {
	counts := map[State]int{}
	for _, s := range States() {
		var n int
		if err := q.o.db.QueryRowContext(ctx, "SELECT count(*) FROM items WHERE state = ?", string(s)).Scan(&n); err != nil {
			return nil, err
		}
		counts[s] = n
	}
	return counts, nil
}

// Park is an account whose mail waits for somebody or for a limit to pass.
type Park struct {
	Account mail.AccountID `json:"account"`
	Class   string         `json:"class"`
	Since   time.Time      `json:"since"`
	Until   time.Time      `json:"until"` // when it is tried again
	Reason  string         `json:"reason"`
}

// Parks lists the parked accounts.
func (q *Queue) Parks(ctx context.Context) ([]Park, error) {
	rows, err := q.o.db.QueryContext(ctx, "SELECT account, class, since, until, reason FROM parks ORDER BY account")
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var list []Park
	for rows.Next() {
		var p Park
		var since, until int64
		if err := rows.Scan(&p.Account, &p.Class, &since, &until, &p.Reason); err != nil {
			return nil, err
		}
		p.Since, p.Until = fromMillis(since), fromMillis(until)
		list = append(list, p)
	}
	return list, rows.Err()
}
