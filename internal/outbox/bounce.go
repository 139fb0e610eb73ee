package outbox

import (
	"bytes"
	"context"
	"crypto/rand"
	"fmt"
	"io"
	"strings"
	"time"

	"mailbridge/internal/mail"
	"mailbridge/internal/mailerr"
	"mailbridge/internal/mime"
)

// maxBounces is how often a report is tried before the dead letter has to do.
const maxBounces = 5

// bounce files a report about the refused recipients in the sender's own mailbox, and makes the item a dead
// letter, or a sent one where only some recipients were refused.
func (o *Outbox) bounce(ctx context.Context, a *account, it *item) {
	now := o.now()
	b := a.Provider.Bouncer
	// RFC 5321 §4.5.5: a message with a null sender is never answered with another.
	if b != nil && it.envelope.From != "" {
		report, err := o.report(ctx, it, now)
		if err == nil {
			err = b.Bounce(ctx, report, "")
		}
		if err != nil {
			e := mailerr.Of(err)
			o.log.Warn("the report about a message could not be filed", "item", string(it.id), "account", string(it.account), "class", e.Class.String(), "err", err)
			it.lookups++
			if it.lookups < maxBounces && e.Class != mailerr.Permanent && !e.Unsure {
				it.nextAt = now.Add(o.schedule[min(it.lookups, len(o.schedule))-1])
				if e.RetryAt.After(it.nextAt) {
					it.nextAt = e.RetryAt
				}
				o.record(a, it)
				return
			}
		}
	}
	o.step(StepReported)
	it.state, it.nextAt, it.lookups = Dead, time.Time{}, 0
	o.metrics.dead.Inc()
	if err := o.w.do(func(t tx) error {
		if err := it.save(t); err != nil {
			return err
		}
		_, err := t.exec("UPDATE items SET finished = ? WHERE id = ?", now.UnixMilli(), string(it.id))
		return err
	}); err != nil {
		o.log.Error("a dead letter could not be recorded", "item", string(it.id), "err", err)
	}
}

// maxReturned is how much of the original a report brings back, in bytes: its header.
const maxReturned = 64 << 10

// report writes a delivery status notification (RFC 3464) with the original's header.
func (o *Outbox) report(ctx context.Context, it *item, now time.Time) (mail.Content, error) {
	c, err := o.body(ctx, it)
	if err != nil {
		return nil, err
	}
	r, err := c.Open()
	if err != nil {
		return nil, err
	}
	head, err := io.ReadAll(io.LimitReader(r, maxReturned))
	if cerr := r.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return nil, err
	}
	if end := mime.HeaderEnd(head); end >= 0 {
		head = head[:end]
	}
	boundary := rand.Text()
	var b bytes.Buffer
	line := func(format string, a ...any) { fmt.Fprintf(&b, format+"\r\n", a...) }
	line("From: Mailbridge <%s>", it.envelope.From)
	line("To: %s", it.envelope.From)
	line("Subject: Undelivered: your message could not be sent")
	line("Date: %s", now.Format(time.RFC1123Z))
	line("Message-ID: <%s@%s>", rand.Text(), o.hostname)
	if _, ok := mime.ParseMessageID(it.messageID); ok {
		line("In-Reply-To: %s", it.messageID)
	}
	line("Auto-Submitted: auto-replied") // RFC 3834 §5: keeps vacation programs quiet
	line("MIME-Version: 1.0")
	line("Content-Type: multipart/report; report-type=delivery-status; boundary=%q", boundary)
	line("")
	line("--%s", boundary)
	line("Content-Type: text/plain; charset=utf-8")
	line("Content-Transfer-Encoding: 8bit")
	line("")
	line("A message that was handed to Mailbridge on %s could not be sent.", o.hostname)
	line("It was accepted on %s and has the id %s.", it.created.Format(time.RFC1123Z), it.id)
	line("")
	for _, rc := range it.rcpts {
		if rc.state == refused {
			line("  %s: %s", oneLine(rc.addr), reasonOf(it, rc))
		}
	}
	line("")
	line("The message itself is kept until somebody deletes it: mailbridge queue show %s", it.id)
	line("")
	line("--%s", boundary)
	line("Content-Type: message/delivery-status")
	line("")
	line("Reporting-MTA: dns; %s", o.hostname)
	line("Arrival-Date: %s", it.created.Format(time.RFC1123Z))
	for _, rc := range it.rcpts {
		if rc.state != refused {
			continue
		}
		line("")
		kind := "rfc822"
		if strings.ContainsFunc(rc.addr, func(r rune) bool { return r > 0x7e }) {
			kind = "utf-8" // RFC 6533 §3
		}
		line("Final-Recipient: %s; %s", kind, oneLine(rc.addr))
		line("Action: failed")
		line("Status: %s", permanent(rc.code, it.code))
		line("Diagnostic-Code: x-mailbridge; %s", reasonOf(it, rc))
	}
	line("")
	line("--%s", boundary)
	line("Content-Type: text/rfc822-headers")
	line("Content-Transfer-Encoding: 8bit")
	line("")
	b.Write(head)
	line("")
	line("--%s--", boundary)
	return &content{data: b.Bytes(), size: int64(b.Len())}, nil
}

func reasonOf(it *item, rc recipient) string {
	for _, s := range []string{rc.reason, it.reason} {
		if s != "" {
			return oneLine(s)
		}
	}
	return "no attempt succeeded in time"
}

// permanent is a status code with the class of a final failure (RFC 3463 §2).
func permanent(codes ...string) string {
	for _, c := range codes {
		if _, rest, ok := strings.Cut(c, "."); ok {
			return "5." + rest
		}
	}
	return "5.4.7" // delivery time expired
}

// oneLine keeps a text from ending its line.
func oneLine(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return ' '
		}
		return r
	}, s)
}
