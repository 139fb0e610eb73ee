package graph

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"mailbridge/internal/mail"
	"mailbridge/internal/mailerr"
	"mailbridge/internal/secret"
	"mailbridge/providers"
)

// Prepare makes a draft under an immutable id, which is the handle. The handle is empty where drafts are
// not permitted; then Commit sends in one step and its outcome can be looked up only if reading is.
func (c *Client) Prepare(ctx context.Context, out *mail.Outgoing) (mail.Handle, error) {
	body, err := c.body(opPrepare, out, c.mismatch)
	large := errors.Is(err, ErrTooLarge) && c.uploads != nil && !c.direct()
	if large {
		return c.prepareLarge(ctx, out)
	}
	if err != nil {
		return "", err
	}
	if c.direct() {
		return "", nil
	}
	resp, err := c.do(ctx, call{op: opPrepare, method: http.MethodPost, path: "/messages", body: body, prefer: immutable})
	if e := mailerr.Of(err); errors.Is(err, errForbidden) && e.Class == mailerr.Auth && e.Status == st(7, 0) {
		// A refusal is no draft. Mail.Send alone permits sendMail; if that is refused too, it says why.
		c.setDirect(true)
		c.log.Info("Microsoft 365 refuses drafts in this mailbox: sending in one step, without look-up; grant Mail.ReadWrite to change that", "op", opPrepare.name, "err", err)
		return "", nil
	}
	if errors.Is(err, ErrTooLarge) && c.uploads != nil {
		return c.prepareLarge(ctx, out) // a 413 is a definite refusal
	}
	if err != nil {
		return "", err
	}
	requestID := resp.Header.Get("request-id")
	var d item
	if err := decode(resp, &d); err != nil || d.ID == "" {
		return "", &mailerr.Error{Class: mailerr.Temporary, Status: st(4, 2), Unsure: true, Op: opPrepare.name,
			Text: "the answer of Microsoft 365 broke off", Err: fmt.Errorf("draft without an id (request-id %s): %w", printable(requestID), orMissing(err))}
	}
	return c.checked(ctx, out, &d)
}

// checked holds what Exchange read out of the header against the envelope. A draft that does not fit is
// deleted.
func (c *Client) checked(ctx context.Context, out *mail.Outgoing, d *item) (mail.Handle, error) {
	h := mail.Handle(d.ID)
	if d.To == nil && d.Cc == nil && d.Bcc == nil {
		shown, err := c.get(ctx, opPrepare, h)
		if err != nil {
			return "", c.drop(ctx, out, h, err)
		}
		d = shown
	}
	if diff := compare(out.To, d); diff != "" {
		return "", c.drop(ctx, out, h, &mailerr.Error{Class: mailerr.Permanent, Status: st(6, 0), Op: opPrepare.name,
			Text: "Microsoft 365 reads other recipients out of the header than the message was sent to: " + printable(diff),
			Err:  fmt.Errorf("draft %s deleted", printable(string(h)))})
	}
	return h, nil
}

func orMissing(err error) error {
	if err == nil {
		return errors.New("no id")
	}
	return transportError{err}
}

// cleanup is how long deleting what was staged in vain may take.
const cleanup = 10 * time.Second

// drop deletes a draft that will not be sent and passes the reason on. The error is Unsure if the draft
// may still be there.
func (c *Client) drop(ctx context.Context, out *mail.Outgoing, h mail.Handle, reason error) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanup) // an ended context is no excuse
	defer cancel()
	if err := c.Abandon(ctx, out, h); err != nil {
		c.log.Warn("a draft that does not fit its message could not be deleted", "op", opAbandon.name, "item", out.TraceID, "err", err)
		if e := *mailerr.Of(reason); e.Class != mailerr.Permanent {
			e.Unsure = true
			return &e
		}
	}
	return reason
}

// body is the message with its recipients by the envelope rule, as the body of a request.
func (c *Client) body(o op, out *mail.Outgoing, m providers.Mismatch) (*payload, error) {
	p, err := plan(out, m, "")
	if err != nil {
		return nil, withOp(o, err)
	}
	return c.fit(o, p, out)
}

func withOp(o op, err error) error {
	if e, ok := errors.AsType[*mailerr.Error](err); ok {
		c := *e
		c.Op = o.name
		return &c
	}
	return err
}

// fit makes the body and holds it against the limit.
func (c *Client) fit(o op, p *rewriting, out *mail.Outgoing) (*payload, error) {
	for _, f := range p.fixes {
		c.log.Debug("header edited so that its recipients are the envelope's: "+printable(f), "op", o.name, "item", out.TraceID)
	}
	body := mimeBody(p.prefix, out.Content, p.skip)
	if body.size > c.limits.encoded {
		v := tooLarge()
		return nil, &mailerr.Error{Class: v.class, Status: v.status, Op: o.name, Text: v.text,
			Err: fmt.Errorf("%w: %d bytes in base64, at most %d fit", ErrTooLarge, body.size, c.limits.encoded)}
	}
	return body, nil
}

