package forkserver

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The tests' program is all that takes part: the tests, the process that forks, and the
// guest, which tells what it was born with.
func TestMain(m *testing.M) {
	role := ""
	if len(os.Args) == 2 {
		role = os.Args[1]
	}
	switch role {
	case "fork":
		if err := Run(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	case "init":
		tell()
	default:
		os.Exit(m.Run())
	}
}

// born is what a guest finds.
type born struct {
	PID, UID, Parent int
	Env, Args        []string
	Files            map[string]string
	UIDMap, Groups   string
	Session          int
	Capabilities     bool
}

func tell() {
	b := born{PID: os.Getpid(), UID: os.Getuid(), Parent: os.Getppid(), Env: os.Environ(), Args: os.Args, Files: make(map[string]string)}
	entries, _ := os.ReadDir("/proc/thread-self/fd")
	for _, e := range entries {
		b.Files[e.Name()], _ = os.Readlink("/proc/thread-self/fd/" + e.Name())
	}
	text, _ := os.ReadFile("/proc/thread-self/uid_map")
	b.UIDMap = strings.Join(strings.Fields(string(text)), " ")
	text, _ = os.ReadFile("/proc/thread-self/setgroups")
	b.Groups = strings.TrimSpace(string(text))
	b.Session, _ = unix.Getsid(0)
	b.Capabilities = unix.Mount("tmpfs", "/tmp", "tmpfs", 0, "") == nil
	out := os.NewFile(3, "setup")
	_ = json.NewEncoder(out).Encode(b) // who does not get it fails
	// Until the other end is closed.
	_, _ = out.Read(make([]byte, 1))
}

// startServer starts the process that forks and returns the socket to ask it on.
func startServer(t *testing.T) (*os.File, *os.Process) {
	t.Helper()
	ours, theirs := pair(t, unix.SOCK_SEQPACKET)
	program, err := os.Open("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	defer program.Close()
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	// One that it was not meant to get.
	extra, err := os.Open("/")
	if err != nil {
		t.Fatal(err)
	}
	defer extra.Close()
	p, err := os.StartProcess("/proc/self/exe", []string{"server", "fork"}, &os.ProcAttr{
		Env: []string{"SECRET=1"}, Files: []*os.File{null, null, os.Stderr, theirs, program, extra},
	})
	theirs.Close()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ours.Close()
		if s, err := p.Wait(); err == nil && !s.Success() && !s.Sys().(syscall.WaitStatus).Signaled() {
			t.Errorf("the process that forks: %v", s)
		}
	})
	return ours, p
}

func pair(t *testing.T, kind int) (ours, theirs *os.File) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, kind|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	return os.NewFile(uintptr(fds[0]), "ours"), os.NewFile(uintptr(fds[1]), "theirs")
}

// own asks for a guest with ids that this user can give.
func own() Request {
	if os.Geteuid() == 0 {
		return Request{UID: 0x60000000, GID: 0x60000000, IDs: 65536, Setgroups: true}
	}
	return Request{UID: uint32(os.Geteuid()), GID: uint32(os.Getegid()), IDs: 1}
}

// dead waits for a process's end.
func dead(t *testing.T, pidfd int) {
	t.Helper()
	n, err := unix.Poll([]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}, 60_000)
	for err == unix.EINTR {
		n, err = unix.Poll([]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}, 60_000)
	}
	if err != nil || n != 1 {
		t.Errorf("the guest lives on: %d, %v", n, err)
	}
}

func TestGuestIsBornWithNothing(t *testing.T) {
	server, p := startServer(t)
	for range 3 { // one process forks many
		setup, theirs := pair(t, unix.SOCK_STREAM)
		pid, pidfd, err := Call(server, own(), theirs, nil)
		theirs.Close()
		if err != nil {
			t.Fatal(err)
		}
		var b born
		if err := json.NewDecoder(setup).Decode(&b); err != nil {
			t.Fatal(err)
		}
		if pid <= 1 || b.PID != 1 || b.Parent != 0 || b.UID != 0 || b.Session != 1 || !b.Capabilities || pid == p.Pid {
			t.Errorf("process %d: %+v", pid, b)
		}
		if len(b.Env) != 0 || strings.Join(b.Args, " ") != "executor-guest init" {
			t.Errorf("environment %q, arguments %q", b.Env, b.Args)
		}
		for fd, link := range b.Files {
			switch {
			case strings.Contains("0 1 2", fd) && (link == "/dev/null" || fd == "2"):
			case fd == "3" && strings.HasPrefix(link, "socket:"), strings.HasPrefix(link, "anon_inode:"):
			case strings.HasPrefix(link, "/proc/") && strings.HasSuffix(link, "/fd"): // by which it looked
			case strings.HasPrefix(link, "/sys/fs/cgroup/"): // the runtime's
			case link == "":
			default:
				t.Errorf("descriptor %s: %s", fd, link)
			}
		}
		want, groups := fmt.Sprintf("0 %d %d", own().UID, own().IDs), "deny"
		if own().Setgroups {
			groups = "allow"
		}
		if b.UIDMap != want || b.Groups != groups {
			t.Errorf("uid map %q, want %q; setgroups %s, want %s", b.UIDMap, want, b.Groups, groups)
		}
		setup.Close()
		dead(t, pidfd)
		// It was taken away by the kernel, and is not the server's zombie.
		for deadline := time.Now().Add(time.Minute); unix.Kill(pid, 0) == nil; time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatal("the guest is not reaped")
			}
		}
		unix.Close(pidfd)
	}
}

