package graph

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"time"

	"mailbridge/internal/mail"
	"mailbridge/internal/mailerr"
)

// refused makes the refusal that a status, a code and a text come as.
func refused(status int, code, text string, header ...string) refusal {
	body := ""
	if code != "" || text != "" {
		b, err := json.Marshal(map[string]any{"error": map[string]any{"code": code, "message": text}})
		if err != nil {
			panic(err)
		}
		body = string(b)
	}
	resp := &http.Response{StatusCode: status, Header: http.Header{}, Body: io.NopCloser(strings.NewReader(body))}
	for i := 0; i+1 < len(header); i += 2 {
		resp.Header.Set(header[i], header[i+1])
	}
	return readRefusal(resp)
}

// TestEveryRefusalIsClassified is the error catalogue: what Graph says and what happens to the mail then.
func TestEveryRefusalIsClassified(t *testing.T) {
	const (
		temporary = mailerr.Temporary
		throttled = mailerr.Throttled
		auth      = mailerr.Auth
		quota     = mailerr.Quota
		permanent = mailerr.Permanent
		unknown   = mailerr.Unknown
	)
	rows := []struct {
		status int
		code   string
		text   string
		op     op
		class  mailerr.Class
		want   string // enhanced code
		unsure bool
		is     error
	}{
		{400, "ErrorMimeContentInvalidBase64String", "Invalid base64 string for MIME content.", opPrepare, permanent, "5.6.0", false, nil},
		{400, "ErrorMimeContentInvalid", "", opPrepare, permanent, "5.6.0", false, nil},
		{400, "ErrorInvalidRecipients", "At least one recipient is not valid.", opCommit, permanent, "5.1.3", false, nil},
		{400, "ErrorMissingRecipients", "", opMail, permanent, "5.5.4", false, nil},
		{400, "ErrorMessageSizeExceeded", "", opCommit, permanent, "5.3.4", false, nil},
		{413, "ErrorMessageSizeExceeded", "", opCommit, permanent, "5.3.4", false, nil},
		{400, "BadRequest", "The maximum request length supported is 4MB.", opPrepare, permanent, "5.3.4", false, ErrTooLarge},
		{413, "", "", opPrepare, permanent, "5.3.4", false, ErrTooLarge},
		{413, "RequestEntityTooLarge", "too large", opMail, permanent, "5.3.4", false, ErrTooLarge},
		{400, "ErrorAttachmentSizeLimitExceeded", "", opPrepare, permanent, "5.3.4", false, nil},
		{400, "ErrorAttachmentSizeShouldNotBeLessThanMinimumSize", "", opPrepare, unknown, "4.3.0", false, nil},
		{400, "ErrorQuotaExceeded", "", opCommit, quota, "4.2.2", false, nil},
		{413, "ErrorQuotaExceeded", "", opCommit, quota, "4.2.2", false, nil},
		{507, "ErrorQuotaExceeded", "", opPrepare, quota, "4.2.2", false, nil},
		{500, "ErrorSubmissionQuotaExceeded", "", opCommit, quota, "4.7.1", false, nil},
		{400, "ErrorExceededMessageLimit", "Cannot send mail. Daily Message limit exceeded", opMail, quota, "4.7.1", false, nil},
		{403, "ErrorMessageSubmissionBlocked", "", opMail, quota, "4.7.1", false, nil},
		{429, "ErrorExceededMaxRecipientLimit", "", opMail, quota, "4.7.1", false, nil},
		{403, "ErrorAccountSuspend", "", opMail, quota, "4.7.1", false, nil},
		{400, "InvalidInternetMessageHeader", "", opPrepare, permanent, "5.6.0", false, nil},
		{400, "InvalidInternetMessageHeaderCollection", "", opPrepare, permanent, "5.6.0", false, nil},
		{400, "UnableToDeserializePostBody", "were unable to deserialize ", opPrepare, unknown, "4.3.0", false, nil},
		{400, "ErrorInvalidIdMalformed", "Id is malformed.", opCommit, unknown, "4.3.0", false, nil},
		{400, "ErrorInvalidPropertySet", "", opPrepare, unknown, "4.3.0", false, nil},
		{400, "ErrorInvalidRequest", "", opPrepare, unknown, "4.3.0", false, nil},
		{400, "RequestBodyRead", "", opPrepare, unknown, "4.3.0", false, nil},
		{400, "ParameterValueEmpty", "", opPrepare, unknown, "4.3.0", false, nil},
		{400, "InefficientFilter", "", opSearch, unknown, "4.3.0", false, nil},
		{401, "InvalidAuthenticationToken", "Lifetime validation failed, the token is expired.", opPrepare, auth, "4.7.0", false, nil},
		{401, "", "", opCommit, auth, "4.7.0", false, nil},
		{403, "ErrorAccessDenied", "Access is denied. Check credentials and try again.", opPrepare, auth, "4.7.0", false, nil},
		{403, "ErrorAccessDenied", "Access to OData is disabled.", opMail, auth, "4.7.0", false, nil},
		{403, "ErrorSendAsDenied", "", opCommit, permanent, "5.7.1", false, nil},
		{403, "errorSENDASdenied", "", opMail, permanent, "5.7.1", false, nil},
		{403, "Authorization_RequestDenied", "", opProbe, auth, "4.7.0", false, nil},
		{403, "ErrorAccountDisabled", "", opPrepare, auth, "4.2.1", false, nil},
		{403, "ErrorMailboxLogonFailed", "", opPrepare, auth, "4.2.1", false, nil},
		{403, "ErrorPasswordExpired", "", opPrepare, auth, "4.2.1", false, nil},
		{403, "", "", opPrepare, auth, "4.7.0", false, nil},
		{404, "ErrorItemNotFound", "The specified object was not found in the store.", opItem, permanent, "5.2.0", false, mail.ErrNoMessage},
		{404, "ErrorItemNotFound", "", opCommit, temporary, "4.3.0", true, mail.ErrNoMessage},
		{404, "ErrorItemNotFound", "", opPrepare, auth, "4.1.8", false, mail.ErrNoMailbox},
		{404, "ErrorFolderNotFound", "", opSearch, temporary, "4.2.0", false, nil},
		{404, "ErrorSyncFolderNotFound", "", opSearch, temporary, "4.2.0", false, nil},
		{404, "ErrorInvalidUser", "The requested user 'x' is invalid.", opCommit, auth, "4.1.8", false, mail.ErrNoMailbox},
		{400, "ErrorInvalidUser", "", opPrepare, auth, "4.1.8", false, mail.ErrNoMailbox},
		{404, "MailboxNotEnabledForRESTAPI", "The mailbox is either inactive, soft-deleted, or is hosted on-premise.", opMail, auth, "4.2.1", false, mail.ErrNoMailbox},
		{404, "Request_ResourceNotFound", "", opPrepare, auth, "4.1.8", false, mail.ErrNoMailbox},
		{404, "ResourceNotFound", "", opPrepare, auth, "4.1.8", false, mail.ErrNoMailbox},
		{404, "ResourceNotFound", "", opItem, permanent, "5.2.0", false, mail.ErrNoMessage},
		{404, "ErrorNonExistentMailbox", "", opMail, auth, "4.1.8", false, mail.ErrNoMailbox},
		{404, "", "", opMail, auth, "4.1.8", false, mail.ErrNoMailbox},
		{405, "ErrorInvalidRequest", "The OData request is not supported.", opSearch, unknown, "4.3.0", false, nil},
		{405, "", "", opMail, unknown, "4.3.0", false, nil},
		{409, "ErrorFolderExists", "", opSearch, temporary, "4.2.0", false, nil},
		{409, "ErrorIrresolvableConflict", "", opCommit, temporary, "4.2.0", false, nil},
		{412, "ErrorIrresolvableConflict", "", opAbandon, temporary, "4.2.0", false, nil},
		{408, "ErrorTimeoutExpired", "", opCommit, temporary, "4.4.2", true, nil},
		{408, "ErrorTimeoutExpired", "", opSearch, temporary, "4.4.2", false, nil},
		{410, "SyncStateNotFound", "", opSearch, temporary, "4.2.0", false, nil},
		{429, "ApplicationThrottled", "Application is over its MailboxConcurrency limit.", opCommit, throttled, "4.4.5", false, nil},
		{429, "TooManyRequests", "", opPrepare, throttled, "4.4.5", false, nil},
		{429, "activityLimitReached", "", opMail, throttled, "4.4.5", false, nil},
		{429, "", "WASCL UserAction verdict is not None. Throttle", opMail, throttled, "4.4.5", false, nil},
		{500, "ErrorInternalServerError", "", opCommit, temporary, "4.4.0", true, nil},
		{500, "ErrorInternalServerTransientError", "", opPrepare, temporary, "4.4.0", true, nil},
		{500, "UnknownError", "", opMail, temporary, "4.4.0", true, nil},
		{500, "UnknownError", "", opSearch, temporary, "4.4.0", false, nil},
		{500, "ErrorMimeContentConversionFailed", "", opItem, temporary, "4.4.0", false, nil},
		{500, "ErrorContentConversionFailed", "", opItem, temporary, "4.4.0", false, nil},
		{500, "ErrorItemCorrupt", "", opItem, temporary, "4.4.0", false, nil},
		{500, "ErrorMailboxMoveInProgress", "", opCommit, temporary, "4.2.1", true, nil},
		{503, "ErrorMailboxStoreUnavailable", "", opPrepare, temporary, "4.2.1", true, nil},
		{503, "ErrorMailboxFailover", "", opItem, temporary, "4.2.1", false, nil},
		{501, "NotImplemented", "", opPrepare, unknown, "4.3.0", false, nil},
		{502, "", "", opCommit, temporary, "4.4.0", true, nil},
		{503, "ServiceUnavailable", "", opMail, temporary, "4.4.0", true, nil},
		{503, "ErrorServerBusy", "", opCommit, temporary, "4.4.0", true, nil},
		{504, "GatewayTimeout", "", opCommit, temporary, "4.4.0", true, nil},
		{504, "ServerBusy", "", opProbe, temporary, "4.4.0", false, nil},
		{507, "", "", opPrepare, quota, "4.2.2", false, nil},
		{509, "", "", opCommit, throttled, "4.4.5", false, nil},
		// What no page lists.
		{400, "SomethingNew", "", opMail, permanent, "5.6.0", false, nil},
		{422, "", "", opCommit, permanent, "5.6.0", false, nil},
		{415, "", "", opPrepare, permanent, "5.6.0", false, nil},
		{400, "SomethingNew", "", opSearch, unknown, "4.3.0", false, nil},
		{599, "SomethingNew", "", opMail, temporary, "4.4.0", true, nil},
		{302, "", "", opMail, unknown, "4.3.0", false, nil},
	}
	now := time.Date(2026, 11, 24, 10, 0, 0, 0, time.UTC)
	for _, r := range rows {
		e := classify(r.op, refused(r.status, r.code, r.text), now)
		if e.Class != r.class || e.Code() != r.want || e.Unsure != r.unsure || r.is != nil && !errors.Is(e, r.is) {
			t.Errorf("%d %s for %s: %s %s unsure=%v (%v)\nwant %s %s unsure=%v", r.status, r.code, r.op.name, e.Class, e.Code(), e.Unsure, e, r.class, r.want, r.unsure)
		}
		if e.Text == "" || e.Op != r.op.name || strings.ContainsFunc(e.Text, func(c rune) bool { return c < ' ' || c > '~' }) {
			t.Errorf("%d %s: %+v", r.status, r.code, e)
		}
		if e.Class == quota && e.RetryAt.Sub(now) != quotaWait {
			t.Errorf("%d %s: a quota is tried again at %v", r.status, r.code, e.RetryAt)
		}
		if e.Class == auth && !errors.Is(e, mail.ErrNoMailbox) && e.Status == st(7, 0) && r.status == 403 && !strings.Contains(e.Text, r.op.needs) {
			t.Errorf("%s does not name the permission: %q", r.code, e.Text)
		}
	}
}

