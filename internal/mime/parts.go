package mime

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"strings"
)

// Limits of a scan. What lies beyond them is kept as the body of the part that it stands in.
const (
	maxDepth       = 100     // nested multiparts and messages
	maxParts       = 10_000  // parts in all
	maxPartHeader  = 1 << 20 // bytes of one header block
	maxBoundaryLen = 1 << 10 // RFC 2046 §5.1.1 allows 70; what is longer than this delimits nothing
)

// Part is one node of a message's MIME structure (RFC 2045–2047, 2183, 2231), by offsets into its bytes.
// The root is the message itself.
type Part struct {
	Start int64 // of the header block
	Body  int64 // of the body: after the blank line
	End   int64 // after the last byte; the line end before a boundary belongs to the boundary (RFC 2046 §5.1.1)

	Header []byte // the header block as it stands, without the blank line
	Fields Header // its fields, offsets into Header

	Type        string            // media type in lower case, such as "text/plain", the default where none is given
	Params      map[string]string // of Content-Type; names in lower case, values decoded
	Disposition string            // "attachment", "inline" or whatever stands there, in lower case; "" for none
	DispParams  map[string]string // of Content-Disposition
	Encoding    string            // Content-Transfer-Encoding in lower case; "7bit" where none is given
	ContentID   string            // without angle brackets

	Children []*Part // of a multipart; of message/rfc822 the one message in it
}

// Multipart reports whether the part was read as a multipart: its type says so and it names a boundary.
func (p *Part) Multipart() bool {
	return strings.HasPrefix(p.Type, "multipart/") && p.Params["boundary"] != ""
}

// Filename is the part's name for a person: from Content-Disposition, else from Content-Type; "" for none.
func (p *Part) Filename() string {
	if n := p.DispParams["filename"]; n != "" {
		return n
	}
	return p.Params["name"]
}

// Walk calls visit for p and everything below it, parents first. Where visit returns false it does not
// go below.
func (p *Part) Walk(visit func(*Part) bool) {
	if visit(p) {
		for _, c := range p.Children {
			c.Walk(visit)
		}
	}
}

// ScanParts reads a message to its end and gives its structure. It never fails but with an error of r: what
// cannot be understood is part of a body. It holds header blocks only, whatever the size of the message,
// and takes time linear in it.
func ScanParts(r io.Reader) (*Part, error) {
	s := scanner{r: bufio.NewReaderSize(r, 64<<10), boundaries: map[string]int{}}
	root := s.open("text/plain")
	for {
		line, whole, err := s.line()
		if len(line) > 0 {
			s.take(line, whole)
		}
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, err
		}
	}
	for len(s.stack) > 0 {
		s.close(s.off)
	}
	return root, nil
}

// level is a part that is still open.
type level struct {
	part     *Part
	inHeader bool
	tooLong  bool   // the header block was cut off at its limit
	boundary string // of a multipart
	closed   bool   // its closing delimiter was seen: what follows is the epilogue
	child    string // default type of its parts: RFC 2046 §5.1.5, message/rfc822 in a digest
}

type scanner struct {
	r          *bufio.Reader
	off        int64 // of the next byte to read
	lineEnd    int64 // length of the line end before off: belongs to a delimiter that follows
	fresh      bool  // the last line was given in pieces and is not finished
	stack      []*level
	boundaries map[string]int // delimiter → index in stack of the innermost multipart that has it
	shadowed   []shadow
	parts      int
}

// shadow remembers what an inner multipart's boundary hid.
type shadow struct {
	boundary string
	index    int
	had      bool
}

// line gives the next line with its end, or a piece of one that is longer than the buffer; whole tells
// whether the piece begins a line.
func (s *scanner) line() (b []byte, begins bool, err error) {
	begins = !s.fresh
	b, err = s.r.ReadSlice('\n')
	s.fresh = false
	if errors.Is(err, bufio.ErrBufferFull) {
		s.fresh, err = true, nil
	}
	return b, begins, err
}

// take moves over one line or piece.
func (s *scanner) take(line []byte, begins bool) {
	// The line end before a delimiter belongs to it (RFC 2046 §5.1.1).
	end := s.off - s.lineEnd
	s.off += int64(len(line))
	if begins && len(s.boundaries) > 0 && bytes.HasPrefix(line, []byte("--")) && s.delimiter(line, end) {
		s.lineEnd = 0
		return
	}
	s.lineEnd = endLength(line)
	top := s.stack[len(s.stack)-1]
	if !top.inHeader {
		return
	}
	if begins && s.lineEnd == int64(len(line)) {
		s.headerDone(top)
		return
	}
	if len(top.part.Header)+len(line) > maxPartHeader {
		top.tooLong = true
		s.headerDone(top)
		return
	}
	top.part.Header = append(top.part.Header, line...)
}

