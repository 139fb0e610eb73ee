package main

import (
	"bytes"
	"encoding/json"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const configuration = `state_dir = "state"

[[smtp.listen]]
address = "127.0.0.1:0"

[keystores.bridge]
file     = "bridge.p12"
password = "vault:bridge"

[profiles.contoso]
provider  = "graph"
grant     = "client_credentials"
tenant_id = "contoso.example"
client_id = "11111111-2222-3333-4444-555555555555"
assertion = { keystore = "bridge", alias = "bridge" }

[accounts.scanners]
mailbox = "scanner@contoso.example"
profile = "contoso"
`

// shell runs commands on a configuration in a folder of its own.
type shell struct {
	t    *testing.T
	path string
}

func newShell(t *testing.T) *shell {
	t.Helper()
	dir := t.TempDir()
	key, err := os.ReadFile(filepath.Join("..", "..", "testdata", "keys", "modern.p12"))
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "mailbridge.toml")
	for name, b := range map[string][]byte{path: []byte(configuration), filepath.Join(dir, "bridge.p12"): key} {
		if err := os.WriteFile(name, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return &shell{t, path}
}

func (s *shell) run(in string, want int, args ...string) (out, errs string) {
	s.t.Helper()
	var o, e bytes.Buffer
	if got := run(s.t.Context(), append([]string{"--config", s.path}, args...), strings.NewReader(in), &o, &e); got != want {
		s.t.Fatalf("mailbridge %s: exit code %d, want %d\n%s%s", strings.Join(args, " "), got, want, o.String(), e.String())
	}
	return o.String(), e.String()
}

func TestWrongUsageIsExitCode2(t *testing.T) {
	s := newShell(t)
	for _, args := range [][]string{{}, {"sereve"}, {"check", "more"}, {"serve", "--fast"}, {"passwd"}, {"passwd", "add"}, {"passwd", "revoke", "scanners"}, {"queue"}, {"queue", "retry"}, {"queue", "show"}, {"doctor", "nobody"}, {"secret", "set"}} {
		_, errs := s.run("", exitUsage, args...)
		if !strings.HasPrefix(errs, "mailbridge: ") {
			t.Errorf("%v: %q", args, errs)
		}
	}
}

func TestCheckNamesWhatIsMissing(t *testing.T) {
	s := newShell(t)
	_, errs := s.run("", exitFailed, "check")
	if !strings.Contains(errs, "mailbridge secret set bridge") {
		t.Errorf("a secret that the vault does not hold: %s", errs)
	}
	if _, err := os.Stat(filepath.Join(filepath.Dir(s.path), "state")); err == nil {
		t.Error("check made the state folder")
	}
	s.run("wrong\n", 0, "secret", "set", "bridge")
	if _, errs = s.run("", exitFailed, "check"); !strings.Contains(errs, "password") || strings.Contains(errs, "wrong\n") {
		t.Errorf("a wrong keystore password: %s", errs)
	}
	s.run("notasecret\n", 0, "secret", "set", "bridge")
	if out, _ := s.run("", 0, "check"); !strings.Contains(out, "good: 1 listeners, 1 profiles, 1 accounts") {
		t.Errorf("%s", out)
	}
	b, err := os.ReadFile(s.path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(s.path, []byte(strings.Replace(string(b), `alias = "bridge"`, `alias = "other"`, 1)), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, errs = s.run("", exitFailed, "check"); !strings.Contains(errs, `"other"`) || !strings.Contains(errs, `bridge`) {
		t.Errorf("an unknown alias: %s", errs)
	}
	if err := os.WriteFile(s.path, []byte("stat_dir = \"x\"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, errs = s.run("", exitFailed, "check"); !strings.Contains(errs, ":1:1") || !strings.Contains(errs, "state_dir") {
		t.Errorf("an unknown key: %s", errs)
	}
}

func TestPasswordsAreShownOnceAndRevoked(t *testing.T) {
	s := newShell(t)
	out, errs := s.run("", 0, "passwd", "add", "scanners", "--label", "hall")
	pw := strings.TrimSpace(out)
	if len(pw) < 16 || strings.ContainsAny(pw, " \n") || !strings.Contains(errs, "scanner@contoso.example") {
		t.Errorf("%q %q", out, errs)
	}
	s.run("a long enough password\n", 0, "passwd", "add", "scanners", "--label", "erp", "--stdin")
	out, _ = s.run("", 0, "passwd", "list")
	if strings.Contains(out, pw) || !strings.Contains(out, "hall") || !strings.Contains(out, "erp") || !strings.Contains(out, "never") {
		t.Errorf("%s", out)
	}
	s.run("", 0, "passwd", "revoke", "scanners", "hall")
	s.run("", exitFailed, "passwd", "revoke", "scanners", "hall")
	if out, _ = s.run("", 0, "passwd", "list", "scanners"); strings.Contains(out, "hall") {
		t.Errorf("%s", out)
	}
	if _, errs = s.run("", exitFailed, "passwd", "add", "nobody"); !strings.Contains(errs, "scanners") {
		t.Errorf("%s", errs)
	}
	s.run("\n", exitFailed, "passwd", "add", "scanners", "--stdin")
}

func TestSecretsAreListedByNameAlone(t *testing.T) {
	s := newShell(t)
	s.run("s3cr3t\n", 0, "secret", "set", "contoso")
	if out, _ := s.run("", 0, "secret", "list"); out != "contoso\n" {
		t.Errorf("%q", out)
	}
	s.run("", 0, "secret", "delete", "contoso")
	if out, _ := s.run("", 0, "secret", "list"); out != "" {
		t.Errorf("%q", out)
	}
}

func TestQueueOfNothing(t *testing.T) {
	s := newShell(t)
	out, _ := s.run("", 0, "queue", "list", "--json")
	var v struct {
		Stuck    bool
		Messages []any
	}
	if err := json.Unmarshal([]byte(out), &v); err != nil || v.Stuck || len(v.Messages) != 0 {
		t.Errorf("%v %s", err, out)
	}
	for _, verb := range []string{"show", "retry", "hold", "release", "delete"} {
		if _, errs := s.run("", exitFailed, "queue", verb, "084EQJ0K42D23OP3J6J1ACDCV4"); !strings.Contains(errs, "084EQJ0K42D23OP3J6J1ACDCV4") {
			t.Errorf("%s: %s", verb, errs)
		}
	}
}

func TestServeNamesThePortThatIsTaken(t *testing.T) {
	s := newShell(t)
	s.run("notasecret\n", 0, "secret", "set", "bridge")
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	b, err := os.ReadFile(s.path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(s.path, bytes.Replace(b, []byte("127.0.0.1:0"), []byte(l.Addr().String()), 1), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, errs := s.run("", exitFailed, "serve"); !strings.Contains(errs, l.Addr().String()) {
		t.Errorf("%s", errs)
	}
}
