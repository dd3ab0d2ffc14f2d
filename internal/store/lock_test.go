package store

import (
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A process that a killed executord was just starting has the lock for a moment longer.
// The next executord waits for that, and does not say that it is in use.
func TestLockOfAnOrphan(t *testing.T) {
	dir := t.TempDir()
	dead := exec.Command("true")
	if err := dead.Run(); err != nil {
		t.Fatal(err)
	}
	file, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Flock(int(file.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	if _, err := file.WriteString(strconv.Itoa(dead.Process.Pid)); err != nil {
		t.Fatal(err)
	}
	orphan := exec.Command("sleep", "0.3")
	orphan.ExtraFiles = []*os.File{file}
	if err := orphan.Start(); err != nil {
		t.Fatal(err)
	}
	begun := time.Now()
	file.Close()
	closeStore(t, open(t, dir))
	if took := time.Since(begun); took < 200*time.Millisecond {
		t.Errorf("the lock was not held: it took %v", took)
	}
	if err := orphan.Wait(); err != nil {
		t.Error(err)
	}
}
