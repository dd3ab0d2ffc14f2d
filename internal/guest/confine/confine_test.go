package confine

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// A thread that was confined stays so, and so does what it starts: the tests look at
// processes made for this.
const roleVariable = "CONFINE_TEST_ROLE"

func TestMain(m *testing.M) {
	switch os.Getenv(roleVariable) {
	case "":
		os.Exit(m.Run())
	case "child":
		report("child", "/proc/self/status")
	default:
		if err := confined(); err != nil {
			fmt.Println("error:", err)
			os.Exit(1)
		}
	}
}

// kept are the capabilities that the confined thread keeps.
func kept() []uint32 { return []uint32{unix.CAP_CHOWN, unix.CAP_KILL, unix.CAP_SETPCAP} }

// noHostname is a filter with which sethostname fails with EXDEV, an error that it
// never has.
func noHostname() []byte {
	var text []byte
	for _, f := range []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: 0}, // the number of the system call
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, Jf: 1, K: unix.SYS_SETHOSTNAME},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ERRNO | uint32(unix.EXDEV)},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW},
	} {
		text = binary.NativeEndian.AppendUint16(text, f.Code)
		text = append(text, f.Jt, f.Jf)
		text = binary.NativeEndian.AppendUint32(text, f.K)
	}
	return text
}

// report prints what the kernel says of a thread or process.
func report(who, status string) {
	text, err := os.ReadFile(status)
	if err != nil {
		fmt.Println("error:", err)
		return
	}
	for line := range strings.Lines(string(text)) {
		for _, name := range []string{"CapBnd:", "NoNewPrivs:", "Seccomp:"} {
			if value, ok := strings.CutPrefix(line, name); ok {
				fmt.Println(who, name, strings.TrimSpace(value))
			}
		}
	}
	// The call fails either way: with the filter's error, or because no name has a
	// negative length.
	_, _, errno := unix.RawSyscall(unix.SYS_SETHOSTNAME, 0, ^uintptr(0), 0)
	fmt.Println(who, "sethostname:", unix.ErrnoName(errno))
}

// confined confines one thread, starts a program on it, and reports on all.
func confined() error {
	tasks, err := os.Create(os.Getenv("CONFINE_TEST_TASKS"))
	if err != nil {
		return err
	}
	defer tasks.Close()
	var thread sync.WaitGroup
	thread.Go(func() {
		runtime.LockOSThread()
		err = Thread{Capabilities: kept(), Seccomp: noHostname(), Tasks: []*os.File{tasks}}.Apply()
		if err != nil {
			return
		}
		report("thread", fmt.Sprintf("/proc/self/task/%d/status", unix.Gettid()))
		var pid int
		pid, err = syscall.ForkExec("/proc/self/exe", []string{"child"}, &syscall.ProcAttr{
			Env: []string{roleVariable + "=child", "GORACE=atexit_sleep_ms=0"}, Files: []uintptr{0, 1, 2},
		})
		if err == nil {
			_, err = syscall.Wait4(pid, nil, 0, nil)
		}
	})
	thread.Wait()
	runtime.LockOSThread() // of the main goroutine, on another thread
	report("other", fmt.Sprintf("/proc/self/task/%d/status", unix.Gettid()))
	return err
}

func TestApply(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	tasks := filepath.Join(t.TempDir(), "tasks")
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), roleVariable+"=confined", "GORACE=atexit_sleep_ms=0", "CONFINE_TEST_TASKS="+tasks)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	bounding := 0
	for _, c := range kept() {
		bounding |= 1 << c
	}
	for _, who := range []string{"thread", "child"} {
		for _, want := range []string{fmt.Sprintf("CapBnd: %016x", bounding), "NoNewPrivs: 1", "Seccomp: 2", "sethostname: EXDEV"} {
			if !strings.Contains(string(out), who+" "+want+"\n") {
				t.Errorf("not %q", who+" "+want)
			}
		}
	}
	for _, want := range []string{"NoNewPrivs: 0", "Seccomp: 0", "sethostname: EINVAL"} {
		if !strings.Contains(string(out), "other "+want+"\n") {
			t.Errorf("not %q: the rest of the process is confined too", "other "+want)
		}
	}
	if t.Failed() {
		t.Logf("%s", out)
	}
	if text, err := os.ReadFile(tasks); err != nil || string(text) != "0" {
		t.Errorf("joined with %q, %v", text, err)
	}
}

func TestFilterIsRefused(t *testing.T) {
	for name, c := range map[string]struct {
		program []byte
		want    string
	}{
		"part of a record": {noHostname()[:20], "not a whole number"},
		"one byte":         {[]byte{1}, "not a whole number"},
		"too many records": {make([]byte, 8*(maxRecords+1)), "more than"},
		// 65537 records: as a number of 16 bits that is 1.
		"far too many": {make([]byte, 8*65537), "more than"},
	} {
		// Nothing of this reaches the kernel, so that the test stays as it is.
		if err := loadFilter(c.program); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
	if err := loadFilter(nil); err != nil {
		t.Errorf("no filter: %v", err)
	}
}

// TestKernelRefusesTheFilter loads what the kernel takes for no program.
func TestKernelRefusesTheFilter(t *testing.T) {
	var failed error
	var thread sync.WaitGroup
	thread.Go(func() {
		runtime.LockOSThread() // and never unlocked: should it be taken, the thread ends with it
		failed = loadFilter(make([]byte, 8))
	})
	thread.Wait()
	if failed == nil || !strings.Contains(failed.Error(), "load the seccomp filter") {
		t.Errorf("%v", failed)
	}
}

func TestTasksThatCannotBeJoined(t *testing.T) {
	f, err := os.CreateTemp(t.TempDir(), "tasks")
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
	if err := (Thread{Tasks: []*os.File{f}}).Apply(); !errors.Is(err, os.ErrClosed) || !strings.Contains(err.Error(), f.Name()) {
		t.Errorf("%v", err)
	}
}
