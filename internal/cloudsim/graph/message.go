package graph

import (
	"bytes"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"mime"
	"mime/quotedprintable"
	"net/http"
	"net/mail"
	"net/textproto"
	"strconv"
	"strings"
	"time"

	"mailbridge/internal/cloudsim/world"
)

// message is the JSON of a message (https://learn.microsoft.com/graph/api/resources/message).
type message struct {
	Subject                    string        `json:"subject,omitempty"`
	Importance                 string        `json:"importance,omitempty"`
	Body                       *body         `json:"body,omitempty"`
	From                       *recipient    `json:"from,omitempty"`
	Sender                     *recipient    `json:"sender,omitempty"`
	To                         []recipient   `json:"toRecipients,omitempty"`
	Cc                         []recipient   `json:"ccRecipients,omitempty"`
	Bcc                        []recipient   `json:"bccRecipients,omitempty"`
	ReplyTo                    []recipient   `json:"replyTo,omitempty"`
	InternetMessageID          string        `json:"internetMessageId,omitempty"`
	Headers                    []headerField `json:"internetMessageHeaders,omitempty"`
	Properties                 []property    `json:"singleValueExtendedProperties,omitempty"`
	Attachments                []jsonFile    `json:"attachments,omitempty"`
	IsRead                     *bool         `json:"isRead,omitempty"`
	IsReadReceiptRequested     *bool         `json:"isReadReceiptRequested,omitempty"`
	IsDeliveryReceiptRequested *bool         `json:"isDeliveryReceiptRequested,omitempty"`
}

type body struct {
	ContentType string `json:"contentType"`
	Content     string `json:"content"`
}

type recipient struct {
	EmailAddress struct {
		Name    string `json:"name,omitempty"`
		Address string `json:"address"`
	} `json:"emailAddress"`
}

type headerField struct {
	Name  string `json:"name"`
	Value string `json:"value"`
}

type property struct {
	ID    string `json:"id"`
	Value string `json:"value"`
}

type jsonFile struct {
	Type         string `json:"@odata.type"`
	Name         string `json:"name"`
	ContentType  string `json:"contentType"`
	ContentBytes string `json:"contentBytes"`
	IsInline     bool   `json:"isInline"`
	ContentID    string `json:"contentId"`
}

// take checks a JSON message; it returns an error code.
func (it *item) take(m *message) string {
	if len(m.Headers) > 5 {
		return "InvalidInternetMessageHeaderCollection"
	}
	for _, h := range m.Headers {
		if !strings.HasPrefix(strings.ToLower(h.Name), "x-") {
			return "InvalidInternetMessageHeader"
		}
	}
	if m.InternetMessageID == "" {
		m.InternetMessageID = "<" + rand.Text() + "@simulated.outlook.example>"
	}
	for _, f := range m.Attachments {
		if code := it.file(f); code != "" {
			return code
		}
	}
	m.Attachments = nil
	return ""
}

func (it *item) file(f jsonFile) string {
	data, err := base64.StdEncoding.DecodeString(f.ContentBytes)
	if err != nil || f.Type != "#microsoft.graph.fileAttachment" {
		return "RequestBodyRead"
	}
	if len(data) > minUpload {
		return "ErrorAttachmentSizeLimitExceeded"
	}
	it.att = append(it.att, attachment{ID: "ATT" + rand.Text(), Type: f.Type, Name: f.Name, ContentType: f.ContentType, Size: len(data), IsInline: f.IsInline, ContentID: f.ContentID, data: data})
	return ""
}

// header is what Exchange reads out of a message's header.
type header struct {
	from, subject, messageID string
	to, cc, bcc              []recipient
	fields                   []headerField
	unreadable               bool
}

