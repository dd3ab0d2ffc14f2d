package guest

import (
	"bytes"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
	"github.com/harvest-run/executord/internal/guest/wire"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
)

// socketPair is a connected pair; the test's end is closed with the test, the other by
// whoever takes it.
func socketPair(t *testing.T) (ours, theirs int) {
	t.Helper()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	return pair[0], pair[1]
}

func TestReceiveSetup(t *testing.T) {
	setup := &guestv1.Setup{Hostname: "box", Seccomp: randomBytes(1, 5000), ListenerFd: 2, HeldFds: []uint32{0}}
	var b bytes.Buffer
	if err := wire.Write(&b, setup); err != nil {
		t.Fatal(err)
	}
	text := b.Bytes()
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	rights := func(n int) []byte {
		fds := make([]int, n)
		for i := range fds {
			fds[i] = int(null.Fd())
		}
		return unix.UnixRights(fds...)
	}
	for name, c := range map[string]struct {
		send func(fd int) error
		fds  int
		err  string
	}{
		"in one piece": {func(fd int) error { return unix.Sendmsg(fd, text, rights(3), nil, 0) }, 3, ""},
		"in two pieces": {func(fd int) error {
			if err := unix.Sendmsg(fd, text[:4], rights(2), nil, 0); err != nil {
				return err
			}
			return unix.Sendmsg(fd, text[4:], rights(1), nil, 0)
		}, 3, ""},
		"without descriptors":  {func(fd int) error { return unix.Sendmsg(fd, text, nil, nil, 0) }, 0, ""},
		"nothing":              {func(int) error { return nil }, 0, "EOF"},
		"half":                 {func(fd int) error { return unix.Sendmsg(fd, text[:100], rights(1), nil, 0) }, 0, "unexpected EOF"},
		"garbage":              {func(fd int) error { return unix.Sendmsg(fd, bytes.Repeat([]byte{255}, 100), nil, nil, 0) }, 0, "over the limit"},
		"too many descriptors": {func(fd int) error { return unix.Sendmsg(fd, text, rights(maxSetupFDs+1), nil, 0) }, 0, "more descriptors"},
	} {
		t.Run(name, func(t *testing.T) {
			ours, theirs := socketPair(t)
			defer unix.Close(theirs)
			if err := c.send(ours); err != nil {
				t.Fatal(err)
			}
			unix.Close(ours)
			got, fds, err := receiveSetup(theirs)
			if c.err != "" {
				if err == nil || !strings.Contains(err.Error(), c.err) {
					t.Errorf("%v, want %q", err, c.err)
				}
				return
			}
			if err != nil || !proto.Equal(got, setup) || len(fds) != c.fds {
				t.Errorf("%d descriptors, %v", len(fds), err)
			}
			for _, fd := range fds {
				if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC == 0 {
					t.Errorf("descriptor %d would go to programs: %v", fd, err)
				}
				unix.Close(fd)
			}
		})
	}
}

func TestBuildRefusesWrongDescriptors(t *testing.T) {
	one := uint32(1)
	for name, setup := range map[string]*guestv1.Setup{
		"listener": {ListenerFd: 1},
		"cgroup":   {CgroupFd: &one},
		"tasks":    {TaskFds: []uint32{1 << 31}},
	} {
		if _, _, err := build(setup, nil); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestRunInitTellsWhatIsWrong(t *testing.T) {
	ours, theirs := socketPair(t)
	conn := os.NewFile(uintptr(ours), "ours")
	defer conn.Close()
	if err := wire.Write(conn, &guestv1.Setup{ListenerFd: 9}); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), roleVariable+"=init", noRaceSleep)
	cmd.ExtraFiles = []*os.File{os.NewFile(uintptr(theirs), "theirs")}
	out, err := cmd.CombinedOutput()
	cmd.ExtraFiles[0].Close()
	if err == nil || !strings.Contains(string(out), "descriptor 9 of 0 for listener") {
		t.Errorf("%v, %s", err, out)
	}
	result := new(guestv1.SetupResult)
	if _, err := (&wire.Reader{R: conn}).Read(result); err != nil || !strings.Contains(result.GetError(), "descriptor 9 of 0 for listener") {
		t.Errorf("told %v, %v", result, err)
	}
	if n, err := conn.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("told more: %d, %v", n, err)
	}
}

// underFire is process 1 of a namespace in which a program sends it every signal.
func underFire() error {
	shrugOffSignals()
	self, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return err
	}
	pid, err := syscall.ForkExec(self, []string{self, "attack"}, &syscall.ProcAttr{
		Env: []string{roleVariable + "=program", noRaceSleep}, Files: []uintptr{0, 1, 2},
	})
	if err != nil {
		return err
	}
	var status syscall.WaitStatus
	if _, err := syscall.Wait4(pid, &status, 0, nil); err != nil {
		return err
	}
	_, err = os.Stdout.WriteString("still here\n")
	return err
}

func TestSignalsDoNotEndProcess1(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), roleVariable+"=underFire", noRaceSleep)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID}
	out, err := cmd.CombinedOutput()
	if err != nil || string(out) != "attacked\nstill here\n" {
		t.Errorf("%v\n%.2000s", err, out)
	}
}