// direct reports whether messages go by sendMail.
func (c *Client) direct() bool {
	if c.noDrafts {
		return true
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now().Before(c.directUntil)
}

func (c *Client) setDirect(on bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.directUntil = time.Time{}
	if on {
		c.directUntil = c.now().Add(draftsDenied)
	}
}

// Commit sends the draft, or the message itself when there is none.
func (c *Client) Commit(ctx context.Context, out *mail.Outgoing, h mail.Handle) (mail.Receipt, error) {
	if h == "" {
		return c.sendMail(ctx, opMail, out, c.mismatch)
	}
	resp, err := c.do(ctx, call{op: opCommit, method: http.MethodPost, path: "/messages/" + segment(string(h)) + "/send", prefer: immutable})
	if err == nil {
		return taken(opCommit, resp, string(h))
	}
	// A refusal of a draft that an earlier attempt has sent is no refusal of the message: whoever believed
	// it would bounce mail that has arrived.
	e := mailerr.Of(err)
	if e.Class == mailerr.Permanent || e.Class == mailerr.Unknown || errors.Is(e, mail.ErrNoMessage) {
		if m, gerr := c.get(ctx, opItem, h); gerr == nil && m.IsDraft != nil && !*m.IsDraft {
			return mail.Receipt{ID: string(h)}, nil
		}
	}
	return mail.Receipt{}, err
}

// taken finishes a 202. Its Retry-After, if any, concerns later requests: a 202 is never repeated. Another
// success is not Graph's (https://learn.microsoft.com/graph/api/message-send), say a portal's on the way, and
// says nothing about the message.
func taken(o op, resp *http.Response, id string) (mail.Receipt, error) {
	finish(resp)
	r := mail.Receipt{ID: id, RequestID: resp.Header.Get("request-id")}
	if resp.StatusCode != http.StatusAccepted {
		return mail.Receipt{}, &mailerr.Error{Class: mailerr.Temporary, Status: st(4, 0), Unsure: true, Op: o.name,
			Text: "the answer to the message was not one of Microsoft 365; check endpoint in the profile, and proxies on the way",
			Err:  fmt.Errorf("HTTP %d instead of 202 (request-id %s)", resp.StatusCode, printable(secret.Scrub(r.RequestID)))}
	}
	return r, nil
}

func (c *Client) sendMail(ctx context.Context, o op, out *mail.Outgoing, m providers.Mismatch) (mail.Receipt, error) {
	body, err := c.body(o, out, m)
	if err != nil {
		return mail.Receipt{}, err
	}
	return c.post(ctx, o, body)
}

func (c *Client) post(ctx context.Context, o op, body *payload) (mail.Receipt, error) {
	resp, err := c.do(ctx, call{op: o, method: http.MethodPost, path: "/sendMail", body: body})
	if err != nil {
		if errors.Is(err, errForbidden) && mailerr.Of(err).Class == mailerr.Auth {
			c.setDirect(false) // it is not drafts alone that are refused: the next message tries them again
		}
		return mail.Receipt{}, err
	}
	return taken(o, resp, "")
}

// Abandon deletes the draft. With an empty handle it looks for drafts with the message's Message-ID and our
// Received line and deletes every one of them, so that it must not be called while another draft of the same
// message is to be sent.
func (c *Client) Abandon(ctx context.Context, out *mail.Outgoing, h mail.Handle) error {
	if h != "" {
		return c.discard(ctx, h)
	}
	if c.direct() || out.TraceID == "" || out.MessageID == "" {
		return nil // nothing can be there, or nothing could tell it from others
	}
	ids, err := c.find(ctx, opAbandon, "drafts", out)
	if err != nil {
		if errors.Is(err, errForbidden) {
			return nil // who may not read drafts has made none
		}
		return err
	}
	for _, id := range ids {
		if err := c.discard(ctx, mail.Handle(id)); err != nil {
			return err
		}
	}
	return nil
}

// discard deletes a message if it is a draft that is not on its way out.
func (c *Client) discard(ctx context.Context, h mail.Handle) error {
	m, err := c.get(ctx, opAbandon, h)
	if errors.Is(err, mail.ErrNoMessage) {
		return nil
	}
	if err != nil {
		return err
	}
	if going, _ := m.submitted(); going || m.IsDraft == nil || !*m.IsDraft {
		return nil
	}
	resp, err := c.do(ctx, call{op: opAbandon, method: http.MethodDelete, path: "/messages/" + segment(string(h)), prefer: immutable})
	if errors.Is(err, mail.ErrNoMessage) {
		return nil
	}
	if err != nil {
		return err
	}
	finish(resp)
	return nil
}

// Bounce sends a report from the mailbox to itself: Graph has no other way to put a finished message into
// an Inbox, and does not let the mailbox send under another name.
func (c *Client) Bounce(ctx context.Context, raw mail.Content, to string) error {
	if to == "" {
		to = c.mailbox
	}
	out := &mail.Outgoing{Envelope: mail.Envelope{To: []string{to}, UTF8: strings.ContainsFunc(to, func(r rune) bool { return r > '~' })}, Content: raw}
	p, err := plan(out, providers.Rewrite, c.mailbox)
	if err != nil {
		return withOp(opBounce, err)
	}
	body, err := c.fit(opBounce, p, out)
	if err != nil {
		return err
	}
	_, err = c.post(ctx, opBounce, body)
	return err
}
