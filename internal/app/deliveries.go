package app

import (
	"encoding/json"
	"html/template"
	"net/http"
	"strconv"
	"time"
)

// delivered is one recipient's copy in the simulated clouds.
type delivered struct {
	ID   int       `json:"id"`
	Time time.Time `json:"time"`
	Via  string    `json:"via"`
	From string    `json:"from"`
	To   string    `json:"to"`
	Raw  []byte    `json:"-"`
}

// maxListed bounds the page of deliveries; /deliveries.json lists all that are kept.
const maxListed = 200

var deliveriesPage = template.Must(template.New("").Parse(`<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Mailbridge: delivered</title>
<style>
 body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; color: #222; background: #fff }
 table { border-collapse: collapse; width: 100% } td, th { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid #ddd; overflow-wrap: anywhere }
 pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f4f4f4; padding: 1rem } .dim { color: #666 }
</style>
{{if .One}}<p><a href="/">All copies</a> · <a href="/deliveries/{{.One.ID}}.eml">raw</a></p>
<h1>Copy of {{.One.To}}</h1><p class="dim">from {{.One.From}}, through {{.One.Via}}, {{.One.Time.Format "15:04:05"}}</p><pre>{{.Text}}</pre>
{{else}}<h1>Delivered</h1>
<p>Each recipient's copy, as the simulated clouds delivered it; newest first. Nothing here has left this machine.</p>
{{if not .List}}<p class="dim">Nothing yet. Send something with the settings that the demo printed, then reload.</p>{{else}}
<table><tr><th>when<th>to<th>from<th>through<th></tr>
{{range .List}}<tr><td>{{.Time.Format "15:04:05"}}<td><a href="/deliveries/{{.ID}}">{{.To}}</a><td>{{.From}}<td>{{.Via}}<td><a href="/deliveries/{{.ID}}.eml">raw</a></tr>
{{end}}</table>{{end}}{{end}}
</html>
`))

// deliveriesHandler shows what list gives: / is a page, /deliveries.json the list, /deliveries/N a copy as
// a page and /deliveries/N.eml its bytes.
func deliveriesHandler(list func() []delivered) http.Handler {
	mux := http.NewServeMux()
	type page struct {
		List []delivered
		One  *delivered
		Text string
	}
	show := func(w http.ResponseWriter, p page) {
		w.Header().Set("Content-Type", "text/html; charset=utf-8")
		w.Header().Set("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'")
		if err := deliveriesPage.Execute(w, p); err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
		}
	}
	find := func(r *http.Request, suffix string) *delivered {
		name := r.PathValue("id")
		if len(name) <= len(suffix) || name[len(name)-len(suffix):] != suffix {
			return nil
		}
		id, err := strconv.Atoi(name[:len(name)-len(suffix)])
		if err != nil {
			return nil
		}
		for _, d := range list() {
			if d.ID == id {
				return &d
			}
		}
		return nil
	}
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, _ *http.Request) {
		all := list()
		all = all[max(0, len(all)-maxListed):]
		newest := make([]delivered, 0, len(all))
		for i := len(all) - 1; i >= 0; i-- {
			newest = append(newest, all[i])
		}
		show(w, page{List: newest})
	})
	mux.HandleFunc("GET /deliveries.json", func(w http.ResponseWriter, _ *http.Request) {
		all := list()
		if all == nil {
			all = []delivered{}
		}
		w.Header().Set("Content-Type", "application/json")
		if err := json.NewEncoder(w).Encode(all); err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
		}
	})
	mux.HandleFunc("GET /deliveries/{id}", func(w http.ResponseWriter, r *http.Request) {
		if d := find(r, ".eml"); d != nil {
			// The bytes as they are; a browser shows them as text and runs nothing in them.
			w.Header().Set("Content-Type", "text/plain; charset=utf-8")
			w.Header().Set("X-Content-Type-Options", "nosniff")
			if _, err := w.Write(d.Raw); err != nil {
				return
			}
			return
		}
		if d := find(r, ""); d != nil {
			show(w, page{One: d, Text: string(d.Raw)})
			return
		}
		http.NotFound(w, r)
	})
	return mux
}
