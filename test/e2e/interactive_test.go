package e2e

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/harvest-run/executord/client"
	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
)

// person sits at a terminal at which executorctl runs.
type person struct {
	t      *testing.T
	cmd    *exec.Cmd
	keys   *os.File // the terminal's other end
	line   *os.File
	before unix.Termios
	sees   sync.WaitGroup
	mu     sync.Mutex
	screen bytes.Buffer
}

// sit runs executorctl at a terminal of 24 by 80, which controls a session of its own.
func (d *daemon) sit(args ...string) *person {
	d.t.Helper()
	keys, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		d.t.Skip("no pseudo-terminals: ", err)
	}
	fd := int(keys.Fd())
	n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err := errors.Join(err, unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0), unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &unix.Winsize{Row: 24, Col: 80})); err != nil {
		d.t.Fatal(err)
	}
	line, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		d.t.Fatal(err)
	}
	p := &person{t: d.t, keys: keys, line: line}
	p.before = p.attributes()
	p.cmd = exec.Command(filepath.Join(binaries, "executorctl"), args...)
	p.cmd.Env = append(os.Environ(), "EXECUTOR_ADDRESS="+d.address())
	p.cmd.Stdin, p.cmd.Stdout, p.cmd.Stderr = line, line, line
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := p.cmd.Start(); err != nil {
		d.t.Fatal(err)
	}
	p.sees.Go(func() {
		piece := make([]byte, 4096)
		for {
			n, err := keys.Read(piece)
			p.mu.Lock()
			p.screen.Write(piece[:n])
			p.mu.Unlock()
			if err != nil {
				return
			}
		}
	})
	d.t.Cleanup(func() {
		_ = p.cmd.Process.Kill()
		_ = p.cmd.Wait()
		line.Close()
		p.sees.Wait() // the last who held the line is gone: EIO
		keys.Close()
	})
	return p
}

func (p *person) attributes() unix.Termios {
	p.t.Helper()
	a, err := unix.IoctlGetTermios(int(p.line.Fd()), unix.TCGETS)
	if err != nil {
		p.t.Fatal(err)
	}
	return *a
}

func (p *person) seen() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.screen.String()
}