// header reads the item's header: with Go's own parser, which shares nothing with the bridge's.
func (it *item) header() header {
	var h header
	if it.json != nil {
		m := it.json
		h.subject, h.messageID, h.to, h.cc, h.bcc, h.fields = m.Subject, m.InternetMessageID, m.To, m.Cc, m.Bcc, m.Headers
		if m.From != nil {
			h.from = m.From.EmailAddress.Address
		}
		return h
	}
	msg, err := mail.ReadMessage(bytes.NewReader(it.raw))
	if err != nil {
		h.unreadable = true
		return h
	}
	dec := &mime.WordDecoder{}
	list := func(name string) []recipient {
		var rs []recipient
		for _, v := range msg.Header[textproto.CanonicalMIMEHeaderKey(name)] {
			if strings.HasSuffix(strings.TrimSpace(v), ":;") || strings.TrimSpace(v) == "" {
				h.unreadable = h.unreadable || name == "To" && strings.TrimSpace(v) != ""
				continue
			}
			addrs, err := (&mail.AddressParser{WordDecoder: dec}).ParseList(v)
			if err != nil {
				h.unreadable = true
			}
			for _, a := range addrs {
				var r recipient
				r.EmailAddress.Name, r.EmailAddress.Address = a.Name, a.Address
				rs = append(rs, r)
			}
		}
		return rs
	}
	h.to, h.cc, h.bcc = list("To"), list("Cc"), list("Bcc")
	if f, err := mail.ParseAddress(msg.Header.Get("From")); err == nil {
		h.from = f.Address
	}
	h.subject, err = dec.DecodeHeader(msg.Header.Get("Subject"))
	if err != nil {
		h.subject = msg.Header.Get("Subject")
	}
	h.messageID = strings.TrimSpace(msg.Header.Get("Message-Id"))
	for name, vs := range msg.Header {
		for _, v := range vs {
			h.fields = append(h.fields, headerField{name, v})
		}
	}
	return h
}

func (h header) recipients() []string {
	var all []string
	seen := map[string]bool{}
	for _, l := range [][]recipient{h.to, h.cc, h.bcc} {
		for _, r := range l {
			a := r.EmailAddress.Address
			if !seen[world.Fold(a)] {
				seen[world.Fold(a)] = true
				all = append(all, a)
			}
		}
	}
	return all
}

// render is the item as Graph shows it.
func (c *call) render(it *item) map[string]any {
	h := it.header()
	id := it.classic()
	if c.immutable {
		id = it.id
	}
	orEmpty := func(r []recipient) []recipient {
		if r == nil {
			return []recipient{}
		}
		return r
	}
	change := base64.StdEncoding.EncodeToString([]byte(fmt.Sprint("CQ", it.change)))
	m := map[string]any{
		"@odata.context": "https://" + c.r.Host + "/v1.0/$metadata#message", "@odata.etag": `W/"` + change + `"`, "id": id, "changeKey": change,
		"createdDateTime": it.created.UTC().Format(time.RFC3339), "subject": h.subject, "internetMessageId": h.messageID, "isDraft": it.draft, "isRead": it.folder != "inbox",
		"toRecipients": orEmpty(h.to), "ccRecipients": orEmpty(h.cc), "bccRecipients": orEmpty(h.bcc), "hasAttachments": len(it.att) > 0,
		"parentFolderId": c.folder(it.folder)["id"],
	}
	q := c.r.URL.Query()
	if sel := q.Get("$select"); sel != "" {
		keep := map[string]any{"@odata.context": m["@odata.context"], "@odata.etag": m["@odata.etag"], "id": m["id"]}
		for _, k := range strings.Split(sel, ",") {
			k = strings.TrimSpace(k)
			if k == "internetMessageHeaders" {
				keep[k] = h.fields
			} else if v, ok := m[k]; ok {
				keep[k] = v
			}
		}
		m = keep
	}
	if strings.Contains(strings.ToLower(q.Get("$expand")), "singlevalueextendedproperties") {
		var ps []property
		if strings.Contains(strings.ToLower(q.Get("$expand")), "0x0e07") || strings.Contains(strings.ToLower(q.Get("$expand")), "0xe07") {
			flags := 0
			if it.draft {
				flags |= 8
			}
			if it.submitted {
				flags |= 4
			}
			ps = append(ps, property{"Integer 0xe07", strconv.Itoa(flags)})
		}
		if it.json != nil {
			ps = append(ps, it.json.Properties...)
		}
		m["singleValueExtendedProperties"] = ps
	}
	return m
}

