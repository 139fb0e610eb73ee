// Package providertest is the conformance suite of the provider contract. Every provider runs it: the
// reference in memory always, the clouds against their simulators. A subtest is named after the promise
// that it stands on; one whose knob or role is missing is skipped and says which.
package providertest

import (
	"time"

	"mailbridge/internal/mailerr"
	"mailbridge/providers"
)

// Harness is one opened account on a cloud that nobody else uses, and what the suite may do to that cloud.
type Harness struct {
	Account *providers.Account
	Mailbox string // the account's own address
	Cloud   Cloud  // what was delivered

	// Rewriting accounts are opened with Config.Mismatch = Rewrite. HeaderRecipients says that the cloud
	// takes recipients from the header, so that an account without Rewriting refuses what does not fit.
	Rewriting        bool
	HeaderRecipients bool

	// What follows may be nil or empty.

	Stager Stager      // clouds that stage
	Faults Faults      // clouds that can be made to fail
	Errors []ErrorCase // every refusal the cloud knows, for Errors/EveryStatus
	// Settle returns once the cloud has finished what it does behind its answers, such as moving what was
	// sent from Drafts to Sent Items; a harness with a clock of its own moves it.
	Settle func()
}

// Cloud shows what arrived.
type Cloud interface {
	// Deliveries lists every recipient's copy since the account was opened, oldest first.
	Deliveries() []Delivery
}

// Delivery is one recipient's copy.
type Delivery struct {
	To  string // the recipient
	Raw []byte // the message as the recipient got it
}

// Stager counts what is staged in the mailbox and not sent.
type Stager interface{ Staged() int }

// Fault is a way for the cloud to fail. It concerns the next requests that fit, until Reset.
type Fault string

const (
	// LoseCommitAnswer: the cloud takes the message, once; then the connection ends without an answer.
	LoseCommitAnswer Fault = "lose the answer to commit"
	// LoseCommit: the whole request to commit arrives, once; the cloud does nothing, and the connection
	// ends without an answer.
	LoseCommit Fault = "lose the request to commit"
	// LosePrepareAnswer: the cloud stages the message, once; then the connection ends without an answer.
	LosePrepareAnswer Fault = "lose the answer to prepare"
	// Unreachable: nothing listens any more.
	Unreachable Fault = "be unreachable"
	// HangCommit: the cloud reads the request to commit and never answers.
	HangCommit Fault = "hang in commit"
	// HangPrepare: the same for prepare.
	HangPrepare Fault = "hang in prepare"
	// Throttle: every sending request is answered "not before arg seconds"; arg is a whole number.
	Throttle Fault = "throttle"
	// RefuseRecipient: the cloud refuses the recipient arg for good while it takes the others.
	RefuseRecipient Fault = "refuse a recipient"
	// EchoSecret: the next sending request is refused with a text that repeats the request's
	// authorization and arg.
	EchoSecret Fault = "echo a secret"
)

// Faults makes the cloud fail. Set reports whether this cloud can fail that way.
type Faults interface {
	Set(f Fault, arg string) bool
	Reset()
}

// ErrorCase is one refusal and what it must be classified as.
type ErrorCase struct {
	Name  string // what the cloud says, such as "403 ErrorSendAsDenied"
	Set   func() // makes the cloud say it to the next sending request; Faults.Reset ends it
	Class mailerr.Class
	Code  string // the enhanced status code with its leading digit; empty is not compared
	// Unsure is whether the cloud may have acted after all.
	Unsure bool
	// RetryIn is how long RetryAt must lie ahead, within a second; 0 is not compared.
	RetryIn time.Duration
}
