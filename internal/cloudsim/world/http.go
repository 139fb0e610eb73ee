package world

import (
	"bytes"
	"encoding/json"
	"io"
	"net/http"
	"strconv"
	"time"
)

// Reply is an answer of an HTTP cloud, made before it is given, so that a knob can spoil it.
type Reply struct {
	Status int
	Header http.Header
	Body   []byte
}

// JSON makes a reply with a JSON body; v nil is none.
func JSON(status int, v any) Reply {
	r := Reply{Status: status, Header: http.Header{}}
	if v != nil {
		b, err := json.Marshal(v)
		if err != nil {
			return Reply{Status: http.StatusInternalServerError}
		}
		r.Header.Set("Content-Type", "application/json; charset=utf-8")
		r.Body = b
	}
	return r
}

// Meet is one request to an HTTP cloud on its way through the knobs and the record.
type Meet struct {
	Service, Mailbox, Route string
	ID                      string                                    // request id that was or will be answered
	Refuse                  func(status int, code, text string) Reply // an error body in the service's own shape
	Act                     func(body []byte) Reply                   // what the service does; body is the whole request body
	MaxBody                 int64                                     // bytes of a body that are read; more is 413
}

// Serve lets a request meet its rule: latency, cuts, statuses, acting and then failing.
func (w *World) Serve(rw http.ResponseWriter, r *http.Request, m Meet) {
	rule := w.Match(m.Service, m.Mailbox, m.Route)
	rec := Request{Service: m.Service, Mailbox: m.Mailbox, Route: m.Route, Method: r.Method, Path: r.URL.Path, ID: m.ID, Prefer: r.Header.Get("Prefer")}
	defer func() { w.Record(rec) }()
	if rule.Latency > 0 {
		select {
		case <-time.After(rule.Latency):
		case <-r.Context().Done():
			return
		}
	}
	cut := func() {
		if c, _, err := http.NewResponseController(rw).Hijack(); err == nil {
			_ = c.Close()
			return
		}
		panic(http.ErrAbortHandler)
	}
	if rule.Cut == "before" {
		cut()
		return
	}
	if rule.Cut == "during" {
		_, _ = io.CopyN(io.Discard, r.Body, max(1, r.ContentLength/2))
		cut()
		return
	}
	body, err := io.ReadAll(io.LimitReader(r.Body, m.MaxBody+1))
	rec.Bytes = int64(len(body))
	if err != nil {
		return // the client broke off: nothing was done
	}
	var reply Reply
	spoiled := func() Reply {
		s := m.Refuse(rule.Status, rule.Code, rule.Text)
		if rule.Body != "" {
			s = Reply{Status: rule.Status, Header: http.Header{"Content-Type": {"text/html"}}, Body: []byte(rule.Body)}
		}
		return s
	}
	switch {
	case rule.Status != 0 && !rule.After:
		reply = spoiled()
	case int64(len(body)) > m.MaxBody:
		reply = m.Refuse(http.StatusRequestEntityTooLarge, "", "")
	default:
		reply = m.Act(body)
		if rule.Status != 0 {
			reply = spoiled()
		}
	}
	if rule.Cut == "after" {
		cut()
		return
	}
	if rule.Hang {
		<-r.Context().Done()
		panic(http.ErrAbortHandler) // an empty answer would be one
	}
	for k, v := range reply.Header {
		rw.Header()[k] = v
	}
	if rule.RetryAfter != "" {
		rw.Header().Set("Retry-After", rule.RetryAfter)
	}
	rec.Status = reply.Status
	rw.Header().Set("Content-Length", strconv.Itoa(len(reply.Body)))
	rw.WriteHeader(reply.Status)
	if rule.Cut == "answer" {
		_, _ = rw.Write(reply.Body[:len(reply.Body)/2])
		_ = http.NewResponseController(rw).Flush()
		cut()
		return
	}
	if _, err := io.Copy(rw, bytes.NewReader(reply.Body)); err != nil {
		return // the client has gone
	}
}
