package graph

import (
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"sync/atomic"

	"mailbridge/internal/mail"
)

// payload is the body of a request, made while it is sent, as often as it is opened.
type payload struct {
	kind string // media type
	size int64  // in bytes, exact
	open func() (io.ReadCloser, error)
}

// reader gives the body; sent becomes true once its last byte was handed out.
func (p *payload) reader(sent *atomic.Bool) (io.ReadCloser, error) {
	r, err := p.open()
	if err != nil {
		return nil, err
	}
	return &watched{ReadCloser: r, left: p.size, sent: sent}, nil
}

type watched struct {
	io.ReadCloser
	left int64
	sent *atomic.Bool
}

func (w *watched) Read(p []byte) (int, error) {
	n, err := w.ReadCloser.Read(p)
	if w.left -= int64(n); w.left <= 0 {
		w.sent.Store(true)
	}
	return n, err
}

// jsonBody is a small body.
func jsonBody(b []byte) *payload {
	return &payload{kind: "application/json", size: int64(len(b)), open: func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b)), nil }}
}

// encodedLen is the length of n bytes in base64.
func encodedLen(n int64) int64 { return (n + 2) / 3 * 4 }

// mimeBody is a message as Graph takes MIME, in base64: a new beginning, then the content from skip on.
func mimeBody(prefix []byte, content mail.Content, skip int64) *payload {
	raw := int64(len(prefix)) + content.Size() - skip
	return &payload{kind: "text/plain", size: encodedLen(raw), open: func() (io.ReadCloser, error) {
		r, err := section(content, skip, content.Size())
		if err != nil {
			return nil, err
		}
		return newEncoder(io.MultiReader(bytes.NewReader(prefix), r), r, raw), nil
	}}
}

// section opens the content from one offset to another. What is missing at the end is an error.
func section(content mail.Content, from, to int64) (io.ReadCloser, error) {
	r, err := content.Open()
	if err != nil {
		return nil, err
	}
	if s, ok := r.(io.Seeker); ok {
		_, err = s.Seek(from, io.SeekStart)
	} else {
		_, err = io.CopyN(io.Discard, r, from)
	}
	if err != nil {
		return nil, errors.Join(err, r.Close())
	}
	return struct {
		io.Reader
		io.Closer
	}{io.LimitReader(r, to-from), r}, nil
}

// encoder reads raw bytes and gives base64 in one line, of exactly the length that was announced.
type encoder struct {
	src  io.Reader
	file io.Closer
	left int64 // raw bytes still to read
	raw  []byte
	out  []byte
	todo []byte // encoded, not yet given; part of out
}

func newEncoder(src io.Reader, file io.Closer, raw int64) *encoder {
	block := min(int64(24<<10), (raw+2)/3*3) // a multiple of 3
	return &encoder{src: src, file: file, left: raw, raw: make([]byte, block), out: make([]byte, encodedLen(block))}
}

func (e *encoder) Read(p []byte) (int, error) {
	if len(e.todo) == 0 {
		if e.left == 0 {
			return 0, io.EOF
		}
		n := int(min(e.left, int64(len(e.raw))))
		if _, err := io.ReadFull(e.src, e.raw[:n]); err != nil {
			if errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return 0, fmt.Errorf("reading the stored message: %w", err)
		}
		e.left -= int64(n)
		e.todo = e.out[:base64.StdEncoding.EncodedLen(n)]
		base64.StdEncoding.Encode(e.todo, e.raw[:n])
	}
	n := copy(p, e.todo)
	e.todo = e.todo[n:]
	return n, nil
}

func (e *encoder) Close() error { return e.file.Close() }
