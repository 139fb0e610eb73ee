package graph

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"mailbridge/internal/mail"
	"mailbridge/internal/mailerr"
	"mailbridge/internal/mime"
)

// The large route: what does not fit one request becomes a structured draft. It keeps the subject, the body
// (HTML where there is one, else text), attachments and inline parts with their names, attached messages and
// calendar parts as files, threading, importance, Reply-To, a wish for a receipt, the Message-ID and some
// X- fields. It does not keep the MIME structure, so that signed and encrypted mail is refused.

const (
	// maxInOne is the largest attachment, in bytes, that goes in one request. Upload sessions begin at 3 MB,
	// whichever megabyte that is (https://learn.microsoft.com/graph/outlook-large-attachments).
	maxInOne = 2_900_000
	// chunk is how much of an attachment one upload request carries, in bytes: a multiple of 320 KiB under
	// the 4 MB that Outlook takes. It is held in memory so that it can be sent again.
	chunk = 6 * 327_680
	// chunkTries is how often a piece is tried before the whole attempt is given up.
	chunkTries = 3
	// maxHeaders is how many internet message headers a draft may have, ours included
	// (https://learn.microsoft.com/graph/api/resources/message).
	maxHeaders = 5
	// traceField carries our id where there is no Received line to carry it.
	traceField = "X-Mailbridge-Id"
)

type emailAddress struct {
	Name    string `json:"name,omitempty"`
	Address string `json:"address"`
}

type addressee struct {
	EmailAddress emailAddress `json:"emailAddress"`
}

// structured is a draft to make.
type structured struct {
	Subject    string         `json:"subject"`
	Body       structuredBody `json:"body"`
	From       *addressee     `json:"from,omitempty"`
	ReplyTo    []addressee    `json:"replyTo,omitempty"`
	To         []addressee    `json:"toRecipients"`
	Cc         []addressee    `json:"ccRecipients"`
	Bcc        []addressee    `json:"bccRecipients"`
	Importance string         `json:"importance,omitempty"`
	Receipt    bool           `json:"isReadReceiptRequested,omitempty"`
	MessageID  string         `json:"internetMessageId,omitempty"`
	Headers    []header       `json:"internetMessageHeaders,omitempty"`
	Properties []property     `json:"singleValueExtendedProperties,omitempty"`
}

type structuredBody struct {
	ContentType string `json:"contentType"`
	Content     string `json:"content"`
}

// prepareLarge makes a structured draft with everything in it. When something fails in the middle, the draft
// is deleted.
func (c *Client) prepareLarge(ctx context.Context, out *mail.Outgoing) (mail.Handle, error) {
	p, err := plan(out, c.mismatch, "")
	if err != nil {
		return "", withOp(opPrepare, err)
	}
	letter, err := takeApart(out.Content)
	if err != nil {
		return "", err
	}
	text, err := c.draftJSON(out, p, letter)
	if err != nil {
		return "", err
	}
	resp, err := c.do(ctx, call{op: opPrepare, method: http.MethodPost, path: "/messages", body: jsonBody(text), prefer: immutable})
	if err != nil {
		return "", err
	}
	var d item
	if err := decode(resp, &d); err != nil || d.ID == "" {
		return "", &mailerr.Error{Class: mailerr.Temporary, Status: st(4, 2), Unsure: true, Op: opPrepare.name,
			Text: "the answer of Microsoft 365 broke off", Err: orMissing(err)}
	}
	h := mail.Handle(d.ID)
	for i := range letter.Files {
		if err := c.attach(ctx, out, h, &letter.Files[i]); err != nil {
			return "", c.drop(ctx, out, h, err)
		}
	}
	return c.checked(ctx, out, &d)
}

func takeApart(content mail.Content) (*mime.Letter, error) {
	r, err := content.Open()
	if err != nil {
		return nil, unreadable(err)
	}
	root, err := mime.ScanParts(r)
	if err = errors.Join(err, r.Close()); err != nil {
		return nil, unreadable(err)
	}
	letter, err := mime.Flatten(root)
	if err != nil {
		return nil, &mailerr.Error{Class: mailerr.Permanent, Status: st(3, 4), Op: opPrepare.name, Err: err,
			Text: fmt.Sprintf("a signed or encrypted message over %d bytes cannot be sent through Microsoft 365 without breaking it", maxEncoded/4*3)}
	}
	return letter, nil
}