func TestGuestsOutliveTheServer(t *testing.T) {
	for _, end := range []string{"its socket is closed", "it is killed"} {
		t.Run(end, func(t *testing.T) {
			server, p := startServer(t)
			setup, theirs := pair(t, unix.SOCK_STREAM)
			_, pidfd, err := Call(server, own(), theirs, nil)
			theirs.Close()
			if err != nil {
				t.Fatal(err)
			}
			defer unix.Close(pidfd)
			if end == "it is killed" {
				if err := p.Kill(); err != nil {
					t.Fatal(err)
				}
			} else {
				server.Close()
			}
			if _, err := p.Wait(); err != nil {
				t.Fatal(err)
			}
			var b born
			if err := json.NewDecoder(setup).Decode(&b); err != nil || b.PID != 1 {
				t.Errorf("the guest: %+v, %v", b, err)
			}
			setup.Close()
			dead(t, pidfd)
		})
	}
}

func TestCallOfADeadServer(t *testing.T) {
	server, p := startServer(t)
	if err := p.Kill(); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if _, _, err := Call(server, own(), os.Stdin, nil); !errors.Is(err, ErrBroken) {
			t.Errorf("%v, want ErrBroken", err)
		}
	}
}

func TestRefusals(t *testing.T) {
	server, _ := startServer(t)
	_, theirs := pair(t, unix.SOCK_STREAM)
	defer theirs.Close()
	file, err := os.Open(filepath.Join("/proc", "self", "exe"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	for name, c := range map[string]struct {
		change func(*Request)
		want   error
	}{
		"no ids":                {func(r *Request) { r.IDs = 0 }, unix.EINVAL},
		"ids that are none":     {func(r *Request) { r.UID, r.IDs = 1<<32-1, 2 }, unix.EINVAL},
		"no group's descriptor": {func(r *Request) { r.Cgroup = true }, unix.EBADF},
	} {
		r := own()
		c.change(&r)
		_, _, err := Call(server, r, theirs, file)
		if errno := syscall.Errno(0); err == nil || errors.Is(err, ErrBroken) || !errors.As(err, &errno) {
			t.Errorf("%s: %v, want an error of the kernel such as %v", name, err, c.want)
		}
	}
	// After all that it still works.
	setup, theirs := pair(t, unix.SOCK_STREAM)
	_, pidfd, err := Call(server, own(), theirs, nil)
	if err := errors.Join(err, theirs.Close(), setup.Close()); err != nil {
		t.Fatal(err)
	}
	dead(t, pidfd)
	unix.Close(pidfd)
}

func TestNonsenseIsRefused(t *testing.T) {
	server, _ := startServer(t)
	for _, text := range [][]byte{[]byte("x"), bytes.Repeat([]byte{1}, requestSize), bytes.Repeat([]byte{1}, 100)} {
		if err := unix.Sendmsg(int(server.Fd()), text, nil, nil, 0); err != nil {
			t.Fatal(err)
		}
		b := make([]byte, maxAnswer)
		n, err := unix.Read(int(server.Fd()), b)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := decodeAnswer(b[:n], 0); err == nil || errors.Is(err, ErrBroken) {
			t.Errorf("%d bytes: %v", len(text), err)
		}
	}
}

func TestMessages(t *testing.T) {
	for _, r := range []Request{{}, {UID: 1, GID: 2, IDs: 3}, {UID: 1<<32 - 1, Setgroups: true}, {GID: 1<<32 - 1, Cgroup: true}, {1, 2, 3, true, true, true}, {HostNetwork: true}} {
		if got, err := decode(r.Encode()); err != nil || got != r {
			t.Errorf("%+v became %+v, %v", r, got, err)
		}
	}
	if pid, err := decodeAnswer(encodeAnswer(42, nil), 1); pid != 42 || err != nil {
		t.Errorf("process 42 became %d, %v", pid, err)
	}
	wrapped := fmt.Errorf("open: %w", unix.ENOSPC)
	if _, err := decodeAnswer(encodeAnswer(0, wrapped), 0); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("%v became %v", wrapped, err)
	}
	long := errors.New(strings.Repeat("long ", 5000))
	if b := encodeAnswer(0, long); len(b) > maxAnswer {
		t.Errorf("an answer of %d bytes", len(b))
	} else if _, err := decodeAnswer(b, 0); err == nil || !strings.HasPrefix(err.Error(), "long long") {
		t.Errorf("became %v", err)
	}
}

func FuzzDecode(f *testing.F) {
	f.Add([]byte("0123456789abcdef"), encodeAnswer(7, nil), 1)
	f.Add([]byte{}, encodeAnswer(0, unix.EPERM), 0)
	f.Fuzz(func(t *testing.T, request, answer []byte, fds int) {
		if r, err := decode(request); err == nil && len(r.Encode()) != len(request) {
			t.Errorf("%x became %+v", request, r)
		}
		if pid, err := decodeAnswer(answer, fds); err == nil && (pid <= 0 || fds != 1) {
			t.Errorf("%x with %d descriptors became process %d", answer, fds, pid)
		}
	})
}
