// Package mime is a tolerant scanner over the bytes of a message. It never fails: it gives offsets of what
// it can read, and treats what it cannot read as text. Nothing here parses a message to write it again.
package mime

import (
	"bytes"
	"strings"
)

// Header is the header block of a message or part: its fields in order, with byte offsets into the bytes
// that were scanned.
type Header struct {
	Fields []Field
	// End is the offset of the first body byte, after the blank line; the length of the bytes when there
	// is no blank line.
	End int
	// Defects are the stretches of the block that belong to no field: lines without a colon, an mbox "From "
	// line, white space before the first field.
	Defects []Defect
}

// Field is one header field. Name is as it was written.
type Field struct {
	Name       string
	Start, End int // the whole field: name, folded lines, line end
	ValueStart int // after the colon
}

// Defect is a stretch of bytes in a header block that is no field.
type Defect struct {
	Start, End int
	What       string // "mbox line", "leading space", "no colon"
}

// ScanHeader reads the header block at the start of b, in time linear in it. It takes lines that end in
// CRLF, LF or a run of CRs and an LF.
func ScanHeader(b []byte) Header {
	var h Header
	for off := 0; off < len(b); {
		end := lineEnd(b, off)
		line := bytes.TrimRight(b[off:end], "\r\n")
		if len(line) == 0 && end > off && b[end-1] == '\n' {
			h.End = end
			return h
		}
		h.line(b, line, off, end)
		off = end
	}
	h.End = len(b)
	return h
}

// line adds one line to the block.
func (h *Header) line(b, line []byte, off, end int) {
	if len(line) > 0 && (line[0] == ' ' || line[0] == '\t') {
		if n := len(h.Fields); n > 0 && h.Fields[n-1].End == off {
			h.Fields[n-1].End = end // RFC 5322 §2.2.3: folded
			return
		}
		h.Defects = append(h.Defects, Defect{off, end, "leading space"})
		return
	}
	colon := bytes.IndexByte(line, ':')
	if colon < 0 || !fieldName(bytes.TrimRight(line[:max(colon, 0)], " \t")) {
		what := "no colon"
		if bytes.HasPrefix(line, []byte("From ")) || bytes.HasPrefix(line, []byte(">From ")) {
			what = "mbox line"
		}
		h.Defects = append(h.Defects, Defect{off, end, what})
		return
	}
	// RFC 5322 §4.5.3: obsolete syntax allows white space before the colon.
	h.Fields = append(h.Fields, Field{Name: string(bytes.TrimRight(line[:colon], " \t")), Start: off, End: end, ValueStart: off + colon + 1})
}

// lineEnd is the offset after the line feed that ends the line at off.
func lineEnd(b []byte, off int) int {
	if i := bytes.IndexByte(b[off:], '\n'); i >= 0 {
		return off + i + 1
	}
	return len(b)
}

// fieldName reports whether b is a field name: printable ASCII without the colon (RFC 5322 §2.2).
func fieldName(b []byte) bool {
	for _, c := range b {
		if c <= ' ' || c >= 0x7f {
			return false
		}
	}
	return len(b) > 0
}

// HeaderEnd gives the offset of the first body byte, or -1 while b holds no blank line yet. For readers that
// gather a header block as it comes.
func HeaderEnd(b []byte) int {
	for off := 0; off < len(b); {
		i := bytes.IndexByte(b[off:], '\n')
		if i < 0 {
			return -1
		}
		if len(bytes.TrimRight(b[off:off+i], "\r")) == 0 {
			return off + i + 1
		}
		off += i + 1
	}
	return -1
}

// Value is the field's value, unfolded (RFC 5322 §2.2.3) and trimmed. b is what was scanned.
func (f Field) Value(b []byte) string {
	v := b[f.ValueStart:f.End]
	if bytes.IndexByte(v[:max(len(v)-2, 0)], '\n') < 0 {
		return strings.TrimSpace(string(v))
	}
	// Unfolding takes out the line end alone; the white space behind it stays.
	return strings.TrimSpace(strings.NewReplacer("\r\n", "", "\n", "", "\r", "").Replace(string(v)))
}

// Is reports whether the field has the name, in any case.
func (f Field) Is(name string) bool { return strings.EqualFold(f.Name, name) }

// Values gives the values of all fields of that name, in order.
func (h Header) Values(b []byte, name string) []string {
	var vs []string
	for _, f := range h.Fields {
		if f.Is(name) {
			vs = append(vs, f.Value(b))
		}
	}
	return vs
}

// Get gives the first field's value; "" when there is none.
func (h Header) Get(b []byte, name string) string {
	for _, f := range h.Fields {
		if f.Is(name) {
			return f.Value(b)
		}
	}
	return ""
}

// Has reports whether there is a field of that name.
func (h Header) Has(name string) bool {
	for _, f := range h.Fields {
		if f.Is(name) {
			return true
		}
	}
	return false
}
