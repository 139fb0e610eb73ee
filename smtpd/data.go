package smtpd

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"errors"
	"hash"
	"io"
	"strconv"
	"strings"
	"time"

	"mailbridge/internal/mailerr"
	"mailbridge/internal/mime"
	"mailbridge/internal/outbox"
)

const (
	// maxHeader bounds a message's header block, in bytes.
	maxHeader = 1 << 20
	// maxDrain is how much of a message that is refused already is read to stay in step, beyond its limit.
	maxDrain = 64 << 20
)

// data is DATA (RFC 5321 §4.1.1.4).
func (c *conn) data(args string) error {
	switch {
	case args != "":
		return c.badCommand(replySyntax)
	case c.account == nil:
		return c.reply(replyNeedAuth)
	case c.mail == nil || c.bdat != nil:
		return c.reply(replySequence)
	case len(c.mail.env.To) == 0:
		return c.reply(replyNoRcpt)
	}
	if err := c.reply(replyData); err != nil {
		return err
	}
	if err := c.bw.Flush(); err != nil {
		return err
	}
	c.p.setTimeout(c.s.cfg.DataTimeout)
	d := &dotReader{br: c.br, check: newCheck(c.l.Tolerant, c.maxSize())}
	id := c.s.cfg.Submit.NewID()
	w := &watcher{c: c, id: id}
	d.onEnd = w.start
	r, err := c.submit(id, d, d.check)
	gone := w.stop()
	if d.err != nil && !errors.Is(d.err, io.EOF) {
		// Nothing behind a message that did not end is a command.
		return d.err
	}
	if !d.ended {
		// Submit gave up early: the rest must be read all the same.
		d.onEnd = nil
		if derr := d.drain(); derr != nil {
			return derr
		}
	}
	c.mail = nil
	if rerr := c.answer(id, r, gone); rerr != nil {
		return rerr
	}
	if ref, ok := errors.AsType[*refusal](err); ok && ref.closing {
		return errors.Join(c.bw.Flush(), errEnd)
	}
	return nil
}

// answer gives the final reply to a message. From when it has left, a sign of life proves that it was read.
func (c *conn) answer(id outbox.ID, r reply, gone bool) error {
	c.s.metrics.messages.WithLabelValues(strconv.Itoa(r.code / 100)).Inc()
	c.unread, c.unreadMid = id, c.br.Buffered() > 0
	if gone {
		c.answered(false)
	}
	if err := c.reply(r); err != nil {
		return err
	}
	if err := c.flush(); err != nil {
		c.answered(false)
		return err
	}
	return nil
}

// submit hands a message to the outbox and tells what to answer.
func (c *conn) submit(id outbox.ID, r io.Reader, k *check) (reply, error) {
	start := time.Now()
	log := c.log.With("item", string(id))
	head, rest, err := readHeader(r)
	var res outbox.Result
	var fixed *fixedHeader
	if err == nil {
		fixed, err = c.fix(head, id)
	}
	if err == nil {
		res, err = c.s.cfg.Submit.Submit(c.ctx, outbox.Submission{
			ID: id, Account: c.account.ID, Envelope: c.mail.env, MessageID: fixed.messageID, Fixes: fixed.fixes,
			Client: c.remote.String(), ClientDigest: k.sum,
		}, io.MultiReader(bytes.NewReader(fixed.bytes), rest))
	}
	if err != nil {
		if k.refused != nil {
			err = k.refused
		}
		rep := render(err, string(id))
		log.Warn("message refused", "from", c.mail.env.From, "recipients", len(c.mail.env.To), "bytes", k.n, "code", rep.code, "class", mailerr.Of(err).Class.String(), "err", err)
		// An unsure message may have been kept: the outbox knows it under this id.
		return rep, err
	}
	c.s.metrics.bytes.Add(float64(k.n))
	log.Info("message accepted", "from", c.mail.env.From, "recipients", len(c.mail.env.To), "bytes", k.n, "message_id", fixed.messageID,
		"fixes", strings.Join(fixed.fixes, " "), "state", string(res.State), "as", string(res.ID), "client", c.remote.String(), "took", time.Since(start).Round(time.Microsecond))
	return reply{250, "2.0.0", "OK: " + string(res.ID)}, nil
}