// mime is the message's MIME: what was submitted, or one made of a structured message.
func (it *item) mime() []byte {
	if it.raw != nil {
		return it.raw
	}
	m := it.json
	var b bytes.Buffer
	field := func(n, v string) {
		if v != "" {
			fmt.Fprintf(&b, "%s: %s\r\n", n, v)
		}
	}
	list := func(rs []recipient) string {
		var l []string
		for _, r := range rs {
			l = append(l, (&mail.Address{Name: r.EmailAddress.Name, Address: r.EmailAddress.Address}).String())
		}
		return strings.Join(l, ",\r\n ")
	}
	if m.From != nil {
		field("From", list([]recipient{*m.From}))
	}
	field("To", list(m.To))
	field("Cc", list(m.Cc))
	field("Bcc", list(m.Bcc))
	field("Reply-To", list(m.ReplyTo))
	field("Subject", mime.QEncoding.Encode("utf-8", m.Subject))
	field("Date", it.created.UTC().Format(time.RFC1123Z))
	field("Message-ID", m.InternetMessageID)
	if m.Importance != "" && m.Importance != "normal" {
		field("Importance", m.Importance)
	}
	for _, p := range m.Properties {
		switch strings.ToLower(strings.ReplaceAll(p.ID, "String 0x", "")) {
		case "1042":
			field("In-Reply-To", p.Value)
		case "1039":
			field("References", p.Value)
		}
	}
	for _, h := range m.Headers {
		field(h.Name, h.Value)
	}
	b.WriteString("MIME-Version: 1.0\r\n")
	boundary := "sim" + it.id[:20]
	if len(it.att) > 0 {
		fmt.Fprintf(&b, "Content-Type: multipart/mixed; boundary=%q\r\n\r\n--%s\r\n", boundary, boundary)
	}
	kind := "text/plain"
	text := ""
	if m.Body != nil {
		text = m.Body.Content
		if strings.EqualFold(m.Body.ContentType, "html") {
			kind = "text/html"
		}
	}
	fmt.Fprintf(&b, "Content-Type: %s; charset=utf-8\r\nContent-Transfer-Encoding: quoted-printable\r\n\r\n", kind)
	qp := quotedprintable.NewWriter(&b)
	_, _ = qp.Write([]byte(text)) // a bytes.Buffer takes everything
	_ = qp.Close()
	b.WriteString("\r\n")
	for _, a := range it.att {
		disp := "attachment"
		if a.IsInline {
			disp = "inline"
		}
		fmt.Fprintf(&b, "--%s\r\nContent-Type: %s\r\nContent-Disposition: %s\r\nContent-Transfer-Encoding: base64\r\n", boundary,
			mime.FormatMediaType(orOctets(a.ContentType), map[string]string{"name": a.Name}), mime.FormatMediaType(disp, map[string]string{"filename": a.Name}))
		if a.ContentID != "" {
			fmt.Fprintf(&b, "Content-ID: <%s>\r\n", a.ContentID)
		}
		b.WriteString("\r\n")
		enc := base64.StdEncoding.EncodeToString(a.data)
		for len(enc) > 76 {
			b.WriteString(enc[:76] + "\r\n")
			enc = enc[76:]
		}
		b.WriteString(enc + "\r\n")
	}
	if len(it.att) > 0 {
		fmt.Fprintf(&b, "--%s--\r\n", boundary)
	}
	return b.Bytes()
}

func orOctets(t string) string {
	if kind, _, err := mime.ParseMediaType(t); err == nil {
		return kind
	}
	return "application/octet-stream"
}

// without takes all fields of a name out of a message's header.
func without(raw []byte, name string) []byte {
	head, rest, ok := bytes.Cut(raw, []byte("\r\n\r\n"))
	if !ok {
		return raw
	}
	var out []byte
	skip := false
	for _, line := range bytes.SplitAfter(append(head, "\r\n"...), []byte("\r\n")) {
		if len(line) > 0 && line[0] != ' ' && line[0] != '\t' {
			n, _, _ := bytes.Cut(line, []byte(":"))
			skip = strings.EqualFold(strings.TrimSpace(string(n)), name)
		}
		if !skip {
			out = append(out, line...)
		}
	}
	return append(append(out, "\r\n"...), rest...)
}

// attach is POST and GET of attachments (https://learn.microsoft.com/graph/outlook-large-attachments).
func (c *call) attach(it *item, b []byte) world.Reply {
	if c.r.Method == http.MethodGet {
		list := it.att
		if list == nil {
			list = []attachment{}
		}
		return world.JSON(200, map[string]any{"value": list})
	}
	if !it.draft || it.json == nil {
		return c.fail(400, "ErrorInvalidRequest", "Attachments can be added to drafts only.")
	}
	var f jsonFile
	if err := json.Unmarshal(b, &f); err != nil {
		return c.fail(400, "RequestBodyRead", err.Error())
	}
	if code := it.file(f); code != "" {
		return c.fail(400, code, code)
	}
	return world.JSON(http.StatusCreated, it.att[len(it.att)-1])
}

