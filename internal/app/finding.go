package app

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
)

// ErrStuck says that something needs a person: doctor found a failure, or the queue holds mail that will not
// go out by itself. Commands exit with 3 for it.
var ErrStuck = errors.New("something is stuck or unhealthy")

// Level is how bad a finding is.
type Level string

const (
	OK   Level = "ok"
	Warn Level = "warning" // works, and will not for long, or not in every case
	Fail Level = "failure" // does not work
	Skip Level = "skipped" // not looked at, because of what failed before
)

// Finding is what one check of doctor came to.
type Finding struct {
	Account string `json:"account,omitempty"` // empty for what concerns the whole bridge
	Check   string `json:"check"`
	Level   Level  `json:"level"`
	Text    string `json:"text"`           // what was found
	Next    string `json:"next,omitempty"` // what to do about it
}

// Report is all findings, in the order in which they were made.
type Report struct {
	Findings []Finding `json:"findings"`
	show     func(Finding)
}

// add notes a finding and shows it at once, for some checks take a while.
func (r *Report) add(f Finding) {
	r.Findings = append(r.Findings, f)
	if r.show != nil {
		r.show(f)
	}
}

// Err is ErrStuck when a check failed.
func (r *Report) Err() error {
	for _, f := range r.Findings {
		if f.Level == Fail {
			return ErrStuck
		}
	}
	return nil
}

// WriteJSON writes the report as one JSON object.
func (r *Report) WriteJSON(w io.Writer) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	e.SetEscapeHTML(false)
	return e.Encode(struct {
		Healthy bool `json:"healthy"`
		*Report
	}{r.Err() == nil, r})
}

// textReport gives a show function that writes findings for people.
func textReport(w io.Writer) func(Finding) {
	account := ""
	marks := map[Level]string{OK: "ok  ", Warn: "WARN", Fail: "FAIL", Skip: "-   "}
	return func(f Finding) {
		if f.Account != account {
			account = f.Account
			fmt.Fprintf(w, "\naccount %s\n", account)
		}
		fmt.Fprintf(w, "  %s  %-12s %s\n", marks[f.Level], f.Check, f.Text)
		for line := range strings.Lines(f.Next) {
			fmt.Fprintf(w, "        %-12s → %s\n", "", strings.TrimRight(line, "\n"))
		}
	}
}
