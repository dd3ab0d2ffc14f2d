package cli

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/harvest-run/executord/client/clienttest"
	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
)

// terminal is a pseudo-terminal: keys are typed at one end, the command has the other.
type terminal struct {
	keys, line *os.File
	reading    sync.WaitGroup
	shown      output
}

// openTerminal opens a terminal of 24 by 80.
func openTerminal(t *testing.T) *terminal {
	t.Helper()
	keys, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Skip("no pseudo-terminals: ", err)
	}
	var line *os.File
	raw, err := keys.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	err = errors.Join(raw.Control(func(fd uintptr) {
		if err = unix.IoctlSetPointerInt(int(fd), unix.TIOCSPTLCK, 0); err != nil {
			return
		}
		n, e := unix.IoctlGetInt(int(fd), unix.TIOCGPTN)
		if err = e; err != nil {
			return
		}
		line, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	}), err)
	if err != nil {
		t.Fatal(err)
	}
	tt := &terminal{keys: keys, line: line}
	tt.resize(t, 24, 80)
	tt.reading.Go(func() { _, _ = io.Copy(&tt.shown, keys) })
	t.Cleanup(func() {
		line.Close()
		keys.Close()
		tt.reading.Wait()
	})
	return tt
}

func (tt *terminal) resize(t *testing.T, rows, columns uint16) {
	t.Helper()
	if err := unix.IoctlSetWinsize(int(tt.line.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: rows, Col: columns}); err != nil {
		t.Fatal(err)
	}
}

func (tt *terminal) attributes(t *testing.T) unix.Termios {
	t.Helper()
	a, err := unix.IoctlGetTermios(int(tt.line.Fd()), unix.TCGETS)
	if err != nil {
		t.Fatal(err)
	}
	return *a
}

func (tt *terminal) raw(t *testing.T) bool { return tt.attributes(t).Lflag&unix.ICANON == 0 }

func (tt *terminal) press(t *testing.T, keys string) {
	t.Helper()
	if _, err := tt.keys.WriteString(keys); err != nil {
		t.Fatal(err)
	}
}

func (tt *terminal) until(t *testing.T, text string) {
	t.Helper()
	eventually(t, fmt.Sprintf("the terminal shows %q", text), func() bool { return strings.Contains(tt.shown.String(), text) })
}

// sitting is a command that runs at a terminal beside the test.
type sitting struct {
	*terminal
	stderr              output
	interrupts, signals chan os.Signal
	running             sync.WaitGroup
	code                int
	before              unix.Termios
}

func sit(t *testing.T, s *clienttest.Server, line string) *sitting {
	t.Helper()
	c := &sitting{terminal: openTerminal(t), interrupts: make(chan os.Signal, 2), signals: make(chan os.Signal, 2)}
	c.before = c.attributes(t)
	i := invocation{args: command(line), input: c.line, interrupts: c.interrupts, signals: c.signals}
	c.running.Go(func() { c.code = i.start(t, s, c.line, &c.stderr) })
	return c
}

// end waits for the command and sees that the terminal is as it was.
func (c *sitting) end(t *testing.T, code int, stderr string) {
	t.Helper()
	c.running.Wait()
	if c.code != code || c.stderr.String() != stderr {
		t.Errorf("exit code %d, want %d; stderr %q, want %q", c.code, code, c.stderr.String(), stderr)
	}
	if after := c.attributes(t); after != c.before {
		t.Errorf("the terminal is left as %+v, was %+v", after, c.before)
	}
}

func TestRunOnATerminal(t *testing.T) {
	s := clienttest.Start(t)
	c := sit(t, s, "run -it -- 'out ready' line line size size 'exit 3'")
	c.until(t, "ready")
	if !c.raw(t) {
		t.Error("the terminal is not raw")
	}
	c.press(t, "one \x03\x04\x1a\xff\r")
	c.until(t, "one \x03\x04\x1a\xff\n")
	c.press(t, "~~two\r")
	c.until(t, "~two\n")
	c.until(t, "24x80\n")
	c.resize(t, 50, 132)
	c.signals <- unix.SIGWINCH
	c.until(t, "50x132\n")
	c.end(t, 3, "")
	r := s.Calls("Execute")[0].(*executorv1.ExecuteRequest).GetCommand()
	if !r.GetStdin() || r.GetTerminal().GetRows() != 24 || r.GetTerminal().GetColumns() != 80 {
		t.Errorf("asked for %v", r)
	}
}

func TestDetachFromATerminal(t *testing.T) {
	s := clienttest.Start(t)
	c := sit(t, s, "run -it -- 'out ready' cat")
	c.until(t, "ready")
	c.press(t, "a line\r")
	c.until(t, "a line")
	c.press(t, "~.")
	c.end(t, 0, "executorctl: left executions/x1, which goes on\nhint: executorctl executions attach executions/x1 --after e1/3\n")
	if n := len(s.Calls("CancelExecution")); n > 0 {
		t.Error("it was cancelled")
	}
	// And back, with what was said so far.
	c = sit(t, s, "executions attach x1")
	c.until(t, "ready\na line")
	c.press(t, "more\r")
	c.until(t, "more")
	// Another client, on another terminal.
	d := sit(t, s, "executions attach x1")
	d.end(t, 125, "executorctl: follow executions/x1: another writer is attached to executions/x1\nhint: --take-over ends the other's attachment; executorctl executions watch only follows\n")
	d = sit(t, s, "executions attach x1 --take-over")
	c.end(t, 125, "executorctl: follow executions/x1: another writer has taken over\nhint: it goes on; executorctl executions attach --take-over takes it back\n")
	d.until(t, "more")
	d.press(t, "of d\r")
	d.until(t, "of d")
	d.press(t, "~.")
	d.running.Wait()
}

