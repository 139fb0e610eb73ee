// Package graph sends through Microsoft Graph.
//
// With Mail.ReadWrite a message goes in two steps: Prepare makes a MIME draft under an immutable id,
// Commit sends it, and an outcome that nobody heard is looked up by that id
// (https://learn.microsoft.com/graph/outlook-immutable-id). With Mail.Send alone Prepare stages nothing and
// Commit is one sendMail.
//
// Graph knows no envelope: a message goes to whom its To, Cc and Bcc fields name. The fields are edited in
// place until they name exactly the envelope's recipients (recipients.go); all other bytes of the message
// go to the cloud as they are. What is too large for one request is taken apart instead, into a structured
// draft with its attachments uploaded (large.go). The answer to Prepare says whom Exchange read out of the header, and a draft
// that does not fit the envelope is never sent.
package graph

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"mailbridge/internal/mailerr"
	"mailbridge/providers"
)

const (
	// maxEncoded is the most bytes of base64 that go in one request. Graph takes requests under 4 MB and
	// does not say which megabyte (https://learn.microsoft.com/graph/api/user-sendmail).
	maxEncoded = 3_900_000
	// maxLarge is the largest message, in bytes, that is taken at all: Exchange's own limit, which a
	// mailbox may have far below (https://learn.microsoft.com/graph/outlook-large-attachments).
	maxLarge = 150_000_000
	// headroom is kept free of MaxSize for recipients that travel as an added Bcc field.
	headroom = 64 << 10
	// maxRecipients is the limit of a message (https://learn.microsoft.com/graph/api/resources/message).
	maxRecipients = 500
	// parallel is how many requests Graph takes at once for one application and mailbox
	// (https://learn.microsoft.com/graph/throttling-limits).
	parallel = 4
	// draftsDenied is how long a refusal to make drafts is remembered. Granting a permission takes up to
	// two hours to be seen (https://learn.microsoft.com/exchange/permissions-exo/application-rbac).
	draftsDenied = time.Hour
)

// Client is one mailbox in Microsoft 365. It is safe for concurrent use.
type Client struct {
	http     *http.Client
	uploads  *http.Client // nil: no upload sessions, hence no large route
	mailbox  string       // address
	root     string       // the base with /users/{mailbox}
	mismatch providers.Mismatch
	noDrafts bool
	log      *slog.Logger
	now      func() time.Time
	limits   limits
	pause    time.Duration // before an interrupted piece of an upload is tried again, times the tries so far

	mu          sync.Mutex
	directUntil time.Time // until then drafts are known to be refused
}

// limits are sizes in bytes at which the way of a message changes.
type limits struct {
	encoded int64 // of a message in base64 that goes in one request
	inOne   int64 // of an attachment that goes in one request
	chunk   int64 // of a piece of an upload
}

// Open opens the account. It asks the cloud nothing.
func Open(cfg providers.Config) (*providers.Account, error) {
	c, err := open(cfg)
	if err != nil {
		return nil, err
	}
	size := int64(maxEncoded/4*3 - headroom)
	if c.uploads != nil && !c.noDrafts {
		size = maxLarge
	}
	return &providers.Account{
		Sender:  c,
		Sent:    c,
		Prober:  c,
		Bouncer: c,
		Traits: providers.Traits{
			MaxSize:       size,
			MaxRecipients: maxRecipients,
			Parallel:      parallel,
			SMTPUTF8:      true,
			OneStep:       c.noDrafts,
		},
	}, nil
}

func open(cfg providers.Config) (*Client, error) {
	base, err := url.Parse(cfg.Base)
	switch {
	case cfg.HTTP == nil:
		return nil, errors.New("graph: no HTTP client")
	case err != nil:
		return nil, errors.New("graph: the endpoint is not a URL")
	case base.Scheme != "https" && base.Scheme != "http" || base.Host == "":
		return nil, errors.New("graph: the endpoint must be a URL such as https://graph.microsoft.com/v1.0")
	case !strings.Contains(cfg.Mailbox, "@"):
		return nil, errors.New("graph: the mailbox must be an address")
	}
	c := &Client{
		http:     unredirected(cfg.HTTP),
		uploads:  unredirected(cfg.Uploads),
		mailbox:  cfg.Mailbox,
		root:     strings.TrimRight(cfg.Base, "/") + "/users/" + segment(cfg.Mailbox),
		mismatch: cfg.Mismatch,
		noDrafts: cfg.NoDrafts,
		log:      cfg.Log,
		now:      time.Now,
		limits:   limits{encoded: maxEncoded, inOne: maxInOne, chunk: chunk},
		pause:    time.Second,
	}
	if c.mismatch == "" {
		c.mismatch = providers.Refuse
	}
	if c.log == nil {
		c.log = slog.New(slog.DiscardHandler)
	}
	c.log = c.log.With("account", string(cfg.ID), "provider", "graph")
	return c, nil
}

