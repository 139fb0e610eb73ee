// Package graph simulates the part of Microsoft Graph that stands behind sending: drafts, messages, folders,
// attachments and upload sessions. It is written from the vendor's documentation and published observations,
// and knows nothing of the bridge.
package graph

import (
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"sort"
	"strconv"
	"strings"
	"sync"
	"time"

	"mailbridge/internal/cloudsim/identity"
	"mailbridge/internal/cloudsim/world"
)

// Limits of the simulated cloud (https://learn.microsoft.com/graph/throttling-limits and message pages).
const (
	maxBody       = 4 << 20
	maxRecipients = 500
	maxPiece      = 4 << 20
	maxUpload     = 150 << 20
	minUpload     = 3 << 20
	concurrent    = 4
)

// Server is the simulated Graph.
type Server struct {
	w       *world.World
	verify  func(token string) (identity.Claims, error)
	uploads func() string // base of the other host, for upload URLs

	// Linger is how long a sent draft stays in Drafts; Concurrent the requests at once per application and
	// mailbox. Set them before use.
	Linger     time.Duration
	Concurrent int

	mu       sync.Mutex
	boxes    map[string]*mailbox
	sessions map[string]*session
	running  map[string]int
	timers   sync.WaitGroup
	closed   bool
}

// mailbox is one user's.
type mailbox struct {
	addr    string
	aliases []string
	allowed map[string][]string // RBAC: application → roles, which do not show in tokens
	items   map[string]*item
	order   []string
}

// item is a message.
type item struct {
	id        string // immutable
	folder    string
	draft     bool
	submitted bool
	raw       []byte // MIME; nil for a structured draft
	json      *message
	att       []attachment
	created   time.Time
	change    int
}

type attachment struct {
	ID          string `json:"id"`
	Type        string `json:"@odata.type"`
	Name        string `json:"name"`
	ContentType string `json:"contentType"`
	Size        int    `json:"size"`
	IsInline    bool   `json:"isInline"`
	ContentID   string `json:"contentId,omitempty"`
	data        []byte
}

// session is an upload of one attachment.
type session struct {
	box, item, token string
	att              attachment
	data             []byte
	size             int
}

// New makes an empty Graph; uploads gives the base of the host that upload URLs lead to.
func New(w *world.World, verify func(string) (identity.Claims, error), uploads func() string) *Server {
	return &Server{w: w, verify: verify, uploads: uploads, Linger: 50 * time.Millisecond, Concurrent: concurrent, boxes: map[string]*mailbox{}, sessions: map[string]*session{}, running: map[string]int{}}
}

// AddMailbox makes a mailbox; aliases are further addresses that it may send as.
func (s *Server) AddMailbox(addr string, aliases ...string) {
	b := &mailbox{addr: addr, aliases: aliases, items: map[string]*item{}, allowed: map[string][]string{}}
	s.mu.Lock()
	s.boxes[world.Fold(addr)] = b
	s.mu.Unlock()
	s.w.Register(addr, func(d world.Delivery) {
		s.mu.Lock()
		defer s.mu.Unlock()
		b.add(&item{folder: "inbox", raw: d.Raw, created: s.w.Now()})
	})
}

// Allow grants an application roles for one mailbox, as RBAC for Applications does.
func (s *Server) Allow(addr, appID string, roles ...string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if b := s.boxes[world.Fold(addr)]; b != nil {
		b.allowed[appID] = roles
	}
}

// Count counts the messages in a folder, by its well-known name.
func (s *Server) Count(addr, folder string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	if b := s.boxes[world.Fold(addr)]; b != nil {
		for _, it := range b.items {
			if it.folder == folder {
				n++
			}
		}
	}
	return n
}

// Settle waits until what was sent has been delivered and has moved to Sent Items.
func (s *Server) Settle() { s.timers.Wait() }

// Close waits for messages that are on their way from Drafts to Sent Items.
func (s *Server) Close() {
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	s.timers.Wait()
}

func (b *mailbox) add(it *item) *item {
	var id [54]byte // 72 characters in base64, as immutable ids have
	if _, err := rand.Read(id[:]); err != nil {
		panic(err)
	}
	it.id = base64.RawURLEncoding.EncodeToString(id[:])
	b.items[it.id] = it
	b.order = append(b.order, it.id)
	return it
}