// endLength is the length of the line end at the end of line.
func endLength(line []byte) int64 {
	switch {
	case bytes.HasSuffix(line, []byte("\r\n")):
		return 2
	case bytes.HasSuffix(line, []byte("\n")):
		return 1
	}
	return 0
}

// delimiter handles a line that may be a boundary delimiter of an open multipart and reports whether it
// was. An outer multipart's delimiter ends every part inside.
func (s *scanner) delimiter(line []byte, end int64) bool {
	text := strings.TrimRight(string(line[2:min(len(line), maxBoundaryLen+8)]), " \t\r\n")
	index, ok := s.boundaries[text]
	closing := false
	if !ok {
		if text, closing = strings.CutSuffix(text, "--"); closing {
			index, ok = s.boundaries[text]
		}
	}
	if !ok || s.stack[index].closed {
		return false
	}
	for len(s.stack) > index+1 {
		s.close(end)
	}
	m := s.stack[index]
	m.closed = closing
	if !closing && s.parts < maxParts {
		s.open(m.child)
	}
	return true
}

// open begins a part at off, below the innermost open one.
func (s *scanner) open(defaultType string) *Part {
	p := &Part{Start: s.off, Type: defaultType}
	s.parts++
	if len(s.stack) > 0 {
		top := s.stack[len(s.stack)-1].part
		top.Children = append(top.Children, p)
	}
	s.stack = append(s.stack, &level{part: p, inHeader: true})
	return p
}

// headerDone reads a finished header block and opens what the part's type says is inside.
func (s *scanner) headerDone(l *level) {
	l.inHeader = false
	l.part.Body = s.off
	l.part.readHeader()
	if len(s.stack) >= maxDepth || s.parts >= maxParts || l.tooLong {
		return
	}
	identity := l.part.Encoding == "7bit" || l.part.Encoding == "8bit" || l.part.Encoding == "binary"
	switch {
	case l.part.Multipart() && len(l.part.Params["boundary"]) <= maxBoundaryLen:
		l.boundary = strings.TrimRight(l.part.Params["boundary"], " \t")
		l.child = "text/plain"
		if l.part.Type == "multipart/digest" {
			l.child = "message/rfc822"
		}
		old, had := s.boundaries[l.boundary]
		s.shadowed = append(s.shadowed, shadow{l.boundary, old, had})
		s.boundaries[l.boundary] = len(s.stack) - 1
	case (l.part.Type == "message/rfc822" || l.part.Type == "message/global") && identity:
		s.open("text/plain")
	}
}

// close ends the innermost open part at end.
func (s *scanner) close(end int64) {
	l := s.stack[len(s.stack)-1]
	s.stack = s.stack[:len(s.stack)-1]
	l.part.End = max(end, l.part.Start)
	if l.inHeader {
		l.part.Body = l.part.End
		l.part.readHeader()
	}
	l.part.Body = min(l.part.Body, l.part.End)
	if l.boundary != "" {
		h := s.shadowed[len(s.shadowed)-1]
		s.shadowed = s.shadowed[:len(s.shadowed)-1]
		if h.had {
			s.boundaries[h.boundary] = h.index
		} else {
			delete(s.boundaries, h.boundary)
		}
	}
}

// readHeader fills the fields that the header block gives.
func (p *Part) readHeader() {
	p.Fields = ScanHeader(p.Header)
	p.Encoding = "7bit"
	if v := p.Fields.Get(p.Header, "Content-Type"); v != "" {
		t, params := ParseParams(v)
		if strings.Count(t, "/") == 1 {
			p.Type = t
		}
		p.Params = params
	}
	if v := p.Fields.Get(p.Header, "Content-Disposition"); v != "" {
		p.Disposition, p.DispParams = ParseParams(v)
	}
	if v := p.Fields.Get(p.Header, "Content-Transfer-Encoding"); v != "" {
		e, _, _ := strings.Cut(v, ";")
		p.Encoding = strings.ToLower(strings.TrimSpace(e))
	}
	p.ContentID = strings.TrimSuffix(strings.TrimPrefix(p.Fields.Get(p.Header, "Content-ID"), "<"), ">")
}
