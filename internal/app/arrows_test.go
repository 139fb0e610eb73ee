package app

import (
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

// TestArrowsPointInwards holds the imports of every package against the rules of docs/architecture.md.
func TestArrowsPointInwards(t *testing.T) {
	cmd := exec.Command("go", "list", "-json=ImportPath,Imports", "mailbridge/...")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	seen := 0
	for dec := json.NewDecoder(out); ; {
		var p struct {
			ImportPath string
			Imports    []string
		}
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		seen++
		from := strings.TrimPrefix(p.ImportPath, "mailbridge/")
		for _, imp := range p.Imports {
			if to, ours := strings.CutPrefix(imp, "mailbridge/"); ours {
				if why := forbidden(from, to); why != "" {
					t.Errorf("%s imports %s: %s", from, to, why)
				}
			}
		}
	}
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	if seen < 15 {
		t.Fatalf("only %d packages were looked at", seen)
	}
}

// below reports whether pkg is root or stands under it.
func below(pkg, root string) bool { return pkg == root || strings.HasPrefix(pkg, root+"/") }

// forbidden says why from must not import to; empty when it may.
func forbidden(from, to string) string {
	switch {
	case from == "internal/app" || below(from, "cmd") || from == "internal/interop":
		return "" // internal/app alone knows everybody; cmd is its front
	case from == "internal/mail" || from == "internal/mailerr" || from == "internal/secret":
		return "nouns, failures and secrets import nothing of ours"
	case below(from, "internal/cloudsim"):
		if !below(to, "internal/cloudsim") {
			return "the simulated clouds share nothing with the clients that they test"
		}
	case below(from, "providers"):
		allowed := []string{"providers", "internal/mail", "internal/mailerr", "internal/mime", "internal/secret"}
		if from == "providers/providertest" || from == "providers/memory" {
			allowed = append(allowed, "providers/memory", "providers/providertest")
		}
		if !slices.Contains(allowed, to) {
			return "a provider imports the contract, the nouns, the failures, secrets and internal/mime, nothing else"
		}
	case strings.HasPrefix(to, "providers/"):
		return "a concrete provider is known to internal/app alone"
	case to == "internal/app":
		return "nobody imports the wiring"
	case below(to, "internal/cloudsim"):
		return "the simulated clouds are not part of the bridge"
	case below(to, "smtpd") && from != "smtpd" || below(to, "imapd") && from != "imapd":
		return "nothing inside imports an edge"
	}
	return ""
}

func TestForbiddenKnowsTheRules(t *testing.T) {
	for _, c := range []struct{ from, to string }{
		{"smtpd", "providers/graph"}, {"internal/outbox", "smtpd"}, {"providers/graph", "auth"}, {"providers/gmail", "internal/cloudhttp"},
		{"internal/mail", "internal/mime"}, {"internal/cloudsim/graph", "providers"}, {"auth/oauth", "internal/app"}, {"auth", "internal/cloudsim/world"},
	} {
		if forbidden(c.from, c.to) == "" {
			t.Errorf("%s may import %s", c.from, c.to)
		}
	}
	for _, c := range []struct{ from, to string }{
		{"smtpd", "internal/outbox"}, {"internal/outbox", "providers"}, {"providers/graph", "internal/mime"}, {"internal/app", "providers/graph"},
	} {
		if why := forbidden(c.from, c.to); why != "" {
			t.Errorf("%s may not import %s: %s", c.from, c.to, why)
		}
	}
}