func TestSignalsGiveTheTerminalBack(t *testing.T) {
	s := clienttest.Start(t)
	for sig, code := range map[syscall.Signal]int{unix.SIGTERM: 143, unix.SIGHUP: 129} {
		c := sit(t, s, "run -it -- 'out ready' cat")
		c.until(t, "ready")
		c.signals <- sig
		c.running.Wait()
		if c.code != code || !strings.Contains(c.stderr.String(), "which goes on") {
			t.Errorf("%v: exit code %d, %q", sig, c.code, c.stderr.String())
		}
		c.end(t, code, c.stderr.String())
	}
}

func TestServerGoesAwayAtATerminal(t *testing.T) {
	s := clienttest.Start(t)
	c := sit(t, s, "run -it --max-outage 100ms -- 'out ready' cat")
	c.until(t, "ready")
	s.Stop()
	c.running.Wait()
	if c.code != 125 || !strings.Contains(c.stderr.String(), "hint: executorctl executions attach executions/x1") {
		t.Errorf("exit code %d, %q", c.code, c.stderr.String())
	}
	c.end(t, 125, c.stderr.String())
}

// Without -t, or without a terminal here, nothing is raw and Ctrl-C cancels.
func TestCtrlCWithoutATerminal(t *testing.T) {
	s := clienttest.Start(t)
	for _, line := range []string{"run -i -- 'out ready' cat", "run -t -- 'out ready' await"} {
		c := sit(t, s, line)
		c.until(t, "ready")
		if c.raw(t) {
			t.Errorf("%s: the terminal is raw", line)
		}
		c.interrupts <- os.Interrupt
		c.end(t, 130, "executorctl: cancelling; ctrl-c again leaves it\nexecutorctl: cancelled by ann@box ctrl-c\n")
	}
	c := sit(t, s, "run -i -- cat")
	c.press(t, "a line\n\x04")
	c.until(t, "a line\r\na line")
	c.end(t, 0, "")
}

func TestForwardedInput(t *testing.T) {
	s := clienttest.Start(t)
	data := strings.Repeat("0123456789\x00\xff\r\n~.\n", 50_000)
	got := invocation{args: command("run -i -- cat"), stdin: data}.run(t, s)
	if got.code != 0 || got.stdout != data || got.stderr != "" {
		t.Errorf("exit code %d, %d of %d bytes, %q", got.code, len(got.stdout), len(data), got.stderr)
	}
	got = invocation{args: command("run -it -- 'line' 'exit 4'"), stdin: "a line\n~.\n"}.run(t, s)
	if got.code != 4 || got.stdout != "a line\n" {
		t.Errorf("exit code %d, %q, %q", got.code, got.stdout, got.stderr)
	}
	got = invocation{args: command("executions attach x1"), stdin: "x"}.run(t, s)
	if got.code != 0 || got.stdout != data {
		t.Errorf("exit code %d, %d bytes, %q", got.code, len(got.stdout), got.stderr)
	}
}

// A program that ends, or closes its stdin, is not held up by a stdin that stays open.
func TestOpenStdinHoldsNothingUp(t *testing.T) {
	s := clienttest.Start(t)
	for line, code := range map[string]int{"run -i -- 'out x' 'exit 3'": 3, "run -i -- line shut 'exit 4'": 4, "run -i -- 'refuse INVALID_ARGUMENT NO - no'": 125} {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := w.WriteString("a line\n"); err != nil {
			t.Fatal(err)
		}
		var stdout, stderr bytes.Buffer
		begun := time.Now()
		if got := (invocation{args: command(line), input: r}).start(t, s, &stdout, &stderr); got != code {
			t.Errorf("%s: exit code %d, %q", line, got, stderr.String())
		}
		if time.Since(begun) > 30*time.Second {
			t.Errorf("%s took %v", line, time.Since(begun))
		}
		r.Close()
		w.Close()
	}
}

func TestSignalCommand(t *testing.T) {
	s := clienttest.Start(t)
	f := follow(t, s, "run -- 'out ready' signalled signalled signalled signalled")
	f.until(t, "ready")
	for _, line := range []string{"x1 TERM", "executions/x1 SIGusr1 --scope group", "x1 37 --scope tree", "x1 hup --scope process"} {
		if got := (invocation{args: command("executions signal " + line)}).run(t, s); got != (outcome{}) {
			t.Errorf("%s: %+v", line, got)
		}
	}
	f.end(t, 0, "ready\nsignal 15 SIGNAL_SCOPE_UNSPECIFIED\nsignal 10 SIGNAL_SCOPE_GROUP\nsignal 37 SIGNAL_SCOPE_TREE\nsignal 1 SIGNAL_SCOPE_PROCESS\n", "")
	for line, code := range map[string]int{
		"x1 TERM": 1, "x2 TERM": 1, "x1 NOPE": 2, "x1 0": 2, "x1 65": 2, "x1": 2, "x1 TERM x": 2, "x1 TERM --scope all": 2, "x1 TERM --scope unspecified": 2,
	} {
		if got := (invocation{args: command("executions signal " + line)}).run(t, s); got.code != code || got.stderr == "" {
			t.Errorf("%s: %+v, want exit code %d", line, got, code)
		}
	}
}