func TestRetryAfterIsReadInEveryForm(t *testing.T) {
	now := time.Date(2026, 11, 24, 10, 0, 0, 0, time.UTC)
	server := now.Add(-time.Hour) // a cloud whose clock differs
	for _, c := range []struct {
		status int
		value  string
		class  mailerr.Class
		wait   time.Duration
	}{
		{429, "10", mailerr.Throttled, 10 * time.Second},
		{429, "2.128", mailerr.Throttled, 3 * time.Second},
		{429, "0", mailerr.Throttled, 0},
		{429, server.Add(90 * time.Second).Format(http.TimeFormat), mailerr.Throttled, 90 * time.Second},
		{429, server.Add(-time.Minute).Format(http.TimeFormat), mailerr.Throttled, 0},
		{429, "1e300", mailerr.Throttled, mailerr.MaxRetryAfter},
		{503, "30", mailerr.Throttled, 30 * time.Second},
		{509, "5", mailerr.Throttled, 5 * time.Second},
		{507, "5", mailerr.Quota, quotaWait},
		{507, "7200", mailerr.Quota, 2 * time.Hour},
	} {
		e := classify(opCommit, refused(c.status, "", "", "Retry-After", c.value, "Date", server.Format(http.TimeFormat)), now)
		if e.Class != c.class || !e.RetryAt.Equal(now.Add(c.wait)) || e.Unsure != (c.status == 503) {
			t.Errorf("%d %q: %s at %v unsure=%v, want %s at %v", c.status, c.value, e.Class, e.RetryAt, e.Unsure, c.class, now.Add(c.wait))
		}
	}
	for _, junk := range []string{"", "soon", "NaN", "-5", "+Inf x"} {
		if e := classify(opCommit, refused(429, "", "", "Retry-After", junk), now); e.Class != mailerr.Throttled || !e.RetryAt.IsZero() {
			t.Errorf("%q: %s at %v", junk, e.Class, e.RetryAt)
		}
	}
}