func (p *person) until(text string) {
	p.t.Helper()
	for range 6000 {
		if strings.Contains(p.seen(), text) {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	p.t.Fatalf("%q is never seen, only %q", text, p.seen())
}

func (p *person) press(keys string) {
	p.t.Helper()
	if _, err := p.keys.WriteString(keys); err != nil {
		p.t.Fatal(err)
	}
}

func (p *person) resize(rows, columns uint16) {
	p.t.Helper()
	if err := unix.IoctlSetWinsize(int(p.keys.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: rows, Col: columns}); err != nil {
		p.t.Fatal(err)
	}
}

// leaves waits for the end of executorctl and sees that the terminal is as it was.
func (p *person) leaves(code int) {
	p.t.Helper()
	ended := make(chan struct{})
	var waiting sync.WaitGroup
	waiting.Go(func() { _ = p.cmd.Wait(); close(ended) })
	select {
	case <-ended:
	case <-time.After(time.Minute):
		_ = p.cmd.Process.Kill()
		p.t.Errorf("it does not end; seen: %q", p.seen())
	}
	waiting.Wait()
	if got := p.cmd.ProcessState.ExitCode(); got != code {
		p.t.Errorf("exit code %d, want %d; seen: %q", got, code, p.seen())
	}
	if after := p.attributes(); after != p.before {
		p.t.Errorf("the terminal is left as %+v, was %+v", after, p.before)
	}
}

// A shell at a terminal, as somebody uses it.
func TestInteractiveShell(t *testing.T) {
	d := start(t)
	p := d.sit("run", "-it", "-e", "PS1=ready> ", "--", "bash", "--norc", "--noprofile")
	p.until("ready> ")
	p.press("stty size; tty; echo $TERM\r")
	p.until("24 80\r\n/dev/pts/0\r\nxterm-256color\r\n")
	p.resize(50, 132)
	p.until("ready> ")
	for range 100 { // until the size has come through
		p.press("stty size\r")
		time.Sleep(50 * time.Millisecond)
		if strings.Contains(p.seen(), "50 132") {
			break
		}
	}
	p.until("50 132")
	// Ctrl-C goes to the program, and only ends what is in its foreground.
	p.press("sleep 1000; echo code $?\r")
	time.Sleep(300 * time.Millisecond)
	p.press("\x03")
	p.press("echo code $?\r")
	p.until("code 130")
	// Ctrl-Z, and back.
	p.press("cat\r")
	time.Sleep(200 * time.Millisecond)
	p.press("\x1a")
	p.until("Stopped")
	p.press("fg\r")
	time.Sleep(200 * time.Millisecond)
	p.press("still here\r")
	p.until("still here\r\nstill here")
	p.press("\x04")
	// Bytes of eight bits.
	p.press("printf 'gr\xc3\xbc\xc3\x9fe' | od -An -tx1\r")
	p.until("67 72 c3 bc c3 9f 65")
	p.press("exit 7\r")
	p.leaves(7)
}

// Full-screen programs get their terminal.
func TestFullScreen(t *testing.T) {
	if _, err := exec.LookPath("vim"); err != nil {
		if _, err := exec.LookPath("less"); err != nil {
			t.Skip("neither vim nor less is installed")
		}
	}
	d := start(t)
	if _, err := exec.LookPath("vim"); err == nil {
		p := d.sit("run", "-it", "--", "sh", "-c", "vim -u NONE -N file && cat file")
		p.until("~")
		p.press("ihello from vim\x1b:wq\r")
		p.until("hello from vim\r\n")
		p.leaves(0)
	}
	if _, err := exec.LookPath("less"); err == nil {
		p := d.sit("run", "-it", "--", "sh", "-c", "seq 1000 | less")
		p.until("\n20\r\n")
		p.press("G")
		p.until("1000")
		p.press("q")
		p.leaves(0)
	}
}

// Whatever ends executorctl, the terminal is as it was, and the program goes on.
func TestTerminalIsGivenBack(t *testing.T) {
	d := start(t)
	for sig, code := range map[syscall.Signal]int{syscall.SIGTERM: 143, syscall.SIGHUP: 129} {
		p := d.sit("run", "-it", "--", "sh", "-c", "echo ready; cat")
		p.until("ready")
		if p.attributes().Lflag&unix.ICANON != 0 {
			t.Error("the terminal is not raw")
		}
		if err := p.cmd.Process.Signal(sig); err != nil {
			t.Fatal(err)
		}
		p.leaves(code)
		p.until("which goes on")
	}
	// A program that leaves its own terminal raw does nothing to this one.
	p := d.sit("run", "-it", "--", "sh", "-c", "stty raw -echo; echo ready; exit 3")
	p.until("ready")
	p.leaves(3)
	p = d.sit("run", "-it", "--", "sh", "-c", "echo ready; kill -KILL $$")
	p.leaves(137)
	p = d.sit("run", "-it", "--timeout", "500ms", "--grace", "100ms", "--", "cat")
	p.leaves(124)
	p = d.sit("run", "-it", "--", "no-such-program")
	p.leaves(127)
}

func TestAttachAndTakeOver(t *testing.T) {
	d := start(t)
	first := d.sit("run", "-it", "--", "sh", "-c", "stty -echo; echo ready; while read -r line; do echo \"got $line\"; done")
	first.until("ready")
	first.press("one\r")
	first.until("got one")
	first.press("~.")
	first.leaves(0)
	out, _, _ := d.ctl("executions", "list", "-o", "name")
	name := strings.Fields(out)[0]
	second := d.sit("executions", "attach", name)
	second.until("ready\r\ngot one") // what was said so far
	second.press("two\r")
	second.until("got two")
	if _, stderr, code := d.ctlStdin("x", "executions", "attach", name); code != 125 || !strings.Contains(stderr, "--take-over") {
		t.Errorf("exit code %d, %s", code, stderr)
	}
	third := d.sit("executions", "attach", "--take-over", name)
	second.leaves(125)
	second.until("taken over")
	third.until("got two")
	third.press("three\r")
	third.until("got three")
	// Signals from another place.
	if _, stderr, code := d.ctl("executions", "signal", name, "INT", "--scope", "group"); code != 0 {
		t.Errorf("exit code %d, %s", code, stderr)
	}
	third.leaves(130)
}

// executorctl run -i: bytes as they are, the end, and no waiting for a stdin that stays
// open.
func TestForwardedStdin(t *testing.T) {
	d := start(t)
	data := make([]byte, 10<<20)
	_, _ = rand.NewChaCha8([32]byte{5}).Read(data)
	sum := sha256.Sum256(data)
	out, stderr, code := d.ctlStdin(string(data), "run", "-i", "--", "sha256sum")
	if code != 0 || strings.Fields(out + " ?")[0] != hex.EncodeToString(sum[:]) {
		t.Errorf("exit code %d, %q, %s", code, out, stderr)
	}
	out, stderr, code = d.ctlStdin(string(data[:3<<20]), "run", "-i", "--", "cat")
	if code != 0 || out != string(data[:3<<20]) {
		t.Errorf("exit code %d, %d bytes, %s", code, len(out), stderr)
	}
	// Closed early, and never read.
	if out, stderr, code = d.ctlStdin(string(data), "run", "-i", "--", "head", "-c", "5"); code != 0 || out != string(data[:5]) {
		t.Errorf("exit code %d, %q, %s", code, out, stderr)
	}
	if _, stderr, code = d.ctlStdin(string(data), "run", "-i", "--", "sh", "-c", "sleep 0.5; exit 9"); code != 9 {
		t.Errorf("exit code %d, %s", code, stderr)
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	cmd := exec.Command(filepath.Join(binaries, "executorctl"), "--address", d.address(), "run", "-i", "--", "sh", "-c", "exit 4")
	cmd.Stdin = r
	if err := cmd.Run(); cmd.ProcessState.ExitCode() != 4 {
		t.Errorf("with a stdin that stays open: %v", err)
	}
}

// numbered is a program that checks that the lines it reads are numbered without a
// hole or a repetition, and tells how many there were.
const numbered = `
import sys
expect = 0
for line in sys.stdin.buffer:
    if line != b"line %d of many, many lines\n" % expect:
        print("expected", expect, "and read", line); sys.exit(1)
    expect += 1
    if expect % 1000 == 0: print("at", expect)
print("read", expect)
`

// kill -9 of executord while input is on its way: nothing is lost, nothing comes twice.
func TestKillInMidInput(t *testing.T) {
	d := start(t, "--on-stop", "terminate")
	c := d.dial()
	command := python(numbered)
	command.Stdin = true
	a, err := c.Interact(t.Context(), &executorv1.ExecuteRequest{Command: command})
	if err != nil {
		t.Fatal(err)
	}
	const lines = 60_000
	k := newChecker()
	var hands sync.WaitGroup
	var followErr, writeErr error
	hands.Go(func() { followErr = k.follow(a.Stream) })
	hands.Go(func() {
		var piece bytes.Buffer
		for i := range lines {
			fmt.Fprintf(&piece, "line %d of many, many lines\n", i)
			if i%97 == 0 || i == lines-1 {
				if _, writeErr = a.Write(piece.Bytes()); writeErr != nil {
					return
				}
				piece.Reset()
				time.Sleep(2 * time.Millisecond)
			}
		}
		a.CloseInput()
	})
	for a.Committed() == 0 { // one that has not been started is not taken up
		time.Sleep(time.Millisecond)
	}
	for range repetitions(t, 5) {
		time.Sleep(time.Duration(rand.IntN(400)) * time.Millisecond)
		d.kill()
		time.Sleep(time.Duration(rand.IntN(150)) * time.Millisecond)
		d.up()
	}
	hands.Wait()
	if err := errors.Join(followErr, writeErr, k.err); err != nil {
		t.Fatalf("%v; %v; the program says …%q; %d bytes are committed", err, k.result, tail([]byte(k.stdout()), 200), a.Committed())
	}
	if want := fmt.Sprintf("read %d\n", lines); !strings.HasSuffix(k.stdout(), want) || k.result.GetExitCode() != 0 {
		t.Errorf("%v; the program says …%q", k.result, tail([]byte(k.stdout()), 200))
	}
}

// The same for unary writes, by the offset that the server tells.
func TestWriteInputSurvivesAKill(t *testing.T) {
	d := start(t)
	c := d.dial()
	command := argv("cat")
	command.Stdin = true
	s, err := c.Execute(t.Context(), &executorv1.ExecuteRequest{Command: command})
	if err != nil {
		t.Fatal(err)
	}
	data := make([]byte, 400_000)
	_, _ = rand.NewChaCha8([32]byte{6}).Read(data)
	k := newChecker()
	var hands sync.WaitGroup
	var followErr, writeErr error
	hands.Go(func() { followErr = k.follow(s) })
	begun := make(chan struct{})
	hands.Go(func() {
		for at := int64(0); at < int64(len(data)) && writeErr == nil; {
			if at >= 20_000 {
				select {
				case <-begun:
				default:
					close(begun) // as above
				}
			}
			n := min(20_000, int64(len(data))-at)
			at, writeErr = c.WriteInput(t.Context(), s.Name(), at, data[at:at+n], at+n == int64(len(data)))
			time.Sleep(20 * time.Millisecond)
		}
	})
	<-begun
	for range 2 {
		time.Sleep(100 * time.Millisecond)
		d.kill()
		d.up()
	}
	hands.Wait()
	// The program ends at its end of file: the answer to the last write may be that.
	if client.Reason(writeErr) == "EXECUTION_ENDED" {
		writeErr = nil
	}
	if err := errors.Join(followErr, writeErr, k.err); err != nil {
		t.Fatal(err)
	}
	if k.stdout() != string(data) {
		t.Errorf("%d bytes came back, want %d", len(k.stdout()), len(data))
	}
}

// A program that never reads its input costs executord nothing but a pipe.
func TestInputThatNobodyReads(t *testing.T) {
	d := start(t)
	c := d.dial()
	command := bash("echo ready; sleep 1000")
	command.Stdin = true
	a, err := c.Interact(t.Context(), &executorv1.ExecuteRequest{Command: command})
	if err != nil {
		t.Fatal(err)
	}
	var hands sync.WaitGroup
	hands.Go(func() {
		for {
			if _, err := a.Recv(); err != nil {
				if !errors.Is(err, io.EOF) {
					t.Error(err)
				}
				return
			}
		}
	})
	before := rss(t, d.process.Process.Pid)
	var writing sync.WaitGroup
	accepted := 0
	writing.Go(func() { accepted, _ = a.Write(make([]byte, 1<<30)) })
	time.Sleep(2 * time.Second)
	if grown := rss(t, d.process.Process.Pid) - before; grown > 32<<20 {
		t.Errorf("executord has grown by %d MiB", grown>>20)
	}
	if _, err := c.Cancel(t.Context(), &executorv1.CancelExecutionRequest{Name: a.Name(), GracePeriod: durationpb.New(0)}); err != nil {
		t.Fatal(err)
	}
	writing.Wait()
	hands.Wait()
	if accepted > 4<<20 {
		t.Errorf("%d bytes were accepted", accepted)
	}
}

// What is stopped stays so until it is told to go on, or its time is up.
func TestStoppedProgram(t *testing.T) {
	d := start(t)
	c := d.dial()
	command := bash("trap 'echo went on' CONT; echo ready; while :; do sleep 0.05; done")
	command.Timeout, command.GracePeriod = durationpb.New(5*time.Second), durationpb.New(200*time.Millisecond)
	s, err := c.Execute(t.Context(), &executorv1.ExecuteRequest{Command: command})
	if err != nil {
		t.Fatal(err)
	}
	k := newChecker()
	until := func(text string) {
		t.Helper()
		for !strings.Contains(k.stdout(), text) && k.result == nil {
			e, err := s.Recv()
			if err != nil {
				t.Fatal(err)
			}
			k.take(e)
		}
	}
	send := func(sig syscall.Signal) {
		t.Helper()
		if err := c.Signal(t.Context(), &executorv1.SignalExecutionRequest{Name: s.Name(), Signal: int32(sig), Scope: executorv1.SignalScope_SIGNAL_SCOPE_TREE}); err != nil {
			t.Fatal(err)
		}
	}
	until("ready")
	send(syscall.SIGSTOP)
	send(syscall.SIGCONT)
	until("went on")
	send(syscall.SIGSTOP)
	if err := k.follow(s); err != nil {
		t.Fatal(err)
	}
	k.wants(t, executorv1.Reason_REASON_TIMED_OUT)
	if !strings.Contains(k.stdout(), "went on") {
		t.Errorf("stdout %q", k.stdout())
	}
	err = c.Signal(t.Context(), &executorv1.SignalExecutionRequest{Name: s.Name(), Signal: 15, Scope: executorv1.SignalScope_SIGNAL_SCOPE_PROCESS})
	if client.Reason(err) != "EXECUTION_ENDED" {
		t.Errorf("%v", err)
	}
}