func unreadable(err error) error {
	return &mailerr.Error{Class: mailerr.Temporary, Status: st(3, 0), Op: opPrepare.name,
		Text: "the stored message cannot be read at the moment", Err: transportError{err}}
}

// draftJSON is the draft without its attachments.
func (c *Client) draftJSON(out *mail.Outgoing, p *rewriting, l *mime.Letter) ([]byte, error) {
	head := p.prefix
	h := mime.ScanHeader(head)
	d := structured{
		Subject:   mime.DecodeWords(h.Get(head, "Subject")),
		Body:      structuredBody{ContentType: "text"},
		ReplyTo:   addressees(h, head, "Reply-To"),
		To:        addressees(h, head, "To"),
		Cc:        addressees(h, head, "Cc"),
		Bcc:       addressees(h, head, "Bcc"),
		Receipt:   h.Has("Disposition-Notification-To"), // RFC 8098 §2.1
		MessageID: out.MessageID,
		Headers:   []header{{traceField, out.TraceID}},
	}
	if from := addressees(h, head, "From"); len(from) > 0 {
		d.From = &from[0]
	}
	d.Importance = importance(h, head)
	// PidTagInReplyToId and PidTagInternetReferences, [MS-OXOMSG] §2.2.1.
	for _, f := range []struct{ name, id string }{{"In-Reply-To", "String 0x1042"}, {"References", "String 0x1039"}} {
		if v := h.Get(head, f.name); v != "" {
			d.Properties = append(d.Properties, property{f.id, strings.ToValidUTF8(v, "\uFFFD")})
		}
	}
	var lost []string
	for _, f := range h.Fields {
		if len(f.Name) < 3 || !strings.EqualFold(f.Name[:2], "x-") || f.Is("X-Priority") || f.Is(traceField) {
			continue
		}
		if v := f.Value(head); len(d.Headers) < maxHeaders && v != "" && len(v) < 900 {
			d.Headers = append(d.Headers, header{f.Name, strings.ToValidUTF8(v, "\uFFFD")})
		} else {
			lost = append(lost, f.Name)
		}
	}
	note := fmt.Sprintf("the message is too large for one request: sent as a structured draft with %d files", len(l.Files))
	if len(lost) > 0 {
		note += ", without the header fields " + printable(strings.Join(lost, ", "))
	}
	c.log.Info(note, "op", opPrepare.name, "item", out.TraceID)
	part := l.Text
	if l.HTML != nil {
		part, d.Body.ContentType = l.HTML, "html"
	}
	if part != nil {
		text, err := bodyText(out.Content, part)
		if err != nil {
			return nil, err
		}
		d.Body.Content = text
	}
	b, err := json.Marshal(d)
	if err != nil {
		return nil, &mailerr.Error{Class: mailerr.Unknown, Status: st(3, 0), Op: opPrepare.name, Text: "internal error", Err: err}
	}
	if len(b) > maxEncoded {
		return nil, bodyTooLarge()
	}
	return b, nil
}

func bodyTooLarge() error {
	return &mailerr.Error{Class: mailerr.Permanent, Status: st(3, 4), Op: opPrepare.name,
		Text: "the text of the message is too large for Microsoft 365; send it as an attachment", Err: ErrTooLarge}
}

// bodyText reads a text part as UTF-8.
func bodyText(content mail.Content, p *mime.Part) (string, error) {
	r, err := section(content, p.Body, p.End)
	if err != nil {
		return "", unreadable(err)
	}
	b, err := io.ReadAll(io.LimitReader(mime.TextReader(mime.Decode(r, p.Encoding), p.Params["charset"]), maxEncoded+1))
	if err = errors.Join(err, r.Close()); err != nil {
		return "", unreadable(err)
	}
	if len(b) > maxEncoded {
		return "", bodyTooLarge()
	}
	return strings.ToValidUTF8(string(b), "\uFFFD"), nil
}

func addressees(h mime.Header, head []byte, name string) []addressee {
	list := []addressee{}
	for _, v := range h.Values(head, name) {
		as, _ := mime.ParseAddresses(v) // what cannot be read is nobody
		for _, a := range as {
			list = append(list, addressee{emailAddress{Name: a.Name, Address: a.Addr}})
		}
	}
	return list
}

