package outbox

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"sync"
	"time"
)

// schema is written so that PostgreSQL can run it too. Times are milliseconds since 1970; 0 is never.
const schema = `
CREATE TABLE items (
	id         TEXT PRIMARY KEY,
	account    TEXT NOT NULL,
	state      TEXT NOT NULL,
	created    BIGINT NOT NULL,
	next_at    BIGINT NOT NULL DEFAULT 0,  -- when something is due; 0: not by itself
	finished   BIGINT NOT NULL DEFAULT 0,
	sender     TEXT NOT NULL,
	utf8       INTEGER NOT NULL,
	message_id TEXT NOT NULL,
	size       BIGINT NOT NULL,
	spool      INTEGER NOT NULL,           -- 1: the body is a file, 0: a row of bodies
	client     TEXT NOT NULL,
	fixes      TEXT NOT NULL,
	digest     BYTEA NOT NULL,             -- of account, envelope and the client's bytes
	answered   INTEGER NOT NULL DEFAULT 0, -- 1: the client has read our answer
	repeated   INTEGER NOT NULL DEFAULT 0, -- 1: a resubmission was answered with this one
	attempts   INTEGER NOT NULL DEFAULT 0,
	phase      TEXT NOT NULL DEFAULT '',   -- of the attempt that runs or was cut off: '', 'prepare', 'commit'
	handle     TEXT NOT NULL DEFAULT '',   -- what the provider keeps staged
	stray      INTEGER NOT NULL DEFAULT 0, -- 1: something may be staged that nobody has a handle of
	lookups    INTEGER NOT NULL DEFAULT 0, -- since the outcome became unsure
	class      TEXT NOT NULL DEFAULT '',   -- of the last failure
	code       TEXT NOT NULL DEFAULT '',   -- enhanced status code of the last failure
	reason     TEXT NOT NULL DEFAULT '',   -- its text
	request_id TEXT NOT NULL DEFAULT ''    -- the cloud's id of the request that took it
);
CREATE INDEX items_due ON items (account, state, next_at);
CREATE INDEX items_state ON items (state, id);
CREATE INDEX items_created ON items (created);
CREATE INDEX items_phase ON items (phase) WHERE phase <> '';
CREATE TABLE recipients (
	item   TEXT NOT NULL,
	n      INTEGER NOT NULL,
	addr   TEXT NOT NULL,
	state  TEXT NOT NULL,                  -- 'pending', 'trying', 'sent', 'refused'
	code   TEXT NOT NULL DEFAULT '',
	reason TEXT NOT NULL DEFAULT '',
	PRIMARY KEY (item, n)
);
CREATE TABLE bodies (
	item TEXT PRIMARY KEY,
	data BYTEA NOT NULL
);
CREATE TABLE parks (
	account TEXT PRIMARY KEY,              -- nothing is sent for it before until
	class   TEXT NOT NULL,
	until   BIGINT NOT NULL,
	since   BIGINT NOT NULL,
	tries   INTEGER NOT NULL,
	reason  TEXT NOT NULL
);
CREATE TABLE changes (n BIGINT NOT NULL);  -- counts what other processes did
INSERT INTO changes VALUES (0);`

// writer gathers the waiting operations of all goroutines into one transaction, so that they share a sync.
type writer struct {
	conn *sql.Conn
	ops  chan *op
	stop chan struct{}
	done chan struct{}

	mu    sync.Mutex
	stmts map[string]*sql.Stmt
}

// op is one operation: f runs inside of the transaction.
type op struct {
	f    func(tx) error
	done chan error // nil for those that nobody waits for
}

// tx runs statements of the transaction under way.
type tx struct {
	ctx context.Context
	w   *writer
}

const (
	// maxBatch bounds the operations of one transaction.
	maxBatch = 256
	// lazyWait is how long an operation that nobody waits for waits for company.
	lazyWait = 20 * time.Millisecond
)

func newWriter(ctx context.Context, d *sql.DB) (*writer, error) {
	conn, err := d.Conn(ctx)
	if err != nil {
		return nil, err
	}
	w := &writer{conn: conn, ops: make(chan *op, maxBatch), stop: make(chan struct{}), done: make(chan struct{}), stmts: map[string]*sql.Stmt{}}
	go w.run()
	return w, nil
}