func (c *call) openSession(it *item, b []byte) world.Reply {
	var req struct {
		AttachmentItem struct {
			AttachmentType string `json:"attachmentType"`
			Name           string `json:"name"`
			Size           int    `json:"size"`
			ContentType    string `json:"contentType"`
			IsInline       bool   `json:"isInline"`
			ContentID      string `json:"contentId"`
		} `json:"AttachmentItem"`
	}
	if err := json.Unmarshal(b, &req); err != nil || req.AttachmentItem.AttachmentType != "file" {
		return c.fail(400, "RequestBodyRead", "AttachmentItem is missing.")
	}
	a := req.AttachmentItem
	switch {
	case a.Size < minUpload:
		return c.fail(400, "ErrorAttachmentSizeShouldNotBeLessThanMinimumSize", "")
	case a.Size > maxUpload:
		return c.fail(400, "ErrorAttachmentSizeLimitExceeded", "")
	}
	token := rand.Text()
	s := &session{box: world.Fold(c.box.addr), item: it.id, token: token, size: a.Size, att: attachment{ID: "ATT" + rand.Text(), Type: "#microsoft.graph.fileAttachment", Name: a.Name, ContentType: a.ContentType, IsInline: a.IsInline, ContentID: a.ContentID}}
	c.s.sessions[token] = s
	return world.JSON(http.StatusCreated, map[string]any{
		"uploadUrl":          c.s.uploads() + "/api/gv1.0/AttachmentSessions('" + rand.Text() + "')?authtoken=" + token,
		"expirationDateTime": c.s.w.Now().Add(time.Hour).UTC().Format(time.RFC3339), "nextExpectedRanges": []string{"0-"},
	})
}

// upload is the other host: PUT of a range, GET of the state, DELETE.
func (s *Server) upload(w http.ResponseWriter, r *http.Request) {
	c := &call{s: s, r: r, id: uuid()}
	s.mu.Lock()
	sess := s.sessions[r.URL.Query().Get("authtoken")]
	s.mu.Unlock()
	who := ""
	if sess != nil {
		who = sess.box
	}
	s.w.Serve(w, r, world.Meet{Service: "upload", Mailbox: who, Route: r.Method, ID: c.id, MaxBody: maxPiece, Refuse: c.fail, Act: func(body []byte) world.Reply {
		s.mu.Lock()
		defer s.mu.Unlock()
		switch {
		case r.Header.Get("Authorization") != "":
			return c.fail(401, "InvalidAuthenticationToken", "Do not send Authorization with an upload URL.")
		case sess == nil:
			return c.fail(404, "ErrorItemNotFound", "The upload session was not found.")
		case r.Method == http.MethodDelete:
			delete(s.sessions, sess.token)
			return world.Reply{Status: 204}
		case r.Method == http.MethodGet:
			return world.JSON(200, map[string]any{"expirationDateTime": s.w.Now().Add(time.Hour).UTC().Format(time.RFC3339), "nextExpectedRanges": []string{strconv.Itoa(len(sess.data)) + "-"}})
		case r.Method != http.MethodPut:
			return c.fail(405, "ErrorInvalidRequest", "The OData request is not supported.")
		}
		var from, to, size int
		if n, err := fmt.Sscanf(r.Header.Get("Content-Range"), "bytes %d-%d/%d", &from, &to, &size); err != nil || n != 3 || size != sess.size || to-from+1 != len(body) || to >= size {
			return c.fail(400, "ErrorInvalidRequest", "Content-Range does not fit.")
		}
		if from != len(sess.data) {
			return c.fail(416, "InvalidRange", "Ranges come in order.")
		}
		sess.data = append(sess.data, body...)
		if len(sess.data) < sess.size {
			return world.JSON(200, map[string]any{"ExpirationDateTime": s.w.Now().Add(time.Hour).UTC().Format(time.RFC3339), "nextExpectedRanges": []string{strconv.Itoa(len(sess.data))}})
		}
		delete(s.sessions, sess.token)
		b := s.boxes[sess.box]
		if b == nil || b.items[sess.item] == nil {
			return c.fail(404, "ErrorItemNotFound", "The specified object was not found in the store.")
		}
		a := sess.att
		a.data, a.Size = sess.data, len(sess.data)
		b.items[sess.item].att = append(b.items[sess.item].att, a)
		return world.Reply{Status: http.StatusCreated, Header: http.Header{"Location": {s.uploads() + "/api/gv1.0/Attachments('" + a.ID + "')"}}}
	}})
}