// readHeader reads up to the end of the header block; rest gives what follows.
func readHeader(r io.Reader) (head []byte, rest io.Reader, err error) {
	buf := make([]byte, 0, 8<<10)
	from := 0
	for {
		if len(buf) == cap(buf) {
			if len(buf) >= maxHeader {
				return nil, nil, &refusal{reply: replyHeaderBig}
			}
			buf = append(buf, make([]byte, len(buf))...)[:len(buf)]
		}
		n, err := r.Read(buf[len(buf):cap(buf)])
		buf = buf[:len(buf)+n]
		// The blank line may begin in what was looked at before.
		if end := mime.HeaderEnd(buf[from:]); end >= 0 {
			end += from
			return buf[:end], io.MultiReader(bytes.NewReader(buf[end:]), r), nil
		}
		if i := bytes.LastIndexByte(buf, '\n'); i >= 0 {
			from = i + 1
		}
		if errors.Is(err, io.EOF) {
			if len(buf) == 0 {
				return nil, nil, &refusal{reply: replyEmptyMessage}
			}
			return buf, bytes.NewReader(nil), nil
		}
		if err != nil {
			return nil, nil, err
		}
	}
}

// watcher looks whether the client goes away while its message is being sent: then its answer will not be
// read.
type watcher struct {
	c    *conn
	id   outbox.ID
	done chan struct{}
	gone bool
}

func (w *watcher) start() {
	w.done = make(chan struct{})
	go func() {
		defer close(w.done)
		if _, err := w.c.br.Peek(1); err != nil {
			w.gone = true
			// At once: the client may be back with the same message before this one has its answer.
			if w.c.p.broken() {
				w.c.s.cfg.Submit.Answered(w.id, false)
			}
		}
	}()
}

// stop ends the watch and reports whether the client has gone.
func (w *watcher) stop() bool {
	if w.done == nil {
		return false
	}
	w.c.p.poke()
	<-w.done
	w.c.p.unpoke()
	return w.gone && w.c.p.broken() // else it was only called off
}

// check looks at a message's bytes as they come: line ends, NUL, size, and what the client sent, as a digest.
type check struct {
	tolerant bool
	limit    int64
	n        int64
	hash     hash.Hash
	refused  *refusal // set once the message is refused; what follows is read and dropped
	cr       bool     // the last byte of the last piece was a CR that is not decided yet
}

func newCheck(tolerant bool, limit int64) *check {
	return &check{tolerant: tolerant, limit: limit, hash: sha256.New()}
}

func (k *check) sum() [32]byte { return [32]byte(k.hash.Sum(nil)) }

func (k *check) refuse(r reply, closing bool) {
	if k.refused == nil {
		k.refused = &refusal{r, closing}
	}
}

// count counts and digests bytes as the client sent them.
func (k *check) count(p []byte) {
	k.hash.Write(p)
	if k.n += int64(len(p)); k.n > k.limit {
		k.refuse(replyTooBig, false)
	}
}

// pass gives a piece of a message with its line ends put right, appended to dst. Last says that nothing
// follows.
func (k *check) pass(dst, p []byte, last bool) []byte {
	if k.cr && len(p) > 0 {
		k.cr = false
		if p[0] != '\n' {
			dst = k.bareCR(dst)
		} else {
			dst = append(dst, '\r', '\n')
			p = p[1:]
		}
	}
	for len(p) > 0 {
		i := bytes.IndexAny(p, "\r\n\x00")
		if i < 0 {
			return append(dst, p...)
		}
		dst = append(dst, p[:i]...)
		switch {
		case p[i] == 0:
			if !k.tolerant {
				k.refuse(replyNUL, false)
			}
			p = p[i+1:]
		case p[i] == '\n':
			if !k.tolerant {
				k.refuse(replyBareLF, false)
			}
			dst = append(dst, '\r', '\n')
			p = p[i+1:]
		case i+1 == len(p) && !last:
			k.cr = true
			return dst
		case i+1 < len(p) && p[i+1] == '\n':
			dst = append(dst, '\r', '\n')
			p = p[i+2:]
		default:
			dst = k.bareCR(dst)
			p = p[i+1:]
		}
	}
	if last && k.cr {
		k.cr = false
		dst = k.bareCR(dst)
	}
	return dst
}

