package config

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"mailbridge/internal/secret"
)

const good = `state_dir = "state"
allow_literal_secrets = true

[[smtp.listen]]
address = "127.0.0.1:1587"

[[smtp.listen]]
address = "127.0.0.1:1465"
tls = "implicit"

[keystores.google]
file = "google.p12"
password = "notasecret"

[profiles.contoso]
provider = "graph"
grant = "client_credentials"
tenant_id = "11111111-2222-3333-4444-555555555555"
client_id = "app"
client_secret = "s3cret"

[profiles.workspace]
provider = "gmail"
grant = "jwt_bearer"
jwt = { keystore = "google", alias = "privatekey", issuer = "svc@p.iam.gserviceaccount.com", subject = "{mailbox}" }
claims = { scope = "https://mail.google.com/", team = ["a", 1] }

[accounts.scanners]
mailbox = "scanner@contoso.example"
profile = "contoso"
may = ["send"]
from = ["scanner@contoso.example", "*@devices.contoso.example"]
max_size = "25MB"
give_up = "2d"

[accounts.relay]
mailbox = "relay@example.test"
profile = "workspace"
first_attempt = "0s"
`

func write(t *testing.T, text string) string {
	t.Helper()
	dir := t.TempDir()
	for name, body := range map[string]string{"mailbridge.toml": text, "google.p12": "x"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(body), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return filepath.Join(dir, "mailbridge.toml")
}

func TestGoodFileIsReadWithDefaults(t *testing.T) {
	path := write(t, good)
	f, err := Load(path)
	if err != nil {
		t.Fatal(err)
	}
	a, b := f.Accounts["scanners"], f.Accounts["relay"]
	if a.MaxSize != 25_000_000 || time.Duration(a.GiveUp) != 48*time.Hour || a.Accept != "queued" || a.Unsure != "hold" || a.Mismatch != "refuse" {
		t.Errorf("scanners: %+v", a)
	}
	if time.Duration(a.FirstAttempt) != DefaultFirstAttempt || b.FirstAttempt != 0 {
		t.Errorf("first_attempt: %v and %v; a written 0s must stay", a.FirstAttempt, b.FirstAttempt)
	}
	if p := f.Profiles["workspace"]; p.SMTP != "smtp.gmail.com:465" || p.SMTPTLS != "implicit" || p.Claims["scope"] != "https://mail.google.com/" {
		t.Errorf("workspace: %+v", p)
	}
	if f.SMTP.Listen[0].TLS != "starttls" || f.SMTP.Listen[1].TLS != "implicit" {
		t.Errorf("listeners: %+v", f.SMTP.Listen)
	}
	if want := filepath.Join(filepath.Dir(path), "state"); f.Absolute() != want {
		t.Errorf("state folder %s, want %s: it would depend on where the service is started", f.Absolute(), want)
	}
	if f.Keystores["google"].File != filepath.Join(filepath.Dir(path), "google.p12") {
		t.Errorf("keystore file %s", f.Keystores["google"].File)
	}
}

// Every slip is told with its line, its column and what was expected.
func TestEverySlipIsToldWhereItIs(t *testing.T) {
	for _, c := range []struct{ name, from, to, where, text string }{
		{"mistyped key", `may = ["send"]`, `mya = ["send"]`, ":31:1: accounts.scanners.mya", `did you mean "may"?`},
		{"mistyped table", "[accounts.relay]", "[account.relay]", ":36:2: account", `did you mean "accounts"?`},
		{"syntax", `give_up = "2d"`, `give_up = 2d"`, ":34:", ""},
		{"wrong type", `provider = "graph"`, `provider = 7`, ":16:", "string"},
		{"no such profile", `profile = "contoso"`, `profile = "contos"`, ":30:1: accounts.scanners.profile", "there is no [profiles.contos]; there are: contoso, workspace"},
		{"no such keystore", `keystore = "google"`, `keystore = "gogle"`, ":25:9: profiles.workspace.jwt.keystore", "there is no [keystores.gogle]; there are: google"},
		{"secret in clear", `allow_literal_secrets = true`, ``, ":13:1: keystores.google.password", `"env:NAME", "file:PATH" or "vault:NAME"`},
		{"unset variable", `"s3cret"`, `"env:MAILBRIDGE_TEST_UNSET"`, ":20:1: profiles.contoso.client_secret", "MAILBRIDGE_TEST_UNSET is not set"},
		{"missing file", `file = "google.p12"`, `file = "nowhere.p12"`, ":12:1: keystores.google.file", "no such file"},
		{"wrong word", `tls = "implicit"`, `tls = "ssl"`, ":9:1: smtp.listen.1.tls", `"ssl" is not one of "starttls", "implicit", "none"`},
		{"address without port", `"127.0.0.1:1587"`, `"127.0.0.1"`, ":5:1: smtp.listen.0.address", "not host:port"},
		{"same port twice", `"127.0.0.1:1465"`, `"127.0.0.1:1587"`, ":8:1: smtp.listen.1.address", "listener 1 has"},
		{"cleartext to the world", "address = \"127.0.0.1:1465\"\ntls = \"implicit\"", "address = \"0.0.0.0:25\"\ntls = \"none\"", ":9:1: smtp.listen.1.tls", "nobody could log in"},
		{"no mail address", `"relay@example.test"`, `"relay"`, ":37:1: accounts.relay.mailbox", "not a mail address"},
		{"bad duration", `"2d"`, `"2 days"`, ":34:", "not a duration"},
		{"bad size", `"25MB"`, `"25 megs"`, ":33:", "not a size"},
		{"beyond the client's wait", `first_attempt = "0s"`, `first_attempt = "5m"`, ":39:1: accounts.relay.first_attempt", "two minutes"},
		{"common tenant", `"11111111-2222-3333-4444-555555555555"`, `"common"`, ":18:1: profiles.contoso.tenant_id", "the tenant itself"},
		{"no tenant", `tenant_id = "11111111-2222-3333-4444-555555555555"`, ``, ":15:11: profiles.contoso.tenant_id", "needs it"},
		{"claim that is not custom", `team = `, `aud = `, ":26:", "custom ones only"},
		{"unknown grant", `grant = "jwt_bearer"`, `grant = "password"`, ":24:1: profiles.workspace.grant", `"password" is not one of`},
		{"plain http", `client_secret = "s3cret"`, "client_secret = \"s3cret\"\nendpoint = \"http://graph\"", ":21:1: profiles.contoso.endpoint", "not an https:// address"},
		{"receiving", `may = ["send"]`, `may = ["send", "receive"]`, ":31:1: accounts.scanners.may", "sends only"},
		{"name of an account", "[accounts.relay]", "[accounts.\"a b\"]", ":36:11: accounts.a b", "letters, digits"},
		{"no state", `state_dir = "state"`, ``, ": state_dir", "it is missing"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if !strings.Contains(good, c.from) {
				t.Fatalf("the good file has no %q", c.from)
			}
			_, err := Load(write(t, strings.Replace(good, c.from, c.to, 1)))
			if _, ok := errors.AsType[*Error](err); !ok {
				t.Fatalf("error %v", err)
			}
			if !strings.Contains(err.Error(), "mailbridge.toml"+c.where) || !strings.Contains(err.Error(), c.text) {
				t.Errorf("got  %v\nwant %s … %s", err, c.where, c.text)
			}
		})
	}
}