// importance reads Importance (RFC 4021 §2.1.54), Priority and X-Priority.
func importance(h mime.Header, head []byte) string {
	switch v := strings.ToLower(h.Get(head, "Importance")); v {
	case "high", "low":
		return v
	}
	switch v := strings.TrimSpace(h.Get(head, "X-Priority")); {
	case strings.HasPrefix(v, "1"), strings.HasPrefix(v, "2"):
		return "high"
	case strings.HasPrefix(v, "4"), strings.HasPrefix(v, "5"):
		return "low"
	}
	return ""
}

// file opens the bytes of an attachment, its transfer encoding undone.
func file(content mail.Content, p *mime.Part) (io.ReadCloser, error) {
	r, err := section(content, p.Body, p.End)
	if err != nil {
		return nil, err
	}
	return struct {
		io.Reader
		io.Closer
	}{mime.Decode(r, p.Encoding), r}, nil
}

// attach adds one file to the draft.
func (c *Client) attach(ctx context.Context, out *mail.Outgoing, h mail.Handle, f *mime.File) error {
	r, err := file(out.Content, f.Part)
	if err != nil {
		return unreadable(err)
	}
	size, err := io.Copy(io.Discard, r)
	if err = errors.Join(err, r.Close()); err != nil {
		return unreadable(err)
	}
	if size <= c.limits.inOne {
		return c.attachInOne(ctx, out, h, f, size)
	}
	err = c.attachUpload(ctx, out, h, f, size)
	if errors.Is(err, errTooSmall) { // a megabyte of 2^20 bytes after all
		return c.attachInOne(ctx, out, h, f, size)
	}
	return err
}

func (c *Client) attachInOne(ctx context.Context, out *mail.Outgoing, h mail.Handle, f *mime.File, size int64) error {
	meta, err := json.Marshal(map[string]any{
		"@odata.type": "#microsoft.graph.fileAttachment",
		"name":        f.Name,
		"contentType": f.Part.Type,
		"isInline":    f.Inline,
		"contentId":   f.Part.ContentID,
	})
	if err != nil {
		return &mailerr.Error{Class: mailerr.Unknown, Status: st(3, 0), Op: opAttach.name, Text: "internal error", Err: err}
	}
	before := append(bytes.TrimSuffix(meta, []byte("}")), `,"contentBytes":"`...)
	after := `"}`
	body := &payload{
		kind: "application/json",
		size: int64(len(before)+len(after)) + encodedLen(size),
		open: func() (io.ReadCloser, error) {
			r, err := file(out.Content, f.Part)
			if err != nil {
				return nil, err
			}
			return struct {
				io.Reader
				io.Closer
			}{io.MultiReader(bytes.NewReader(before), newEncoder(r, r, size), strings.NewReader(after)), r}, nil
		},
	}
	resp, err := c.do(ctx, call{op: opAttach, method: http.MethodPost, path: "/messages/" + segment(string(h)) + "/attachments", body: body, prefer: immutable})
	if err != nil {
		return err
	}
	finish(resp)
	return nil
}

// session is an upload session (https://learn.microsoft.com/graph/api/resources/uploadsession). Its URL
// carries its own authority, so it is for nobody's eyes.
type session struct {
	URL  string   `json:"uploadUrl"`
	Next []string `json:"nextExpectedRanges"`
}

func (c *Client) attachUpload(ctx context.Context, out *mail.Outgoing, h mail.Handle, f *mime.File, size int64) error {
	ask, err := json.Marshal(map[string]any{"AttachmentItem": map[string]any{
		"attachmentType": "file",
		"name":           f.Name,
		"size":           size,
		"contentType":    f.Part.Type,
		"isInline":       f.Inline,
		"contentId":      f.Part.ContentID,
	}})
	if err != nil {
		return &mailerr.Error{Class: mailerr.Unknown, Status: st(3, 0), Op: opAttach.name, Text: "internal error", Err: err}
	}
	resp, err := c.do(ctx, call{op: opAttach, method: http.MethodPost, path: "/messages/" + segment(string(h)) + "/attachments/createUploadSession",
		body: jsonBody(ask), prefer: immutable})
	if err != nil {
		return err
	}
	var s session
	if err := decode(resp, &s); err != nil {
		return brokeOff(opAttach, err)
	}
	if u, err := url.Parse(s.URL); err != nil || u.Host == "" || u.Scheme != "https" && !strings.HasPrefix(c.root, "http://") {
		return brokeOff(opAttach, errors.New("no usable upload URL"))
	}
	r, err := file(out.Content, f.Part)
	if err != nil {
		return unreadable(err)
	}
	err = c.upload(ctx, s.URL, r, size)
	if cerr := r.Close(); err == nil && cerr != nil {
		err = unreadable(cerr)
	}
	if err != nil { // what was uploaded so far is of no use any more
		stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanup)
		defer cancel()
		if resp, derr := c.put(stop, s.URL, http.MethodDelete, nil, 0, 0); derr == nil {
			finish(resp)
		}
	}
	return err
}