var wellKnown = map[string]string{"inbox": "Inbox", "drafts": "Drafts", "sentitems": "Sent Items", "deleteditems": "Deleted Items", "junkemail": "Junk Email", "outbox": "Outbox", "archive": "Archive"}

// Register adds the routes of the API.
func (s *Server) Register(mux *http.ServeMux) {
	mux.HandleFunc("/v1.0/", s.serve)
}

// RegisterUploads adds the routes of the other host.
func (s *Server) RegisterUploads(mux *http.ServeMux) { mux.HandleFunc("/api/gv1.0/", s.upload) }

// call is one request on its way.
type call struct {
	s         *Server
	r         *http.Request
	claims    identity.Claims
	box       *mailbox
	user      string
	path      []string // below the mailbox
	route     string
	immutable bool
	id        string
}

func (c *call) fail(status int, code, text string) world.Reply {
	if code == "" {
		code = map[int]string{413: "RequestEntityTooLarge", 429: "ApplicationThrottled", 503: "ServiceUnavailable", 504: "GatewayTimeout", 500: "InternalServerError"}[status]
	}
	if text == "" {
		text = code
	}
	inner := map[string]string{"date": c.s.w.Now().UTC().Format("2006-01-02T15:04:05"), "request-id": c.id, "client-request-id": c.r.Header.Get("client-request-id")}
	return world.JSON(status, map[string]any{"error": map[string]any{"code": code, "message": text, "innerError": inner}})
}

func uuid() string {
	var b [16]byte
	if _, err := rand.Read(b[:]); err != nil {
		panic(err)
	}
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

func (s *Server) serve(w http.ResponseWriter, r *http.Request) {
	c := &call{s: s, r: r, id: uuid(), immutable: strings.Contains(strings.ToLower(r.Header.Get("Prefer")), `idtype="immutableid"`)}
	h := w.Header()
	h.Set("request-id", c.id)
	if v := r.Header.Get("client-request-id"); v != "" {
		h.Set("client-request-id", v)
	}
	h.Set("x-ms-ags-diagnostic", `{"ServerInfo":{"DataCenter":"Simulated","Slice":"E","Ring":"1","ScaleUnit":"001","RoleInstance":"SIM"}}`)
	if c.immutable {
		h.Set("Preference-Applied", `IdType="ImmutableId"`)
	}
	refused := c.parse()
	who := c.user
	if c.box != nil {
		who = c.box.addr
	}
	// From the request's arrival to its answer
	// (https://learn.microsoft.com/graph/throttling-limits#outlook-service-limits).
	key := c.claims.AppID + "\x00" + world.Fold(who)
	s.mu.Lock()
	s.running[key]++
	if s.running[key] > s.Concurrent && refused == nil {
		reply := c.fail(http.StatusTooManyRequests, "ApplicationThrottled", "Application is over its MailboxConcurrency limit.")
		refused = &reply
	}
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		s.running[key]--
		s.mu.Unlock()
	}()
	s.w.Serve(w, r, world.Meet{Service: "graph", Mailbox: who, Route: c.route, ID: c.id, MaxBody: maxBody, Refuse: c.fail, Act: func(body []byte) world.Reply {
		if refused != nil {
			return *refused
		}
		return c.act(body)
	}})
}

// parse finds out who asks for what; a reply is a refusal.
func (c *call) parse() *world.Reply {
	refuse := func(status int, code, text string) *world.Reply {
		r := c.fail(status, code, text)
		return &r
	}
	segs := strings.Split(strings.TrimPrefix(c.r.URL.EscapedPath(), "/v1.0/"), "/")
	for i := range segs {
		v, err := url.PathUnescape(segs[i])
		if err != nil {
			return refuse(400, "BadRequest", "Malformed path.")
		}
		segs[i] = v
	}
	me := segs[0] == "me"
	switch {
	case me:
		c.path = segs[1:]
	case segs[0] == "users" && len(segs) > 1:
		c.user, c.path = segs[1], segs[2:]
	default:
		c.route = "unknown"
	}
	c.route = c.name()
	token, ok := strings.CutPrefix(c.r.Header.Get("Authorization"), "Bearer ")
	if !ok || token == "" {
		return refuse(401, "InvalidAuthenticationToken", "Access token is empty.")
	}
	claims, err := c.s.verify(token)
	if err != nil || claims.Google {
		return refuse(401, "InvalidAuthenticationToken", "Lifetime validation failed, the token is expired.")
	}
	c.claims = claims
	if me {
		if claims.Mailbox == "" {
			return refuse(400, "BadRequest", "/me request is only valid with delegated authentication flow.")
		}
		c.user = claims.Mailbox
	}
	if c.route == "unknown" {
		return refuse(404, "ResourceNotFound", "Resource not found.")
	}
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	c.box = c.s.boxes[world.Fold(c.user)]
	if c.box == nil {
		return refuse(404, "ErrorInvalidUser", "The requested user '"+c.user+"' is invalid.")
	}
	if claims.Mailbox != "" && world.Fold(claims.Mailbox) != world.Fold(c.user) {
		return refuse(403, "ErrorAccessDenied", "Access is denied. Check credentials and try again.")
	}
	if !c.permitted() {
		return refuse(403, "ErrorAccessDenied", "Access is denied. Check credentials and try again.")
	}
	return nil
}

