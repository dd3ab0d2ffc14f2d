package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The runtime of the shipped program keeps no file of the host's open, as it would of
// the control groups that limit its processors: guests show it the same way as the role
// that waits for requests.
func TestRuntimeKeepsNoFiles(t *testing.T) {
	file := build(t)
	program, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer program.Close()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	ours, theirs := os.NewFile(uintptr(pair[0]), "ours"), os.NewFile(uintptr(pair[1]), "theirs")
	defer theirs.Close()
	cmd := exec.Command(file, "fork")
	cmd.ExtraFiles = []*os.File{theirs, program}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		ours.Close()
		if err := cmd.Wait(); err != nil {
			t.Errorf("it ends with its socket: %v", err)
		}
	}()
	// An answer, to a request that is none, says that it is up.
	if err := unix.Sendmsg(pair[0], []byte("x"), nil, nil, 0); err != nil {
		t.Fatal(err)
	}
	if n, err := unix.Poll([]unix.PollFd{{Fd: int32(pair[0]), Events: unix.POLLIN}}, int(time.Minute.Milliseconds())); err != nil || n != 1 {
		t.Fatalf("no answer: %d, %v", n, err)
	}
	dir := "/proc/" + strconv.Itoa(cmd.Process.Pid) + "/fd"
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) < 5 {
		t.Fatalf("%v, %v", entries, err)
	}
	for _, e := range entries {
		link, err := os.Readlink(filepath.Join(dir, e.Name()))
		if err == nil && strings.HasPrefix(link, "/") && link != os.DevNull && link != file {
			t.Errorf("descriptor %s: %s", e.Name(), link)
		}
	}
}
