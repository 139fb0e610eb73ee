package app

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"
)

// controlName is the socket in the state folder by which commands tell a running service to look at what
// they changed. The service would notice by itself; the socket makes it soon.
const controlName = "control.sock"

// maxSocketPath is what the operating systems take for a socket's path, in bytes, with a margin.
const maxSocketPath = 100

// listenControl opens the control socket, for this user alone. It also guards the state folder: two
// services on one folder would both send the same mail.
func listenControl(stateDir string) (net.Listener, error) {
	path := filepath.Join(stateDir, controlName)
	if len(path) > maxSocketPath {
		return nil, fmt.Errorf("state_dir %s is too long for a socket in it (%d bytes at most): use a shorter path", stateDir, maxSocketPath-len(controlName)-1)
	}
	if c, err := net.DialTimeout("unix", path, time.Second); err == nil {
		c.Close()
		return nil, fmt.Errorf("another mailbridge is running on %s: stop it first, or give this one a state_dir of its own", stateDir)
	}
	// What a killed service left behind.
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(path, 0o600); err != nil {
		l.Close()
		return nil, err
	}
	return l, nil
}

// control answers the commands: POST /kick (the queue was changed), POST /resume?account=NAME (somebody
// signed in or an administrator acted; without account: all).
func (a *App) control() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("POST /kick", func(w http.ResponseWriter, r *http.Request) {
		a.outbox.Kick()
		w.WriteHeader(http.StatusNoContent)
	})
	mux.HandleFunc("POST /resume", func(w http.ResponseWriter, r *http.Request) {
		if err := a.resume(r.Context(), r.URL.Query().Get("account")); err != nil {
			http.Error(w, err.Error(), http.StatusNotFound)
			return
		}
		w.WriteHeader(http.StatusNoContent)
	})
	return mux
}

// Tell posts path to the service that runs on stateDir. It reports whether one runs; when none does there
// is nobody to tell, and that is no error.
func Tell(ctx context.Context, stateDir, path string) (running bool, err error) {
	client := http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", filepath.Join(stateDir, controlName))
		},
		DisableKeepAlives: true,
	}}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://mailbridge"+path, nil)
	if err != nil {
		return false, err
	}
	resp, err := client.Do(req)
	if err != nil {
		return false, nil
	}
	defer resp.Body.Close()
	if resp.StatusCode >= 300 {
		b, err := io.ReadAll(io.LimitReader(resp.Body, 1<<10))
		return true, errors.Join(fmt.Errorf("the running service refused: %s", b), err)
	}
	return true, nil
}
