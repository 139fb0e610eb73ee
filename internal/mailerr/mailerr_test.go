package mailerr

import (
	"context"
	"errors"
	"fmt"
	"testing"
)

func TestLeadingDigitNeverContradictsClass(t *testing.T) {
	for _, c := range Classes() {
		e := &Error{Class: c, Status: Status{7, 1}}
		want := "4.7.1"
		if c == Permanent {
			want = "5.7.1"
		}
		if got := e.Code(); got != want {
			t.Errorf("%v: code %q, want %q", c, got, want)
		}
		if ParseClass(c.String()) != c {
			t.Errorf("%v does not survive being stored as %q", c, c.String())
		}
	}
}

func TestUnclassifiedNeverBouncesMail(t *testing.T) {
	for _, err := range []error{errors.New("x"), context.Canceled, fmt.Errorf("a: %w", context.DeadlineExceeded)} {
		if c := Of(err).Class; c == Permanent {
			t.Errorf("%v became permanent", err)
		}
	}
	inner := &Error{Class: Throttled, Op: "x"}
	if Of(fmt.Errorf("while sending: %w", inner)) != inner {
		t.Error("a wrapped failure lost its class")
	}
	if Of(nil) != nil {
		t.Error("nil became a failure")
	}
}
