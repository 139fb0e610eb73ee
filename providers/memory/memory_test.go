package memory_test

import (
	"errors"
	"strconv"
	"testing"
	"time"

	"mailbridge/internal/mailerr"
	"mailbridge/internal/secret"
	"mailbridge/providers/memory"
	"mailbridge/providers/providertest"
)

type harness struct{ *memory.Cloud }

func (h harness) Deliveries() (out []providertest.Delivery) {
	for _, d := range h.Cloud.Deliveries() {
		out = append(out, providertest.Delivery{To: d.To, Raw: d.Raw})
	}
	return out
}

func (h harness) Set(f providertest.Fault, arg string) bool {
	switch f {
	case providertest.LoseCommitAnswer:
		h.Fail(memory.Commit, memory.Fault{Err: memory.Lost(memory.Commit), Act: true, Times: 1})
	case providertest.LoseCommit:
		h.Fail(memory.Commit, memory.Fault{Err: memory.Lost(memory.Commit), Times: 1})
	case providertest.LosePrepareAnswer:
		h.Fail(memory.Prepare, memory.Fault{Err: memory.Lost(memory.Prepare), Act: true, Times: 1})
	case providertest.Unreachable:
		for _, s := range []memory.Step{memory.Prepare, memory.Commit, memory.Probe} {
			h.Fail(s, memory.Fault{Err: errors.New("connection refused")})
		}
	case providertest.HangCommit:
		h.Fail(memory.Commit, memory.Fault{Hang: true})
	case providertest.HangPrepare:
		h.Fail(memory.Prepare, memory.Fault{Hang: true})
	case providertest.Throttle:
		n, err := strconv.Atoi(arg)
		if err != nil {
			return false
		}
		h.Fail(memory.Prepare, memory.Fault{Err: memory.ThrottledUntil(memory.Prepare, time.Now().Add(time.Duration(n)*time.Second))})
	case providertest.RefuseRecipient:
		h.Refuse(arg, &mailerr.Error{Class: mailerr.Permanent, Status: mailerr.Status{Subject: 1, Detail: 1}, Op: "memory.commit", Text: "no such recipient"})
	case providertest.EchoSecret:
		h.Fail(memory.Prepare, memory.Fault{Err: errors.New(arg)})
	default:
		return false
	}
	return true
}

func TestConformance(t *testing.T) {
	for name, staging := range map[string]bool{"staging": true, "direct": false} {
		t.Run(name, func(t *testing.T) {
			providertest.Run(t, func(t *testing.T) providertest.Harness {
				c := memory.New()
				c.Staging = staging
				h := harness{c}
				ph := providertest.Harness{Account: c.Account(), Mailbox: "me@example.org", Cloud: h, Faults: h}
				if staging {
					ph.Stager = c
				}
				for _, class := range mailerr.Classes() {
					ph.Errors = append(ph.Errors, providertest.ErrorCase{
						Name: class.String(), Class: class,
						Set: func() {
							c.Fail(memory.Prepare, memory.Fault{Err: &mailerr.Error{Class: class, Op: "memory.prepare", Text: "no"}})
						},
					})
				}
				return ph
			})
		})
	}
}

func TestFaultTextsAreScrubbed(t *testing.T) {
	c := memory.New()
	c.Fail(memory.Probe, memory.Fault{Err: errors.New("Bearer abcdef")})
	if _, err := c.Probe(t.Context()); err == nil || err.Error() != secret.Scrub(err.Error()) {
		t.Errorf("got %v", err)
	}
}
