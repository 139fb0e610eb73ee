package gmail

import (
	"mailbridge/internal/secret"
)

// xoauth2 is the client's side of XOAUTH2 (https://developers.google.com/gmail/imap/xoauth2-protocol).
type xoauth2 struct {
	user      string
	token     secret.Text
	challenge string // what the server said before it refused
}

// Start gives the initial response.
func (x *xoauth2) Start() (mech string, ir []byte, err error) {
	return "XOAUTH2", []byte("user=" + x.user + "\x01auth=Bearer " + x.token.Reveal() + "\x01\x01"), nil
}

// Next answers the challenge of a refusal with an empty line; only then the server says why. An error here would
// cancel the exchange and hide the code.
func (x *xoauth2) Next(challenge []byte) ([]byte, error) {
	x.challenge = secret.Scrub(string(challenge[:min(len(challenge), 300)]))
	return []byte{}, nil
}
