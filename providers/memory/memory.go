// Package memory is the reference provider: a mail cloud in memory that does what the contract says and
// fails on demand. It stands in for a cloud in the tests of those who use one.
package memory

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"mailbridge/internal/mail"
	"mailbridge/internal/mailerr"
	"mailbridge/internal/secret"
	"mailbridge/providers"
)

// Step is a place where a cloud can fail.
type Step string

const (
	Prepare Step = "prepare"
	Commit  Step = "commit"
	Abandon Step = "abandon"
	Find    Step = "find"
	Probe   Step = "probe"
	Bounce  Step = "bounce"
)

// Fault is what happens to calls of one step.
type Fault struct {
	// Err is returned; a *mailerr.Error as it is. Nil with Hang set is the context's error.
	Err error
	// Act first, then fail: the answer is lost. Err should have Unsure set.
	Act bool
	// Hang waits for the context to end, after acting if Act is set.
	Hang bool
	// Times is how many calls meet the fault; 0 is all until Reset.
	Times int
	// Wait, if not nil, is received from before anything else: a call that takes its time.
	Wait <-chan struct{}
}

// Delivery is one recipient's copy.
type Delivery struct {
	From, To string
	Raw      []byte
}

// Cloud is a mailbox in memory. The zero value is not usable; see New. It is safe for concurrent use.
type Cloud struct {
	// Staging decides whether Prepare stages and gives handles; set it before use.
	Staging bool
	// Traits are what Account announces; set them before use.
	Traits providers.Traits

	mu        sync.Mutex
	next      int
	drafts    map[mail.Handle]*message
	sent      []*message
	delivered []Delivery
	reports   []Delivery
	faults    map[Step][]*Fault
	refused   map[string]error
	calls     map[Step]int
}

type message struct {
	handle mail.Handle
	trace  string
	raw    []byte
}

// New makes an empty cloud that stages.
func New() *Cloud {
	return &Cloud{
		Staging: true,
		Traits:  providers.Traits{MaxSize: 150 << 20, MaxRecipients: 500, Parallel: 4, SMTPUTF8: true},
		drafts:  map[mail.Handle]*message{}, faults: map[Step][]*Fault{}, refused: map[string]error{}, calls: map[Step]int{},
	}
}

// Account opens the cloud with every role.
func (c *Cloud) Account() *providers.Account {
	return &providers.Account{Sender: c, Sent: c, Prober: c, Bouncer: c, Traits: c.Traits}
}

// Fail makes calls of a step meet f, after those that were set before are used up.
func (c *Cloud) Fail(s Step, f Fault) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.faults[s] = append(c.faults[s], &f)
}

// Refuse makes the cloud refuse one recipient while it takes the others.
func (c *Cloud) Refuse(recipient string, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.refused[fold(recipient)] = err
}

// Reset ends all faults and refusals.
func (c *Cloud) Reset() {
	c.mu.Lock()
	defer c.mu.Unlock()
	clear(c.faults)
	clear(c.refused)
}

// Deliveries lists every recipient's copy, oldest first.
func (c *Cloud) Deliveries() []Delivery {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.delivered)
}

// Reports lists what Bounce filed, oldest first.
func (c *Cloud) Reports() []Delivery {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.reports)
}

// Staged counts the drafts.
func (c *Cloud) Staged() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.drafts)
}

// Calls counts the calls of a step, failed ones included.
func (c *Cloud) Calls(s Step) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.calls[s]
}

// Forget loses a sent message, as a user does who deletes it from Sent Items; FindSent is inconclusive then.
func (c *Cloud) Forget(traceID string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.sent = slices.DeleteFunc(c.sent, func(m *message) bool { return m.trace == traceID })
}

// Prepare stages the message.
func (c *Cloud) Prepare(ctx context.Context, out *mail.Outgoing) (h mail.Handle, err error) {
	err = c.do(ctx, Prepare, func() error {
		if len(out.To) == 0 {
			return permanent(Prepare, mailerr.Status{Subject: 5, Detail: 4}, "the message has no recipients")
		}
		if c.Traits.MaxSize > 0 && out.Content.Size() > c.Traits.MaxSize {
			return permanent(Prepare, mailerr.Status{Subject: 3, Detail: 4}, fmt.Sprintf("the message is larger than %d bytes", c.Traits.MaxSize))
		}
		if !c.Staging {
			return nil
		}
		raw, err := read(out.Content)
		if err != nil {
			return temporary(Prepare, err)
		}
		c.mu.Lock()
		defer c.mu.Unlock()
		c.next++
		h = mail.Handle("draft-" + strconv.Itoa(c.next))
		c.drafts[h] = &message{handle: h, trace: out.TraceID, raw: raw}
		return nil
	})
	if err != nil {
		h = ""
	}
	return h, err
}

// Commit sends the draft, or the message itself when the handle is empty.
func (c *Cloud) Commit(ctx context.Context, out *mail.Outgoing, h mail.Handle) (r mail.Receipt, err error) {
	err = c.do(ctx, Commit, func() error {
		raw, err := read(out.Content)
		if err != nil {
			return temporary(Commit, err)
		}
		c.mu.Lock()
		defer c.mu.Unlock()
		m := &message{handle: h, trace: out.TraceID, raw: raw}
		if h != "" {
			if m = c.drafts[h]; m == nil {
				return &mailerr.Error{Class: mailerr.Temporary, Status: mailerr.Status{Subject: 3}, Unsure: true, Op: "memory.commit",
					Text: "the draft is gone", Err: mail.ErrNoMessage}
			}
		}
		var took []string
		for _, to := range out.To {
			if err := c.refused[fold(to)]; err != nil {
				r.Refused = append(r.Refused, mail.Refusal{Recipient: to, Err: err})
			} else {
				took = append(took, to)
			}
		}
		if len(took) == 0 && len(r.Refused) > 0 {
			return r.Refused[0].Err
		}
		delete(c.drafts, h)
		c.next++
		r.ID, r.RequestID = "sent-"+strconv.Itoa(c.next), "request-"+strconv.Itoa(c.next)
		c.sent = append(c.sent, m)
		for _, to := range took {
			c.delivered = append(c.delivered, Delivery{From: out.From, To: to, Raw: m.raw})
		}
		return nil
	})
	if err != nil {
		return mail.Receipt{}, err
	}
	return r, nil
}

