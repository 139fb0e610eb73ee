//go:build unix

package outbox

import "golang.org/x/sys/unix"

// free is the space on the disk of dir that this user may still fill, in bytes.
func free(dir string) (int64, error) {
	var s unix.Statfs_t
	if err := unix.Statfs(dir, &s); err != nil {
		return 0, err
	}
	return int64(s.Bavail) * int64(s.Bsize), nil
}
