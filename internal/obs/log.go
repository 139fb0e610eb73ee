// Package obs is how the bridge is seen from outside: the logger, the metrics registry and the health checks.
package obs

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"strings"

	"mailbridge/internal/secret"
)

// Keys of log attributes. One name for one thing, so that a search finds all of it.
const (
	Conn      = "conn"       // an accepted connection
	Account   = "account"    // account in the configuration
	Provider  = "provider"   // "graph", "gmail"
	Op        = "op"         // what was being done, such as "graph.commit"
	Item      = "item"       // id of a message, as in the SMTP reply and in its Received line
	Mailbox   = "mailbox"    // address of a mailbox
	Class     = "class"      // mailerr.Class
	RetryAt   = "retry_at"   // when the next attempt is due
	RequestID = "request_id" // the cloud's own id of a request
	Err       = "err"
)

// LogOptions says how much is logged and in which form.
type LogOptions struct {
	Level  string // "debug", "info", "warn", "error"; empty is info
	Format string // "text", "json"; empty is text
}

// NewLogger makes the logger that is handed down everywhere. Every text that it writes passes
// secret.Scrub, the last net under secret.Text.
func NewLogger(w io.Writer, o LogOptions) (*slog.Logger, error) {
	var level slog.Level
	if o.Level != "" {
		if err := level.UnmarshalText([]byte(o.Level)); err != nil {
			return nil, fmt.Errorf("log level %q is not one of debug, info, warn, error", o.Level)
		}
	}
	opts := &slog.HandlerOptions{Level: level}
	var h slog.Handler
	switch o.Format {
	case "", "text":
		h = slog.NewTextHandler(w, opts)
	case "json":
		h = slog.NewJSONHandler(w, opts)
	default:
		return nil, fmt.Errorf("log format %q is not one of text, json", o.Format)
	}
	return slog.New(scrubber{h}), nil
}

// scrubber is a handler that lets no token through.
type scrubber struct{ next slog.Handler }

func (s scrubber) Enabled(ctx context.Context, l slog.Level) bool { return s.next.Enabled(ctx, l) }

func (s scrubber) Handle(ctx context.Context, r slog.Record) error {
	clean := !suspicious(r.Message)
	if clean {
		r.Attrs(func(a slog.Attr) bool {
			clean = harmless(a)
			return clean
		})
	}
	if clean {
		return s.next.Handle(ctx, r)
	}
	out := slog.NewRecord(r.Time, r.Level, secret.Scrub(r.Message), r.PC)
	r.Attrs(func(a slog.Attr) bool {
		out.AddAttrs(scrub(a))
		return true
	})
	return s.next.Handle(ctx, out)
}

func (s scrubber) WithAttrs(as []slog.Attr) slog.Handler {
	clean := make([]slog.Attr, len(as))
	for i, a := range as {
		clean[i] = scrub(a)
	}
	return scrubber{s.next.WithAttrs(clean)}
}

func (s scrubber) WithGroup(name string) slog.Handler { return scrubber{s.next.WithGroup(name)} }

// harmless reports whether an attribute is sure to hold no token, without working on it.
func harmless(a slog.Attr) bool {
	switch a.Value.Kind() {
	case slog.KindString:
		return !suspicious(a.Value.String())
	case slog.KindAny, slog.KindGroup, slog.KindLogValuer:
		return false
	}
	return true
}

// scrub cleans one attribute; errors and other values are turned into their text first.
func scrub(a slog.Attr) slog.Attr {
	v := a.Value.Resolve()
	switch v.Kind() {
	case slog.KindString:
		a.Value = slog.StringValue(secret.Scrub(v.String()))
	case slog.KindGroup:
		group := v.Group()
		clean := make([]slog.Attr, len(group))
		for i, g := range group {
			clean[i] = scrub(g)
		}
		a.Value = slog.GroupValue(clean...)
	case slog.KindAny:
		text := ""
		switch x := v.Any().(type) {
		case error:
			text = x.Error()
		case fmt.Stringer:
			text = x.String()
		case []string:
			text = strings.Join(x, " ")
		default:
			text = fmt.Sprintf("%+v", x)
		}
		if suspicious(text) {
			text = secret.Scrub(text)
		}
		a.Value = slog.StringValue(text)
	default:
		a.Value = v
	}
	return a
}

// suspicious is the cheap look that spares ordinary texts the patterns of secret.Scrub: it finds every text
// that one of them could match.
func suspicious(s string) bool {
	for i := range len(s) {
		switch s[i] | 0x20 {
		case 'y':
			if has(s, i, "ya29.") {
				return true
			}
		case 'e':
			if has(s, i, "eyj") {
				return true
			}
		case 'b':
			if has(s, i, "bearer") {
				return true
			}
		case 'a':
			if has(s, i, "auth") || has(s, i, "assertion") || has(s, i, "access_token") {
				return true
			}
		case 's':
			if has(s, i, "secret") {
				return true
			}
		case 't':
			if has(s, i, "token") {
				return true
			}
		case 'p':
			if has(s, i, "password") {
				return true
			}
		case 'c':
			if has(s, i, "code") || has(s, i, "client_assertion") {
				return true
			}
		}
	}
	return false
}

// has reports whether word, in lower case, stands at s[i:] in any case.
func has(s string, i int, word string) bool {
	return len(s)-i >= len(word) && strings.EqualFold(s[i:i+len(word)], word)
}
