package providertest

import (
	"bytes"
	"fmt"
	"io"
	"net/mail"
	"strings"
	"sync/atomic"
	"time"

	nouns "mailbridge/internal/mail"
)

// Bytes is a message in memory.
type Bytes []byte

// Open gives a reader of the message.
func (b Bytes) Open() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b)), nil }

// Size is its length in bytes.
func (b Bytes) Size() int64 { return int64(len(b)) }

var serial atomic.Int64 // makes ids of messages differ within a test binary

// Message describes a message to make.
type Message struct {
	From    string
	To      []string // envelope
	Header  string   // further fields with CRLF, such as "To: a@example.net\r\n"; empty names To
	Body    string   // empty is a line of text
	TraceID string   // empty is a new one
}

// Outgoing makes the message as the submission edge would hand it over: CRLF, our Received line on top.
func (m Message) Outgoing() *nouns.Outgoing {
	n := serial.Add(1)
	if m.TraceID == "" {
		m.TraceID = fmt.Sprintf("T%08dX%x", n, time.Now().UnixNano())
	}
	if m.Header == "" {
		m.Header = "To: " + strings.Join(m.To, ",\r\n ") + "\r\n"
	}
	if m.Body == "" {
		m.Body = "Toner is low.\r\n.\r\nSecond line, caf\xc3\xa9.\r\n"
	}
	id := "<" + m.TraceID + "@bridge.example>"
	raw := "Received: from printer (printer.example [192.0.2.7])\r\n\tby bridge.example with ESMTPSA id " + m.TraceID +
		";\r\n\tTue, 24 Nov 2026 10:00:00 +0000\r\n" +
		"From: " + m.From + "\r\nSubject: conformance " + m.TraceID + "\r\nMessage-ID: " + id +
		"\r\nDate: Tue, 24 Nov 2026 10:00:00 +0000\r\nMIME-Version: 1.0\r\nContent-Type: text/plain; charset=utf-8\r\n" +
		"Content-Transfer-Encoding: 8bit\r\nX-Conformance:  two  spaces,\r\n\tand a fold\r\n" + m.Header + "\r\n" + m.Body
	return &nouns.Outgoing{
		Envelope:  nouns.Envelope{From: m.From, To: m.To},
		Content:   Bytes(raw),
		TraceID:   m.TraceID,
		MessageID: id,
	}
}

// split separates header block and body.
func split(raw []byte) (header, body string) {
	h, b, found := strings.Cut(string(raw), "\r\n\r\n")
	if !found {
		return string(raw), ""
	}
	return h + "\r\n", b
}

// parsed reads raw with the standard library's reader, which is none of ours.
func parsed(raw []byte) (*mail.Message, error) { return mail.ReadMessage(bytes.NewReader(raw)) }
