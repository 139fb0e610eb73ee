package smtpd

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"mailbridge/auth"
)

// execute carries out one command line.
func (c *conn) execute(line string) error {
	verb, args, _ := strings.Cut(line, " ")
	if i := strings.IndexByte(verb, '\t'); i >= 0 {
		verb, args = line[:i], line[i+1:]
	}
	args = strings.TrimSpace(args)
	switch strings.ToUpper(verb) {
	case "EHLO":
		return c.ehlo(args, true)
	case "HELO":
		return c.ehlo(args, false)
	case "STARTTLS":
		return c.startTLS(args)
	case "AUTH":
		return c.auth(args)
	case "MAIL":
		return c.mailFrom(args)
	case "RCPT":
		return c.rcptTo(args)
	case "DATA":
		return c.data(args)
	case "BDAT":
		return c.bdatChunk(args)
	case "RSET":
		c.reset()
		return c.reply(replyOK)
	case "NOOP":
		return c.reply(replyOK)
	case "QUIT":
		if err := c.reply(replyBye); err != nil {
			return err
		}
		if err := c.bw.Flush(); err != nil {
			return err
		}
		return errEnd
	case "HELP":
		return c.reply(replyHelp)
	case "VRFY":
		return c.reply(replyVrfy)
	case "EXPN":
		return c.reply(replyNoExpn)
	}
	return c.badCommand(replyUnknown)
}

// ehlo greets. The name is not used for anything but the Received line: clients send all kinds.
func (c *conn) ehlo(name string, extended bool) error {
	c.reset()
	c.hello, c.esmtp = name, extended
	if name == "" {
		c.hello = "unknown"
	}
	who := c.s.cfg.Hostname
	if !extended {
		return c.reply(reply{250, "", who})
	}
	size := c.s.cfg.MaxSize
	if c.account != nil && c.account.MaxSize > 0 {
		size = c.account.MaxSize
	}
	lines := []string{fmt.Sprintf("%s greets [%s]", who, c.remote), "SIZE " + strconv.FormatInt(size, 10), "8BITMIME", "PIPELINING", "ENHANCEDSTATUSCODES", "CHUNKING"}
	if c.s.cfg.SMTPUTF8 {
		lines = append(lines, "SMTPUTF8")
	}
	if c.canStartTLS() {
		lines = append(lines, "STARTTLS")
	}
	if c.mayAuth() && c.account == nil {
		lines = append(lines, "AUTH PLAIN LOGIN")
		if c.l.AuthEquals {
			lines = append(lines, "AUTH=PLAIN LOGIN")
		}
	}
	return c.reply(reply{250, "", strings.Join(lines, "\n")})
}

func (c *conn) canStartTLS() bool { return c.l.TLS == StartTLS && c.tls == nil }

// mayAuth reports whether passwords may be sent now: under TLS, or in clear where nobody can listen or the
// operator said so.
func (c *conn) mayAuth() bool {
	return c.tls != nil || c.l.CleartextAuth || c.local
}

func (c *conn) startTLS(args string) error {
	switch {
	case args != "":
		return c.badCommand(replySyntax)
	case !c.canStartTLS():
		return c.badCommand(replySequence)
	case c.mail != nil:
		return c.reply(replySequence)
	}
	if err := c.reply(replyStartTLS); err != nil {
		return err
	}
	if err := c.bw.Flush(); err != nil {
		return err
	}
	// RFC 3207 §4.2: what was learned before TLS is forgotten. A failed handshake ends the connection.
	if err := c.handshake(); err != nil {
		return err
	}
	c.hello, c.esmtp, c.account = "", false, nil
	return nil
}

