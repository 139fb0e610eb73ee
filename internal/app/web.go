package app

import (
	"html/template"
	"net/http"
	"time"

	"mailbridge/internal/obs"
	"mailbridge/internal/outbox"
)

var statusPage = template.Must(template.New("").Parse(`<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Mailbridge</title>
<style>body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 50rem; padding: 0 1rem }
td, th { text-align: left; padding: .2rem 1rem .2rem 0 } .bad { color: #b00 }</style>
<h1>Mailbridge {{.Version}}</h1>
{{range $name, $why := .Failed}}<p class="bad">Not ready: {{$name}}: {{$why}}</p>{{else}}<p>Ready.</p>{{end}}
<h2>Outbox</h2><table>{{range .Counts}}<tr><td>{{.State}}<td>{{.N}}</tr>{{end}}</table>
{{if .Parks}}<h2>Accounts that wait</h2><table><tr><th>account<th>class<th>since<th>next try<th>why</tr>
{{range .Parks}}<tr><td>{{.Account}}<td>{{.Class}}<td>{{.Since.Format "2006-01-02 15:04"}}<td>{{.Until.Format "15:04"}}<td>{{.Reason}}</tr>{{end}}</table>{{end}}
<p><a href="/metrics">metrics</a> · <a href="/readyz">readiness</a></p></html>
`))

// web is the HTTP listener: health, metrics, status.
func (a *App) web() http.Handler {
	mux := obs.Mux(a.registry, a.health)
	pages := a.pages
	if pages == nil {
		pages = http.HandlerFunc(a.status)
	}
	mux.Handle("/", pages)
	return mux
}

// status shows what an operator asks first. It names no message and no address but accounts'.
func (a *App) status(w http.ResponseWriter, r *http.Request) {
	if r.URL.Path != "/" {
		http.NotFound(w, r)
		return
	}
	type count struct {
		State outbox.State
		N     int
	}
	page := struct {
		Version string
		Now     time.Time
		Failed  map[string]string
		Counts  []count
		Parks   []outbox.Park
	}{Version: a.version, Failed: a.health.Check(r.Context())}
	q := a.outbox.Queue()
	counts, err := q.Counts(r.Context())
	if err == nil {
		page.Parks, err = q.Parks(r.Context())
	}
	if err != nil {
		http.Error(w, "the outbox cannot be read", http.StatusServiceUnavailable)
		return
	}
	for _, s := range outbox.States() {
		page.Counts = append(page.Counts, count{s, counts[s]})
	}
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	w.Header().Set("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'")
	if err := statusPage.Execute(w, page); err != nil {
		a.log.Debug("status page", "err", err)
	}
}
