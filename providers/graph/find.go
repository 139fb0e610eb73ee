package graph

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"

	"mailbridge/internal/mail"
	"mailbridge/internal/mailerr"
	"mailbridge/internal/mime"
	"mailbridge/providers"
)

const (
	// maxCandidates is how many messages with the same Message-ID are looked at: devices that send the
	// same one for ever must not make a look-up endless.
	maxCandidates = 100
	// pageSize is how many of them one request lists.
	pageSize = 25
	// maxHead is how much of a message is read in search of its Received lines, in bytes.
	maxHead = 256 << 10
)

// shown is what a look-up needs to know of an item; the name of the property is PidTagMessageFlags.
var shown = "?$select=id,isDraft,toRecipients,ccRecipients,bccRecipients&$expand=" +
	strings.ReplaceAll(url.QueryEscape("singleValueExtendedProperties($filter=id eq 'Integer 0x0E07')"), "+", "%20")

// FindSent looks the outcome of a Commit up. An item that is no draft any more was sent. A draft whose
// submitted flag is set is being sent, and nobody knows yet; one whose flag is not set was not sent, given
// that the caller has waited: what was submitted lingers in Drafts for a while. What is gone is looked for
// in Sent Items, by Message-ID and the id in our Received line.
func (c *Client) FindSent(ctx context.Context, out *mail.Outgoing, h mail.Handle) (mail.Receipt, providers.Finding, error) {
	if h != "" {
		m, err := c.get(ctx, opItem, h)
		switch {
		case errors.Is(err, mail.ErrNoMessage):
			// Gone is no proof: a rule or a person may have removed the sent copy.
		case err != nil:
			return mail.Receipt{}, providers.Inconclusive, err
		case m.IsDraft == nil:
			return mail.Receipt{}, providers.Inconclusive, nil
		case !*m.IsDraft:
			return mail.Receipt{ID: string(h)}, providers.WasSent, nil
		default:
			if going, _ := m.submitted(); going {
				return mail.Receipt{}, providers.Inconclusive, nil
			}
			return mail.Receipt{}, providers.NotSent, nil
		}
	}
	if out.TraceID == "" || out.MessageID == "" {
		return mail.Receipt{}, providers.Inconclusive, nil
	}
	ids, err := c.find(ctx, opSearch, "sentitems", out)
	switch {
	case errors.Is(err, errForbidden):
		return mail.Receipt{}, providers.Inconclusive, nil // with Mail.Send alone nobody can know
	case err != nil:
		return mail.Receipt{}, providers.Inconclusive, err
	case len(ids) == 0:
		return mail.Receipt{}, providers.Inconclusive, nil
	}
	return mail.Receipt{ID: ids[0]}, providers.WasSent, nil
}

// get reads one item. Its failure wraps mail.ErrNoMessage when the item is not there.
func (c *Client) get(ctx context.Context, o op, h mail.Handle) (*item, error) {
	o.item, o.send, o.write = true, false, false
	resp, err := c.do(ctx, call{op: o, method: http.MethodGet, path: "/messages/" + segment(string(h)) + shown, prefer: immutable})
	if err != nil {
		return nil, err
	}
	var m item
	if err := decode(resp, &m); err != nil {
		return nil, brokeOff(o, err)
	}
	return &m, nil
}

func brokeOff(o op, err error) error {
	return &mailerr.Error{Class: mailerr.Temporary, Status: st(4, 2), Op: o.name, Text: "the answer of Microsoft 365 broke off", Err: transportError{err}}
}

// find lists the ids of messages in a well-known folder that have the message's Message-ID and our Received
// line.
func (c *Client) find(ctx context.Context, o op, folder string, out *mail.Outgoing) ([]string, error) {
	o.item, o.send, o.write = false, false, false
	next := "/mailFolders/" + folder + "/messages?$filter=internetMessageId%20eq%20" + filter(out.MessageID) +
		"&$select=id,isDraft,internetMessageId,internetMessageHeaders&$top=" + strconv.Itoa(pageSize)
	var ids []string
	for seen := 0; next != "" && seen < maxCandidates; {
		resp, err := c.do(ctx, call{op: o, method: http.MethodGet, path: next, prefer: immutable})
		if err != nil {
			return nil, err
		}
		var p page
		if err := decode(resp, &p); err != nil {
			return nil, brokeOff(o, err)
		}
		for i := range p.Value {
			seen++
			ours, err := c.ours(ctx, o, &p.Value[i], out.TraceID)
			if err != nil {
				return nil, err
			}
			if ours {
				ids = append(ids, p.Value[i].ID)
			}
		}
		// The rest of a link is opaque, but it must not lead our token to another host or mailbox.
		var below bool
		if next, below = strings.CutPrefix(p.Next, c.root); !below {
			next = ""
		}
	}
	return ids, nil
}

// ours reports whether the Received line that the bridge puts on top is on the item. The page shows headers
// of received mail; for others the message itself is asked for and read as far as its header goes.
func (c *Client) ours(ctx context.Context, o op, m *item, trace string) (bool, error) {
	traced := false
	for _, h := range m.Headers {
		if strings.EqualFold(h.Name, traceField) && strings.TrimSpace(h.Value) == trace {
			return true, nil
		}
		if strings.EqualFold(h.Name, "Received") {
			if traced = true; hasID(h.Value, trace) {
				return true, nil
			}
		}
	}
	if traced {
		return false, nil
	}
	o.item = true
	resp, err := c.do(ctx, call{op: o, method: http.MethodGet, path: "/messages/" + segment(m.ID) + "/$value", prefer: immutable})
	if errors.Is(err, mail.ErrNoMessage) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	head, err := io.ReadAll(io.LimitReader(resp.Body, maxHead))
	_ = resp.Body.Close() // the rest may be large and is not wanted
	if err != nil {
		return false, brokeOff(o, err)
	}
	for _, f := range mime.ScanHeader(head).Fields {
		if f.Is("Received") && hasID(f.Value(head), trace) || f.Is(traceField) && f.Value(head) == trace {
			return true, nil
		}
	}
	return false, nil
}

// hasID reports whether a Received value has the clause "id trace" (RFC 5321 §4.4).
func hasID(received, trace string) bool {
	words := strings.Fields(received)
	for i, w := range words {
		if strings.EqualFold(w, "id") && i+1 < len(words) && trace != "" && strings.TrimRight(words[i+1], ";") == trace {
			return true
		}
	}
	return false
}
