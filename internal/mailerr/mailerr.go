// Package mailerr is how a failure travels: classified once where it happens, rendered once where it
// leaves. A Class says what to do next, a Status says to the other side what it was (RFC 3463), and two
// texts are kept apart: Text may be read by a stranger, Err is for the log alone.
package mailerr

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// Class says what the caller may do next.
type Class uint8

const (
	// Unknown is what nobody classified: treated as Temporary and counted as a bug of ours.
	Unknown Class = iota
	// Temporary: the same request may work later.
	Temporary
	// Throttled: the same request may work, but not before RetryAt.
	Throttled
	// Auth: not before somebody signs in or an administrator acts. Concerns the account, never the message.
	Auth
	// Quota: the account has used up an allowance; hold for hours, never bounce.
	Quota
	// Permanent: never.
	Permanent
)

var classNames = [...]string{"unknown", "temporary", "throttled", "auth", "quota", "permanent"}

// String is the class's name in logs, metrics and stored records.
func (c Class) String() string {
	if int(c) < len(classNames) {
		return classNames[c]
	}
	return "unknown"
}

// ParseClass is the inverse of Class.String; what it does not know is Unknown.
func ParseClass(s string) Class {
	for i, n := range classNames {
		if n == s {
			return Class(i)
		}
	}
	return Unknown
}

// Classes lists every class, for metrics whose labels exist from the first scrape.
func Classes() []Class { return []Class{Unknown, Temporary, Throttled, Auth, Quota, Permanent} }

// Status is subject and detail of an enhanced status code (RFC 3463 §2). The leading digit is not kept:
// it follows from the class, so that the two cannot contradict each other.
type Status struct{ Subject, Detail uint8 }

// Error is a classified failure.
type Error struct {
	Class   Class
	Status  Status
	RetryAt time.Time // for Throttled and Quota: absolute, so that it survives in a spool; zero is "soon"
	Unsure  bool      // the cloud may have acted although no success was heard
	Op      string    // what was being done, such as "graph.send"
	Text    string    // one ASCII line that a mail client or a bounce may show: cause and next step, no secret
	Err     error     // for the log only; sentinels of package mail are wrapped here
}

// Error is the text for logs. It holds what Err holds and so must not be shown to clients.
func (e *Error) Error() string {
	s := e.Op
	if e.Text != "" {
		s += ": " + e.Text
	}
	if e.Err != nil {
		s += ": " + e.Err.Error()
	}
	if s == "" {
		s = e.Class.String() + " failure"
	}
	return s
}

// Unwrap gives the cause.
func (e *Error) Unwrap() error { return e.Err }

// Code is the enhanced status code with its leading digit, such as "4.4.1": 5 for Permanent, 4 for the rest.
func (e *Error) Code() string {
	d := 4
	if e.Class == Permanent {
		d = 5
	}
	return fmt.Sprintf("%d.%d.%d", d, e.Status.Subject, e.Status.Detail)
}

// Of finds the classified failure in err, or makes one of class Unknown; nil for nil. A cancelled or
// expired context that nobody classified is Temporary: it says nothing about the request.
func Of(err error) *Error {
	if err == nil {
		return nil
	}
	if e, ok := errors.AsType[*Error](err); ok {
		return e
	}
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return &Error{Class: Temporary, Status: Status{4, 2}, Text: "interrupted", Err: err}
	}
	return &Error{Class: Unknown, Status: Status{3, 0}, Text: "internal error", Err: err}
}
