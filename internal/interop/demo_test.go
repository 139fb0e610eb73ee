//go:build interop

package interop

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"
)

// endpoint is one port of the demo.
type endpoint struct {
	Host string `json:"host"`
	Port int    `json:"port"`
	TLS  string `json:"tls"`
}

// account is one login of the demo.
type account struct {
	Name     string `json:"name"`
	Mailbox  string `json:"mailbox"`
	Password string `json:"password"`
	Provider string `json:"provider"`
}

// settings is the first line of mailbridge demo --json.
type settings struct {
	SMTP     endpoint  `json:"smtp"`
	SMTPS    endpoint  `json:"smtps"`
	HTTP     string    `json:"http"`
	CA       string    `json:"ca"`
	Accounts []account `json:"accounts"`
}

// delivery is one recipient's copy, as the demo lists it.
type delivery struct {
	ID   int    `json:"id"`
	From string `json:"from"`
	To   string `json:"to"`
	Via  string `json:"via"`
}

// startDemo builds the program, starts mailbridge demo on free ports and reads its settings.
func startDemo(t *testing.T) settings {
	t.Helper()
	bin := filepath.Join(t.TempDir(), "mailbridge")
	build := exec.Command("go", "build", "-o", bin, "mailbridge/cmd/mailbridge")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	log, err := os.Create(filepath.Join(t.TempDir(), "demo.log"))
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(bin, "demo", "--ephemeral", "--json")
	cmd.Stderr = log
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
			t.Error(err)
		}
		if err := cmd.Wait(); err != nil {
			t.Errorf("the demo did not stop in order: %v", err)
		}
		if t.Failed() {
			if b, err := os.ReadFile(log.Name()); err == nil {
				t.Logf("the demo's log:\n%s", b)
			}
		}
	})
	line, err := bufio.NewReader(stdout).ReadBytes('\n')
	if err != nil {
		t.Fatalf("no settings on the first line: %v", err)
	}
	var s settings
	if err := json.Unmarshal(line, &s); err != nil {
		t.Fatalf("the first line is not one JSON object: %v\n%s", err, line)
	}
	return s
}

func (s settings) account(t *testing.T, provider string) account {
	t.Helper()
	for _, a := range s.Accounts {
		if a.Provider == provider {
			return a
		}
	}
	t.Fatalf("the demo has no account of provider %s: %+v", provider, s.Accounts)
	return account{}
}

func (s settings) get(t *testing.T, path string) []byte {
	t.Helper()
	resp, err := http.Get(s.HTTP + path)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("GET %s: %s, %v\n%s", path, resp.Status, err, b)
	}
	return b
}

func (s settings) deliveries(t *testing.T) []delivery {
	t.Helper()
	var list []delivery
	if err := json.Unmarshal(s.get(t, "/deliveries.json"), &list); err != nil {
		t.Fatal(err)
	}
	return list
}

// arrived waits until n copies have come in since the id after, and gives them by recipient.
func (s settings) arrived(t *testing.T, after, n int) map[string][]byte {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		copies := map[string][]byte{}
		for _, d := range s.deliveries(t) {
			if d.ID <= after {
				continue
			}
			if copies[d.To] != nil {
				t.Fatalf("%s got the message twice", d.To)
			}
			copies[d.To] = s.get(t, fmt.Sprintf("/deliveries/%d.eml", d.ID))
		}
		if len(copies) >= n {
			return copies
		}
		select {
		case <-ctx.Done():
			t.Fatalf("%d of %d copies arrived: %v", len(copies), n, copies)
		case <-tick.C:
		}
	}
}

// last is the id of the newest delivery.
func (s settings) last(t *testing.T) int {
	t.Helper()
	id := 0
	for _, d := range s.deliveries(t) {
		id = max(id, d.ID)
	}
	return id
}
