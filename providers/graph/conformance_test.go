package graph

import (
	"testing"
	"time"

	"go.uber.org/goleak"

	"mailbridge/internal/mailerr"
	"mailbridge/providers"
	"mailbridge/providers/providertest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestConformance(t *testing.T) {
	variants := []struct {
		name     string
		noDrafts bool
		mismatch providers.Mismatch
		linger   bool
	}{
		{name: "drafts, refuse"},
		{name: "drafts, rewrite", mismatch: providers.Rewrite},
		{name: "drafts that linger", linger: true, mismatch: providers.Rewrite},
		{name: "sendMail alone", noDrafts: true, mismatch: providers.Rewrite},
	}
	for _, v := range variants {
		t.Run(v.name, func(t *testing.T) {
			providertest.Run(t, func(t *testing.T) providertest.Harness {
				f := newFake(t)
				f.linger, f.noDrafts = v.linger, v.noDrafts
				cfg := f.config(t)
				cfg.Mismatch, cfg.NoDrafts = v.mismatch, v.noDrafts
				a, err := Open(cfg)
				if err != nil {
					t.Fatal(err)
				}
				h := providertest.Harness{
					Account: a, Mailbox: mailbox, Cloud: f, Faults: f, Settle: f.settle,
					HeaderRecipients: true, Rewriting: v.mismatch == providers.Rewrite,
				}
				route := "createDraft"
				if v.noDrafts {
					route = "sendMail"
				} else {
					h.Stager = f
				}
				h.Errors = []providertest.ErrorCase{
					{Name: "400 ErrorMimeContentInvalid", Class: mailerr.Permanent, Code: "5.6.0", Set: f.refusal(route, 400, "ErrorMimeContentInvalid")},
					{Name: "401", Class: mailerr.Auth, Code: "4.7.0", Set: f.refusal(route, 401, "InvalidAuthenticationToken")},
					{Name: "403 ErrorSendAsDenied", Class: mailerr.Permanent, Code: "5.7.1", Set: f.refusal(route, 403, "ErrorSendAsDenied")},
					{Name: "404 ErrorInvalidUser", Class: mailerr.Auth, Set: f.refusal("", 404, "ErrorInvalidUser")},
					{Name: "413", Class: mailerr.Permanent, Code: "5.3.4", Set: f.refusal(route, 413, "")},
					{Name: "429 with a fraction", Class: mailerr.Throttled, RetryIn: 3 * time.Second, Set: func() {
						f.fault(fakeFault{route: route, status: 429, code: "TooManyRequests", header: map[string]string{"Retry-After": "2.128"}})
					}},
					{Name: "500", Class: mailerr.Temporary, Unsure: true, Set: f.refusal(route, 500, "")},
					{Name: "503 HTML", Class: mailerr.Temporary, Unsure: true, Set: func() { f.fault(fakeFault{route: route, status: 503, body: "<html>busy</html>"}) }},
					{Name: "507", Class: mailerr.Quota, Code: "4.2.2", Set: f.refusal(route, 507, "")},
				}
				return h
			})
		})
	}
}

func (f *fake) refusal(route string, status int, code string) func() {
	return func() { f.fault(fakeFault{route: route, status: status, code: code}) }
}