func TestAllProblemsAreToldAtOnceInOrder(t *testing.T) {
	text := strings.NewReplacer(`profile = "workspace"`, `profile = "w"`, `mailbox = "scanner@contoso.example"`, `mailbox = "x"`, `"implicit"`, `"ssl"`).Replace(good)
	_, err := Load(write(t, text))
	e, ok := errors.AsType[*Error](err)
	if !ok || len(e.Problems) != 3 {
		t.Fatalf("%v", err)
	}
	for i := 1; i < 3; i++ {
		if e.Problems[i].Line < e.Problems[i-1].Line {
			t.Errorf("not in the order of the lines: %v", err)
		}
	}
}

func TestSecretsAreResolvedAndNeverShown(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "s")
	if err := os.WriteFile(file, []byte("from-file\r\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	s := Secrets{
		Getenv: func(n string) (string, bool) { return "from-env", n == "A" },
		Vault:  func(n string) (secret.Text, error) { return secret.New("from-vault-" + n), nil },
	}
	for ref, want := range map[string]string{"env:A": "from-env", "file:" + file: "from-file", "vault:x": "from-vault-x", "literal": "literal", "": ""} {
		got, err := s.Resolve(ref)
		if err != nil || got.Reveal() != want {
			t.Errorf("%s: %q, %v", ref, got.Reveal(), err)
		}
	}
	for _, ref := range []string{"env:B", "file:" + dir + "/none", "file:" + dir} {
		if _, err := s.Resolve(ref); err == nil {
			t.Errorf("%s gave no error", ref)
		}
	}
	if _, err := (Secrets{}).Resolve("vault:x"); err == nil {
		t.Error("a vault reference without a vault gave no error")
	}
	// A problem's text never repeats the secret that stands in clear.
	_, err := Load(write(t, strings.Replace(good, "allow_literal_secrets = true", "", 1)))
	if err == nil || strings.Contains(err.Error(), "s3cret") || strings.Contains(err.Error(), "notasecret") {
		t.Errorf("%v", err)
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(good))
	f.Add([]byte("[[a]]\nb.c={d=1}\n[a.e]\nf=[{g=1}]"))
	f.Fuzz(func(t *testing.T, b []byte) {
		_, err := Parse("x.toml", b)
		if err != nil && err.Error() == "" {
			t.Error("an error without words")
		}
	})
}

func TestEverySettingIsInTheReference(t *testing.T) {
	b, err := os.ReadFile(filepath.Join("..", "..", "docs", "configuration.md"))
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range settings() {
		if !strings.Contains(string(b), s) {
			t.Errorf("docs/configuration.md does not tell of %s", s)
		}
	}
}
