package guest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
	"github.com/harvest-run/executord/internal/guestclient"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

// The test binary has three roles: it runs the tests; as "daemon" it is a guest, a
// process of its own because a guest reaps every child of its process; as "program"
// it is a command that such a guest starts.
const (
	roleVariable = "GUEST_TEST_ROLE"
	// noRaceSleep spares the race detector's second of sleep at every end.
	noRaceSleep = "GORACE=atexit_sleep_ms=0"
)

func TestMain(m *testing.M) {
	if signal.Ignored(syscall.SIGHUP) {
		// As under nohup. The programs of these tests would ignore it, too; a guest by itself
		// passes nothing on (see shrugOffSignals).
		hangups := make(chan os.Signal, 1)
		signal.Notify(hangups, syscall.SIGHUP)
	}
	switch role := os.Getenv(roleVariable); role {
	case "":
		goleak.VerifyTestMain(m)
	case "program":
		os.Exit(program(os.Args[1:]))
	default:
		run := func() error { return daemon(role) }
		switch role {
		case "init":
			run = func() error { return RunInit(3) }
		case "underFire":
			run = underFire
		}
		if err := run(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
}

// Descriptors that a daemon is started with.
const (
	daemonListener = 3 + iota
	daemonControl  // at its end the daemon ends
	daemonCgroup   // for the role "cgroup"
)

// daemon is a guest without a sandbox around it: the orphans of its commands come to
// it as they would come to process 1.
func daemon(role string) error {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return err
	}
	socket := os.NewFile(daemonListener, "listener")
	l, err := net.FileListener(socket)
	if err != nil {
		return err
	}
	socket.Close()
	control := os.NewFile(daemonControl, "control")
	cfg := Config{RuntimeDirectory: os.Getenv("GUEST_TEST_RUNTIME")}
	if role == "cgroup" {
		cfg.Cgroups = os.NewFile(daemonCgroup, "cgroup")
	}
	g, err := New(cfg)
	if err != nil {
		return err
	}
	var end sync.WaitGroup
	end.Go(func() {
		_, _ = control.Read(make([]byte, 1))
		l.Close()
	})
	err = errors.Join(g.Serve(l), g.Close())
	end.Wait()
	return errors.Join(err, goleak.Find())
}

// guestProcess is a running daemon.
type guestProcess struct {
	*guestclient.Client
	t       *testing.T
	pid     int
	dir     string // where commands may leave things
	runtime string // its runtime directory
	socket  string
	cgroup  string // "" for the role "proc"
}

// full is an id that no other guest on this machine uses: one that looks through /proc
// would take their commands for its own. Tests leave it to the methods below.
func (g *guestProcess) full(id string) string {
	suffix := fmt.Sprintf("-test-%d", g.pid)
	return strings.TrimSuffix(id, suffix) + suffix
}

// Read is the Client's.
func (g *guestProcess) Read(ctx context.Context, id string, position int64, n int, wait time.Duration) (*guestclient.Output, error) {
	return g.Client.Read(ctx, g.full(id), position, n, wait)
}

// Stop is the Client's.
func (g *guestProcess) Stop(ctx context.Context, id string, grace time.Duration) error {
	return g.Client.Stop(ctx, g.full(id), grace)
}

// Release is the Client's.
func (g *guestProcess) Release(ctx context.Context, id string) error {
	return g.Client.Release(ctx, g.full(id))
}

// Dial opens a pipe to the guest.
func (g *guestProcess) Dial(ctx context.Context) (net.Conn, error) {
	return new(net.Dialer).DialContext(ctx, "unix", g.socket)
}

// overTrees runs a test with a guest that follows processes through /proc and with
// one that has cgroups.
func overTrees(t *testing.T, test func(t *testing.T, g *guestProcess)) {
	for _, role := range []string{"proc", "cgroup"} {
		t.Run(role, func(t *testing.T) {
			t.Parallel()
			test(t, startDaemon(t, role))
		})
	}
}

// startDaemon starts a guest and ends it with the test, when it must have nothing left
// and nothing to complain about.
func startDaemon(t *testing.T, role string) *guestProcess {
	t.Helper()
	dir, err := os.MkdirTemp("", "guest") // short enough for a socket's address
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	g := &guestProcess{t: t, dir: filepath.Join(dir, "work"), runtime: filepath.Join(dir, "run"), socket: filepath.Join(dir, "s")}
	if err := os.Mkdir(g.dir, 0o755); err != nil {
		t.Fatal(err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: g.socket})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	l.SetUnlinkOnClose(false)
	socket, err := l.File()
	if err != nil {
		t.Fatal(err)
	}
	defer socket.Close()
	control, hold, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer control.Close()
	cmd := exec.Command("/proc/self/exe")
	cmd.ExtraFiles = []*os.File{socket, control}
	if role == "cgroup" {
		g.cgroup = makeCgroup(t)
		d, err := os.Open(g.cgroup)
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		cmd.ExtraFiles = append(cmd.ExtraFiles, d)
	}
	cmd.Env = append(os.Environ(), roleVariable+"="+role, "GUEST_TEST_RUNTIME="+g.runtime, noRaceSleep)
	var complaints bytes.Buffer
	cmd.Stderr = &complaints
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	g.pid = cmd.Process.Pid
	g.Client = guestclient.New(g)
	t.Cleanup(func() {
		defer hold.Close()
		if t.Failed() {
			g.abandon(cmd)
			t.Logf("the guest said: %s", complaints.String())
			return
		}
		g.Client.Close()
		hold.Close()
		patience := time.AfterFunc(20*time.Second, func() { _ = cmd.Process.Signal(unix.SIGQUIT) })
		defer patience.Stop()
		if err := cmd.Wait(); err != nil || complaints.Len() > 0 {
			t.Errorf("the guest ended with %v\n%s", err, complaints.String())
		}
	})
	return g
}

// abandon ends a guest whose test failed, and what runs in it.
func (g *guestProcess) abandon(cmd *exec.Cmd) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	info, _ := g.Info(ctx)
	for _, id := range info.GetExecutions() {
		_ = g.Stop(ctx, id, 0)
	}
	for all, _ := g.children(); len(all) > 0 && ctx.Err() == nil; all, _ = g.children() {
		time.Sleep(10 * time.Millisecond)
	}
	g.Client.Close()
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
}