// mailFrom begins a transaction (RFC 5321 §4.1.1.2).
func (c *conn) mailFrom(args string) error {
	switch {
	case c.hello == "":
		return c.reply(replyNoHello)
	case c.account == nil:
		return c.reply(replyNeedAuth)
	case c.mail != nil:
		return c.reply(replySequence)
	case !c.account.Send:
		return c.reply(replyMayNotSend)
	}
	path, params, ok := c.path(args, "FROM:")
	if !ok {
		return c.badCommand(replyBadSender)
	}
	t := &transaction{}
	for _, p := range params {
		name, value, _ := strings.Cut(p, "=")
		switch strings.ToUpper(name) {
		case "SIZE":
			n, err := strconv.ParseUint(value, 10, 63)
			if err != nil {
				return c.badCommand(replySyntax)
			}
			t.size = int64(n)
		case "BODY":
			if v := strings.ToUpper(value); v != "7BIT" && v != "8BITMIME" {
				return c.badCommand(replyParam)
			}
		case "SMTPUTF8":
			if !c.s.cfg.SMTPUTF8 {
				return c.badCommand(replyParam)
			}
			t.env.UTF8 = true
		case "AUTH": // RFC 4954 §5: taken and not used
		case "RET", "ENVID", "XPRIO", "MT-PRIORITY":
			// Sent by clients that do not look at what is offered; leaving them out does no harm.
			if !c.l.Tolerant {
				return c.badCommand(replyParam)
			}
		default:
			return c.badCommand(replyParam)
		}
	}
	if path != "" {
		if r := checkAddress(path, t.env.UTF8); r != nil {
			if r.enh == replyBadAddress.enh {
				r.enh = replyBadSender.enh
			}
			return c.badCommand(*r)
		}
		if !mayUse(c.account, path) {
			return c.reply(notAllowed(c.account, path))
		}
	}
	if t.size > c.maxSize() {
		return c.reply(replyTooBig)
	}
	t.env.From = path
	c.mail = t
	return c.reply(replySenderOK)
}

func (c *conn) maxSize() int64 {
	if c.account != nil && c.account.MaxSize > 0 {
		return c.account.MaxSize
	}
	return c.s.cfg.MaxSize
}

// rcptTo adds a recipient (RFC 5321 §4.1.1.3).
func (c *conn) rcptTo(args string) error {
	if c.mail == nil || c.bdat != nil {
		if c.account == nil {
			return c.reply(replyNeedAuth)
		}
		return c.reply(replySequence)
	}
	path, params, ok := c.path(args, "TO:")
	if !ok {
		return c.badCommand(replyBadAddress)
	}
	for _, p := range params {
		name, _, _ := strings.Cut(p, "=")
		switch strings.ToUpper(name) {
		case "NOTIFY", "ORCPT": // as with MAIL
			if !c.l.Tolerant {
				return c.badCommand(replyParam)
			}
		default:
			return c.badCommand(replyParam)
		}
	}
	if r := checkAddress(path, c.mail.env.UTF8); r != nil {
		return c.badCommand(*r)
	}
	if slices.Contains(c.mail.env.To, path) {
		return c.reply(replyRcptOK)
	}
	// RFC 5321 §4.5.3.1.10: 452 for the recipients over the limit, so that the client sends them next.
	if len(c.mail.env.To) >= c.s.cfg.MaxRecipients {
		return c.reply(replyTooManyRcpt)
	}
	c.mail.env.To = append(c.mail.env.To, path)
	return c.reply(replyRcptOK)
}

// path reads "FROM:<path> params". A source route is dropped (RFC 5321 appendix C); white space after the colon
// is taken, and tolerant listeners take an address without brackets.
func (c *conn) path(args, keyword string) (path string, params []string, ok bool) {
	if len(args) < len(keyword) || !strings.EqualFold(args[:len(keyword)], keyword) {
		return "", nil, false
	}
	rest := strings.TrimLeft(args[len(keyword):], " \t")
	if !strings.HasPrefix(rest, "<") {
		if !c.l.Tolerant || rest == "" {
			return "", nil, false
		}
		fields := strings.Fields(rest)
		return fields[0], fields[1:], true
	}
	// A quoted local part may hold a closing bracket.
	quoted, end := false, -1
	for i := 1; i < len(rest) && end < 0; i++ {
		switch {
		case rest[i] == '\\' && quoted:
			i++
		case rest[i] == '"':
			quoted = !quoted
		case rest[i] == '>' && !quoted:
			end = i
		}
	}
	if end < 0 {
		return "", nil, false
	}
	path = rest[1:end]
	if strings.HasPrefix(path, "@") {
		_, after, found := strings.Cut(path, ":")
		if !found {
			return "", nil, false
		}
		path = after
	}
	after := rest[end+1:]
	if after != "" && after[0] != ' ' && after[0] != '\t' {
		return "", nil, false
	}
	return path, strings.Fields(after), true
}

