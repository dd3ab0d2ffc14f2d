package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/harvest-run/executord/client"
	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
)

// sandboxes names those of a daemon.
func (d *daemon) sandboxes() []string {
	d.t.Helper()
	if os.Getenv(onModal) != "" {
		return d.atModal()
	}
	entries, err := os.ReadDir(filepath.Join(d.dir, "state/local/sandboxes"))
	if err != nil {
		d.t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// ready waits until so many sandboxes are ready and there are no others.
func (d *daemon) ready(c *client.Client, n int) {
	d.t.Helper()
	for range 1000 {
		if int(d.info(c).GetWarmPool().GetReady()) == n && len(d.sandboxes()) == n {
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
	d.t.Fatalf("%v, there are %v", d.info(c).GetWarmPool(), d.sandboxes())
}

// A command and a session get sandboxes that are ready; each is used once, and is as new.
func TestWarmStart(t *testing.T) {
	d := start(t, "--pool-size", "2")
	c := d.dial()
	seen := make(map[string]bool)
	for range 3 {
		d.ready(c, 2)
		k := execute(t, c, &executorv1.ExecuteRequest{Command: bash("hostname; ls /workspace /tmp | wc -l; touch /workspace/used /tmp/used")})
		k.wants(t, executorv1.Reason_REASON_EXITED)
		name, rest, _ := strings.Cut(k.stdout(), "\n")
		if !strings.HasPrefix(name, "w-") || seen[name] {
			t.Errorf("it ran in %q, seen are %v", name, seen)
		}
		seen[name] = true
		if files := strings.TrimSpace(rest); files != "3" { // the two headings and the line between them
			t.Errorf("it found files: %q", rest)
		}
		if len(k.result.GetEvidence()) != 0 {
			t.Errorf("%v", k.result)
		}
	}
	d.ready(c, 2)
	s, err := c.Sessions().CreateSession(t.Context(), &executorv1.CreateSessionRequest{})
	if err != nil {
		t.Fatal(err)
	}
	parent := s.GetSession().GetName()
	if got, err := c.Sessions().GetSession(t.Context(), &executorv1.GetSessionRequest{Name: parent, Wait: durationpb.New(time.Minute)}); err != nil || got.GetSession().GetState() != executorv1.Session_STATE_RUNNING {
		t.Fatalf("%v, %v", got, err)
	}
	k := execute(t, c, &executorv1.ExecuteRequest{Parent: parent, Command: argv("hostname")})
	if !strings.HasPrefix(k.stdout(), "w-") || seen[strings.TrimSpace(k.stdout())] {
		t.Errorf("the session is in %q", k.stdout())
	}
	if _, err := c.Sessions().TerminateSession(t.Context(), &executorv1.TerminateSessionRequest{Name: parent}); err != nil {
		t.Fatal(err)
	}
	// With limits of its own it gets a sandbox that has them.
	k = execute(t, c, &executorv1.ExecuteRequest{Command: argv("hostname"), Limits: &executorv1.Limits{Pids: 50}})
	if !strings.HasPrefix(k.stdout(), "e-") {
		t.Errorf("with limits it ran in %q", k.stdout())
	}
	if p := d.info(c).GetWarmPool(); p.GetHits() != 4 || p.GetMisses() != 0 {
		t.Errorf("%v", p)
	}
}

// The limits of a sandbox that was ready are those of any other, and what they did
// before the command does not count.
func TestWarmMemoryLimit(t *testing.T) {
	needRoot(t)
	d := start(t, "--pool-size", "1", "--limits-memory-bytes", "96MiB")
	c := d.dial()
	d.ready(c, 1)
	k := execute(t, c, &executorv1.ExecuteRequest{Command: python("x = bytearray(400 << 20)")})
	k.wants(t, executorv1.Reason_REASON_OOM_KILLED)
	if d.info(c).GetWarmPool().GetHits() != 1 || k.result.GetEvidence()["oom_kills"] == "" {
		t.Errorf("%v, %v", k.result, d.info(c).GetWarmPool())
	}
	d.ready(c, 1)
	k = execute(t, c, &executorv1.ExecuteRequest{Command: argv("true")})
	k.wants(t, executorv1.Reason_REASON_EXITED)
	if len(k.result.GetEvidence()) != 0 {
		t.Errorf("%v", k.result)
	}
}

// kill -9 leaves the sandboxes that were ready; the next start ends them and makes its
// own, and a stop leaves none, with every policy and signal.
func TestKillWithAFullPool(t *testing.T) {
	d := start(t, "--pool-size", "4", "--on-stop", "keep")
	for range repetitions(t, 3) {
		c := d.client()
		d.ready(c, 4)
		before := d.sandboxes()
		c.Close()
		d.kill()
		if len(d.sandboxes()) != 4 {
			t.Errorf("%v", d.sandboxes())
		}
		d.up()
		c = d.client()
		d.ready(c, 4)
		for _, id := range d.sandboxes() {
			for _, old := range before {
				if id == old {
					t.Errorf("%s of before the kill is kept", id)
				}
			}
		}
		c.Close()
	}
	// In the middle of a refill too.
	for range repetitions(t, 3) {
		c := d.client()
		_, _ = c.Executor().StartExecution(t.Context(), &executorv1.StartExecutionRequest{Command: argv("true")})
		time.Sleep(110 * time.Millisecond)
		c.Close()
		d.kill()
		d.up()
	}
	c := d.client()
	d.ready(c, 4)
	c.Close()
	if code := d.stop(syscall.SIGTERM); code != 0 {
		t.Errorf("exit code %d", code)
	}
	if left := d.sandboxes(); len(left) != 0 {
		t.Errorf("a stop that keeps what runs left %v", left)
	}
	d.up()
}