// makeCgroup makes a cgroup of version 2 for a guest, or skips the test.
func makeCgroup(t *testing.T) string {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		before, after, _ := strings.Cut(line, " - ")
		if fields := strings.Fields(before); strings.HasPrefix(after, "cgroup2 ") && len(fields) > 4 {
			dir, err := os.MkdirTemp(fields[4], "guest-test-")
			if err != nil {
				t.Skip("no cgroup can be made: ", err)
			}
			t.Cleanup(func() {
				if err := os.Remove(dir); err != nil {
					t.Errorf("the cgroup is not empty at the end: %v", err)
				}
			})
			return dir
		}
	}
	t.Skip("no cgroup of version 2 is mounted")
	return ""
}

// sh is a request that runs a shell command.
func (g *guestProcess) sh(id, script string) *guestv1.StartRequest {
	return g.request(id, "/bin/bash", "-c", script)
}

// request is a request that runs a program.
func (g *guestProcess) request(id string, args ...string) *guestv1.StartRequest {
	id = g.full(id)
	r := &guestv1.StartRequest{
		Execution: id, Args: args, WorkingDirectory: g.dir,
		Env: []string{"PATH=" + os.Getenv("PATH"), "HOME=" + g.dir},
	}
	if g.cgroup == "" { // the guests of other tests must not take the command for theirs
		r.Env = append(r.Env, marker+id)
	}
	return r
}

// program is a request that runs a part of this test binary.
func (g *guestProcess) program(id string, args ...string) *guestv1.StartRequest {
	self, err := os.Executable()
	if err != nil {
		g.t.Fatal(err)
	}
	r := g.request(id, append([]string{self}, args...)...)
	r.Env = append(r.Env, roleVariable+"=program", noRaceSleep)
	return r
}

