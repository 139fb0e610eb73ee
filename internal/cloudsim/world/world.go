// Package world is what the simulated clouds share: who has a mailbox where, how a message travels between
// them, the knobs that make a cloud misbehave, and the record of every request. It imports nothing of the
// bridge: the simulated clouds are written from the clouds' documents, not from our clients.
package world

import (
	"fmt"
	"strings"
	"sync"
	"time"
)

// Delivery is one recipient's copy of a message, as the recipient got it.
type Delivery struct {
	ID   int       `json:"id"` // counts from 1
	Time time.Time `json:"time"`
	Via  string    `json:"via"`  // the cloud that sent it: "graph" or "gmail"
	From string    `json:"from"` // envelope sender
	To   string    `json:"to"`   // this recipient
	Raw  []byte    `json:"-"`    // RFC 5322, CRLF
}

// World is one set of simulated clouds. Its methods are safe for concurrent use.
type World struct {
	// Now is the clouds' clock; set it before use to make them disagree with the client's.
	Now func() time.Time

	mu         sync.Mutex
	inboxes    map[string]func(Delivery)
	deliveries []Delivery
	keep       int
	next       int
	rules      []*Rule
	requests   []Request
}

// New makes an empty world that keeps the last keep deliveries and requests (0: 100,000 of each).
func New(keep int) *World {
	if keep <= 0 {
		keep = 100_000
	}
	return &World{Now: time.Now, inboxes: map[string]func(Delivery){}, keep: keep}
}

// Fold is the form in which addresses are compared: mailboxes of both clouds ignore case.
func Fold(addr string) string { return strings.ToLower(strings.TrimSpace(addr)) }

// Register says that a cloud has a mailbox at addr; put files a message that arrives for it.
func (w *World) Register(addr string, put func(Delivery)) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.inboxes[Fold(addr)] = put
}

// Deliver carries raw to every recipient: into the mailbox where one is registered, and in any case into
// the record that Deliveries shows, so that mail to the outside can be seen too.
func (w *World) Deliver(via, from string, to []string, raw []byte) {
	for _, rcpt := range to {
		w.mu.Lock()
		w.next++
		d := Delivery{ID: w.next, Time: w.Now(), Via: via, From: from, To: rcpt, Raw: raw}
		w.deliveries = append(w.deliveries, d)
		if len(w.deliveries) > w.keep {
			w.deliveries = append([]Delivery(nil), w.deliveries[len(w.deliveries)-w.keep/2:]...)
		}
		put := w.inboxes[Fold(rcpt)]
		w.mu.Unlock()
		if put != nil {
			put(d)
		}
	}
}

// Deliveries lists the recipients' copies, oldest first.
func (w *World) Deliveries() []Delivery {
	w.mu.Lock()
	defer w.mu.Unlock()
	return append([]Delivery(nil), w.deliveries...)
}

// Request is one request that a cloud was asked, as it saw it.
type Request struct {
	Time    time.Time `json:"time"`
	Service string    `json:"service"` // "entra", "google", "graph", "upload", "gmail-smtp", "gmail-imap"
	Route   string    `json:"route"`   // the operation, such as "sendMail", "createDraft", "send", "token", "AUTH", "DATA"
	Mailbox string    `json:"mailbox,omitempty"`
	Method  string    `json:"method,omitempty"`
	Path    string    `json:"path,omitempty"` // with the query, without tokens
	Status  int       `json:"status"`         // HTTP status or SMTP code; 0 when the connection was cut
	ID      string    `json:"id,omitempty"`   // the request id that was answered
	Bytes   int64     `json:"bytes"`          // of the request's body
	Prefer  string    `json:"prefer,omitempty"`
}

// Record adds r to the record.
func (w *World) Record(r Request) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if r.Time.IsZero() {
		r.Time = w.Now()
	}
	w.requests = append(w.requests, r)
	if len(w.requests) > w.keep {
		w.requests = append([]Request(nil), w.requests[len(w.requests)-w.keep/2:]...)
	}
}

// Requests lists the requests, oldest first.
func (w *World) Requests() []Request {
	w.mu.Lock()
	defer w.mu.Unlock()
	return append([]Request(nil), w.requests...)
}

// Rule is one knob: requests that match it meet its fault. Empty match fields match everything. Rules are
// tried in the order of Add; the first that matches counts, so a script of statuses is a row of rules with
// Times 1. A zero field does nothing.
type Rule struct {
	// What it matches.
	Service string `json:"service,omitempty"`
	Mailbox string `json:"mailbox,omitempty"`
	Route   string `json:"route,omitempty"`
	Times   int    `json:"times,omitempty"` // matches so many requests and is gone; 0 is until Reset
	Skip    int    `json:"skip,omitempty"`  // lets so many matching requests pass first

	// What happens. Latency comes first, then at most one of the others.
	Latency    time.Duration `json:"latency,omitempty"`     // nanoseconds
	Status     int           `json:"status,omitempty"`      // answer this status or SMTP code and do nothing
	Code       string        `json:"code,omitempty"`        // … with this error code (Graph, OAuth) or enhanced code (SMTP)
	Text       string        `json:"text,omitempty"`        // … and this text
	Body       string        `json:"body,omitempty"`        // … or with exactly this body, say garbage or HTML
	RetryAfter string        `json:"retry_after,omitempty"` // Retry-After verbatim: "3", "2.128", a date; also on success
	After      bool          `json:"after,omitempty"`       // act first, then answer Status (504 after success)
	Cut        string        `json:"cut,omitempty"`         // cut the connection: "before" reading the request, "during" its body, "after" acting on it, "answer" in mid-answer
	Hang       bool          `json:"hang,omitempty"`        // act, then answer nothing until the client goes away
	Name       string        `json:"name,omitempty"`        // a fault that only one service knows, such as "linger" or "no-access-token"

	seen int
}

// Add turns a knob.
func (w *World) Add(r Rule) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.rules = append(w.rules, &r)
}

// Reset turns all knobs back. Requests already met keep their fate.
func (w *World) Reset() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.rules = nil
}

// Match finds the rule that a request meets and counts the meeting. The zero Rule is "nothing happens".
func (w *World) Match(service, mailbox, route string) Rule {
	w.mu.Lock()
	defer w.mu.Unlock()
	for i, r := range w.rules {
		if r.Service != "" && r.Service != service || r.Route != "" && r.Route != route ||
			r.Mailbox != "" && Fold(r.Mailbox) != Fold(mailbox) {
			continue
		}
		r.seen++
		if r.seen <= r.Skip {
			continue
		}
		if r.Times > 0 && r.seen-r.Skip >= r.Times {
			w.rules = append(w.rules[:i:i], w.rules[i+1:]...)
		}
		return *r
	}
	return Rule{}
}

// String describes the rule in one line.
func (r Rule) String() string {
	return fmt.Sprintf("%s %s %s: status=%d cut=%q after=%v retry-after=%q name=%q", r.Service, r.Mailbox, r.Route, r.Status, r.Cut, r.After, r.RetryAfter, r.Name)
}