// unredirected is the client without redirects. Graph makes none, and following one would turn a POST into a
// GET whose success says nothing about the message (RFC 9110 §15.4.3).
func unredirected(c *http.Client) *http.Client {
	if c == nil {
		return nil
	}
	u := *c
	u.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	return &u
}

// Probe reads the id of the Inbox: /me is refused to applications, and User.Read does not exist for them
// (https://learn.microsoft.com/graph/permissions-reference). With Mail.Send alone reading is refused, which
// says that the mailbox's server and the sign-in work, and no more.
func (c *Client) Probe(ctx context.Context) (string, error) {
	resp, err := c.do(ctx, call{op: opProbe, method: http.MethodGet, path: "/mailFolders/inbox?$select=id"})
	if e := mailerr.Of(err); err != nil && e.Class == mailerr.Auth && e.Status == st(7, 0) && errors.Is(err, errForbidden) {
		if c.noDrafts {
			return "Microsoft 365 accepts the sign-in; whether the mailbox may send cannot be checked without Mail.ReadWrite", nil
		}
		more := *e
		more.Text += "; with Mail.Send alone the account sends, but cannot look up what became of a lost answer"
		return "", &more
	}
	if err != nil {
		return "", err
	}
	finish(resp)
	return "Microsoft 365 shows the Inbox of " + c.mailbox, nil
}

// errForbidden marks a refusal with status 403.
var errForbidden = errors.New("forbidden")

// call is one request.
type call struct {
	op     op
	method string
	path   string   // below the mailbox, with the query
	body   *payload // nil is an empty body
	prefer string   // Prefer header
}

// immutable asks for ids that stay when a message moves. It is needed on every request that takes or
// gives ids (https://learn.microsoft.com/graph/outlook-immutable-id).
const immutable = `IdType="ImmutableId"`

// do makes the request. Every failure is a classified one; the answer is a success and must be finished.
func (c *Client) do(ctx context.Context, q call) (*http.Response, error) {
	var sent atomic.Bool // the whole request may have left
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		WroteHeaders: func() {
			if q.body == nil {
				sent.Store(true)
			}
		},
		GotFirstResponseByte: func() { sent.Store(true) },
	})
	req, err := http.NewRequestWithContext(ctx, q.method, c.root+q.path, http.NoBody)
	if err != nil {
		return nil, &mailerr.Error{Class: mailerr.Unknown, Status: st(3, 0), Op: q.op.name, Text: "internal error", Err: transportError{err}}
	}
	if q.prefer != "" {
		req.Header.Set("Prefer", q.prefer)
	}
	if q.body != nil {
		req.Header.Set("Content-Type", q.body.kind)
		req.ContentLength = q.body.size
		req.GetBody = func() (io.ReadCloser, error) { return q.body.reader(&sent) }
		if req.Body, err = req.GetBody(); err != nil {
			return nil, &mailerr.Error{Class: mailerr.Temporary, Status: st(3, 0), Op: q.op.name,
				Text: "the stored message cannot be read at the moment", Err: transportError{err}}
		}
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, classifyTransport(q.op, err, sent.Load())
	}
	if resp.StatusCode >= 200 && resp.StatusCode < 300 {
		return resp, nil
	}
	defer finish(resp)
	e := classify(q.op, readRefusal(resp), c.now())
	if resp.StatusCode == http.StatusForbidden {
		e.Err = errors.Join(e.Err, errForbidden)
	}
	return nil, e
}

// finish reads the rest of a small answer, so that its connection can serve again, and closes it.
func finish(resp *http.Response) {
	_, _ = io.CopyN(io.Discard, resp.Body, 16<<10) // what fails here was of no use any more
	_ = resp.Body.Close()
}

// segment escapes s as one segment of a path: addresses hold characters such as +, # and '.
func segment(s string) string {
	return strings.ReplaceAll(url.PathEscape(s), "+", "%2B")
}

// filter escapes a string literal of an OData filter, as part of a query.
func filter(s string) string {
	return url.QueryEscape("'" + strings.ReplaceAll(s, "'", "''") + "'")
}

var (
	_ providers.Sender     = (*Client)(nil)
	_ providers.SentFinder = (*Client)(nil)
	_ providers.Prober     = (*Client)(nil)
	_ providers.Bouncer    = (*Client)(nil)
)