// Abandon removes the draft, or every draft of the message when the handle is empty.
func (c *Cloud) Abandon(ctx context.Context, out *mail.Outgoing, h mail.Handle) error {
	return c.do(ctx, Abandon, func() error {
		c.mu.Lock()
		defer c.mu.Unlock()
		for k, m := range c.drafts {
			if k == h || h == "" && m.trace == out.TraceID {
				delete(c.drafts, k)
			}
		}
		return nil
	})
}

// FindSent looks the outcome up by handle and trace id.
func (c *Cloud) FindSent(ctx context.Context, out *mail.Outgoing, h mail.Handle) (r mail.Receipt, f providers.Finding, err error) {
	err = c.do(ctx, Find, func() error {
		c.mu.Lock()
		defer c.mu.Unlock()
		for _, m := range c.sent {
			if m.trace == out.TraceID {
				f, r.ID = providers.WasSent, string(m.handle)
				return nil
			}
		}
		if h != "" && c.drafts[h] != nil {
			f = providers.NotSent
		}
		return nil
	})
	if err != nil {
		return mail.Receipt{}, providers.Inconclusive, err
	}
	return r, f, nil
}

// Probe says that the mailbox is there.
func (c *Cloud) Probe(ctx context.Context) (string, error) {
	if err := c.do(ctx, Probe, func() error { return nil }); err != nil {
		return "", err
	}
	return "the mailbox is in memory", nil
}

// Bounce files a report.
func (c *Cloud) Bounce(ctx context.Context, content mail.Content, to string) error {
	return c.do(ctx, Bounce, func() error {
		raw, err := read(content)
		if err != nil {
			return temporary(Bounce, err)
		}
		c.mu.Lock()
		defer c.mu.Unlock()
		c.reports = append(c.reports, Delivery{To: to, Raw: raw})
		return nil
	})
}

// do runs one step with the fault that it meets.
func (c *Cloud) do(ctx context.Context, s Step, act func() error) error {
	c.mu.Lock()
	c.calls[s]++
	var f Fault
	hit := false
	if row := c.faults[s]; len(row) > 0 {
		hit, f = true, *row[0]
		if row[0].Times == 1 {
			c.faults[s] = row[1:]
		} else if row[0].Times > 1 {
			row[0].Times--
		}
	}
	c.mu.Unlock()
	if err := ctx.Err(); err != nil {
		return temporary(s, err)
	}
	if hit && f.Wait != nil {
		select {
		case <-f.Wait:
		case <-ctx.Done():
			return temporary(s, ctx.Err())
		}
	}
	if !hit || f.Act || f.Err == nil && !f.Hang {
		if err := act(); err != nil {
			return err
		}
	}
	if !hit {
		return nil
	}
	if f.Hang {
		<-ctx.Done()
		if f.Err == nil {
			return &mailerr.Error{Class: mailerr.Temporary, Status: mailerr.Status{Subject: 4, Detail: 2}, Unsure: s == Prepare || s == Commit || s == Bounce,
				Op: "memory." + string(s), Text: "the mail cloud did not answer in time", Err: ctx.Err()}
		}
	}
	if f.Err == nil {
		return nil
	}
	if _, ok := errors.AsType[*mailerr.Error](f.Err); ok {
		return f.Err
	}
	return temporary(s, f.Err)
}

func temporary(s Step, err error) error {
	return &mailerr.Error{Class: mailerr.Temporary, Status: mailerr.Status{Subject: 4, Detail: 2}, Op: "memory." + string(s),
		Text: "the mail cloud cannot be reached at the moment", Err: errors.New(secret.Scrub(err.Error()))}
}

func permanent(s Step, st mailerr.Status, text string) error {
	return &mailerr.Error{Class: mailerr.Permanent, Status: st, Op: "memory." + string(s), Text: text}
}

// Lost is the failure of an attempt whose answer never came, for Fault.Err.
func Lost(s Step) error {
	return &mailerr.Error{Class: mailerr.Temporary, Status: mailerr.Status{Subject: 4, Detail: 2}, Unsure: true, Op: "memory." + string(s),
		Text: "the connection ended before the mail cloud answered", Err: io.ErrUnexpectedEOF}
}

// ThrottledUntil is the failure of a call that came too early, for Fault.Err.
func ThrottledUntil(s Step, at time.Time) error {
	return &mailerr.Error{Class: mailerr.Throttled, Status: mailerr.Status{Subject: 4, Detail: 5}, RetryAt: at, Op: "memory." + string(s),
		Text: "the mail cloud asks to wait"}
}

func read(c mail.Content) ([]byte, error) {
	r, err := c.Open()
	if err != nil {
		return nil, err
	}
	raw, err := io.ReadAll(r)
	return raw, errors.Join(err, r.Close())
}

func fold(s string) string { return strings.ToLower(s) }

var (
	_ providers.Sender     = (*Cloud)(nil)
	_ providers.SentFinder = (*Cloud)(nil)
	_ providers.Prober     = (*Cloud)(nil)
	_ providers.Bouncer    = (*Cloud)(nil)
)
