package smtpd

import (
	"encoding/base64"
	"errors"
	"strings"
	"time"

	"mailbridge/auth"
	"mailbridge/internal/secret"
)

// auth is AUTH (RFC 4954) with PLAIN (RFC 4616) and LOGIN.
func (c *conn) auth(args string) error {
	switch {
	case c.hello == "":
		return c.reply(replyNoHello)
	case c.account != nil:
		return c.reply(replyAuthTwice)
	case c.mail != nil:
		return c.reply(replyAuthInMail)
	}
	fields := strings.Fields(args)
	if len(fields) == 0 || len(fields) > 2 {
		return c.badCommand(replySyntax)
	}
	mech := strings.ToUpper(fields[0])
	if mech != "PLAIN" && mech != "LOGIN" {
		return c.badCommand(replyMechanism)
	}
	if !c.mayAuth() {
		// RFC 4954 §6; a client that sent its password all the same has told it to the network.
		return c.badCommand(replyNeedTLS)
	}
	var initial *string
	if len(fields) == 2 {
		initial = &fields[1]
	}
	user, pass, err := c.credentials(mech, initial)
	if r, ok := errors.AsType[*refusal](err); ok {
		return c.badCommand(r.reply)
	}
	if err != nil {
		return err
	}
	account, err := c.s.cfg.Auth.Authenticate(c.ctx, auth.Credentials{User: user, Password: pass, Remote: c.remote})
	var wait interface{ RetryAfter() time.Duration }
	switch {
	case err == nil:
		c.account = account
		c.log = c.log.With("account", string(account.ID))
		c.s.metrics.logins.WithLabelValues("ok").Inc()
		return c.reply(replyAuthOK)
	case errors.Is(err, auth.ErrCredentials):
		c.s.metrics.logins.WithLabelValues("refused").Inc()
		c.log.Warn("login refused", "client", c.remote.String(), "user", clean(user))
		c.authFails++
		if c.authFails >= maxAuthFails {
			return c.reply(replyTooManyAuth)
		}
		return c.reply(replyWrong)
	case errors.As(err, &wait):
		c.s.metrics.logins.WithLabelValues("delayed").Inc()
		c.log.Warn("login not looked at: too many failed before", "client", c.remote.String(), "user", clean(user), "wait", wait.RetryAfter())
		return c.reply(replyTooManyAuth)
	}
	c.s.metrics.logins.WithLabelValues("error").Inc()
	c.log.Error("a login could not be checked", "err", err)
	return c.reply(replyTryLater)
}

// credentials runs the exchange. A *refusal is an answer; any other error ends the connection.
func (c *conn) credentials(mech string, initial *string) (user string, pass secret.Text, err error) {
	if mech == "PLAIN" {
		b, err := c.response(initial, "")
		if err != nil {
			return "", pass, err
		}
		parts := strings.Split(b, "\x00")
		// RFC 4616 §2: authzid NUL authcid NUL passwd. Nobody acts for another here.
		if len(parts) != 3 || parts[1] == "" || parts[0] != "" && !strings.EqualFold(parts[0], parts[1]) {
			return "", pass, &refusal{reply: replyWrong}
		}
		return parts[1], secret.New(parts[2]), nil
	}
	// Clients look for these very words in the prompts.
	if user, err = c.response(initial, "Username:"); err != nil {
		return "", pass, err
	}
	p, err := c.response(nil, "Password:")
	return user, secret.New(p), err
}

// response gives the client's next response: what it sent along, or what it answers to a prompt.
func (c *conn) response(initial *string, prompt string) (string, error) {
	text := ""
	if initial != nil {
		if text = *initial; text == "=" {
			return "", nil // RFC 4954 §4: an empty response
		}
	} else {
		if err := c.reply(reply{334, "", base64.StdEncoding.EncodeToString([]byte(prompt))}); err != nil {
			return "", err
		}
		if err := c.flush(); err != nil {
			return "", err
		}
		b, err := c.readLine(maxAuthLine)
		if errors.Is(err, errLong) {
			return "", &refusal{reply: replyLineLong}
		}
		if err != nil {
			return "", err
		}
		text = string(b)
	}
	if strings.TrimSpace(text) == "*" {
		return "", &refusal{reply: replyCancelled}
	}
	b, ok := decode64(text)
	if !ok {
		return "", &refusal{reply: replyBase64}
	}
	return b, nil
}

// decode64 takes base64 as devices write it: with white space, without padding.
func decode64(s string) (string, bool) {
	s = strings.Map(func(r rune) rune {
		if r == ' ' || r == '\t' || r == '\r' || r == '\n' {
			return -1
		}
		return r
	}, s)
	b, err := base64.RawStdEncoding.DecodeString(strings.TrimRight(s, "="))
	return string(b), err == nil
}