// name is the route's name, for knobs and the record.
func (c *call) name() string {
	p, m := c.path, c.r.Method
	is := func(n int, at0 string) bool { return len(p) == n && p[0] == at0 }
	switch {
	case is(1, "sendMail") && m == "POST":
		return "sendMail"
	case is(1, "messages") && m == "POST":
		return "createDraft"
	case is(1, "messages") && m == "GET":
		return "listMessages"
	case is(2, "messages") && m == "GET":
		return "getMessage"
	case is(2, "messages") && m == "PATCH":
		return "patchMessage"
	case is(2, "messages") && m == "DELETE":
		return "deleteMessage"
	case is(3, "messages") && p[2] == "send" && m == "POST":
		return "send"
	case is(3, "messages") && p[2] == "$value" && m == "GET":
		return "getValue"
	case is(3, "messages") && p[2] == "attachments" && (m == "POST" || m == "GET"):
		return "attachments"
	case is(4, "messages") && p[3] == "createUploadSession" && m == "POST":
		return "createUploadSession"
	case is(1, "mailFolders") && m == "GET":
		return "listFolders"
	case is(2, "mailFolders") && m == "GET":
		return "getFolder"
	case is(3, "mailFolders") && p[2] == "messages" && m == "GET":
		return "listMessages"
	case is(3, "mailFolders") && p[2] == "messages" && m == "POST":
		return "createInFolder"
	}
	return "unknown"
}

// permitted holds the route against roles, scopes and RBAC grants
// (https://learn.microsoft.com/graph/permissions-reference).
func (c *call) permitted() bool {
	need := []string{"Mail.ReadWrite"}
	switch c.route {
	case "sendMail", "send":
		need = []string{"Mail.Send"}
	case "listMessages", "getMessage", "getValue", "listFolders", "getFolder":
		need = []string{"Mail.ReadWrite", "Mail.Read"}
	}
	have := append(append(append([]string{}, c.claims.Roles...), c.claims.Scopes...), c.box.allowed[c.claims.AppID]...)
	for _, n := range need {
		for _, h := range have {
			if h == n {
				return true
			}
		}
	}
	return false
}

// find finds the item that the path names, by either kind of id; the caller holds the lock.
func (c *call) find(id string) (*item, *world.Reply) {
	if len(id) < 20 {
		r := c.fail(400, "ErrorInvalidIdMalformed", "Id is malformed.")
		return nil, &r
	}
	if it := c.box.items[id]; it != nil {
		return it, nil
	}
	for _, it := range c.box.items {
		if it.classic() == id {
			return it, nil
		}
	}
	r := c.fail(404, "ErrorItemNotFound", "The specified object was not found in the store.")
	return nil, &r
}

// classic is the default id, which changes with the folder and is longer than an immutable one.
func (it *item) classic() string {
	return base64.RawURLEncoding.EncodeToString([]byte("classic id, which is long and changes when the message moves " + it.folder + " " + it.id))
}

