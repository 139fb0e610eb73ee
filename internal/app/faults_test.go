//go:build faults && linux

package app

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/emersion/go-sasl"
	"github.com/emersion/go-smtp"

	"mailbridge/internal/cloudsim/world"
	"mailbridge/internal/config"
	"mailbridge/internal/outbox"
)

// number reads a setting of the suite from the environment.
func number(t *testing.T, name string, def int) int {
	t.Helper()
	v := os.Getenv(name)
	if v == "" {
		return def
	}
	n, err := strconv.Atoi(v)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// TestFaultChild is the service in a process of its own, which the suite below starts and kills.
func TestFaultChild(t *testing.T) {
	path := os.Getenv("FAULT_CONFIG")
	if path == "" {
		t.Skip("started by TestFaults")
	}
	signal.Ignore(syscall.SIGXFSZ)
	f, err := config.Load(path)
	if err != nil {
		t.Fatal(err)
	}
	step, nth, _ := strings.Cut(os.Getenv("FAULT_KILL"), ":")
	left, _ := strconv.Atoi(nth)
	var count atomic.Int64
	o := Options{Version: "test", LogTo: os.Stderr, outbox: func(o *outbox.Options) {
		o.Schedule = []time.Duration{200 * time.Millisecond, 500 * time.Millisecond, time.Second}
		o.MinFree = 1
		o.Step = func(at string) {
			if at == step && count.Add(1) == int64(left) {
				_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
				select {} // it comes at once
			}
		}
	}}
	a, err := New(t.Context(), f, o)
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	if limit := os.Getenv("FAULT_FILE_LIMIT"); limit != "" {
		n, err := strconv.ParseUint(limit, 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		if err := syscall.Setrlimit(syscall.RLIMIT_FSIZE, &syscall.Rlimit{Cur: n, Max: n}); err != nil {
			t.Fatal(err)
		}
	}
	if err := a.Run(ctx, nil); err != nil {
		t.Fatal(err)
	}
}

// faults is one run: clouds that stay, a service that does not, and clients that never give up.
type faults struct {
	*bridge
	t     *testing.T
	rng   *rand.Rand
	addr  string // implicit TLS
	plain string
	roots *x509.CertPool
	log   *os.File

	mu    sync.Mutex
	cmd   *exec.Cmd
	ended chan struct{}
	kills map[string]int
}

// start starts the service, to die behind the n-th pass of step, or with files that cannot grow.
func (f *faults) start(kill string, fileLimit int64) {
	cmd := exec.Command(os.Args[0], "-test.run=^TestFaultChild$", "-test.timeout=30m")
	cmd.Env = append(os.Environ(), "FAULT_CONFIG="+f.path, "FAULT_KILL="+kill)
	if fileLimit > 0 {
		cmd.Env = append(cmd.Env, fmt.Sprintf("FAULT_FILE_LIMIT=%d", fileLimit))
	}
	cmd.Stdout, cmd.Stderr = f.log, f.log
	if err := cmd.Start(); err != nil {
		f.t.Error(err)
		return
	}
	ended := make(chan struct{})
	go func() {
		_ = cmd.Wait() // it is killed
		close(ended)
	}()
	f.mu.Lock()
	f.cmd, f.ended = cmd, ended
	f.mu.Unlock()
}

func (f *faults) kill(sig syscall.Signal) {
	f.mu.Lock()
	cmd, ended := f.cmd, f.ended
	f.mu.Unlock()
	_ = cmd.Process.Signal(sig) // it may have ended by itself
	<-ended
}

// up waits until the service answers.
func (f *faults) up() bool {
	for range 500 {
		c, err := net.DialTimeout("tcp", f.plain, time.Second)
		if err == nil {
			_ = c.SetReadDeadline(time.Now().Add(2 * time.Second))
			b := make([]byte, 4)
			_, err = io.ReadFull(c, b)
			c.Close()
			if err == nil {
				return true
			}
		}
		f.pause(10 * time.Millisecond)
	}
	return false
}

// pause is what a client does before it tries again.
func (f *faults) pause(d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-f.t.Context().Done():
	}
}

// message is one message of a client.
type message struct {
	account, from string
	to            []string
	token         string
	raw           []byte
}

var tokenPattern = regexp.MustCompile(`(?m)^Subject: (T-\d+)`)

func (f *faults) message(n int) message {
	m := message{token: fmt.Sprintf("T-%06d", n)}
	switch n % 5 {
	case 0, 1:
		m.account, m.from = "scanners", "scanner@contoso.example"
	case 2:
		m.account, m.from = "direct", "scanner@contoso.example"
	default:
		m.account, m.from = "relay", "relay@workspace.example"
	}
	for i := range 1 + f.rng.IntN(3) {
		m.to = append(m.to, fmt.Sprintf("r%d@elsewhere.example", i))
	}
	size := 500 + f.rng.IntN(3000)
	attachment := ""
	switch {
	case n%50 == 7:
		size = 100_000 + f.rng.IntN(100_000) // a file in the spool
	case n%200 == 11 && m.account == "scanners":
		attachment = strings.Repeat(strings.Repeat("QUJDREVGR0hJSktM", 4)+"\r\n", 70_000) // 4.6 MB: upload sessions
	}
	var b bytes.Buffer
	// Every tenth has a Message-ID that others have too, as devices make them.
	mid := m.token
	if n%10 == 3 {
		mid = "fixed"
	}
	fmt.Fprintf(&b, "From: %s\r\nTo: %s\r\nSubject: %s\r\nDate: Tue, 24 Nov 2026 10:00:00 +0000\r\nMessage-ID: <%s@client.example>\r\nMIME-Version: 1.0\r\n", m.from, strings.Join(m.to, ", "), m.token, mid)
	if attachment == "" {
		fmt.Fprintf(&b, "Content-Type: text/plain\r\n\r\n%s\r\n", strings.Repeat(strings.Repeat("x", 70)+"\r\n", size/72))
	} else {
		fmt.Fprintf(&b, "Content-Type: multipart/mixed; boundary=b\r\n\r\n--b\r\nContent-Type: text/plain\r\n\r\nsee there\r\n--b\r\nContent-Type: application/pdf; name=a.pdf\r\nContent-Disposition: attachment; filename=a.pdf\r\nContent-Transfer-Encoding: base64\r\n\r\n%s--b--\r\n", attachment)
	}
	m.raw = b.Bytes()
	return m
}

// submit tries once, as a client does.
func (f *faults) submit(m message) error {
	conn, err := net.DialTimeout("tcp", f.addr, 5*time.Second)
	if err != nil {
		return err
	}
	if err := conn.SetDeadline(time.Now().Add(60 * time.Second)); err != nil {
		return err
	}
	defer conn.Close()
	tc := tls.Client(conn, &tls.Config{RootCAs: f.roots, ServerName: "127.0.0.1"})
	c := smtp.NewClient(tc)
	if err := c.Auth(sasl.NewPlainClient("", m.account, "a password for tests")); err != nil {
		return err
	}
	if err := c.Mail(m.from, nil); err != nil {
		return err
	}
	for _, to := range m.to {
		if err := c.Rcpt(to, nil); err != nil {
			return err
		}
	}
	w, err := c.Data()
	if err != nil {
		return err
	}
	if _, err := w.Write(m.raw); err != nil {
		return err
	}
	if err := w.Close(); err != nil {
		return err
	}
	_ = c.Quit() // the answer was read; what follows does not matter to a client
	return nil
}

// trouble is what clouds do, each a few times at most.
func (f *faults) trouble() world.Rule {
	routes := []struct{ service, route string }{{"graph", "createDraft"}, {"graph", "send"}, {"graph", "sendMail"}, {"graph", "getMessage"}, {"graph", "listMessages"}, {"graph", "attachments"}, {"graph", "createUploadSession"},
		{"upload", ""}, {"entra", "token"}, {"google", "token"}, {"gmail-smtp", "EOD"}, {"gmail-smtp", "MAIL"}, {"gmail-smtp", "RCPT"}, {"gmail-smtp", "AUTH"}, {"gmail-imap", ""}}
	at := routes[f.rng.IntN(len(routes))]
	r := world.Rule{Service: at.service, Route: at.route, Times: 1 + f.rng.IntN(4), Skip: f.rng.IntN(3)}
	if strings.HasPrefix(at.service, "gmail") {
		switch f.rng.IntN(5) {
		case 0:
			r.Cut = "before"
		case 1:
			r.Cut = "after"
		case 2:
			r.Status, r.Code, r.Text = 451, "4.3.0", "Temporary System Problem. Try again later."
		case 3:
			r.Status, r.Code, r.Text = 421, "4.7.0", "Try again later, closing connection."
		case 4:
			r.Latency = time.Duration(f.rng.IntN(1500)) * time.Millisecond
		}
		return r
	}
	switch f.rng.IntN(12) {
	case 0:
		r.Cut = "before"
	case 1:
		r.Cut = "during"
	case 2:
		r.Cut = "after"
	case 3:
		r.Cut = "answer"
	case 4:
		r.Status, r.After = 504, true
	case 5:
		r.RetryAfter = "0.4" // with success
	case 6:
		r.Status, r.RetryAfter, r.Times = 429, "0.7", 20
	case 7:
		r.Status, r.Times = 429, 3
	case 8:
		r.Status, r.Body = 502, "<html>bad gateway</html>"
	case 9:
		r.Status, r.RetryAfter, r.After = 503, "1", true
	case 10:
		r.Latency = time.Duration(f.rng.IntN(3000)) * time.Millisecond
	case 11:
		r.Status, r.Body = 500, "{\"error\":{\"code\":"
	}
	return r
}

// TestFaults kills the service at every durable step and at random, while the clouds misbehave and clients
// resubmit what they have no answer for. Afterwards: nothing acknowledged is missing, nothing arrived twice, and
// what is stuck is shown.
func TestFaults(t *testing.T) {
	runs, messages := number(t, "RUNS", 1), number(t, "MESSAGES", 2000)
	seed := uint64(number(t, "SEED", int(time.Now().UnixNano()%1_000_000)))
	total := map[string]int{}
	for run := range runs {
		t.Run(fmt.Sprint(seed+uint64(run)), func(t *testing.T) { faultRun(t, seed+uint64(run), messages, total) })
	}
	t.Logf("the service died behind: %v", total)
	if runs*messages >= 4000 {
		for _, s := range killSteps {
			if total[s] == 0 {
				t.Errorf("the service was never killed behind %q", s)
			}
		}
	}
}

var killSteps = []string{outbox.StepSpooled, outbox.StepRecorded, outbox.StepPrepared, outbox.StepStaged, outbox.StepSent, outbox.StepFinished}

// newFaults starts clouds and the service.
func newFaults(t *testing.T, seed uint64) *faults {
	f := &faults{t: t, rng: rand.New(rand.NewPCG(seed, 1)), kills: map[string]int{}}
	f.bridge = newBridge(t, func(s string) string {
		for i := range 3 {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			s = strings.Replace(s, `"127.0.0.1:0"`, `"`+l.Addr().String()+`"`, 1)
			switch i {
			case 0:
				f.plain = l.Addr().String()
			case 1:
				f.addr = l.Addr().String()
			}
			l.Close()
		}
		settle := "\nsettle = \"300ms\"\nfirst_attempt = \"400ms\"\n"
		s = strings.Replace(s, `profile = "contoso"`, `profile = "contoso"`+settle, 1)
		s = strings.Replace(s, `profile = "workspace"`, `profile = "workspace"`+settle, 1)
		return s + "\n[accounts.direct]\nmailbox = \"scanner@contoso.example\"\nprofile = \"contoso\"\nroute = \"sendmail\"\n" + settle
	})
	if err := f.close(); err != nil { // the child opens what belongs to it
		t.Fatal(err)
	}
	f.passwords(t)
	var err error
	if f.log, err = os.Create(filepath.Join(t.TempDir(), "log")); err != nil {
		t.Fatal(err)
	}
	f.start("", 0)
	if !f.up() {
		b, _ := os.ReadFile(f.log.Name())
		t.Fatalf("the service does not start:\n%s", b)
	}
	t.Cleanup(func() { f.kill(syscall.SIGKILL) })
	pem, err := os.ReadFile(filepath.Join(f.dir, "state", "tls", "ca.pem"))
	if err != nil {
		t.Fatal(err)
	}
	f.roots = x509.NewCertPool()
	f.roots.AppendCertsFromPEM(pem)
	return f
}

func faultRun(t *testing.T, seed uint64, messages int, total map[string]int) {
	f := newFaults(t, seed)
	// Clients.
	work := make(chan message)
	var wg sync.WaitGroup
	var again atomic.Int64
	for range 16 {
		wg.Go(func() {
			for m := range work {
				for {
					err := f.submit(m)
					if err == nil {
						break
					}
					if se, ok := err.(*smtp.SMTPError); ok && se.Code >= 500 {
						t.Errorf("%s: %v", m.token, err)
						break
					}
					again.Add(1)
					f.pause(50 * time.Millisecond)
				}
			}
		})
	}
	all := make([]message, messages)
	for i := range all {
		all[i] = f.message(i)
	}
	chaos, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		armed := "" // the step behind which the service that runs is to die
		for n := 0; ; n++ {
			select {
			case <-chaos:
				return
			case <-time.After(time.Duration(50+f.rng.IntN(250)) * time.Millisecond):
			}
			f.cloud.World.Add(f.trouble())
			f.mu.Lock()
			ended := f.ended
			f.mu.Unlock()
			dead := false
			select {
			case <-ended:
				dead = true
			default:
			}
			if !dead && n%4 != 3 {
				continue
			}
			if dead {
				f.kills[armed]++
			} else {
				f.kill(syscall.SIGKILL)
				f.kills["at random"]++
			}
			armed = ""
			// The next one dies behind a step, has a full disk, or runs until it is killed.
			switch k := f.rng.IntN(10); {
			case k < 7:
				step := killSteps[f.rng.IntN(len(killSteps))]
				armed = step
				nth := 1 + f.rng.IntN(20)
				if step == outbox.StepSpooled {
					nth = 1 // these are few
				}
				f.start(fmt.Sprintf("%s:%d", step, nth), 0)
			case k == 7:
				f.kills["full disk"]++
				f.start("", 64<<10+f.rng.Int64N(1<<20))
			default:
				f.start("", 0)
			}
			f.up()
		}
	}()
	for _, m := range all {
		work <- m
	}
	close(work)
	wg.Wait()
	close(chaos)
	<-stopped
	f.cloud.World.Reset()
	f.kill(syscall.SIGKILL)
	f.start("", 0)
	if !f.up() {
		t.Fatal("the service does not start again")
	}

	// What is left goes out, or says why it cannot.
	cfg, err := config.Load(f.path)
	if err != nil {
		t.Fatal(err)
	}
	q, err := OpenQueue(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer q.Close()
	deadline := time.Now().Add(4 * time.Minute)
	var waiting []outbox.Entry
	for {
		list, err := q.List(t.Context(), outbox.Filter{Limit: 100_000})
		if err != nil {
			t.Fatal(err)
		}
		waiting = waiting[:0]
		moving := 0
		for _, e := range list {
			if e.State == outbox.Sent {
				continue
			}
			waiting = append(waiting, e)
			if !e.Stuck() {
				moving++
			}
		}
		if moving == 0 {
			break
		}
		if time.Now().After(deadline) {
			for _, e := range waiting[:min(len(waiting), 20)] {
				t.Logf("waits: %+v", e)
			}
			t.Fatalf("%d messages still move", moving)
		}
		f.pause(100 * time.Millisecond)
	}
	f.cloud.Graph.Settle()

	// Held ones are shown with their tokens, so that they are not missing.
	shown := map[string]string{}
	for _, e := range waiting {
		var b bytes.Buffer
		if err := q.Body(t.Context(), e.ID, &b); err != nil {
			t.Errorf("the body of a message that waits: %v", err)
			continue
		}
		if m := tokenPattern.FindSubmatch(b.Bytes()); m != nil {
			shown[string(m[1])] = string(e.State) + " " + e.Account
		}
	}
	copies := map[string]int{}
	for _, d := range f.cloud.World.Deliveries() {
		m := tokenPattern.FindSubmatch(d.Raw)
		if m == nil {
			t.Errorf("a delivery that nobody submitted: %.300q", d.Raw)
			continue
		}
		copies[string(m[1])+" "+d.To]++
	}
	missing, doubled := 0, 0
	for _, m := range all {
		for _, to := range m.to {
			n := copies[m.token+" "+to]
			delete(copies, m.token+" "+to)
			switch {
			case n > 1:
				doubled++
				t.Errorf("%s of %s arrived %d times at %s", m.token, m.account, n, to)
			case n == 0 && shown[m.token] == "":
				missing++
				t.Errorf("%s of %s is missing at %s", m.token, m.account, to)
			}
		}
	}
	if len(copies) > 0 {
		t.Errorf("copies for people outside of the envelope: %v", copies)
	}
	held := map[string]int{}
	for _, s := range shown {
		held[s]++
	}
	if len(shown) > 0 {
		resp, err := http.Get("http://" + cfg.HTTP.Address + "/metrics")
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil {
			t.Fatal(err)
		}
		if m := regexp.MustCompile(`mailbridge_outbox_messages\{state="unsure"\} (\d+)`).FindSubmatch(b); m == nil || string(m[1]) == "0" {
			t.Errorf("the metrics do not show what is held")
		}
	}
	f.mu.Lock()
	for k, n := range f.kills {
		total[k] += n
	}
	f.mu.Unlock()
	t.Logf("%d messages, %d submitted again, deaths %v; held for an operator: %v; missing %d, doubled %d", messages, again.Load(), f.kills, held, missing, doubled)
	if t.Failed() {
		if dir := os.Getenv("FAULT_KEEP"); dir != "" {
			b, _ := os.ReadFile(f.log.Name())
			_ = os.WriteFile(filepath.Join(dir, fmt.Sprintf("%d.log", seed)), b, 0o600)
		}
	}
}

// peak is the most memory that the service has used so far, in bytes.
func (f *faults) peak() int64 {
	f.t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", f.cmd.Process.Pid))
	if err != nil {
		f.t.Fatal(err)
	}
	m := regexp.MustCompile(`VmHWM:\s+(\d+) kB`).FindSubmatch(b)
	if m == nil {
		f.t.Fatalf("no VmHWM in %s", b)
	}
	n, err := strconv.ParseInt(string(m[1]), 10, 64)
	if err != nil {
		f.t.Fatal(err)
	}
	return n << 10
}

// TestFaultsLargeMessagesNeedLittleMemory sends what is as large as the clouds take: the service needs no more
// memory for it than for small mail, within 32 MB.
func TestFaultsLargeMessagesNeedLittleMemory(t *testing.T) {
	f := newFaults(t, 1)
	for _, c := range []struct {
		account, from string
		size          int // of the attachment
	}{{"relay", "relay@workspace.example", 25 << 20}, {"scanners", "scanner@contoso.example", 100 << 20}} {
		file := make([]byte, c.size)
		for i := range file {
			file[i] = byte(f.rng.Uint32())
		}
		var b bytes.Buffer
		fmt.Fprintf(&b, "From: %s\r\nTo: r0@elsewhere.example\r\nSubject: T-1\r\nDate: Tue, 24 Nov 2026 10:00:00 +0000\r\nMessage-ID: <1@client.example>\r\nMIME-Version: 1.0\r\nContent-Type: multipart/mixed; boundary=b\r\n\r\n"+
			"--b\r\nContent-Type: text/plain\r\n\r\nsee there\r\n--b\r\nContent-Type: application/pdf; name=a.pdf\r\nContent-Disposition: attachment; filename=a.pdf\r\nContent-Transfer-Encoding: base64\r\n\r\n", c.from)
		head := b.Len()
		text := base64.StdEncoding.EncodeToString(file)
		for len(text) > 0 {
			n := min(76, len(text))
			b.WriteString(text[:n] + "\r\n")
			text = text[n:]
		}
		b.WriteString("--b--\r\n")
		small := message{account: c.account, from: c.from, to: []string{"r0@elsewhere.example"}, raw: append(bytes.Clone(b.Bytes()[:head+1024*78]), "--b--\r\n"...)}
		large := small
		large.raw = b.Bytes()
		for range 20 {
			if err := f.submit(small); err != nil {
				t.Fatal(err)
			}
		}
		before := f.peak()
		if err := f.submit(large); err != nil {
			t.Fatal(err)
		}
		var got []byte
		for deadline := time.Now().Add(2 * time.Minute); got == nil; f.pause(50 * time.Millisecond) {
			for _, d := range f.cloud.World.Deliveries() {
				if len(d.Raw) > c.size {
					got = d.Raw
				}
			}
			if time.Now().After(deadline) {
				t.Fatalf("%s: the large message does not arrive", c.account)
			}
		}
		grown := f.peak() - before
		t.Logf("%s: %d MB more for a message of %d MB; %d MB in all", c.account, grown>>20, b.Len()>>20, f.peak()>>20)
		if grown > 32<<20 {
			t.Errorf("%s: %d MB more for a message of %d MB", c.account, grown>>20, b.Len()>>20)
		}
		i := bytes.Index(got, []byte("Content-Transfer-Encoding: base64"))
		i += bytes.Index(got[i:], []byte("\r\n\r\n")) + 4
		end := i + bytes.Index(got[i:], []byte("\r\n--"))
		back, err := base64.StdEncoding.DecodeString(strings.ReplaceAll(string(got[i:end]), "\r\n", ""))
		if err != nil || !bytes.Equal(back, file) {
			t.Errorf("%s: the attachment arrived changed: %d bytes, %v", c.account, len(back), err)
		}
		f.cloud.World.Reset()
	}
}
