package guest

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
	"github.com/harvest-run/executord/internal/guestclient"
)

// Write is the Client's.
func (g *guestProcess) Write(id string, offset int64, data string, end bool, wait time.Duration) (guestclient.Written, error) {
	return g.Client.Write(g.t.Context(), g.full(id), offset, []byte(data), end, wait)
}

// Signal is the Client's.
func (g *guestProcess) Signal(id string, sig syscall.Signal, scope guestv1.SignalRequest_Scope) error {
	return g.Client.Signal(g.t.Context(), g.full(id), int32(sig), scope)
}

// write writes what must be taken whole.
func (g *guestProcess) write(id string, offset int64, data string, end bool) {
	g.t.Helper()
	got, err := g.Write(id, offset, data, end, 10*time.Second)
	if err != nil || got.Committed != offset+int64(len(data)) || got.Closed != end {
		g.t.Fatalf("write %d bytes at %d: %+v, %v", len(data), offset, got, err)
	}
}

// feed writes all of data in pieces of all sizes, and the end.
func (g *guestProcess) feed(id string, data []byte) error {
	r := rand.New(rand.NewPCG(1, 2))
	for at := int64(0); ; {
		piece := data[at:min(at+1+r.Int64N(guestclient.MaxWrite), int64(len(data)))]
		end := at+int64(len(piece)) == int64(len(data))
		got, err := g.Client.Write(g.t.Context(), g.full(id), at, piece, end, 10*time.Second)
		if err != nil {
			return err
		}
		if got.Committed < at || got.Committed > at+int64(len(piece)) {
			return fmt.Errorf("%d bytes are committed after %d at %d", got.Committed, len(piece), at)
		}
		if at = got.Committed; got.Closed {
			return nil
		}
	}
}

func wantRefused(t *testing.T, err error, kind guestv1.Error_Kind, committed int64) {
	t.Helper()
	ge, ok := err.(*guestclient.Error)
	if !ok || ge.Kind != kind || ge.Committed != committed {
		t.Errorf("refused with %+v, want %v at %d", err, kind, committed)
	}
}

func TestInput(t *testing.T) {
	overTrees(t, func(t *testing.T, g *guestProcess) {
		r := g.sh("cat", "cat; echo end >&2; until [ -e go ]; do sleep 0.01; done")
		r.Stdin = true
		g.start(r)
		o := &output{}
		g.write("cat", 0, "hello ", false)
		g.readUntil("cat", o, "hello ")
		g.write("cat", 6, "\x00\xff world", false)
		// All of it again, some of it again, and half of it new.
		g.write("cat", 6, "\x00\xff world", false)
		for offset, data := range map[int64]string{0: "hello ", 3: "lo \x00"} {
			if got, err := g.Write("cat", offset, data, false, 0); err != nil || got.Committed != 14 {
				t.Errorf("a repeat of %q at %d: %+v, %v", data, offset, got, err)
			}
		}
		g.write("cat", 9, "world, again", false)
		_, err := g.Write("cat", 22, "x", false, 0)
		wantRefused(t, err, guestv1.Error_KIND_INVALID, 21)
		_, err = g.Write("cat", 5, "", true, 0)
		wantRefused(t, err, guestv1.Error_KIND_INVALID, 21)
		if got, err := g.Client.Input(t.Context(), g.full("cat")); err != nil || got.Committed != 21 || got.Closed {
			t.Errorf("asked for the committed offset: %+v, %v", got, err)
		}
		g.write("cat", 20, "n!", true)
		g.write("cat", 21, "!", true) // told again
		_, err = g.Write("cat", 22, "x", false, 0)
		wantRefused(t, err, guestv1.Error_KIND_CLOSED, 22)
		if err := os.WriteFile(filepath.Join(g.dir, "go"), nil, 0o644); err != nil {
			t.Fatal(err)
		}
		g.readAll("cat", o)
		wantCode(t, o, 0)
		if string(o.stdout) != "hello \x00\xff world, again!" || string(o.stderr) != "end\n" {
			t.Errorf("stdout %q, stderr %q", o.stdout, o.stderr)
		}
		g.write("cat", 20, "n!", true) // a repeat that comes late
		_, err = g.Write("cat", 22, "x", false, 0)
		wantRefused(t, err, guestv1.Error_KIND_ENDED, 22)
		g.release("cat")
	})
}

