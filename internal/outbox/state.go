package outbox

import (
	"crypto/rand"
	"encoding/base32"
	"encoding/binary"
	"time"
)

// State is where a submission stands.
type State string

const (
	Queued    State = "queued"    // waits for its next attempt, or is being attempted
	Unsure    State = "unsure"    // the cloud may have it: it is looked up, or waits for an operator
	Held      State = "held"      // an operator holds it
	Bouncing  State = "bouncing"  // given up; its report is on the way to the sender
	Dead      State = "dead"      // a dead letter: given up, kept for an operator
	Sent      State = "sent"      // the cloud has it
	Duplicate State = "duplicate" // answered with an earlier submission of the same bytes; never stored
)

// States lists the states that are stored.
func States() []State { return []State{Queued, Unsure, Held, Bouncing, Dead, Sent} }

// idEncoding keeps the order of the bytes (RFC 4648 §7) and needs no escaping anywhere.
var idEncoding = base32.HexEncoding.WithPadding(base32.NoPadding)

// newID gives 26 letters and digits: 48 bits of milliseconds, then 80 random ones.
func newID(now time.Time) ID {
	var b [16]byte
	binary.BigEndian.PutUint64(b[:8], uint64(now.UnixMilli())<<16)
	if _, err := rand.Read(b[6:]); err != nil {
		panic(err) // crypto/rand ends the process before this
	}
	return ID(idEncoding.EncodeToString(b[:]))
}

// firstID is the least id that newID may make at a time.
func firstID(at time.Time) ID {
	var b [16]byte
	binary.BigEndian.PutUint64(b[:8], uint64(at.UnixMilli())<<16)
	return ID(idEncoding.EncodeToString(b[:]))
}