// checkAddress holds an address against RFC 5321 §4.1.2 and §4.5.3.1; nil is good.
func checkAddress(a string, utf8ok bool) *reply {
	bad := func(r reply) *reply { return &r }
	at := strings.LastIndexByte(a, '@')
	if at < 0 && a != "" {
		return bad(replyNoDomain)
	}
	if at <= 0 || at > 64 || len(a)-at-1 == 0 || len(a)-at-1 > 255 {
		return bad(replyBadAddress)
	}
	if !utf8.ValidString(a) {
		return bad(replyBadAddress)
	}
	local, domain := a[:at], a[at+1:]
	for _, r := range a {
		if r > 0x7e {
			if !utf8ok {
				return bad(replyUTF8)
			}
			continue
		}
		if r < ' ' || r == 0x7f {
			return bad(replyBadAddress)
		}
	}
	if !localPart(local) || !domainPart(domain) {
		return bad(replyBadAddress)
	}
	return nil
}

// localPart is a dot-string or a quoted string. Dots where the rule has none are let pass: such addresses exist.
func localPart(s string) bool {
	if s[0] == '"' {
		if len(s) < 2 || s[len(s)-1] != '"' {
			return false
		}
		for i := 1; i < len(s)-1; i++ {
			if s[i] == '\\' {
				i++
			} else if s[i] == '"' {
				return false
			}
		}
		return s[len(s)-2] != '\\' || strings.HasSuffix(s, `\\"`)
	}
	return !strings.ContainsAny(s, " \"(),:;<>@[\\]")
}

// domainPart is a domain or an address literal.
func domainPart(s string) bool {
	if lit, ok := strings.CutPrefix(s, "["); ok {
		lit, ok = strings.CutSuffix(lit, "]")
		lit = strings.TrimPrefix(lit, "IPv6:")
		_, err := netip.ParseAddr(lit)
		return ok && err == nil
	}
	for label := range strings.SplitSeq(s, ".") {
		if label == "" || len(label) > 63 {
			return false
		}
		for _, r := range label {
			if r < 0x7f && !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '-' || r == '_') {
				return false
			}
		}
	}
	return true
}

// mayUse reports whether the account may send under an address.
func mayUse(a *auth.Account, addr string) bool {
	if len(a.From) == 0 {
		return strings.EqualFold(a.Mailbox, addr)
	}
	return slices.ContainsFunc(a.From, func(pattern string) bool { return match(strings.ToLower(pattern), strings.ToLower(addr)) })
}

// match compares with a pattern in which * stands for any run of characters, in linear time but for the stars.
func match(pattern, s string) bool {
	parts := strings.Split(pattern, "*")
	if len(parts) == 1 {
		return pattern == s
	}
	s, ok := strings.CutPrefix(s, parts[0])
	if !ok {
		return false
	}
	for _, p := range parts[1 : len(parts)-1] {
		i := strings.Index(s, p)
		if i < 0 {
			return false
		}
		s = s[i+len(p):]
	}
	return strings.HasSuffix(s, parts[len(parts)-1])
}

// notAllowed refuses a sender (RFC 6409 §6.1) and says which would do.
func notAllowed(a *auth.Account, addr string) reply {
	allowed := a.From
	if len(allowed) == 0 {
		allowed = []string{a.Mailbox}
	}
	return reply{550, "5.7.1", fmt.Sprintf("Sender %s is not allowed for this account: use %s", addr, strings.Join(allowed, " or "))}
}