func TestInputThatIsNotOpen(t *testing.T) {
	g := startDaemon(t, "proc")
	g.start(g.sh("x", "cat; sleep 100"))
	_, err := g.Write("x", 0, "x", false, 0)
	wantRefused(t, err, guestv1.Error_KIND_INVALID, -1)
	_, err = g.Write("y", 0, "x", false, 0)
	wantRefused(t, err, guestv1.Error_KIND_NOT_FOUND, -1)
	g.stop("x", 0)
	g.readAll("x", &output{})
}

func TestMuchInputIsExact(t *testing.T) {
	g := startDaemon(t, "cgroup")
	data := randomBytes(7, 10<<20)
	for _, script := range []string{"cat", "sleep 0.3; cat", "dd bs=7 status=none | dd bs=100001 status=none"} {
		size := len(data)
		if strings.Contains(script, "bs=7") {
			size = 300_000
		}
		r := g.sh("much", script)
		r.Stdin = true
		g.start(r)
		var feeding sync.WaitGroup
		var fed error
		feeding.Go(func() { fed = g.feed("much", data[:size]) })
		o := g.readAll("much", &output{})
		feeding.Wait()
		if fed != nil || sha256.Sum256(o.stdout) != sha256.Sum256(data[:size]) {
			t.Errorf("%s: %d of %d bytes came back, or others: %v", script, len(o.stdout), size, fed)
		}
		wantCode(t, o, 0)
		g.release("much")
	}
}

// Many write the same at once, over pipes that are lost: nothing comes twice.
func TestWritersAtTheSameOffset(t *testing.T) {
	g := startDaemon(t, "proc")
	data := randomBytes(8, 600_000)
	r := g.sh("x", "cat")
	r.Stdin = true
	g.start(r)
	var feeding sync.WaitGroup
	errs := make([]error, 4)
	for i := range errs {
		feeding.Go(func() {
			c := guestclient.New(g)
			defer func() { c.Close() }()
			for at := int64(0); at < int64(len(data)); {
				if i%2 == 1 {
					c.Close()
					c = guestclient.New(g)
				}
				n := min(int64(1000+i*9000), int64(len(data))-at)
				got, err := c.Write(t.Context(), g.full("x"), at, data[at:at+n], false, time.Second)
				if errs[i] = err; err != nil {
					return
				}
				at = min(got.Committed, int64(len(data)))
			}
		})
	}
	o := &output{}
	for o.size < int64(len(data)) {
		g.read("x", o)
	}
	feeding.Wait()
	for _, err := range errs {
		if err != nil {
			t.Error(err)
		}
	}
	g.write("x", int64(len(data)), "", true)
	g.readAll("x", o)
	if !bytes.Equal(o.stdout, data) {
		t.Errorf("%d bytes came back, want %d", len(o.stdout), len(data))
	}
}

// A program that never reads takes what a pipe holds and no more, and waiting for it
// has an end.
func TestInputThatNobodyReads(t *testing.T) {
	overTrees(t, func(t *testing.T, g *guestProcess) {
		r := g.sh("deaf", "echo ready; sleep 1000")
		r.Stdin = true
		g.start(r)
		o := &output{}
		g.readUntil("deaf", o, "ready")
		before := residentBytes(t, g.pid)
		full := int64(0)
		for piece := strings.Repeat("x", guestclient.MaxWrite); ; {
			got, err := g.Write("deaf", full, piece, false, 20*time.Millisecond)
			if err != nil {
				t.Fatal(err)
			}
			if got.Committed == full {
				break
			}
			full = got.Committed
		}
		if full < 4096 || full > 1<<20 {
			t.Errorf("%d bytes were taken", full)
		}
		// Those who wait in vain cost nothing either.
		var writers sync.WaitGroup
		for range 16 {
			writers.Go(func() {
				piece := make([]byte, guestclient.MaxWrite)
				for range 16 {
					if got, err := g.Client.Write(t.Context(), g.full("deaf"), full, piece, false, 0); err != nil || got.Committed != full {
						t.Errorf("%+v, %v", got, err)
						return
					}
				}
			})
		}
		writers.Wait()
		if grown := residentBytes(t, g.pid) - before; grown > 64<<20 {
			t.Errorf("the guest has grown by %d MiB", grown>>20)
		}
		// Its end ends those who wait.
		var waiting sync.WaitGroup
		waiting.Go(func() {
			// The program's death closes the pipe before the guest knows of it.
			_, err := g.Write("deaf", full, "x", true, 10*time.Second)
			if kind := guestclient.KindOf(err); kind != guestv1.Error_KIND_ENDED && kind != guestv1.Error_KIND_CLOSED {
				t.Errorf("%v", err)
			}
		})
		time.Sleep(20 * time.Millisecond)
		g.stop("deaf", 0)
		g.readAll("deaf", o)
		waiting.Wait()
		g.release("deaf")
	})
}