func TestRefusalBodiesOfEveryKindAreRead(t *testing.T) {
	for name, body := range map[string]string{
		"empty":     "",
		"html":      "<html><body>Bad gateway</body></html>",
		"huge":      "{\"error\":{\"code\":\"" + strings.Repeat("x", 1<<20),
		"half":      `{"error":{"code":"Err`,
		"array":     `[1,2]`,
		"wrong":     `{"error":"no object"}`,
		"null":      `{"error":null}`,
		"non ascii": "{\"error\":{\"code\":\"X\",\"message\":\"\u00fc\\r\\n\\u0000z\"}}",
	} {
		resp := &http.Response{StatusCode: 502, Header: http.Header{}, Body: io.NopCloser(strings.NewReader(body))}
		e := classify(opMail, readRefusal(resp), time.Now())
		if e.Class != mailerr.Temporary || !e.Unsure || len(e.Error()) > 1000 {
			t.Errorf("%s: %v", name, e)
		}
		if strings.ContainsAny(e.Error(), "\r\n\x00") {
			t.Errorf("%s: more than a line: %q", name, e.Error())
		}
	}
}

func TestTheRequestIDIsInTheLog(t *testing.T) {
	for _, h := range []string{"request-id", ""} {
		resp := &http.Response{StatusCode: 500, Header: http.Header{}, Body: io.NopCloser(strings.NewReader(`{"error":{"code":"UnknownError","innererror":{"request-id":"6f-1"}}}`))}
		if h != "" {
			resp.Header.Set(h, "6f-1")
		}
		if e := classify(opMail, readRefusal(resp), time.Now()); !strings.Contains(e.Error(), "6f-1") {
			t.Errorf("%v", e)
		}
	}
}

