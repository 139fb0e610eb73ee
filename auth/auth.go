// Package auth says who may use which account: here, by bridge passwords, and, in the packages below it,
// in the cloud, by OAuth 2.0. The two have nothing in common: no client ever sees a token.
package auth

import (
	"errors"
	"net/netip"

	"mailbridge/internal/mail"
	"mailbridge/internal/secret"
)

// Account is what a client logs in to, as the configuration describes it.
type Account struct {
	ID      mail.AccountID
	Mailbox string // the mailbox's address; clients may log in with it too
	Send    bool   // may = ["send"]
	Receive bool   // may = ["receive"]
	// From lists the sender addresses that the account may use, with * for any run of characters
	// ("*@devices.example.org"). Empty is the mailbox's own address alone.
	From []string
	// MaxSize is the largest message in bytes; 0 is what the provider takes.
	MaxSize int64
}

// Credentials is what a client presented.
type Credentials struct {
	User     string // the account's name or its mailbox address
	Password secret.Text
	Remote   netip.Addr
}

// ErrCredentials is all that anybody outside learns of a refused login: unknown user, wrong password and
// revoked password are one.
var ErrCredentials = errors.New("user name or password is wrong")
