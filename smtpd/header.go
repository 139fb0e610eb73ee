package smtpd

import (
	"bytes"
	"crypto/rand"
	"crypto/tls"
	"fmt"
	"slices"
	"strings"
	"time"

	"mailbridge/internal/mime"
	"mailbridge/internal/outbox"
)

// maxHops is how many Received lines a message may bring (RFC 5321 §6.3).
const maxHops = 50

// fixedHeader is a header block as it goes on.
type fixedHeader struct {
	bytes     []byte
	messageID string
	fixes     []string
}

// fix checks a header block and mends what RFC 6409 §8 lets a submission server mend: fields that are missing
// are added at its end, fields that must not travel are taken out. Everything else stays to the byte.
func (c *conn) fix(head []byte, id outbox.ID) (*fixedHeader, error) {
	h := mime.ScanHeader(head)
	f := &fixedHeader{}
	if err := c.checkFrom(head, h); err != nil {
		return nil, err
	}
	if len(h.Values(head, "Received")) > maxHops {
		return nil, &refusal{reply: replyLoop}
	}
	signed := h.Has("DKIM-Signature") || strings.HasPrefix(strings.ToLower(h.Get(head, "Content-Type")), "multipart/signed")
	msgID, goodID := mime.ParseMessageID(h.Get(head, "Message-ID"))
	hasID := h.Has("Message-ID")
	var out bytes.Buffer
	out.Grow(len(head) + 512)
	out.WriteString(c.received(id))
	at := 0
	drop := func(start, end int, fix string) {
		out.Write(head[at:start])
		at = end
		if !slices.Contains(f.fixes, fix) {
			f.fixes = append(f.fixes, fix)
		}
	}
	type cut struct {
		start, end int
		fix        string
	}
	var cuts []cut
	for _, d := range h.Defects {
		if d.What == "mbox line" && d.Start == 0 {
			cuts = append(cuts, cut{d.Start, d.End, "mbox-line"})
		}
	}
	for _, fd := range h.Fields {
		switch strings.ToLower(fd.Name) {
		case "bcc", "resent-bcc":
			// Never shown to anybody: RFC 5322 §3.6.3 leaves that to us.
			cuts = append(cuts, cut{fd.Start, fd.End, "bcc"})
		case "return-path":
			// RFC 5321 §4.4: only final delivery writes it.
			cuts = append(cuts, cut{fd.Start, fd.End, "return-path"})
		case "message-id":
			if !goodID && !signed {
				cuts = append(cuts, cut{fd.Start, fd.End, "message-id"})
			}
		}
	}
	slices.SortFunc(cuts, func(a, b cut) int { return a.start - b.start })
	for _, k := range cuts {
		drop(k.start, k.end, k.fix)
	}
	// The fields, without the blank line, which may be missing.
	end := h.End
	blank := head[:end]
	switch {
	case bytes.HasSuffix(blank, []byte("\r\n\r\n")), bytes.Equal(blank, []byte("\r\n")):
		end -= 2
	case bytes.HasSuffix(blank, []byte("\r\r\n")):
		end -= 3
	}
	out.Write(head[min(at, end):end])
	if b := out.Bytes(); !bytes.HasSuffix(b, []byte("\r\n")) {
		out.WriteString("\r\n")
	}
	add := func(name, value string) {
		fmt.Fprintf(&out, "%s: %s\r\n", name, value)
		f.fixes = append(f.fixes, "add-"+strings.ToLower(name))
	}
	now := c.s.cfg.Now()
	if !h.Has("Date") {
		add("Date", now.Format(time.RFC1123Z))
	}
	if !h.Has("From") {
		from := c.mail.env.From
		if from == "" {
			from = c.account.Mailbox
		}
		add("From", from)
	}
	if !h.Has("To") && !h.Has("Cc") {
		add("To", "undisclosed-recipients:;") // RFC 5322 §3.6.3 and appendix A.1.3
	}
	f.messageID = msgID
	if !hasID || !goodID && !signed {
		_, domain, _ := strings.Cut(c.account.Mailbox, "@")
		f.messageID = "<" + strings.ToLower(rand.Text()) + "@" + domain + ">"
		add("Message-ID", f.messageID)
	}
	out.WriteString("\r\n")
	f.bytes = out.Bytes()
	return f, nil
}

// checkFrom holds the authors and the sender that the header names against what the account may use
// (RFC 6409 §6.1).
func (c *conn) checkFrom(head []byte, h mime.Header) error {
	froms := h.Values(head, "From")
	if len(froms) > 1 {
		return &refusal{reply: replyTwoFrom}
	}
	for _, name := range []string{"From", "Sender"} {
		for _, v := range h.Values(head, name) {
			list, ok := mime.ParseAddresses(v)
			if !ok || len(list) == 0 {
				return &refusal{reply: replyFromUnread}
			}
			for _, a := range list {
				if !mayUse(c.account, a.Addr) {
					return &refusal{reply: notAllowed(c.account, a.Addr)}
				}
			}
			// RFC 5322 §3.6.2: several authors need a sender.
			if name == "From" && len(list) > 1 && !h.Has("Sender") {
				return &refusal{reply: replyNoSender}
			}
		}
	}
	return nil
}

// received is our trace line (RFC 5321 §4.4). Its id finds the message again in the mailbox's sent mail.
func (c *conn) received(id outbox.ID) string {
	with := "SMTP" // RFC 3848
	if c.esmtp {
		with = "ESMTP"
		if c.mail.env.UTF8 {
			with = "UTF8SMTP" // RFC 6531 §4.3
		}
		if c.tls != nil {
			with += "S"
		}
		with += "A"
	}
	from := ""
	if !c.s.cfg.HideClient {
		from = fmt.Sprintf("from %s ([%s])\r\n\t", token(c.hello), c.remote)
	}
	secure := ""
	if c.tls != nil {
		secure = fmt.Sprintf("\r\n\t(%s %s)", strings.ReplaceAll(tls.VersionName(c.tls.Version), " ", ""), tls.CipherSuiteName(c.tls.CipherSuite))
	}
	return fmt.Sprintf("Received: %sby %s with %s id %s%s;\r\n\t%s\r\n", from, c.s.cfg.Hostname, with, id, secure, c.s.cfg.Now().Format(time.RFC1123Z))
}

// token makes a client's name safe for a trace line.
func token(s string) string {
	s = strings.Map(func(r rune) rune {
		if r > ' ' && r < 0x7f && !strings.ContainsRune(`()<>\";,`, r) {
			return r
		}
		return '_'
	}, s)
	return s[:min(len(s), 128)]
}