func (c *call) act(body []byte) world.Reply {
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	switch c.route {
	case "sendMail":
		return c.sendMail(body)
	case "createDraft":
		return c.createDraft(body)
	case "createInFolder":
		if strings.HasPrefix(c.r.Header.Get("Content-Type"), "text/plain") {
			return c.fail(400, "UnableToDeserializePostBody", "were unable to deserialize ")
		}
		return c.createDraft(body)
	case "listMessages":
		return c.list()
	case "listFolders":
		return c.folders()
	case "getFolder":
		name := strings.ToLower(c.path[1])
		if wellKnown[name] == "" {
			return c.fail(404, "ErrorItemNotFound", "The specified object was not found in the store.")
		}
		return world.JSON(200, c.folder(name))
	}
	it, refused := c.find(c.path[1])
	if refused != nil {
		return *refused
	}
	switch c.route {
	case "getMessage":
		return world.JSON(200, c.render(it))
	case "getValue":
		r := world.Reply{Status: 200, Header: http.Header{"Content-Type": {"text/plain"}}, Body: it.mime()}
		return r
	case "deleteMessage":
		delete(c.box.items, it.id)
		return world.Reply{Status: 204}
	case "patchMessage":
		var m message
		if err := json.Unmarshal(body, &m); err != nil {
			return c.fail(400, "RequestBodyRead", err.Error())
		}
		it.change++
		return world.JSON(200, c.render(it))
	case "send":
		if !it.draft {
			return c.fail(400, "ErrorInvalidRequest", "The message is not a draft.")
		}
		return c.submit(it)
	case "attachments":
		return c.attach(it, body)
	case "createUploadSession":
		return c.openSession(it, body)
	}
	return c.fail(501, "NotImplemented", "")
}

// base64Body decodes the body of a MIME request: standard alphabet, line breaks allowed.
func base64Body(b []byte) ([]byte, bool) {
	s := strings.Map(func(r rune) rune {
		if r == '\r' || r == '\n' {
			return -1
		}
		return r
	}, string(b))
	out, err := base64.StdEncoding.DecodeString(s)
	return out, err == nil && len(out) > 0
}

func (c *call) sendMail(body []byte) world.Reply {
	it := &item{draft: true, folder: "drafts", created: c.s.w.Now()}
	if strings.HasPrefix(c.r.Header.Get("Content-Type"), "text/plain") {
		raw, ok := base64Body(body)
		if !ok {
			return c.fail(400, "ErrorMimeContentInvalidBase64String", "Invalid base64 string for MIME content.")
		}
		it.raw = raw
	} else {
		var req struct {
			Message *message `json:"message"`
		}
		if err := json.Unmarshal(body, &req); err != nil || req.Message == nil {
			return c.fail(400, "UnableToDeserializePostBody", "were unable to deserialize ")
		}
		it.json = req.Message
		if refused := it.take(req.Message); refused != "" {
			return c.fail(400, refused, refused)
		}
	}
	if r := c.submit(it); r.Status != http.StatusAccepted {
		return r
	}
	return world.Reply{Status: http.StatusAccepted}
}

// submit sends a draft: it is checked, delivered, and moves to Sent Items a little later.
func (c *call) submit(it *item) world.Reply {
	h := it.header()
	to := h.recipients()
	if len(to) == 0 || h.unreadable {
		return c.fail(400, "ErrorInvalidRecipients", "At least one recipient is not valid., A message can't be sent because it contains no recipients.")
	}
	if len(to) > maxRecipients {
		return c.fail(400, "ErrorInvalidRecipients", "The number of recipients exceeds the limit.")
	}
	from := h.from
	if from == "" {
		from = c.box.addr
	}
	ok := world.Fold(from) == world.Fold(c.box.addr)
	for _, a := range c.box.aliases {
		ok = ok || world.Fold(a) == world.Fold(from)
	}
	if !ok {
		return c.fail(403, "ErrorSendAsDenied", "The user account which was used to submit this request does not have the right to send mail on behalf of the specified sending account. Cannot submit message.")
	}
	if it.id == "" {
		c.box.add(it)
	}
	it.submitted = true
	raw := it.mime()
	// What recipients get has no Bcc, and a trace line of the cloud on top.
	wire := append([]byte("Received: from simulated.outlook.example by simulated.protection.example with HTTPS;\r\n\t"+c.s.w.Now().UTC().Format(time.RFC1123Z)+"\r\n"), without(raw, "Bcc")...)
	s, box, w := c.s, c.box, c.s.w
	done := func() {
		s.mu.Lock()
		it.draft, it.submitted, it.folder = false, false, "sentitems"
		it.change++
		s.mu.Unlock()
	}
	s.timers.Add(1)
	deliver := func() {
		defer s.timers.Done()
		w.Deliver("graph", box.addr, to, wire)
		s.mu.Lock()
		linger := s.Linger
		if s.closed {
			linger = 0
		}
		s.mu.Unlock()
		if linger == 0 {
			done()
			return
		}
		s.timers.Add(1)
		time.AfterFunc(linger, func() {
			defer s.timers.Done()
			done()
		})
	}
	go deliver()
	return world.Reply{Status: http.StatusAccepted}
}

