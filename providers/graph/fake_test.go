package graph

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	netmail "net/mail"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"mailbridge/providers"
	"mailbridge/providers/providertest"
)

const mailbox = "scan+2'er@contoso.example"

// fake is a Graph for one mailbox, written from Microsoft's pages: drafts, send, sendMail, look-ups.
type fake struct {
	t   testing.TB
	srv *httptest.Server

	mu        sync.Mutex
	next      int
	items     map[string]*fakeItem
	delivered []providertest.Delivery
	requests  []string // method and route
	faults    []*fakeFault
	linger    bool // what was sent stays in Drafts, submitted, until settle
	down      bool
	long      int   // how long the body is that an answer shows
	minUpload int64 // the smallest upload session
	plain     bool  // the answer to a draft lists no recipients
	extra     string
	headers   bool // list pages show internetMessageHeaders
	pageSize  int
	noDrafts  bool          // the account never stages
	gone      chan struct{} // closed at the end of the test: hanging handlers end
}

type fakeItem struct {
	id     string
	raw    []byte
	draft  bool
	going  bool
	json   map[string]any // a structured draft
	files  []fakeFile
	folder string
	to     []string
}

type fakeFile struct {
	name, kind, cid string
	inline          bool
	data            []byte
	size            int64
	done            bool
}

type fakeFault struct {
	route  string // "createDraft", "send", "sendMail", …; empty is every route
	status int
	code   string
	text   string
	body   string
	header map[string]string
	after  bool   // act first
	cut    string // "before" acting, "after" it
	hang   bool
	times  int // 0 is for ever
}

func newFake(t testing.TB) *fake {
	f := &fake{t: t, items: map[string]*fakeItem{}, gone: make(chan struct{}), pageSize: 2}
	f.srv = httptest.NewServer(http.HandlerFunc(f.serve))
	t.Cleanup(func() {
		close(f.gone)
		f.srv.Close()
	})
	return f
}

func (f *fake) client(t testing.TB) *http.Client {
	d := net.Dialer{}
	tr := &http.Transport{DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
		f.mu.Lock()
		down := f.down
		f.mu.Unlock()
		if down {
			return nil, &net.OpError{Op: "dial", Net: network, Err: errors.New("connection refused")}
		}
		return d.DialContext(ctx, network, addr)
	}}
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr}
}

func (f *fake) config(t testing.TB) providers.Config {
	return providers.Config{ID: "scanners", Mailbox: mailbox, HTTP: f.client(t), Base: f.srv.URL + "/v1.0"}
}

func (f *fake) fault(x fakeFault) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.faults = append(f.faults, &x)
}

func (f *fake) asked(route string) (n int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, r := range f.requests {
		if r == route {
			n++
		}
	}
	return n
}

func (f *fake) match(route string) *fakeFault {
	f.mu.Lock()
	defer f.mu.Unlock()
	for i, x := range f.faults {
		if x.route != "" && x.route != route {
			continue
		}
		if x.times == 1 {
			f.faults = append(f.faults[:i:i], f.faults[i+1:]...)
		} else if x.times > 1 {
			x.times--
		}
		return x
	}
	return nil
}

