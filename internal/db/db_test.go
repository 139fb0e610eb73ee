package db

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestMigrationsRunOnceAndNewerIsRefused(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a b?c#d.db")
	steps := []string{"CREATE TABLE t (a INTEGER)", "INSERT INTO t VALUES (1)"}
	for range 2 {
		d, err := Open(t.Context(), path, steps)
		if err != nil {
			t.Fatal(err)
		}
		var n int
		if err := d.QueryRow("SELECT count(*) FROM t").Scan(&n); err != nil || n != 1 {
			t.Fatalf("rows %d, %v; a step ran twice or not at all", n, err)
		}
		var mode, sync string
		if err := d.QueryRow("PRAGMA journal_mode").Scan(&mode); err != nil || mode != "wal" {
			t.Fatalf("journal mode %q, %v", mode, err)
		}
		if err := d.QueryRow("PRAGMA synchronous").Scan(&sync); err != nil || sync != "2" {
			t.Fatalf("synchronous %q, %v: a commit would not be durable", sync, err)
		}
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o600 {
		t.Fatalf("%v, %v: others can read the database", st, err)
	}
	if _, err := Open(t.Context(), path, steps[:1]); err == nil || !strings.Contains(err.Error(), "newer") {
		t.Fatalf("an older program opened a newer database: %v", err)
	}
}
