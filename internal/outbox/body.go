package outbox

import (
	"bytes"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"mailbridge/internal/mail"
)

// inRow is the largest body that is kept in its row, in bytes: below it a file of its own costs two syncs
// more than it saves.
const inRow = 64 << 10

// content is a stored body.
type content struct {
	data []byte // of a small one
	path string // of a large one
	size int64
}

func (c *content) Size() int64 { return c.size }

func (c *content) Open() (io.ReadCloser, error) {
	if c.path == "" {
		return &inMemory{bytes.NewReader(c.data)}, nil
	}
	return os.Open(c.path)
}

// inMemory can seek, as a file can: providers skip what they have replaced.
type inMemory struct{ *bytes.Reader }

func (*inMemory) Close() error { return nil }

// errEmpty refuses a message without a byte.
var errEmpty = errors.New("the message is empty")

// spoolIn reads a message to its end: a small one into memory, a large one into a file that is on disk, with
// its name, when spoolIn returns. The file's name is that of the submission.
func (o *Outbox) spoolIn(id ID, r io.Reader) (*content, error) {
	small := make([]byte, 0, 16<<10)
	for len(small) <= inRow {
		if len(small) == cap(small) {
			small = append(small, 0)[:len(small)]
		}
		n, err := r.Read(small[len(small):min(cap(small), inRow+1)])
		small = small[:len(small)+n]
		if errors.Is(err, io.EOF) {
			if len(small) == 0 {
				return nil, errEmpty
			}
			if len(small) > inRow {
				break
			}
			return &content{data: small, size: int64(len(small))}, nil
		}
		if err != nil {
			return nil, err
		}
	}
	path := o.spoolPath(id)
	f, err := os.OpenFile(path+".tmp", os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, o.diskError(err)
	}
	w := &diskWriter{f: f}
	n, err := io.Copy(w, io.MultiReader(bytes.NewReader(small), r))
	if err == nil {
		w.err = f.Sync()
		err = w.err
	}
	if cerr := f.Close(); err == nil && cerr != nil {
		w.err, err = cerr, cerr
	}
	if err == nil {
		w.err = os.Rename(path+".tmp", path)
		if w.err == nil {
			w.err = syncDir(filepath.Dir(path))
		}
		err = w.err
	}
	if err != nil {
		for _, p := range []string{path + ".tmp", path} {
			if rerr := os.Remove(p); rerr != nil && !errors.Is(rerr, fs.ErrNotExist) {
				o.log.Warn("a half-written message could not be removed", "item", string(id), "err", rerr)
			}
		}
		if w.err != nil {
			return nil, o.diskError(w.err)
		}
		return nil, err
	}
	o.step(StepSpooled)
	return &content{path: path, size: n}, nil
}

// diskWriter tells the disk's errors from the reader's.
type diskWriter struct {
	f   *os.File
	err error
}

func (w *diskWriter) Write(p []byte) (int, error) {
	n, err := w.f.Write(p)
	if err != nil {
		w.err = err
	}
	return n, err
}

func (o *Outbox) spoolPath(id ID) string { return filepath.Join(o.dir, "spool", string(id)) }

// syncDir makes the names in a folder durable, where the system knows how.
func syncDir(dir string) error {
	if runtime.GOOS == "windows" {
		return nil
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// body opens the stored body of an item.
func (o *Outbox) body(ctx context.Context, it *item) (mail.Content, error) {
	if it.spool {
		path := o.spoolPath(it.id)
		if _, err := os.Stat(path); err != nil {
			return nil, err
		}
		return &content{path: path, size: it.size}, nil
	}
	var data []byte
	err := o.db.QueryRowContext(ctx, "SELECT data FROM bodies WHERE item = ?", string(it.id)).Scan(&data)
	if errors.Is(err, sql.ErrNoRows) {
		return nil, fmt.Errorf("the body of %s is gone: %w", it.id, fs.ErrNotExist)
	}
	return &content{data: data, size: int64(len(data))}, err
}

// dropFile removes a body whose record is done with.
func (o *Outbox) dropFile(it *item) {
	if !it.spool {
		return
	}
	if err := os.Remove(o.spoolPath(it.id)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		o.log.Warn("a message that is done with could not be removed from the spool", "item", string(it.id), "err", err)
	}
}

// sweep removes files in the spool that no record names: submissions that a crash ended before their record.
func (o *Outbox) sweep(ctx context.Context) error {
	files, err := os.ReadDir(filepath.Join(o.dir, "spool"))
	if err != nil {
		return err
	}
	for _, f := range files {
		name := f.Name()
		var n int
		err := o.db.QueryRowContext(ctx, "SELECT count(*) FROM items WHERE id = ? AND state <> ?", strings.TrimSuffix(name, ".tmp"), string(Sent)).Scan(&n)
		if err != nil {
			return err
		}
		if n == 0 || strings.HasSuffix(name, ".tmp") {
			if err := os.Remove(filepath.Join(o.dir, "spool", name)); err != nil {
				return err
			}
			o.log.Info("removed what an interrupted submission left behind", "item", name)
		}
	}
	return nil
}