func (f *fake) serve(w http.ResponseWriter, r *http.Request) {
	if r.Host != strings.TrimPrefix(f.srv.URL, "http://") { // the upload host is another name of the same server
		f.upload(w, r)
		return
	}
	root := "/v1.0/users/" + strings.NewReplacer("+", "%2B", "'", "%27").Replace(mailbox)
	path, ok := strings.CutPrefix(r.URL.EscapedPath(), root)
	if !ok {
		refuse(w, 404, "ErrorInvalidUser", "The requested user is invalid: "+r.URL.EscapedPath())
		return
	}
	parts := strings.Split(strings.Trim(path, "/"), "/")
	route := r.Method + " " + path
	switch {
	case r.Method == "POST" && path == "/messages":
		route = "createDraft"
	case r.Method == "POST" && path == "/sendMail":
		route = "sendMail"
	case r.Method == "POST" && len(parts) == 3 && parts[2] == "send":
		route = "send"
	case r.Method == "POST" && len(parts) == 3 && parts[2] == "attachments":
		route = "attach"
	case r.Method == "POST" && len(parts) == 4 && parts[3] == "createUploadSession":
		route = "createUploadSession"
	case r.Method == "GET" && len(parts) == 3 && parts[2] == "$value":
		route = "value"
	case r.Method == "GET" && len(parts) == 2 && parts[0] == "messages":
		route = "get"
	case r.Method == "DELETE" && len(parts) == 2 && parts[0] == "messages":
		route = "delete"
	case r.Method == "GET" && len(parts) == 3 && parts[0] == "mailFolders" && parts[2] == "messages":
		route = "list"
	case r.Method == "GET" && path == "/mailFolders/inbox":
		route = "inbox"
	}
	f.mu.Lock()
	f.requests = append(f.requests, route)
	f.mu.Unlock()
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return
	}
	if int64(len(body)) != r.ContentLength {
		refuse(w, 411, "", "")
		return
	}
	w.Header().Set("request-id", "req-"+strconv.Itoa(f.number()))
	x := f.match(route)
	rec := httptest.NewRecorder()
	if x == nil || x.after || x.cut == "after" {
		f.act(rec, r, route, parts, body)
	}
	if x == nil {
		copyAnswer(w, rec)
		return
	}
	for k, v := range x.header {
		w.Header().Set(k, v)
	}
	switch {
	case x.hang:
		select {
		case <-r.Context().Done():
		case <-f.gone:
		}
	case x.cut == "answer":
		w.Header().Set("Content-Length", "1000")
		w.WriteHeader(201)
		_, _ = io.WriteString(w, `{"id":"AAM`)
	case x.cut != "":
		panic(http.ErrAbortHandler)
	case x.status == 0:
		copyAnswer(w, rec)
	case x.body != "":
		w.WriteHeader(x.status)
		_, _ = io.WriteString(w, x.body)
	case x.code == "" && x.text == "":
		w.WriteHeader(x.status)
	default:
		refuse(w, x.status, x.code, x.text)
	}
}

func copyAnswer(w http.ResponseWriter, rec *httptest.ResponseRecorder) {
	for k, v := range rec.Header() {
		w.Header()[k] = v
	}
	w.WriteHeader(rec.Code)
	_, _ = w.Write(rec.Body.Bytes())
}

func (f *fake) number() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.next++
	return f.next
}

func refuse(w http.ResponseWriter, status int, code, text string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(map[string]any{"error": map[string]any{"code": code, "message": text, "innererror": map[string]any{"request-id": "inner-1"}}})
}