// close writes what waits and ends the writer.
func (w *writer) close() error {
	close(w.stop)
	<-w.done
	for _, s := range w.stmts {
		if err := s.Close(); err != nil {
			return err
		}
	}
	return w.conn.Close()
}

// do runs f in a transaction and returns once that is on disk.
func (w *writer) do(f func(tx) error) error {
	o := &op{f, make(chan error, 1)}
	select {
	case w.ops <- o:
	case <-w.done:
		return errors.New("the outbox is closed")
	}
	select {
	case err := <-o.done:
		return err
	case <-w.done:
		select {
		case err := <-o.done:
			return err
		default:
			return errors.New("the outbox is closed")
		}
	}
}

// later runs f in one of the next transactions. Nobody learns when, or whether it failed: it is for what a
// crash may forget.
func (w *writer) later(f func(tx) error) {
	select {
	case w.ops <- &op{f: f}:
	case <-w.done:
	}
}

func (w *writer) run() {
	defer close(w.done)
	for {
		var batch []*op
		select {
		case o := <-w.ops:
			batch = append(batch, o)
		case <-w.stop:
			// Those who still send wait for an answer or do not care.
			for {
				select {
				case o := <-w.ops:
					batch = append(batch, o)
					continue
				default:
				}
				break
			}
			if len(batch) > 0 {
				w.commit(batch)
			}
			return
		}
		batch = w.gather(batch)
		w.commit(batch)
	}
}

// gather adds what waits too. As long as nobody in the batch waits for it, it waits a moment for more.
func (w *writer) gather(batch []*op) []*op {
	var timer <-chan time.Time
	urgent := batch[0].done != nil
	for len(batch) < maxBatch {
		select {
		case o := <-w.ops:
			batch = append(batch, o)
			urgent = urgent || o.done != nil
			continue
		default:
		}
		if urgent {
			return batch
		}
		if timer == nil {
			timer = time.After(lazyWait)
		}
		select {
		case o := <-w.ops:
			batch = append(batch, o)
			urgent = urgent || o.done != nil
		case <-timer:
			return batch
		case <-w.stop:
			return batch
		}
	}
	return batch
}

// commit runs a batch in one transaction; when one of it fails, each alone, so that it fails alone.
func (w *writer) commit(batch []*op) {
	err := w.transact(batch)
	if err != nil && len(batch) > 1 {
		for _, o := range batch {
			err := w.transact([]*op{o})
			if o.done != nil {
				o.done <- err
			}
		}
		return
	}
	for _, o := range batch {
		if o.done != nil {
			o.done <- err
		}
	}
}

func (w *writer) transact(batch []*op) (err error) {
	ctx := context.Background()
	if _, err := w.conn.ExecContext(ctx, "BEGIN IMMEDIATE"); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			// A full disk may have ended the transaction already.
			if _, rerr := w.conn.ExecContext(ctx, "ROLLBACK"); rerr != nil && errors.Is(rerr, driver.ErrBadConn) {
				err = errors.Join(err, rerr)
			}
		}
	}()
	for _, o := range batch {
		if err := o.f(tx{ctx, w}); err != nil {
			return err
		}
	}
	_, err = w.conn.ExecContext(ctx, "COMMIT")
	return err
}

// exec runs one statement, prepared once.
func (t tx) exec(q string, args ...any) (int64, error) {
	s, err := t.stmt(q)
	if err != nil {
		return 0, err
	}
	res, err := s.ExecContext(t.ctx, args...)
	if err != nil {
		return 0, err
	}
	return res.RowsAffected()
}

func (t tx) stmt(q string) (*sql.Stmt, error) {
	t.w.mu.Lock()
	defer t.w.mu.Unlock()
	if s := t.w.stmts[q]; s != nil {
		return s, nil
	}
	s, err := t.w.conn.PrepareContext(t.ctx, q)
	if err == nil {
		t.w.stmts[q] = s
	}
	return s, err
}
