package app

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestCorpusArrivesAsItWasSubmitted sends every message of the corpus on the direct routes. What arrives is what
// was submitted, to the byte, but for the trace lines on top and the fix-ups that the log names.
func TestCorpusArrivesAsItWasSubmitted(t *testing.T) {
	files, err := filepath.Glob(filepath.Join("..", "..", "testdata", "mail", "*.eml"))
	if err != nil || len(files) < 25 {
		t.Fatalf("%d messages, %v", len(files), err)
	}
	for _, route := range []string{"draft", "sendmail"} {
		b := newBridge(t, func(s string) string {
			from := "\nfrom = [\"dev@corpus.example\"]\n"
			s = strings.Replace(s, `profile = "contoso"`, `profile = "contoso"`+from+`route = "`+route+`"`, 1)
			return strings.Replace(s, `profile = "workspace"`, `profile = "workspace"`+from, 1)
		})
		b.cloud.Graph.AddMailbox("scanner@contoso.example", "dev@corpus.example")
		b.cloud.Gmail.AddMailbox("relay@workspace.example", "dev@corpus.example")
		b.passwords(t)
		r := b.serve(t)
		for _, account := range []string{"scanners", "relay"} {
			for _, f := range files {
				name := strings.TrimSuffix(filepath.Base(f), ".eml")
				raw, err := os.ReadFile(f)
				if err != nil {
					t.Fatal(err)
				}
				seen := len(b.cloud.World.Deliveries())
				if err := r.send(t, account, "dev@corpus.example", []string{"ann@contoso.example"}, string(raw)); err != nil {
					t.Errorf("%s %s %s: %v", route, account, name, err)
					continue
				}
				r.until(t, name, func() bool { return len(b.cloud.World.Deliveries()) > seen })
				got := b.cloud.World.Deliveries()[seen].Raw
				if !bytes.HasSuffix(got, raw) {
					t.Errorf("%s %s %s: arrived as\n%.2000q\nsubmitted\n%.2000q", route, account, name, got, raw)
					continue
				}
				for line := range strings.SplitSeq(string(got[:len(got)-len(raw)]), "\r\n") {
					if line != "" && !strings.HasPrefix(line, "Received: ") && line[0] != ' ' && line[0] != '\t' {
						t.Errorf("%s %s %s: %q on top", route, account, name, line)
					}
				}
				if name == "smime-signed" {
					verifySigned(t, got)
				}
			}
		}
		if strings.Contains(r.log.String(), `fixes=`) && strings.Count(r.log.String(), `fixes=""`) != strings.Count(r.log.String(), `fixes=`) {
			t.Error("the log names fix-ups where there were none")
		}
	}
}

// verifySigned lets openssl judge what arrived.
func verifySigned(t *testing.T, raw []byte) {
	t.Helper()
	openssl, err := exec.LookPath("openssl")
	if err != nil {
		t.Log("no openssl here: the signature is not verified")
		return
	}
	cert := filepath.Join("..", "..", "testdata", "mail", "smime-cert.pem")
	cmd := exec.CommandContext(t.Context(), openssl, "cms", "-verify", "-CAfile", cert, "-purpose", "any")
	cmd.Stdin = bytes.NewReader(raw)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("the signature does not hold: %v\n%s", err, out)
	}
}

// TestFixUpsAreNamedInTheLog sends what needs mending: only that is changed, and the log says so.
func TestFixUpsAreNamedInTheLog(t *testing.T) {
	b := newBridge(t, nil)
	b.passwords(t)
	r := b.serve(t)
	body := "\r\nbody \xff\r\n"
	if err := r.send(t, "relay", "relay@workspace.example", []string{"ann@contoso.example"}, "From: relay@workspace.example\r\nBcc: ann@contoso.example\r\nSubject: x\r\n"+body); err != nil {
		t.Fatal(err)
	}
	r.until(t, "it", func() bool { return len(b.cloud.World.Deliveries()) == 1 })
	got := string(b.cloud.World.Deliveries()[0].Raw)
	if !strings.HasSuffix(got, body) || strings.Contains(got, "Bcc") || !strings.Contains(got, "From: relay@workspace.example\r\nSubject: x\r\n") {
		t.Errorf("arrived as %q", got)
	}
	for _, fix := range []string{"bcc", "date", "message-id"} {
		if !strings.Contains(strings.ToLower(r.log.String()), fix) {
			t.Errorf("the log does not name %s:\n%s", fix, r.log)
		}
	}
}
