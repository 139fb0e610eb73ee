package gmail

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"time"

	"crypto/tls"

	"github.com/emersion/go-imap/v2"
	"github.com/emersion/go-imap/v2/imapclient"

	"mailbridge/internal/mail"
	"mailbridge/internal/mailerr"
	"mailbridge/providers"
)

// maxCandidates is how many messages with one Message-ID are looked at, newest first.
const maxCandidates = 50

// FindSent looks for the message in the mailbox marked \Sent, by Message-ID and the id in our Received line. What
// is not there was most likely not sent, for Gmail files the copy as it takes the message; but Gmail files none
// when one with the same Message-ID and Date is there already, so absence is no proof.
func (c *Client) FindSent(ctx context.Context, out *mail.Outgoing, _ mail.Handle) (mail.Receipt, providers.Finding, error) {
	if out.MessageID == "" || out.TraceID == "" {
		return mail.Receipt{}, providers.Inconclusive, nil
	}
	found := providers.Inconclusive
	err := c.imap(ctx, func(cl *imapclient.Client) error {
		sent, err := special(cl, imap.MailboxAttrSent)
		if err != nil {
			return err
		}
		if _, err := cl.Select(sent, &imap.SelectOptions{ReadOnly: true}).Wait(); err != nil {
			return err
		}
		data, err := cl.UIDSearch(&imap.SearchCriteria{Header: []imap.SearchCriteriaHeaderField{{Key: "Message-ID", Value: strings.Trim(out.MessageID, "<>")}}}, nil).Wait()
		if err != nil {
			return err
		}
		uids := data.AllUIDs()
		slices.Reverse(uids)
		if len(uids) == 0 {
			return nil
		}
		section := &imap.FetchItemBodySection{Specifier: imap.PartSpecifierHeader, HeaderFields: []string{"Received"}, Peek: true}
		msgs, err := cl.Fetch(imap.UIDSetNum(uids[:min(len(uids), maxCandidates)]...), &imap.FetchOptions{UID: true, BodySection: []*imap.FetchItemBodySection{section}}).Collect()
		if err != nil {
			return err
		}
		for _, m := range msgs {
			for _, b := range m.BodySection {
				words := strings.Fields(string(b.Bytes))
				for i, w := range words {
					if strings.EqualFold(w, "id") && i+1 < len(words) && strings.TrimRight(words[i+1], ";") == out.TraceID {
						found = providers.WasSent
					}
				}
			}
		}
		return nil
	})
	return mail.Receipt{}, found, err
}

// Bounce files a report in the INBOX.
func (c *Client) Bounce(ctx context.Context, raw mail.Content, _ string) error {
	return c.imap(ctx, func(cl *imapclient.Client) error {
		r, err := raw.Open()
		if err != nil {
			return err
		}
		cmd := cl.Append("INBOX", raw.Size(), &imap.AppendOptions{Time: c.now()})
		_, err = io.Copy(cmd, r)
		err = errors.Join(err, r.Close(), cmd.Close())
		if err != nil {
			return err
		}
		_, err = cmd.Wait()
		return err
	})
}

// special finds a mailbox by its role: names are localised (RFC 6154).
func special(cl *imapclient.Client, attr imap.MailboxAttr) (string, error) {
	list, err := cl.List("", "*", &imap.ListOptions{ReturnSpecialUse: cl.Caps().Has(imap.CapListExtended)}).Collect()
	if err != nil {
		return "", err
	}
	for _, m := range list {
		if slices.Contains(m.Attrs, attr) {
			return m.Mailbox, nil
		}
	}
	return "", fmt.Errorf("no mailbox is marked %s", attr)
}

// imap runs f on a connection of its own.
func (c *Client) imap(ctx context.Context, f func(*imapclient.Client) error) error {
	for again := true; ; again = false {
		tok, err := c.cfg.Tokens.Token(ctx)
		if err != nil {
			return err
		}
		refused, err := c.imapOnce(ctx, tok, f)
		if refused {
			c.cfg.Tokens.Reject(tok)
			if again {
				continue
			}
			return &mailerr.Error{Class: mailerr.Auth, Status: st(7, 0), Op: "gmail.imap", Text: "the IMAP server does not accept the sign-in; check that IMAP is enabled for the mailbox", Err: scrubbed{err}}
		}
		if err != nil {
			return &mailerr.Error{Class: mailerr.Temporary, Status: st(4, 2), Op: "gmail.imap", Text: "the IMAP server cannot be asked at the moment", Err: scrubbed{err}}
		}
		return nil
	}
}

// imapTimeout bounds one look-up.
const imapTimeout = 2 * time.Minute

func (c *Client) imapOnce(ctx context.Context, tok providers.Token, f func(*imapclient.Client) error) (refused bool, err error) {
	tc, err := c.tlsConfig(c.cfg.IMAPAddr)
	if err != nil {
		return false, err
	}
	ctx, cancel := context.WithTimeout(ctx, imapTimeout)
	defer cancel()
	d := tls.Dialer{NetDialer: &net.Dialer{Timeout: dialTimeout}, Config: tc}
	nc, err := d.DialContext(ctx, "tcp", c.cfg.IMAPAddr)
	if err != nil {
		return false, err
	}
	stop := context.AfterFunc(ctx, func() { _ = nc.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	cl := imapclient.New(nc, nil)
	defer cl.Close()
	if err := cl.Authenticate(&xoauth2{user: c.cfg.Mailbox, token: tok.Value}); err != nil {
		_, said := errors.AsType[*imap.Error](err)
		return said, err
	}
	if err := f(cl); err != nil {
		return false, err
	}
	return false, cl.Logout().Wait()
}