// output is all that a command wrote, and its end.
type output struct {
	stdout, stderr []byte
	order          []guestv1.Stream // of the chunks
	size           int64
	exit           *guestv1.Exit
}

func (o *output) add(out *guestclient.Output) {
	for _, c := range out.Chunks {
		o.order = append(o.order, c.Stream)
		o.size += int64(len(c.Data))
		if c.Stream == guestv1.Stream_STREAM_STDOUT {
			o.stdout = append(o.stdout, c.Data...)
		} else {
			o.stderr = append(o.stderr, c.Data...)
		}
	}
	o.exit = out.Exit
}

// start starts a command that has to start.
func (g *guestProcess) start(r *guestv1.StartRequest) {
	g.t.Helper()
	if _, err := g.Start(g.t.Context(), r); err != nil {
		g.t.Fatalf("start %q: %v", r.GetArgs(), err)
	}
}

// read reads once from where o ends.
func (g *guestProcess) read(id string, o *output) {
	g.t.Helper()
	out, err := g.Read(g.t.Context(), id, o.size, 256<<10, 20*time.Second)
	if err != nil {
		g.t.Fatalf("read %s at %d: %v", id, o.size, err)
	}
	o.add(out)
	out.Release()
}

// readUntil reads until the command has written text to its standard output.
func (g *guestProcess) readUntil(id string, o *output, text string) {
	g.t.Helper()
	for !bytes.Contains(o.stdout, []byte(text)) {
		if g.read(id, o); o.exit != nil {
			g.t.Fatalf("%s ended before it wrote %q: %q %q %v", id, text, o.stdout, o.stderr, o.exit)
		}
	}
}

// readAll reads to the end.
func (g *guestProcess) readAll(id string, o *output) *output {
	g.t.Helper()
	for o.exit == nil {
		g.read(id, o)
	}
	return o
}

// run starts a command, reads it to its end and releases it.
func (g *guestProcess) run(r *guestv1.StartRequest) *output {
	g.t.Helper()
	g.start(r)
	o := g.readAll(r.GetExecution(), &output{})
	g.release(r.GetExecution())
	return o
}

func (g *guestProcess) release(id string) {
	g.t.Helper()
	if err := g.Release(g.t.Context(), id); err != nil {
		g.t.Errorf("release %s: %v", id, err)
	}
}

func (g *guestProcess) stop(id string, grace time.Duration) {
	g.t.Helper()
	if err := g.Stop(g.t.Context(), id, grace); err != nil {
		g.t.Fatalf("stop %s: %v", id, err)
	}
}

// children are the processes whose parent is the guest: its zombies, and orphans.
func (g *guestProcess) children() (all []int, zombies int) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		g.t.Fatal(err)
	}
	for _, e := range entries {
		text, err := os.ReadFile(filepath.Join("/proc", e.Name(), "stat"))
		if err != nil {
			continue
		}
		var pid int
		fmt.Sscan(e.Name(), &pid)
		if p, err := parseStat(pid, text); err == nil && p.parent == g.pid {
			all = append(all, pid)
			if !p.alive {
				zombies++
			}
		}
	}
	return all, zombies
}

// eventually waits until something is true.
func eventually(t *testing.T, what string, true func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !true(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within 20 s: %s", what)
		}
	}
}

func wantCode(t *testing.T, o *output, code int32) {
	t.Helper()
	if c, ok := o.exit.GetStatus().(*guestv1.Exit_Code); !ok || c.Code != code {
		t.Errorf("ended with %v, want exit code %d; stderr %q", o.exit, code, o.stderr)
	}
}

func wantSignal(t *testing.T, o *output, sig unix.Signal) {
	t.Helper()
	if s, ok := o.exit.GetStatus().(*guestv1.Exit_Signal); !ok || s.Signal != int32(sig) {
		t.Errorf("ended with %v, want signal %v", o.exit, sig)
	}
}
