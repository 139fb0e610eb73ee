package mime

import (
	"errors"
	"fmt"
	"strings"
)

// Letter is a message taken apart into what a structured message has: one body and attachments.
type Letter struct {
	Text  *Part // the text/plain body; nil when there is none
	HTML  *Part // the text/html body; nil when there is none
	Files []File
}

// File is an attachment, or a part that the HTML body shows by its content id.
type File struct {
	Part   *Part
	Name   string // never empty
	Inline bool   // the HTML body refers to it: it belongs inside, not into the list of attachments
}

// ErrSealed is what Flatten says of a message whose structure carries a signature or encryption: taking it
// apart would break it.
var ErrSealed = errors.New("signed or encrypted")

// Flatten takes a message apart. Both alternatives are found where both are there; a further text body of a
// multipart/mixed, a calendar part and an attached message become files, so that nothing is lost but
// the order of things.
func Flatten(root *Part) (*Letter, error) {
	var l Letter
	var sealed error
	root.Walk(func(p *Part) bool {
		// RFC 1847, RFC 8551 §3.2, RFC 3156. Inside of an attached message they are that message's matter.
		switch p.Type {
		case "multipart/signed", "multipart/encrypted", "application/pkcs7-mime", "application/x-pkcs7-mime":
			sealed = fmt.Errorf("%s: %w", p.Type, ErrSealed)
		}
		return p.Type != "message/rfc822" && p.Type != "message/global"
	})
	if sealed != nil {
		return nil, sealed
	}
	l.add(root, false)
	return &l, nil
}

// add files p and what is in it. related tells that p stands beside an HTML body which may show it.
func (l *Letter) add(p *Part, related bool) {
	switch {
	case p.Multipart() && p.Type == "multipart/related":
		for i, c := range p.Children {
			l.add(c, i > 0)
		}
	case p.Multipart():
		for _, c := range p.Children {
			l.add(c, related)
		}
	case p.Type == "text/plain" && l.body(p) && l.Text == nil && l.HTML == nil:
		l.Text = p
	case p.Type == "text/html" && l.body(p) && l.HTML == nil:
		l.HTML = p
	case p.Type == "text/plain" && l.body(p) && p.Body == p.End:
		// An empty text part between attachments, as Apple Mail writes them, says nothing.
	default:
		l.Files = append(l.Files, File{Part: p, Name: l.name(p), Inline: p.ContentID != "" && p.Disposition != "attachment" && (related || p.Disposition == "inline")})
	}
}

// body reports whether a text part is meant to be read as one rather than saved.
func (l *Letter) body(p *Part) bool { return p.Disposition != "attachment" && p.Filename() == "" }

// name gives a file's name, a made one when the message has none.
func (l *Letter) name(p *Part) string {
	// A path in the name is the sender's folder, or an attack on the recipient's.
	name := p.Filename()
	if i := strings.LastIndexAny(name, `/\`); i >= 0 {
		name = name[i+1:]
	}
	name = strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return -1
		}
		return r
	}, name)
	if name = strings.TrimSpace(name); name != "" {
		return name
	}
	ext := map[string]string{"text/plain": ".txt", "text/html": ".html", "text/calendar": ".ics", "message/rfc822": ".eml", "message/global": ".eml",
		"image/jpeg": ".jpg", "image/png": ".png", "image/gif": ".gif", "image/tiff": ".tif", "application/pdf": ".pdf",
		"message/delivery-status": ".txt", "text/rfc822-headers": ".txt", "application/ms-tnef": ".dat"}[p.Type]
	if ext == "" {
		ext = ".bin"
	}
	return fmt.Sprintf("part-%d%s", len(l.Files)+1, ext)
}