func (f *fake) act(w http.ResponseWriter, r *http.Request, route string, parts []string, body []byte) {
	f.mu.Lock()
	defer f.mu.Unlock()
	var it *fakeItem
	if len(parts) >= 2 && parts[0] == "messages" {
		id, _ := url.PathUnescape(parts[1])
		if it = f.items[id]; it == nil {
			refuse(w, 404, "ErrorItemNotFound", "The specified object was not found in the store.")
			return
		}
		if r.Header.Get("Prefer") != `IdType="ImmutableId"` {
			refuse(w, 400, "ErrorInvalidIdMalformed", "Id is malformed.")
			return
		}
	}
	switch route {
	case "attach":
		var a struct {
			Type      string `json:"@odata.type"`
			Name      string `json:"name"`
			Kind      string `json:"contentType"`
			Inline    bool   `json:"isInline"`
			ContentID string `json:"contentId"`
			Bytes     []byte `json:"contentBytes"`
		}
		if err := json.Unmarshal(body, &a); err != nil || a.Type != "#microsoft.graph.fileAttachment" || len(body) > 4_000_000 {
			refuse(w, 400, "UnableToDeserializePostBody", fmt.Sprint(err))
			return
		}
		it.files = append(it.files, fakeFile{name: a.Name, kind: a.Kind, inline: a.Inline, cid: a.ContentID, data: a.Bytes, done: true})
		w.WriteHeader(201)
		_, _ = io.WriteString(w, `{"id":"ATT1"}`)
	case "createUploadSession":
		var a struct {
			Item struct {
				Name      string `json:"name"`
				Size      int64  `json:"size"`
				Kind      string `json:"contentType"`
				Inline    bool   `json:"isInline"`
				ContentID string `json:"contentId"`
			} `json:"AttachmentItem"`
		}
		if err := json.Unmarshal(body, &a); err != nil || a.Item.Size < f.minUpload {
			refuse(w, 400, "ErrorAttachmentSizeShouldNotBeLessThanMinimumSize", fmt.Sprint(err))
			return
		}
		it.files = append(it.files, fakeFile{name: a.Item.Name, kind: a.Item.Kind, inline: a.Item.Inline, cid: a.Item.ContentID, size: a.Item.Size})
		q := url.Values{"item": {it.id}, "file": {strconv.Itoa(len(it.files) - 1)}, "authtoken": {"eyJhbGciOiJub25lIn0.x"}}
		w.WriteHeader(201)
		_ = json.NewEncoder(w).Encode(map[string]any{"uploadUrl": strings.Replace(f.srv.URL, "127.0.0.1", "localhost", 1) + "/upload?" + q.Encode(), "nextExpectedRanges": []string{"0-"}})
	case "createDraft", "sendMail":
		if r.Header.Get("Content-Type") == "application/json" && route == "createDraft" {
			f.structured(w, body)
			return
		}
		if r.Header.Get("Content-Type") != "text/plain" {
			refuse(w, 400, "UnableToDeserializePostBody", "were unable to deserialize ")
			return
		}
		if len(body) > 4_000_000 {
			w.WriteHeader(413)
			return
		}
		raw, err := base64.StdEncoding.DecodeString(string(body))
		if err != nil {
			refuse(w, 400, "ErrorMimeContentInvalidBase64String", "Invalid base64 string for MIME content.")
			return
		}
		rcpt, err := fakeRecipients(raw)
		if err != nil || len(rcpt.all) == 0 {
			refuse(w, 400, "ErrorInvalidRecipients", fmt.Sprintf("At least one recipient is not valid. %v", err))
			return
		}
		f.next++
		it = &fakeItem{id: "AAk/+=" + strconv.Itoa(f.next), raw: raw, draft: true, folder: "drafts", to: rcpt.all}
		f.items[it.id] = it
		if route == "sendMail" {
			f.submit(it)
			w.WriteHeader(202)
			return
		}
		w.WriteHeader(201)
		_ = json.NewEncoder(w).Encode(f.show(it, rcpt))
	case "send":
		if !it.draft || it.going {
			refuse(w, 400, "ErrorInvalidRequest", "The item is not a draft.")
			return
		}
		f.submit(it)
		w.WriteHeader(202)
	case "get":
		rcpt := it.rcpt()
		_ = json.NewEncoder(w).Encode(f.show(it, rcpt))
	case "value":
		w.Header().Set("Content-Type", "text/plain")
		_, _ = w.Write(it.raw)
	case "delete":
		delete(f.items, it.id)
		w.WriteHeader(204)
	case "inbox":
		_, _ = io.WriteString(w, `{"id":"AQMkInbox"}`)
	case "list":
		want := strings.TrimSuffix(strings.TrimPrefix(r.URL.Query().Get("$filter"), "internetMessageId eq '"), "'")
		want = strings.ReplaceAll(want, "''", "'")
		var all []any
		for _, id := range slices.Sorted(maps.Keys(f.items)) {
			it := f.items[id]
			m, err := netmail.ReadMessage(bytes.NewReader(it.raw))
			if it.json != nil && it.folder == parts[1] && it.json["internetMessageId"] == want {
				all = append(all, map[string]any{"id": it.id, "isDraft": it.draft, "internetMessageHeaders": it.json["internetMessageHeaders"]})
				continue
			}
			if it.folder != parts[1] || err != nil || m.Header.Get("Message-ID") != want {
				continue
			}
			e := map[string]any{"id": it.id, "isDraft": it.draft}
			if f.headers {
				var hs []any
				for _, v := range m.Header["Received"] {
					hs = append(hs, map[string]string{"name": "Received", "value": v})
				}
				e["internetMessageHeaders"] = hs
			}
			all = append(all, e)
		}
		skip, _ := strconv.Atoi(r.URL.Query().Get("$skip"))
		page := map[string]any{"value": all[min(skip, len(all)):min(skip+f.pageSize, len(all))]}
		if skip+f.pageSize < len(all) {
			q := r.URL.Query()
			q.Set("$skip", strconv.Itoa(skip+f.pageSize))
			page["@odata.nextLink"] = f.srv.URL + r.URL.EscapedPath() + "?" + q.Encode()
		}
		_ = json.NewEncoder(w).Encode(page)
	default:
		refuse(w, 404, "ResourceNotFound", route)
	}
}

