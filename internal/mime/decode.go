package mime

import (
	"bufio"
	"bytes"
	"encoding/base64"
	"io"
)

// Decode undoes a Content-Transfer-Encoding (RFC 2045 §6) as it streams. It fails only when r does: junk
// between base64 letters is passed over, blocks that were padded and joined are read on, and quoted-printable
// escapes that are none stay as they are. Other encodings pass unchanged.
func Decode(r io.Reader, encoding string) io.Reader {
	switch encoding {
	case "base64":
		return &base64Reader{r: bufio.NewReaderSize(r, 32<<10)}
	case "quoted-printable":
		return &quotedReader{r: bufio.NewReaderSize(r, 32<<10)}
	}
	return r
}

// base64Reader decodes group by group, so that joined blocks and missing padding do no harm.
type base64Reader struct {
	r    *bufio.Reader
	out  []byte
	buf  [24 << 10]byte
	err  error
	quad [4]byte
	n    int // letters in quad
}

func (d *base64Reader) Read(p []byte) (int, error) {
	for len(d.out) == 0 {
		if d.err != nil {
			return 0, d.err
		}
		d.fill()
	}
	n := copy(p, d.out)
	d.out = d.out[n:]
	return n, nil
}

// fill decodes what is buffered, at most one buffer's worth.
func (d *base64Reader) fill() {
	if _, err := d.r.Peek(1); err != nil {
		d.err = err
		if err == io.EOF {
			d.out = d.buf[:d.flush(d.buf[:0])]
		}
		return
	}
	in, _ := d.r.Peek(min(d.r.Buffered(), 30<<10))
	out := d.buf[:0]
	for _, c := range in {
		if c == '=' {
			out = d.buf[:d.flush(out)]
			continue
		}
		if !base64Letter(c) {
			continue
		}
		d.quad[d.n] = c
		if d.n++; d.n == 4 {
			out = d.buf[:d.flush(out)]
		}
	}
	if _, err := d.r.Discard(len(in)); err != nil {
		d.err = err
	}
	d.out = out
}

// flush decodes the letters in quad behind out and gives the new length.
func (d *base64Reader) flush(out []byte) int {
	if d.n < 2 { // one letter alone holds no byte
		d.n = 0
		return len(out)
	}
	var dec [3]byte
	n, err := base64.RawStdEncoding.Decode(dec[:], d.quad[:d.n])
	d.n = 0
	if err != nil {
		return len(out)
	}
	return len(append(out, dec[:n]...))
}

func base64Letter(c byte) bool {
	return c >= 'A' && c <= 'Z' || c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || c == '+' || c == '/'
}

// quotedReader decodes line by line, or piece by piece where a line is longer than the buffer.
type quotedReader struct {
	r     *bufio.Reader
	carry []byte // the beginning of an escape that the end of a piece cut
	out   []byte
	err   error
}

func (d *quotedReader) Read(p []byte) (int, error) {
	for len(d.out) == 0 {
		if d.err != nil {
			return 0, d.err
		}
		line, err := d.r.ReadSlice('\n')
		if len(d.carry) > 0 {
			line = append(d.carry, line...)
			d.carry = nil
		}
		if err == bufio.ErrBufferFull {
			if i := bytes.LastIndexByte(line, '='); i >= len(line)-2 {
				d.carry = bytes.Clone(line[i:])
				line = line[:i]
			}
		} else {
			d.err = err
		}
		d.out = unquote(line)
	}
	n := copy(p, d.out)
	d.out = d.out[n:]
	return n, nil
}

// unquote decodes one line in place (RFC 2045 §6.7).
func unquote(line []byte) []byte {
	body := bytes.TrimRight(line, "\r\n")
	eol := line[len(body):]
	if len(eol) > 0 {
		// Rule 3: white space at the end of a line was added on the way. Rule 5: "=" there is a soft break.
		body = bytes.TrimRight(body, " \t")
	}
	if soft, ok := bytes.CutSuffix(body, []byte("=")); ok {
		body, eol = soft, nil
	}
	out := line[:0]
	for i := 0; i < len(body); i++ {
		if body[i] == '=' && i+2 < len(body) {
			hi, ok1 := unhex(body[i+1])
			lo, ok2 := unhex(body[i+2])
			if ok1 && ok2 {
				out = append(out, hi<<4|lo)
				i += 2
				continue
			}
		}
		out = append(out, body[i])
	}
	return append(out, eol...)
}

func unhex(c byte) (byte, bool) {
	switch {
	case c >= '0' && c <= '9':
		return c - '0', true
	case c >= 'A' && c <= 'F':
		return c - 'A' + 10, true
	case c >= 'a' && c <= 'f':
		return c - 'a' + 10, true
	}
	return 0, false
}