func (k *check) bareCR(dst []byte) []byte {
	if !k.tolerant {
		k.refuse(replyBareCR, false)
	}
	return append(dst, '\r', '\n')
}

// dotReader gives the message behind DATA. Only CR LF . CR LF ends it (RFC 5321 §4.1.1.4); anything that other
// servers may take for an end is refused, for behind it could stand a message that nobody sent.
type dotReader struct {
	br    *bufio.Reader
	check *check
	onEnd func()

	mid   bool // in the middle of a line
	lf    bool // the last line ended with a bare LF, or was ended by a bare CR
	prev  byte // the last byte of the last piece of this line
	out   []byte
	buf   []byte
	ended bool
	err   error
}

func (d *dotReader) Read(p []byte) (int, error) {
	for len(d.out) == 0 {
		if d.check.refused != nil {
			return 0, d.check.refused
		}
		if d.err != nil {
			return 0, d.err
		}
		d.fill()
	}
	n := copy(p, d.out)
	d.out = d.out[n:]
	return n, nil
}

// fill takes the next lines that are there.
func (d *dotReader) fill() {
	d.buf = d.buf[:0]
	for len(d.buf) < bufSize/2 {
		if len(d.buf) > 0 && d.br.Buffered() == 0 {
			break
		}
		piece, err := d.br.ReadSlice('\n')
		whole := err == nil
		if err != nil && !errors.Is(err, bufio.ErrBufferFull) {
			if errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			d.err = err
			return
		}
		if d.line(piece, whole) {
			d.buf = d.check.pass(d.buf, nil, true)
			d.ended, d.err = true, io.EOF
			if d.onEnd != nil {
				d.onEnd()
			}
			break
		}
	}
	d.out = d.buf
	if d.check.refused != nil {
		d.out = nil
	}
}

// line takes one line or a piece of a long one. It reports whether it was the end.
func (d *dotReader) line(piece []byte, whole bool) (end bool) {
	begins := !d.mid
	if begins && piece[0] == '.' {
		switch {
		case bytes.Equal(piece, []byte(".\r\n")):
			if !d.lf {
				return true
			}
			d.check.refuse(replyLoneDot, true)
		case bytes.Equal(piece, []byte(".\n")), len(piece) > 1 && piece[1] == '\r' && !(len(piece) > 2 && piece[2] == '\n'):
			d.check.refuse(replyLoneDot, true)
		}
		// RFC 5321 §4.5.2: a leading dot was added by the client.
		piece = piece[1:]
	}
	// CR . in the middle of a line: a bare CR that others may take for a line's end.
	if i := bytes.Index(piece, []byte("\r.")); i >= 0 && loneDot(piece[i+2:]) || d.mid && d.prev == '\r' && piece[0] == '.' && loneDot(piece[1:]) {
		d.check.refuse(replyLoneDot, true)
	}
	if whole {
		n := len(piece)
		d.lf = !(n > 1 && piece[n-2] == '\r' || n == 1 && d.mid && d.prev == '\r')
		d.mid = false
	} else {
		d.mid = true
		d.prev = piece[len(piece)-1]
	}
	d.check.count(piece)
	if d.check.refused == nil {
		d.buf = d.check.pass(d.buf, piece, false)
	}
	return false
}

// loneDot reports whether what follows CR and a dot makes that a lone dot to somebody.
func loneDot(after []byte) bool { return len(after) == 0 || after[0] == '\r' || after[0] == '\n' }

// drain reads a refused message to its end, so that the session stays in step; a client that goes on for too
// long is cut off.
func (d *dotReader) drain() error {
	from := d.check.n
	for !d.ended {
		if d.check.n-from > d.check.limit+maxDrain {
			return errors.New("the client does not end a message that is too large")
		}
		if d.err != nil {
			return d.err
		}
		d.fill()
		d.out = nil
	}
	return nil
}

// bdat is a message that comes in chunks (RFC 3030): a goroutine reads it through a pipe.
type bdat struct {
	w     *io.PipeWriter
	check *check
	done  chan struct{}
	id    outbox.ID
	r     reply
	err   error
}