func (f *fake) structured(w http.ResponseWriter, body []byte) {
	var m map[string]any
	if err := json.Unmarshal(body, &m); err != nil {
		refuse(w, 400, "UnableToDeserializePostBody", err.Error())
		return
	}
	if hs, _ := m["internetMessageHeaders"].([]any); len(hs) > 5 {
		refuse(w, 400, "InvalidInternetMessageHeaderCollection", "Maximum number of headers in one message should be less than or equal to 5.")
		return
	}
	f.next++
	it := &fakeItem{id: "AAk/+=" + strconv.Itoa(f.next), draft: true, folder: "drafts", json: m}
	rcpt := it.rcpt()
	it.to = rcpt.all
	f.items[it.id] = it
	w.WriteHeader(201)
	_ = json.NewEncoder(w).Encode(f.show(it, rcpt))
}

func (it *fakeItem) rcpt() (r fakeRcpt) {
	if it.json == nil {
		r, _ = fakeRecipients(it.raw)
		return r
	}
	for name, into := range map[string]*[]string{"toRecipients": &r.to, "ccRecipients": &r.cc, "bccRecipients": &r.bcc} {
		list, _ := it.json[name].([]any)
		for _, e := range list {
			a := e.(map[string]any)["emailAddress"].(map[string]any)["address"].(string)
			*into = append(*into, a)
			r.all = append(r.all, a)
		}
	}
	return r
}

// upload is the host of upload sessions.
func (f *fake) upload(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return
	}
	route := "upload " + r.Method
	f.mu.Lock()
	f.requests = append(f.requests, route)
	f.mu.Unlock()
	if r.Header.Get("Authorization") != "" {
		refuse(w, 401, "InvalidAudience", "no Authorization here")
		return
	}
	x := f.match(route)
	if x != nil && x.cut == "before" {
		panic(http.ErrAbortHandler)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	it := f.items[r.URL.Query().Get("item")]
	n, _ := strconv.Atoi(r.URL.Query().Get("file"))
	if it == nil || n >= len(it.files) || x != nil && x.status != 0 {
		status := 404
		if x != nil {
			status = x.status
		}
		refuse(w, status, "ItemNotFound", "the session is gone")
		return
	}
	a := &it.files[n]
	switch r.Method {
	case "PUT":
		var from, to, size int64
		if _, err := fmt.Sscanf(r.Header.Get("Content-Range"), "bytes %d-%d/%d", &from, &to, &size); err != nil ||
			from != int64(len(a.data)) || to-from+1 != int64(len(body)) || size != a.size || len(body) >= 4<<20 {
			refuse(w, 416, "InvalidRange", r.Header.Get("Content-Range"))
			return
		}
		if x != nil && x.cut == "half" { // the beginning arrives
			a.data = append(a.data, body[:len(body)/2]...)
			panic(http.ErrAbortHandler)
		}
		a.data = append(a.data, body...)
		a.done = int64(len(a.data)) == a.size
		if x != nil && x.cut == "after" {
			panic(http.ErrAbortHandler)
		}
		if a.done {
			w.WriteHeader(201)
			return
		}
		_, _ = fmt.Fprintf(w, `{"nextExpectedRanges":["%d"]}`, len(a.data))
	case "GET":
		_, _ = fmt.Fprintf(w, `{"nextExpectedRanges":["%d-"]}`, len(a.data))
	case "DELETE":
		w.WriteHeader(204)
	}
}

func (f *fake) submit(it *fakeItem) {
	shown := dropFields(it.raw, "bcc")
	seen := map[string]bool{}
	for _, to := range it.to {
		if k := strings.ToLower(to); !seen[k] {
			seen[k] = true
			f.delivered = append(f.delivered, providertest.Delivery{To: to, Raw: shown})
		}
	}
	if it.going = true; !f.linger {
		it.draft, it.folder = false, "sentitems"
	}
}