func residentBytes(t *testing.T, pid int) int64 {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", pid))
	if err != nil {
		t.Fatal(err)
	}
	var size, resident int64
	fmt.Sscan(string(text), &size, &resident)
	return resident * int64(os.Getpagesize())
}

func TestInputThatTheProgramCloses(t *testing.T) {
	g := startDaemon(t, "proc")
	r := g.sh("x", "read line; exec <&-; echo closed; sleep 1000")
	r.Stdin = true
	g.start(r)
	g.write("x", 0, "a line\n", false)
	o := &output{}
	g.readUntil("x", o, "closed")
	_, err := g.Write("x", 7, "more", false, time.Second)
	wantRefused(t, err, guestv1.Error_KIND_CLOSED, 7)
	_, err = g.Write("x", 7, "more", false, time.Second)
	wantRefused(t, err, guestv1.Error_KIND_CLOSED, 7)
	g.write("x", 7, "", true)
	g.stop("x", 0)
	g.readAll("x", o)
}

// A program that ends while its input is open ends at once.
func TestOpenInputDelaysNoEnd(t *testing.T) {
	g := startDaemon(t, "cgroup")
	for range 20 {
		r := g.sh("x", "exit 3")
		r.Stdin = true
		wantCode(t, g.run(r), 3)
	}
	// One that reads on behind the leader's back reads the end.
	r := g.sh("x", "exec 3<&0; { cat <&3; echo end; } & exit 4")
	r.Stdin = true
	o := g.run(r)
	wantCode(t, o, 4)
	if string(o.stdout) != "end\n" {
		t.Errorf("stdout %q", o.stdout)
	}
}

func TestSignalScopes(t *testing.T) {
	const report = `for s in HUP USR1 USR2 RTMIN+3; do trap "echo $1 $s" $s; done; echo $1 ready; while :; do sleep 0.02; done`
	overTrees(t, func(t *testing.T, g *guestProcess) {
		// A child in the leader's group, and one in a session of its own.
		g.start(g.request("x", "/bin/bash", "-c", `r='`+report+`'
bash -c "$r" - child & setsid bash -c "$r" - stranger & eval "set -- leader; $r"`))
		o := &output{}
		for _, name := range []string{"leader", "child", "stranger"} {
			g.readUntil("x", o, name+" ready\n")
		}
		if err := g.Signal("x", syscall.SIGUSR1, guestv1.SignalRequest_SCOPE_TREE); err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{"leader", "child", "stranger"} {
			g.readUntil("x", o, name+" USR1\n")
		}
		if err := g.Signal("x", syscall.SIGUSR2, guestv1.SignalRequest_SCOPE_GROUP); err != nil {
			t.Fatal(err)
		}
		g.readUntil("x", o, "leader USR2\n")
		g.readUntil("x", o, "child USR2\n")
		if err := g.Signal("x", syscall.SIGHUP, guestv1.SignalRequest_SCOPE_PROCESS); err != nil {
			t.Fatal(err)
		}
		g.readUntil("x", o, "leader HUP\n")
		if err := g.Signal("x", 37, guestv1.SignalRequest_SCOPE_PROCESS); err != nil {
			t.Fatal(err)
		}
		g.readUntil("x", o, "leader RTMIN+3\n")
		for _, not := range []string{"stranger USR2", "child HUP", "stranger HUP", "child RTMIN+3"} {
			if strings.Contains(string(o.stdout), not) {
				t.Errorf("%q: the signal went too far", not)
			}
		}
		if err := g.Signal("x", syscall.SIGKILL, guestv1.SignalRequest_SCOPE_PROCESS); err != nil {
			t.Fatal(err)
		}
		g.readAll("x", o)
		wantSignal(t, o, syscall.SIGKILL)
		if o.exit.GetStopCause() != guestv1.StopCause_STOP_CAUSE_UNSPECIFIED || !o.exit.GetTreeEmpty() || o.exit.GetReaped() < 2 {
			t.Errorf("exit %v", o.exit)
		}
		for _, scope := range []guestv1.SignalRequest_Scope{guestv1.SignalRequest_SCOPE_PROCESS, guestv1.SignalRequest_SCOPE_GROUP, guestv1.SignalRequest_SCOPE_TREE} {
			wantRefused(t, g.Signal("x", syscall.SIGTERM, scope), guestv1.Error_KIND_ENDED, -1)
		}
		g.release("x")
		wantRefused(t, g.Signal("x", syscall.SIGTERM, guestv1.SignalRequest_SCOPE_PROCESS), guestv1.Error_KIND_NOT_FOUND, -1)
	})
}

