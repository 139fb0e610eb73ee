package secret

import (
	"bytes"
	"encoding/json"
	"fmt"
	"log/slog"
	"strings"
	"testing"
)

func TestNoPrintedFormShowsTheValue(t *testing.T) {
	s := New("hunter2-hunter2")
	var log bytes.Buffer
	slog.New(slog.NewJSONHandler(&log, nil)).Info("x", "s", s, "in", struct{ S Text }{s})
	js, err := json.Marshal(map[string]any{"s": s, "p": &s})
	if err != nil {
		t.Fatal(err)
	}
	all := log.String() + string(js) + fmt.Sprintf("%v %+v %#v %s %q %x", s, s, s, s, s, struct{ S Text }{s})
	if strings.Contains(all, "hunter2") || strings.Contains(all, fmt.Sprintf("%x", "hunter2")) {
		t.Errorf("a printed form shows the value: %s", all)
	}
	if s.Reveal() != "hunter2-hunter2" || !s.Equal(New("hunter2-hunter2")) || s.Equal(New("x")) {
		t.Error("the value itself is lost")
	}
}

func TestScrubFindsWhatCloudsPrint(t *testing.T) {
	for _, in := range []string{
		"Authorization: Bearer SECRETSECRET",
		"grant_type=x&client_secret=SECRETSECRET&scope=y",
		`{"access_token":"SECRETSECRET","token_type":"Bearer"}`,
		`{"refresh_token": "SECRETSECRET"}`,
		"https://h/p?code=SECRETSECRET&state=1",
		"https://h/AttachmentSessions('x')?authtoken=SECRETSECRET",
		"AUTH XOAUTH2 SECRETSECRET",
		"a1 AUTHENTICATE PLAIN SECRETSECRET",
		"token ya29.SECRETSECRET was refused",
		"assertion eyJhbGciOiJSUzI1NiJ9.SECRETSECRET.SECRETSECRET",
	} {
		if out := Scrub(in); strings.Contains(out, "SECRET") {
			t.Errorf("%q became %q", in, out)
		}
	}
	for _, in := range []string{"AADSTS7000215: Invalid client secret provided.", "error_codes: [7000215]", "status code: 401"} {
		if out := Scrub(in); out != in {
			t.Errorf("harmless %q became %q", in, out)
		}
	}
}