func (c *call) createDraft(body []byte) world.Reply {
	it := &item{draft: true, folder: "drafts", created: c.s.w.Now()}
	if strings.HasPrefix(c.r.Header.Get("Content-Type"), "text/plain") {
		raw, ok := base64Body(body)
		if !ok {
			return c.fail(400, "ErrorMimeContentInvalidBase64String", "Invalid base64 string for MIME content.")
		}
		it.raw = raw
	} else {
		var m message
		d := json.NewDecoder(strings.NewReader(string(body)))
		d.DisallowUnknownFields()
		if err := d.Decode(&m); err != nil {
			return c.fail(400, "UnableToDeserializePostBody", "were unable to deserialize ")
		}
		it.json = &m
		if refused := it.take(&m); refused != "" {
			return c.fail(400, refused, refused)
		}
	}
	c.box.add(it)
	return world.JSON(http.StatusCreated, c.render(it))
}

// list lists messages, with the filters that finding a sent message needs.
func (c *call) list() world.Reply {
	folder := ""
	if len(c.path) == 3 {
		if folder = strings.ToLower(c.path[1]); wellKnown[folder] == "" {
			return c.fail(404, "ErrorFolderNotFound", "The specified folder could not be found in the store.")
		}
	}
	q := c.r.URL.Query()
	want, filtered := "", false
	if f := q.Get("$filter"); f != "" {
		v, ok := strings.CutPrefix(f, "internetMessageId eq '")
		v, ok2 := strings.CutSuffix(v, "'")
		if !ok || !ok2 {
			return c.fail(400, "InefficientFilter", "The restriction or sort order is too complex for this operation.")
		}
		want, filtered = strings.ReplaceAll(v, "''", "'"), true
	}
	top, skip := 10, 0
	if v, err := strconv.Atoi(q.Get("$top")); err == nil && v > 0 && v <= 1000 {
		top = v
	}
	if v, err := strconv.Atoi(q.Get("$skip")); err == nil {
		skip = v
	}
	var found []*item
	for _, it := range c.box.items {
		if (folder == "" || it.folder == folder) && (!filtered || it.header().messageID == want) {
			found = append(found, it)
		}
	}
	sort.Slice(found, func(i, j int) bool { return found[i].created.After(found[j].created) })
	page := []any{}
	for i := skip; i < len(found) && i < skip+top; i++ {
		page = append(page, c.render(found[i]))
	}
	out := map[string]any{"@odata.context": "https://" + c.r.Host + "/v1.0/$metadata#messages", "value": page}
	if skip+top < len(found) {
		q.Set("$skip", strconv.Itoa(skip+top))
		out["@odata.nextLink"] = "https://" + c.r.Host + c.r.URL.EscapedPath() + "?" + q.Encode()
	}
	return world.JSON(200, out)
}

func (c *call) folder(name string) map[string]any {
	n := 0
	for _, it := range c.box.items {
		if it.folder == name {
			n++
		}
	}
	return map[string]any{"id": "AQMkFOLDER" + base64.RawURLEncoding.EncodeToString([]byte(c.box.addr+"/"+name)), "displayName": wellKnown[name], "parentFolderId": "AQMkROOT", "childFolderCount": 0, "unreadItemCount": 0, "totalItemCount": n, "isHidden": false}
}

func (c *call) folders() world.Reply {
	names := make([]string, 0, len(wellKnown))
	for n := range wellKnown {
		names = append(names, n)
	}
	sort.Strings(names)
	list := []any{}
	for _, n := range names {
		list = append(list, c.folder(n))
	}
	return world.JSON(200, map[string]any{"@odata.context": "https://" + c.r.Host + "/v1.0/$metadata#mailFolders", "value": list})
}
