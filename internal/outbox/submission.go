package outbox

import (
	"mailbridge/internal/mail"
)

// ID names one submission: in the SMTP reply, in the Received line, in every log line and in the queue
// commands. It holds only letters and digits, sorts by time and cannot be guessed.
type ID string

// Submission is what an edge hands over with the bytes of a message. The bytes are final: CRLF line ends
// only, Bcc and Return-Path gone, our Received line with ID on top.
type Submission struct {
	ID        ID // from NewID, for it is already in the Received line
	Account   mail.AccountID
	Envelope  mail.Envelope
	MessageID string   // with angle brackets; the edge made one where the client gave none
	Fixes     []string // names of the header fix-ups that the edge made, for the log and for queue show
	Client    string   // where it came from, for queue show: an address, a listener
	// ClientDigest is asked once, after the reader gave io.EOF: the SHA-256 of the bytes as the client sent
	// them, before any fix-up. With account and envelope it tells a resubmission from another message.
	ClientDigest func() [32]byte
}

// Result is what a submission came to inside the client's wait.
type Result struct {
	// ID is the submission that the client should remember: the first one's when this one repeats it.
	ID ID
	// State is Sent when the cloud has the message, Duplicate when identical bytes were accepted before
	// under ID, else the state it waits in. Every one of them deserves a 250.
	State State
}