// upload sends the file piece by piece, in order.
func (c *Client) upload(ctx context.Context, to string, r io.Reader, size int64) error {
	buf := make([]byte, min(c.limits.chunk, size))
	for at := int64(0); at < size; {
		piece := buf[:min(int64(len(buf)), size-at)]
		if _, err := io.ReadFull(r, piece); err != nil {
			return unreadable(err)
		}
		if err := c.uploadPiece(ctx, to, piece, at, size); err != nil {
			return err
		}
		at += int64(len(piece))
	}
	return nil
}

// uploadPiece sends one piece. After a cut it asks how far the cloud came and goes on from there.
func (c *Client) uploadPiece(ctx context.Context, to string, piece []byte, at, size int64) error {
	end := at + int64(len(piece))
	for try := 1; ; try++ {
		resp, err := c.put(ctx, to, http.MethodPut, piece, at, size)
		if err == nil {
			finish(resp)
			return nil
		}
		if e := mailerr.Of(err); e.Class != mailerr.Temporary || try == chunkTries || ctx.Err() != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return classifyTransport(opUpload, ctx.Err(), false)
		case <-time.After(time.Duration(try) * c.pause):
		}
		next, serr := c.uploaded(ctx, to)
		switch {
		case serr != nil:
			return err
		case next >= end:
			return nil // the answer was lost, not the piece
		case next > at:
			piece, at = piece[next-at:], next
		case next < at:
			return brokeOff(opUpload, fmt.Errorf("the upload went back from %d to %d", at, next))
		}
	}
}

// uploaded asks how many bytes the session has.
func (c *Client) uploaded(ctx context.Context, to string) (int64, error) {
	resp, err := c.put(ctx, to, http.MethodGet, nil, 0, 0)
	if err != nil {
		return 0, err
	}
	var s session
	if err := decode(resp, &s); err != nil {
		return 0, brokeOff(opUpload, err)
	}
	if len(s.Next) == 0 {
		return 0, brokeOff(opUpload, errors.New("the session names no next range"))
	}
	first, _, _ := strings.Cut(s.Next[0], "-") // "2097152-" or "2097152"
	n, err := strconv.ParseInt(first, 10, 64)
	if err != nil {
		return 0, brokeOff(opUpload, err)
	}
	return n, nil
}

// put makes a request to the session, without our authorization.
func (c *Client) put(ctx context.Context, to, method string, piece []byte, at, size int64) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, method, to, bytes.NewReader(piece))
	if err != nil {
		return nil, brokeOff(opUpload, err)
	}
	if method == http.MethodPut {
		req.Header.Set("Content-Type", "application/octet-stream")
		req.Header.Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", at, at+int64(len(piece))-1, size))
	}
	resp, err := c.uploads.Do(req)
	if err != nil {
		return nil, classifyTransport(opUpload, err, false)
	}
	if resp.StatusCode >= 200 && resp.StatusCode < 300 {
		return resp, nil
	}
	defer finish(resp)
	r := readRefusal(resp)
	e := classify(opUpload, r, c.now())
	if slices.Contains([]int{http.StatusUnauthorized, http.StatusForbidden, http.StatusNotFound, http.StatusGone, http.StatusRequestedRangeNotSatisfiable}, r.status) {
		// It is the session that ended, not the account's sign-in: the next attempt begins anew.
		e.Class, e.Status, e.Text = mailerr.Temporary, st(4, 2), "an upload to Microsoft 365 was interrupted"
	}
	return nil, e
}