// Every signal that ends a program is told as it is.
func TestEachSignalEnds(t *testing.T) {
	g := startDaemon(t, "proc")
	for sig := syscall.Signal(1); sig <= 64; sig++ {
		switch sig {
		case syscall.SIGCHLD, syscall.SIGCONT, syscall.SIGSTOP, syscall.SIGTSTP, syscall.SIGTTIN, syscall.SIGTTOU, syscall.SIGURG, syscall.SIGWINCH, 32, 33:
			continue
		}
		g.start(g.request("x", "/bin/sleep", "1000"))
		if err := g.Signal("x", sig, guestv1.SignalRequest_SCOPE_PROCESS); err != nil {
			t.Fatal(sig, err)
		}
		o := g.readAll("x", &output{})
		wantSignal(t, o, sig)
		g.release("x")
	}
	for _, bad := range []int32{0, 65, -1} {
		g.start(g.request("x", "/bin/sleep", "1000"))
		wantRefused(t, g.Client.Signal(t.Context(), g.full("x"), bad, guestv1.SignalRequest_SCOPE_PROCESS), guestv1.Error_KIND_INVALID, -1)
		wantRefused(t, g.Client.Signal(t.Context(), g.full("x"), 15, 0), guestv1.Error_KIND_INVALID, -1)
		g.stop("x", 0)
		g.readAll("x", &output{})
		g.release("x")
	}
}

// What is stopped goes on when it is told to, or ends at its timeout.
func TestStoppedPrograms(t *testing.T) {
	g := startDaemon(t, "cgroup")
	r := g.sh("x", "read line; echo got $line; read line")
	r.Stdin = true
	r.TimeoutMs, r.GraceMs = 1500, 200
	g.start(r)
	if err := g.Signal("x", syscall.SIGSTOP, guestv1.SignalRequest_SCOPE_TREE); err != nil {
		t.Fatal(err)
	}
	g.write("x", 0, "on\n", false)
	if err := g.Signal("x", syscall.SIGCONT, guestv1.SignalRequest_SCOPE_TREE); err != nil {
		t.Fatal(err)
	}
	o := &output{}
	g.readUntil("x", o, "got on\n")
	if err := g.Signal("x", syscall.SIGSTOP, guestv1.SignalRequest_SCOPE_PROCESS); err != nil {
		t.Fatal(err)
	}
	g.readAll("x", o)
	if o.exit.GetStopCause() != guestv1.StopCause_STOP_CAUSE_TIMEOUT {
		t.Errorf("exit %v", o.exit)
	}
}

// A program that is given input is not idle, whatever else it does.
func TestInputIsActivity(t *testing.T) {
	g := startDaemon(t, "cgroup")
	r := g.sh("x", "exec cat > /dev/null")
	r.Stdin, r.IdleMs, r.GraceMs = true, 2000, 200
	g.start(r)
	for n := range int64(9) {
		g.write("x", n, "x", false)
		time.Sleep(500 * time.Millisecond)
	}
	o := g.readAll("x", &output{})
	if o.exit.GetStopCause() != guestv1.StopCause_STOP_CAUSE_IDLE || o.exit.GetRunMicros() < 4_000_000 {
		t.Errorf("exit %v", o.exit)
	}
}
