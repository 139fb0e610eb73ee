package gmail

import (
	"bytes"
	"encoding/base64"
	"errors"
	"io"
	"log"
	"net"
	"strings"
	"sync"
	"time"

	"github.com/emersion/go-imap/v2"
	"github.com/emersion/go-imap/v2/imapserver"
	"github.com/emersion/go-imap/v2/imapserver/imapmemserver"
	"github.com/emersion/go-sasl"
)

// The IMAP side is go-imap's in-memory server behind XOAUTH2: enough to find sent mail and to file reports.

// imapState is the running IMAP servers.
type imapState struct {
	mu      sync.Mutex
	servers []*imapserver.Server
}

func (i *imapState) close() error {
	i.mu.Lock()
	defer i.mu.Unlock()
	var err error
	for _, s := range i.servers {
		err = errors.Join(err, s.Close())
	}
	return err
}

// folders are Gmail's, with their roles (RFC 6154).
var folders = []struct {
	name string
	attr imap.MailboxAttr
}{
	{"INBOX", ""}, {"[Gmail]", imap.MailboxAttrNoSelect}, {"[Gmail]/All Mail", imap.MailboxAttrAll}, {"[Gmail]/Drafts", imap.MailboxAttrDrafts},
	{sentMail, imap.MailboxAttrSent}, {"[Gmail]/Spam", imap.MailboxAttrJunk}, {"[Gmail]/Trash", imap.MailboxAttrTrash},
}

func newUser(addr string) *imapmemserver.User {
	u := imapmemserver.NewUser(addr, "")
	for _, f := range folders {
		if err := u.Create(f.name, nil); err != nil {
			panic(err) // the names are all different
		}
	}
	return u
}

// List shows the folders with their roles, as Gmail does unasked.
func (i *imapSession) List(w *imapserver.ListWriter, ref string, patterns []string, _ *imap.ListOptions) error {
	for _, f := range folders {
		for _, p := range patterns {
			if !imapserver.MatchList(f.name, '/', ref, p) {
				continue
			}
			d := &imap.ListData{Mailbox: f.name, Delim: '/'}
			if f.attr != "" {
				d.Attrs = []imap.MailboxAttr{f.attr}
			}
			if err := w.WriteList(d); err != nil {
				return err
			}
			break
		}
	}
	return nil
}

// literal is a message as APPEND has it.
type literal struct {
	*bytes.Reader
}

func (l literal) Size() int64 { return l.Reader.Size() }

func fileIn(u *imapmemserver.User, box string, raw []byte) {
	if _, err := u.Append(box, literal{bytes.NewReader(raw)}, &imap.AppendOptions{Time: time.Now()}); err != nil {
		panic(err) // the folders are there from the start
	}
}

// ServeIMAPS serves port 993: TLS from the first byte, which l gives.
func (s *Server) ServeIMAPS(l net.Listener) error {
	srv := imapserver.New(&imapserver.Options{
		NewSession: func(*imapserver.Conn) (imapserver.Session, *imapserver.GreetingData, error) {
			return &imapSession{srv: s}, nil, nil
		},
		Caps:         imap.CapSet{imap.CapIMAP4rev1: {}, imap.CapSpecialUse: {}, imap.CapUIDPlus: {}, imap.CapESearch: {}, imap.CapListExtended: {}, imap.CapLiteralPlus: {}},
		InsecureAuth: true, // l speaks TLS
		Logger:       log.New(io.Discard, "", 0),
	})
	s.imap.mu.Lock()
	s.imap.servers = append(s.imap.servers, srv)
	s.imap.mu.Unlock()
	err := srv.Serve(l)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.done || errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// imapSession is one connection; the user's session is there after AUTHENTICATE.
type imapSession struct {
	*imapmemserver.UserSession
	srv *Server
}

func (i *imapSession) Close() error {
	if i.UserSession == nil {
		return nil
	}
	return i.UserSession.Close()
}

func (i *imapSession) Login(string, string) error { return imapserver.ErrAuthFailed }

func (i *imapSession) AuthenticateMechanisms() []string { return []string{"XOAUTH2", "OAUTHBEARER"} }

func (i *imapSession) Authenticate(mech string) (sasl.Server, error) {
	return &bearer{session: i, mech: strings.ToUpper(mech)}, nil
}

// bearer is the server's side of both mechanisms, with the two-step refusal.
type bearer struct {
	session *imapSession
	mech    string
	refused bool
}

func (b *bearer) Next(response []byte) (challengeOut []byte, done bool, err error) {
	if b.refused {
		return nil, false, imapserver.ErrAuthFailed
	}
	if response == nil {
		return []byte{}, false, nil
	}
	bx, _, ok := b.session.srv.login(b.mech, encode(response))
	if !ok {
		b.refused = true
		return []byte(challenge), false, nil
	}
	b.session.UserSession = imapmemserver.NewUserSession(bx.user)
	return nil, true, nil
}

func encode(b []byte) string { return base64.StdEncoding.EncodeToString(b) }