func TestTransportErrorsAreUnsureOnlyAfterTheRequestLeft(t *testing.T) {
	get := func(err error) error { return &url.Error{Op: "Post", URL: "https://graph.example/", Err: err} }
	for _, c := range []struct {
		name   string
		err    error
		sent   bool
		op     op
		class  mailerr.Class
		unsure bool
	}{
		{"dial", get(&net.OpError{Op: "dial", Err: errors.New("connection refused")}), false, opMail, mailerr.Temporary, false},
		{"dns", get(&net.DNSError{Err: "no such host", Name: "graph.example"}), false, opMail, mailerr.Temporary, false},
		{"tls", get(&tls.CertificateVerificationError{Err: errors.New("unknown authority")}), false, opMail, mailerr.Temporary, false},
		{"cut in the body", get(io.ErrUnexpectedEOF), false, opMail, mailerr.Temporary, false},
		{"cut after the body", get(io.EOF), true, opMail, mailerr.Temporary, true},
		{"timeout after the body", get(context.DeadlineExceeded), true, opCommit, mailerr.Temporary, true},
		{"cut while reading", get(io.EOF), true, opSearch, mailerr.Temporary, false},
		{"cancelled before", get(context.Canceled), false, opCommit, mailerr.Temporary, false},
		{"no token", get(&mailerr.Error{Class: mailerr.Auth, Text: "sign in"}), true, opMail, mailerr.Auth, false},
		{"no slot", get(&mailerr.Error{Class: mailerr.Throttled, Text: "wait"}), false, opMail, mailerr.Throttled, false},
	} {
		e := classifyTransport(c.op, c.err, c.sent)
		if e.Class != c.class || e.Unsure != c.unsure || e.Text == "" || e.Op == "" {
			t.Errorf("%s: %+v", c.name, e)
		}
		if !errors.Is(e, errors.Unwrap(c.err)) && e.Class == mailerr.Temporary {
			t.Errorf("%s: the cause is lost: %v", c.name, e)
		}
	}
}

// The same on real connections.
func TestAnUntrustedServerGetsNothing(t *testing.T) {
	srv := httptest.NewUnstartedServer(http.NotFoundHandler())
	srv.Config.ErrorLog = log.New(io.Discard, "", 0)
	srv.StartTLS()
	t.Cleanup(srv.Close)
	f := newFake(t)
	cfg := f.config(t)
	cfg.Base = srv.URL
	c, err := open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	_, err = c.Prepare(t.Context(), letter("To: a@x.example\r\n", "a@x.example"))
	if e := mailerr.Of(err); e == nil || e.Class != mailerr.Temporary || e.Unsure || !strings.Contains(e.Text, "certificate") {
		t.Errorf("%v", err)
	}
}
