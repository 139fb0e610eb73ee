package obs

import (
	"context"
	"encoding/json"
	"net/http"
	"runtime"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// checkTimeout bounds one readiness check.
const checkTimeout = 2 * time.Second

// Health is a set of named readiness checks. Its methods are safe for concurrent use.
type Health struct {
	mu     sync.Mutex
	names  []string
	checks map[string]func(context.Context) error
}

// Add registers a check. Its error tells an operator why the service is not ready.
func (h *Health) Add(name string, check func(context.Context) error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.checks == nil {
		h.checks = map[string]func(context.Context) error{}
	}
	if _, ok := h.checks[name]; !ok {
		h.names = append(h.names, name)
	}
	h.checks[name] = check
}

// Check runs all checks and gives the errors of those that failed, by name.
func (h *Health) Check(ctx context.Context) map[string]string {
	h.mu.Lock()
	names := append([]string(nil), h.names...)
	checks := make([]func(context.Context) error, len(names))
	for i, n := range names {
		checks[i] = h.checks[n]
	}
	h.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	failed := map[string]string{}
	for i, check := range checks {
		if err := check(ctx); err != nil {
			failed[names[i]] = err.Error()
		}
	}
	return failed
}

// NewRegistry makes a metrics registry that tells of the process, of Go and of the build.
func NewRegistry(version string) *prometheus.Registry {
	reg := prometheus.NewRegistry()
	build := prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "mailbridge_build_info", Help: "1, with the version in the labels.",
		ConstLabels: prometheus.Labels{"version": version, "go": runtime.Version()},
	})
	build.Set(1)
	reg.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}), build)
	return reg
}

// Mux serves /healthz (the process works), /readyz (503 with the names of the checks that fail) and
// /metrics.
func Mux(reg *prometheus.Registry, h *Health) *http.ServeMux {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(reg, promhttp.HandlerOpts{}))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		answer(w, http.StatusOK, map[string]any{"status": "ok"})
	})
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, r *http.Request) {
		if failed := h.Check(r.Context()); len(failed) > 0 {
			answer(w, http.StatusServiceUnavailable, map[string]any{"status": "not ready", "failed": failed})
			return
		}
		answer(w, http.StatusOK, map[string]any{"status": "ready"})
	})
	return mux
}

func answer(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	if err := json.NewEncoder(w).Encode(v); err != nil {
		return // the one who asked has gone
	}
}
