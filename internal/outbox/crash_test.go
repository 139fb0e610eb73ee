package outbox

import (
	"context"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"mailbridge/internal/mail"
	"mailbridge/providers"
	"mailbridge/providers/memory"
)

// snooper calls at before each step of an attempt, and after Commit: the places where a crash matters.
type snooper struct {
	*memory.Cloud
	at func(step string)
}

func (s *snooper) Prepare(ctx context.Context, out *mail.Outgoing) (mail.Handle, error) {
	s.at("before prepare")
	h, err := s.Cloud.Prepare(ctx, out)
	s.at("after prepare")
	return h, err
}

func (s *snooper) Commit(ctx context.Context, out *mail.Outgoing, h mail.Handle) (mail.Receipt, error) {
	s.at("before commit")
	r, err := s.Cloud.Commit(ctx, out, h)
	s.at("after commit")
	return r, err
}

// TestCrashAtAnyStepLosesNothingAndDoublesNothing takes a copy of the disk at every step of an attempt, as a
// power cut would leave it, and lets a new process go on from it, with the cloud as it was then.
func TestCrashAtAnyStepLosesNothingAndDoublesNothing(t *testing.T) {
	for _, staging := range []bool{true, false} {
		for _, step := range []string{"before prepare", "after prepare", "before commit", "after commit"} {
			for _, size := range []int{100, inRow * 2} {
				crash(t, staging, step, size)
			}
		}
	}
}

func crash(t *testing.T, staging bool, step string, size int) {
	t.Helper()
	cloud := memory.New()
	cloud.Staging = staging
	acct := cloud.Account()
	acct.Traits.OneStep = !staging
	disk := t.TempDir()
	taken := make(chan struct{})
	var once sync.Once
	var w *world
	stop := make(chan struct{})
	acct.Sender = &snooper{cloud, func(at string) {
		if at == step {
			once.Do(func() {
				if err := os.CopyFS(disk, os.DirFS(w.dir)); err != nil {
					t.Error(err)
				}
				close(taken)
				<-stop // this process does no more
			})
		}
	}}
	w = newWorld(t, func(a *Account) {
		a.FirstAttempt = time.Millisecond
		if a.ID == "a" {
			a.Provider = acct
		}
	})
	s, _ := w.submission("a", "r@y.example")
	body := make([]byte, size)
	for i := range body {
		body[i] = 'x'
	}
	head := "Received: by b id " + string(s.ID) + ";\r\nMessage-ID: <m1@client.example>\r\n\r\n"
	res, err := w.Submit(t.Context(), s, readerOf(head, body))
	if err != nil {
		t.Fatal(err)
	}
	<-taken

	// The process after it, on the copy.
	survivor := cloud.Account()
	survivor.Traits.OneStep = !staging
	opts := w.opts
	opts.Dir, opts.Accounts = disk, []Account{{ID: "a", FirstAttempt: time.Second, Settle: 2 * time.Minute, GiveUp: 24 * time.Hour, Provider: survivor}}
	o, err := Open(t.Context(), opts)
	if err != nil {
		t.Fatal(err)
	}
	w2 := &world{Outbox: o, t: t, dir: disk, clouds: map[mail.AccountID]*memory.Cloud{"a": cloud}, opts: opts, now: w.clock()}
	o.now = w2.clock
	if err := o.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	w2.until(step+": found or sent", func() bool {
		w2.pass(time.Minute)
		e, err := w2.Queue().Show(t.Context(), res.ID)
		if err != nil {
			t.Fatal(err)
		}
		// Without staging a look-up that finds nothing proves nothing: it waits for an operator.
		return e.State == Sent || !staging && step != "after commit" && e.State == Unsure && e.NextAt == nil
	})
	copies, drafts := len(cloud.Deliveries()), cloud.Staged()
	w2.stop()
	if _, err := os.Stat(filepath.Join(disk, "spool", string(res.ID))); err == nil && copies == 1 {
		t.Errorf("%s: the body of a sent message is left behind", step)
	}
	close(stop)
	want := 1
	if !staging && step != "after commit" {
		want = 0
	}
	if copies != want || drafts != 0 {
		t.Errorf("staging %v, %s, %d bytes: %d copies (want %d), %d drafts left", staging, step, size, copies, want, drafts)
	}
}

var _ providers.Sender = (*snooper)(nil)
