package graph

import (
	"encoding/json"
	"io"
	"net/http"
	"strconv"
	"strings"
)

// item is a message as Graph shows it (https://learn.microsoft.com/graph/api/resources/message).
type item struct {
	ID         string      `json:"id"`
	IsDraft    *bool       `json:"isDraft"`
	MessageID  string      `json:"internetMessageId"`
	To         []recipient `json:"toRecipients"`
	Cc         []recipient `json:"ccRecipients"`
	Bcc        []recipient `json:"bccRecipients"`
	Headers    []header    `json:"internetMessageHeaders"`
	Properties []property  `json:"singleValueExtendedProperties"`
}

type recipient struct {
	EmailAddress struct {
		Address string `json:"address"`
	} `json:"emailAddress"`
}

type header struct {
	Name  string `json:"name"`
	Value string `json:"value"`
}

// property is an extended property: the value is always a string, and the id comes back normalised,
// "Integer 0xe07" (https://learn.microsoft.com/graph/api/resources/singlevaluelegacyextendedproperty).
type property struct {
	ID    string `json:"id"`
	Value string `json:"value"`
}

type page struct {
	Value []item `json:"value"`
	Next  string `json:"@odata.nextLink"`
}

const (
	tagMessageFlags = 0x0E07 // PidTagMessageFlags, [MS-OXCMSG] §2.2.1.6
	flagSubmitted   = 0x04   // mfSubmitted
)

// submitted reports whether the item is on its way out, and whether Graph said so at all.
func (m *item) submitted() (yes, known bool) {
	for _, p := range m.Properties {
		kind, tag, _ := strings.Cut(p.ID, " ")
		n, err := strconv.ParseUint(strings.TrimPrefix(strings.ToLower(tag), "0x"), 16, 32)
		if err != nil || !strings.EqualFold(kind, "Integer") || n != tagMessageFlags {
			continue
		}
		if v, err := strconv.ParseInt(p.Value, 10, 64); err == nil {
			return v&flagSubmitted != 0, true
		}
	}
	return false, false
}

// maxAnswer is how much of an answer is kept, in bytes, after long strings were left out of it.
const maxAnswer = 4 << 20

// decode reads the JSON of an answer and finishes it. The body of a message, which may be as large as the
// message, is not kept.
func decode(resp *http.Response, v any) error {
	defer finish(resp)
	return json.NewDecoder(io.LimitReader(&shortStrings{r: resp.Body}, maxAnswer)).Decode(v)
}

// maxString is the most bytes of one JSON string that shortStrings lets through. Addresses, ids and
// header values are far shorter.
const maxString = 64 << 10

// shortStrings passes JSON on and cuts strings of more than maxString bytes.
type shortStrings struct {
	r      io.Reader
	in     bool // inside a string
	escape int  // bytes that still belong to an escape sequence
	n      int  // bytes of this string so far
}

func (s *shortStrings) Read(p []byte) (int, error) {
	for {
		n, err := s.r.Read(p)
		if n = s.cut(p[:n]); n > 0 || err != nil || len(p) == 0 {
			return n, err
		}
	}
}

// cut removes from p, in place, what is too much.
func (s *shortStrings) cut(p []byte) int {
	w := 0
	for _, b := range p {
		keep := true
		switch {
		case !s.in:
			if b == '"' {
				s.in, s.n = true, 0
			}
		case s.escape > 0:
			s.escape--
			if s.escape == 0 && b == 'u' { // the first byte after the backslash decides
				s.escape = -4
			}
			s.n++
			keep = s.n <= maxString
		case s.escape < 0: // the four digits of \uXXXX
			s.escape++
			s.n++
			keep = s.n <= maxString
		case b == '"':
			s.in = false
		case b == '\\':
			// A sequence is kept or cut as a whole: room for all of it is asked for at once.
			if s.n+12 > maxString {
				s.n = maxString
			}
			s.escape = 1
			s.n++
			keep = s.n <= maxString
		default:
			s.n++
			keep = s.n <= maxString
		}
		if keep {
			p[w] = b
			w++
		}
	}
	return w
}