// dropFields takes fields out of a raw message, as transport does with Bcc.
func dropFields(raw []byte, name string) []byte {
	head, body, _ := strings.Cut(string(raw), "\r\n\r\n")
	var out []string
	drop := false
	for line := range strings.SplitSeq(head, "\r\n") {
		if line == "" || line[0] != ' ' && line[0] != '\t' {
			n, _, _ := strings.Cut(line, ":")
			drop = strings.EqualFold(strings.TrimSpace(n), name)
		}
		if !drop {
			out = append(out, line)
		}
	}
	return []byte(strings.Join(out, "\r\n") + "\r\n\r\n" + body)
}

type fakeRcpt struct{ to, cc, bcc, all []string }

func fakeRecipients(raw []byte) (r fakeRcpt, err error) {
	m, err := netmail.ReadMessage(bytes.NewReader(raw))
	if err != nil {
		return r, err
	}
	for name, into := range map[string]*[]string{"To": &r.to, "Cc": &r.cc, "Bcc": &r.bcc} {
		vs := m.Header[name]
		if len(vs) > 1 {
			return r, fmt.Errorf("several %s fields", name)
		}
		for _, v := range vs {
			list, err := netmail.ParseAddressList(v)
			if err != nil {
				return r, fmt.Errorf("%s: %q: %w", name, v, err)
			}
			for _, a := range list {
				*into = append(*into, a.Address)
				r.all = append(r.all, a.Address)
			}
		}
	}
	return r, nil
}

func (f *fake) show(it *fakeItem, rcpt fakeRcpt) map[string]any {
	list := func(as []string) []any {
		out := []any{}
		for _, a := range as {
			out = append(out, map[string]any{"emailAddress": map[string]string{"name": a, "address": a}})
		}
		return out
	}
	flags := 8
	if it.going {
		flags |= 4
	}
	if !it.draft {
		flags = 1
	}
	m := map[string]any{"id": it.id, "isDraft": it.draft, "body": map[string]string{"content": strings.Repeat("x\"\\é", 1+f.long)},
		"singleValueExtendedProperties": []any{map[string]string{"id": "Integer 0xe07", "value": strconv.Itoa(flags)}}}
	if !f.plain {
		if f.extra != "" {
			rcpt.cc = append(rcpt.cc, f.extra)
		}
		m["toRecipients"], m["ccRecipients"], m["bccRecipients"] = list(rcpt.to), list(rcpt.cc), list(rcpt.bcc)
	}
	return m
}

// The harness of the conformance suite.

func (f *fake) Deliveries() []providertest.Delivery {
	f.mu.Lock()
	defer f.mu.Unlock()
	return append([]providertest.Delivery(nil), f.delivered...)
}

func (f *fake) Staged() (n int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, it := range f.items {
		if it.draft {
			n++
		}
	}
	return n
}

func (f *fake) settle() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, it := range f.items {
		if it.going {
			it.draft, it.folder = false, "sentitems"
		}
	}
}

func (f *fake) Set(fault providertest.Fault, arg string) bool {
	commit := []string{"send", "sendMail"}
	each := func(x fakeFault, routes ...string) {
		for _, r := range routes {
			x.route = r
			f.fault(x)
		}
	}
	switch fault {
	case providertest.LoseCommitAnswer:
		each(fakeFault{cut: "after", times: 1}, commit...)
	case providertest.LoseCommit:
		each(fakeFault{cut: "before", times: 1}, commit...)
	case providertest.LosePrepareAnswer, providertest.HangPrepare:
		if f.noDrafts {
			return false
		}
		if fault == providertest.HangPrepare {
			each(fakeFault{hang: true}, "createDraft")
			break
		}
		each(fakeFault{cut: "after", times: 1}, "createDraft")
	case providertest.Unreachable:
		f.mu.Lock()
		f.down = true
		f.mu.Unlock()
		f.srv.CloseClientConnections()
	case providertest.HangCommit:
		each(fakeFault{hang: true}, commit...)
	case providertest.Throttle:
		each(fakeFault{status: 429, code: "ApplicationThrottled", text: "over its limit", header: map[string]string{"Retry-After": arg}}, "createDraft", "send", "sendMail")
	case providertest.EchoSecret:
		each(fakeFault{status: 400, code: "ErrorMimeContentInvalid", text: "bad: Authorization: " + arg}, "createDraft", "sendMail")
	default:
		return false
	}
	return true
}

func (f *fake) Reset() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.faults = nil
	f.down = false
}