// bdatChunk is BDAT (RFC 3030 §2).
func (c *conn) bdatChunk(args string) error {
	fields := strings.Fields(args)
	last := len(fields) == 2 && strings.EqualFold(fields[1], "LAST")
	if len(fields) == 0 || len(fields) > 2 || len(fields) == 2 && !last {
		return errors.Join(c.reply(replySyntax), c.bw.Flush(), errors.New("BDAT without a size: the bytes behind it cannot be told from commands"))
	}
	size, err := strconv.ParseUint(fields[0], 10, 62)
	if err != nil {
		return errors.Join(c.reply(replySyntax), c.bw.Flush(), errors.New("BDAT without a size: the bytes behind it cannot be told from commands"))
	}
	// RFC 3030 §2: the chunk follows at once, so it is read even when it is refused.
	chunk := io.LimitReader(c.br, int64(size))
	c.p.setTimeout(c.s.cfg.DataTimeout)
	refuse := func(r reply) error {
		if size > maxDrain {
			return errors.Join(c.reply(r), c.bw.Flush(), errors.New("a chunk that is refused is too large to be read"))
		}
		if err := skip(chunk); err != nil {
			return err
		}
		return c.reply(r)
	}
	switch {
	case c.account == nil:
		return refuse(replyNeedAuth)
	case c.mail == nil:
		return refuse(replySequence)
	case len(c.mail.env.To) == 0:
		return refuse(replyNoRcpt)
	}
	if c.bdat == nil {
		pr, pw := io.Pipe()
		b := &bdat{w: pw, check: newCheck(c.l.Tolerant, c.maxSize()), done: make(chan struct{}), id: c.s.cfg.Submit.NewID()}
		c.bdat = b
		go func() {
			defer close(b.done)
			b.r, b.err = c.submit(b.id, pr, b.check)
			_ = pr.CloseWithError(errGaveUp) // never fails
		}()
	}
	b := c.bdat
	if err := b.copy(chunk); err != nil {
		return err
	}
	if !last {
		if b.check.refused != nil {
			return c.reply(b.check.refused.reply)
		}
		return c.reply(reply{250, "2.0.0", strconv.FormatUint(size, 10) + " octets received"})
	}
	if out := b.check.pass(nil, nil, true); len(out) > 0 && b.check.refused == nil {
		_, _ = b.w.Write(out) // whoever reads no more has its reason
	}
	if b.check.refused != nil {
		_ = b.w.CloseWithError(b.check.refused)
	} else {
		_ = b.w.Close()
	}
	w := &watcher{c: c, id: b.id}
	w.start()
	<-b.done
	gone := w.stop()
	c.bdat, c.mail = nil, nil
	return c.answer(b.id, b.r, gone)
}

var errGaveUp = errors.New("the message was not taken")

// copy feeds a chunk to the one who takes the message; after a refusal it is only read.
func (b *bdat) copy(chunk io.Reader) error {
	buf := make([]byte, 32<<10)
	var out []byte
	gaveUp := false
	for {
		n, err := chunk.Read(buf)
		if n > 0 {
			b.check.count(buf[:n])
			if b.check.refused == nil && !gaveUp {
				out = b.check.pass(out[:0], buf[:n], false)
				if _, werr := b.w.Write(out); werr != nil {
					gaveUp = true
				}
			}
			if b.check.refused != nil && b.check.n > b.check.limit+maxDrain {
				return errors.New("the client does not end a message that is too large")
			}
		}
		if errors.Is(err, io.EOF) {
			if l, ok := chunk.(*io.LimitedReader); ok && l.N > 0 {
				return io.ErrUnexpectedEOF
			}
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// skip reads a chunk that nobody wants.
func skip(chunk io.Reader) error {
	_, err := io.Copy(io.Discard, chunk)
	if l, ok := chunk.(*io.LimitedReader); err == nil && ok && l.N > 0 {
		err = io.ErrUnexpectedEOF
	}
	return err
}

// endBDAT gives a message up that was coming in chunks.
func (c *conn) endBDAT(why error) {
	if c.bdat == nil {
		return
	}
	_ = c.bdat.w.CloseWithError(why)
	<-c.bdat.done
	c.bdat = nil
}
