package modal

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/engine/modal/modaltest"
	"github.com/harvest-run/executord/internal/fault"
	"github.com/harvest-run/executord/internal/guestclient"
	sdk "github.com/modal-labs/modal-client/go"
	"google.golang.org/grpc/codes"
)

// house is an engine over a fake, and what a test needs of both.
type house struct {
	*testing.T
	fake   *modaltest.Fake
	engine *Engine
}

func newHouse(t *testing.T, fake modaltest.Config, change func(*Config)) *house {
	t.Helper()
	h := &house{T: t, fake: fakeOf(t, fake)}
	cfg := testConfig(t)
	if change != nil {
		change(&cfg)
	}
	h.engine = openEngine(t, cfg)
	t.Cleanup(func() {
		h.fake.Repair()
		if err := h.engine.Close(); err != nil {
			t.Error(err)
		}
	})
	return h
}

func (h *house) ctx() context.Context {
	ctx, cancel := context.WithTimeoutCause(h.Context(), time.Minute, errors.New("the step took more than a minute"))
	h.Cleanup(cancel)
	return ctx
}

func (h *house) create(id string) *sandbox {
	h.Helper()
	sb, err := h.engine.Create(h.ctx(), engine.Spec{ID: id})
	if err != nil {
		h.Fatalf("create %s: %v", id, err)
	}
	return sb.(*sandbox)
}

func (h *house) client(sb engine.Sandbox) *guestclient.Client {
	c := guestclient.New(sb)
	h.Cleanup(c.Close)
	return c
}

func command(args ...string) guestclient.Command {
	return guestclient.Command{Args: args, Dir: "/", Env: map[string]string{"PATH": "/usr/bin:/bin"}, Timeout: 50 * time.Second, Limit: 64 << 20}
}

func (h *house) run(c *guestclient.Client, args ...string) string {
	h.Helper()
	out, err := c.Run(h.ctx(), command(args...))
	if err != nil {
		h.Fatalf("%q: %v", args, err)
	}
	return string(out.Stdout)
}

// alive is how many sandboxes the provider has.
func (h *house) alive() int {
	h.Helper()
	app, err := h.engine.theApp(h.ctx())
	if err != nil {
		h.Fatal(err)
	}
	all, err := h.engine.client.Sandboxes.List(h.ctx(), &sdk.SandboxListParams{AppID: app.AppID})
	if err != nil {
		h.Fatal(err)
	}
	n := 0
	for _, err := range all {
		if err != nil {
			h.Fatal(err)
		}
		n++
	}
	return n
}

func (h *house) mustEnd(sb *sandbox, says ...string) {
	h.Helper()
	select {
	case <-sb.Done():
	case <-h.ctx().Done():
		h.Fatalf("the end of %s is not noticed", sb)
	}
	for _, s := range says {
		if !strings.Contains(sb.Ended().Error(), s) {
			h.Errorf("the reason %q does not say %q", sb.Ended(), s)
		}
	}
	if _, err := sb.Dial(h.ctx()); fault.ReasonOf(err) != "SANDBOX_ENDED" || !strings.Contains(err.Error(), sb.Ended().Error()) {
		h.Errorf("dial after the end: %v", err)
	}
	if _, err := sb.Terminate(h.ctx()); err != nil {
		h.Errorf("terminate after the end: %v", err)
	}
	if n := h.alive(); n != 0 {
		h.Errorf("%d sandboxes are left", n)
	}
}

func controlPlane(counts map[string]int) (n int) {
	for name, count := range counts {
		if strings.HasPrefix(name, "CP.") {
			n += count
		}
	}
	return n
}

// TestCost counts the calls to Modal's control plane.
func TestCost(t *testing.T) {
	h := newHouse(t, modaltest.Config{}, nil)
	warm := h.create("warm")
	ref, err := warm.Snapshot(h.ctx(), engine.SnapshotRequest{})
	if err != nil {
		t.Fatal(err)
	}
	live := h.client(warm)
	h.run(live, "true")

	h.fake.ResetCounts()
	sb, err := h.engine.Create(h.ctx(), engine.Spec{ID: "once", Image: ref})
	if err != nil {
		t.Fatal(err)
	}
	if got := h.run(h.client(sb), "echo", "hello"); got != "hello\n" {
		t.Errorf("%q", got)
	}
	if _, err := sb.Usage(h.ctx()); err != nil {
		t.Error(err)
	}
	if _, err := sb.Terminate(h.ctx()); err != nil {
		t.Fatal(err)
	}
	counts := h.fake.Counts()
	if n := controlPlane(counts); n > 8 {
		t.Errorf("a whole life took %d calls: %v", n, counts)
	}
	if n := counts["TCR.TaskExecStart"]; n != 1 {
		t.Errorf("%d programs were started in an image that has the guest: %v", n, counts)
	}
	t.Logf("a whole life: %v", counts)

	h.fake.ResetCounts()
	for range 10 {
		h.run(live, "echo", "hello")
	}
	counts = h.fake.Counts()
	if n := controlPlane(counts); n != 0 || counts["TCR.TaskExecStart"] != 0 {
		t.Errorf("ten commands in a live sandbox: %v", counts)
	}
	t.Logf("ten commands: %v", counts)
}

// A create whose answer is lost, once or however often it is repeated, makes one sandbox.
func TestLostReplies(t *testing.T) {
	for name, c := range map[string]struct {
		count  int
		forget bool
	}{
		"once": {1, false}, "once, and Modal takes the repeat for a new one": {1, true},
		"always": {-1, false}, "always, and Modal takes each for a new one": {-1, true},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHouse(t, modaltest.Config{ForgetRequests: c.forget}, nil)
			h.fake.Inject(modaltest.Fault{RPC: "CP.SandboxCreateV2", Count: c.count, Code: codes.Unavailable, Lost: true})
			sb := h.create("lost")
			if n := h.alive(); n != 1 {
				t.Errorf("%d sandboxes", n)
			}
			if got := h.run(h.client(sb), "echo", "one"); got != "one\n" {
				t.Errorf("%q", got)
			}
			if _, err := sb.Terminate(h.ctx()); err != nil || h.alive() != 0 {
				t.Errorf("%v, %d left", err, h.alive())
			}
		})
	}
}

func TestStorms(t *testing.T) {
	t.Run("throttling is waited out", func(t *testing.T) {
		h := newHouse(t, modaltest.Config{}, nil)
		h.fake.Inject(modaltest.Fault{RPC: "CP.*", Count: 4, Code: codes.ResourceExhausted, RetryAfter: 50 * time.Millisecond})
		h.create("throttled")
		if n := h.alive(); n != 1 {
			t.Errorf("%d sandboxes", n)
		}
	})
	t.Run("throttling without end is told", func(t *testing.T) {
		h := newHouse(t, modaltest.Config{}, nil)
		h.create("before") // so that the image is there
		h.fake.Inject(modaltest.Fault{RPC: "CP.SandboxCreateV2", Count: -1, Code: codes.ResourceExhausted, Message: "too many of them"})
		_, err := h.engine.Create(h.ctx(), engine.Spec{ID: "never"})
		fe, ok := errors.AsType[*fault.Error](err)
		if !ok || fe.Kind != fault.Exhausted || fe.RetryAfter <= 0 || !strings.Contains(err.Error(), "too many of them") {
			t.Errorf("%v", err)
		}
	})
	t.Run("unavailable without end is bounded, and opens the breaker", func(t *testing.T) {
		h := newHouse(t, modaltest.Config{}, nil)
		h.create("before")
		h.fake.Inject(modaltest.Fault{RPC: "CP.*", Count: -1, Code: codes.Unavailable, Message: "the sky has fallen"})
		var err error
		for i := range breakAfter {
			if _, err = h.engine.Create(h.ctx(), engine.Spec{ID: fmt.Sprint("never-", i)}); fault.KindOf(err) != fault.Unavailable || !strings.Contains(err.Error(), "the sky has fallen") {
				t.Fatalf("create: %v", err)
			}
		}
		h.fake.ResetCounts()
		_, err = h.engine.Create(h.ctx(), engine.Spec{ID: "refused"})
		mustRefuse(t, err, fault.Unavailable, longBreak)
		if n := h.fake.Counts()["CP.SandboxCreateV2"]; n != 0 {
			t.Errorf("%d creates were asked for after %d had failed", n, breakAfter)
		}
		h.fake.Repair()
		if n := h.alive(); n != 1 {
			t.Errorf("%d sandboxes, want the first alone", n)
		}
	})
	t.Run("a sandbox that is slow to be reached is waited for", func(t *testing.T) {
		h := newHouse(t, modaltest.Config{}, nil)
		h.fake.SetStartup(12 * time.Second) // longer than the SDK tries by itself
		sb := h.create("slow")
		if got := h.run(h.client(sb), "echo", "there"); got != "there\n" {
			t.Errorf("%q", got)
		}
	})
}

// What the provider does to a sandbox is noticed, and told with its words; never as a
// success.
func TestEnds(t *testing.T) {
	for how, says := range map[modaltest.Gone]string{
		modaltest.GoneFailed: "told by Modal as 0", modaltest.GoneTerminated: "not by executord", modaltest.GoneEvicted: "evicted",
		modaltest.GoneForgotten: "not known to Modal", modaltest.GoneSilent: "gone from its worker",
	} {
		t.Run(string(how), func(t *testing.T) {
			h := newHouse(t, modaltest.Config{}, nil)
			h.engine.lag = 5 * time.Second
			sb := h.create("taken")
			if _, err := h.client(sb).Start(h.ctx(), &guestv1.StartRequest{Execution: "x", Args: []string{"/bin/sleep", "1000"}, WorkingDirectory: "/"}); err != nil {
				t.Fatal(err)
			}
			if err := h.fake.Preempt(sb.modalID, how); err != nil {
				t.Fatal(err)
			}
			h.mustEnd(sb, says)
		})
	}
	t.Run("the worker dies", func(t *testing.T) {
		h := newHouse(t, modaltest.Config{}, nil)
		sb := h.create("worker")
		if err := h.fake.KillWorker(sb.modalID, 2*time.Second); err != nil {
			t.Fatal(err)
		}
		h.mustEnd(sb)
	})
	t.Run("its time is over", func(t *testing.T) {
		h := newHouse(t, modaltest.Config{}, nil)
		made, err := h.engine.Create(h.ctx(), engine.Spec{ID: "short", Lifetime: 10 * time.Second})
		if err != nil {
			t.Fatal(err)
		}
		h.mustEnd(made.(*sandbox), "lifetime was over")
	})
}

// Output goes on, without loss and without repeats, whatever becomes of the pipe.
func TestPipesBreak(t *testing.T) {
	numbers := func(n int) string {
		var b bytes.Buffer
		for i := range n {
			fmt.Fprintln(&b, i)
		}
		return b.String()
	}
	const script = `i=0; while [ $i -lt 300 ]; do echo $i; i=$((i+1)); sleep 0.01; done`
	for name, trouble := range map[string]func(h *house, sb *sandbox){
		"the stream is reset": func(h *house, _ *sandbox) {
			h.fake.Inject(modaltest.Fault{RPC: "TCR.TaskExecStdioRead", Count: 3, Code: codes.Unavailable, Messages: 5})
			_ = h.run(h.client(h.create("other")), "true") // so that the fault finds a stream
		},
		"the program that carries it is killed": func(h *house, sb *sandbox) {
			for range 3 {
				time.Sleep(300 * time.Millisecond)
				p, err := sb.current().Exec(h.ctx(), []string{"pkill", "-KILL", "-f", "executor-guest.* dial"}, nil)
				if err != nil {
					h.Fatal(err)
				}
				_, _ = p.Wait(h.ctx(), nil)
			}
		},
		"tokens expire": func(h *house, sb *sandbox) {
			time.Sleep(1500 * time.Millisecond) // they live a second
			l := sb.openedLine()
			if l == nil {
				h.Fatal("no line")
			}
			l.session.Close()
		},
		"it is renewed": func(h *house, sb *sandbox) {
			before := sb.openedLine()
			for range 3 {
				time.Sleep(200 * time.Millisecond)
				if err := sb.renew(h.ctx()); err != nil {
					h.Fatal(err)
				}
			}
			if sb.openedLine() == before {
				h.Error("the pipe is the old one")
			}
			select {
			case <-before.session.Done():
			case <-time.After(20 * time.Second):
				h.Error("the old pipe is still open")
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHouse(t, modaltest.Config{RouterTokenLife: time.Second, AuthTokenLife: time.Second}, nil)
			sb := h.create("breaks")
			c := h.client(sb)
			type result struct {
				out guestclient.Outcome
				err error
			}
			ran := make(chan result, 1)
			h.engine.work.Go(func() {
				out, err := c.Run(h.ctx(), command("sh", "-c", script))
				ran <- result{out, err}
			})
			time.Sleep(300 * time.Millisecond)
			trouble(h, sb)
			r := <-ran
			if r.err != nil || string(r.out.Stdout) != numbers(300) {
				t.Errorf("%v, %d bytes", r.err, len(r.out.Stdout))
			}
			if sb.over() {
				t.Errorf("the sandbox has ended: %v", sb.Ended())
			}
		})
	}
}

// The ceiling holds whatever is asked for, and a create that is given up counts until it
// is gone.
func TestCeilingHolds(t *testing.T) {
	h := newHouse(t, modaltest.Config{}, func(c *Config) { c.MaxSandboxes = 3 })
	made := make(chan error, 12)
	for i := range 12 {
		h.engine.work.Go(func() {
			_, err := h.engine.Create(h.ctx(), engine.Spec{ID: fmt.Sprint("many-", i)})
			made <- err
		})
	}
	ok := 0
	for range 12 {
		if err := <-made; err == nil {
			ok++
		} else if fault.KindOf(err) != fault.Exhausted {
			t.Error(err)
		}
	}
	if n := h.alive(); ok != 3 || n != 3 {
		t.Errorf("%d were made, %d are there, want 3", ok, n)
	}
	// One that starts over what is there counts it.
	cfg := h.engine.cfg
	cfg.Client = nil
	again := openEngine(t, cfg)
	defer again.Close()
	if _, err := again.Create(h.ctx(), engine.Spec{ID: "more"}); fault.KindOf(err) != fault.Exhausted {
		t.Errorf("after a restart: %v", err)
	}
}

// A sandbox of an engine that was closed cannot be dialled, and says so at once.
func TestDialAfterClose(t *testing.T) {
	h := newHouse(t, modaltest.Config{}, nil)
	sb := h.create("closed")
	if err := h.engine.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := sb.Dial(h.ctx()); !errors.Is(err, errClosing) {
		t.Errorf("dial: %v", err)
	}
	if _, err := h.engine.Create(h.ctx(), engine.Spec{ID: "late"}); !errors.Is(err, errClosing) {
		t.Errorf("create: %v", err)
	}
}

// Secrets of the provider are in the environment of programs where they were asked for.
func TestSecrets(t *testing.T) {
	h := newHouse(t, modaltest.Config{Secrets: map[string]map[string]string{"harvest-github": {"GITHUB_TOKEN": "ghp_x"}}}, nil)
	sb, err := h.engine.Create(h.ctx(), engine.Spec{ID: "secret", Secrets: []string{"harvest-github"}})
	if err != nil {
		t.Fatal(err)
	}
	if got := h.run(h.client(sb), "sh", "-c", "echo $GITHUB_TOKEN; env | grep -c ^MODAL_; cat /proc/1/cmdline | tr '\\0' ' ' | grep -c ghp_"); got != "ghp_x\n0\n0\n" {
		t.Errorf("%q", got)
	}
	if got := h.run(h.client(h.create("plain")), "sh", "-c", "echo $GITHUB_TOKEN"); got != "\n" {
		t.Errorf("a sandbox that did not ask has %q", got)
	}
	if _, err := h.engine.Create(h.ctx(), engine.Spec{ID: "none", Secrets: []string{"nobody-made"}}); fault.ReasonOf(err) != "SECRETS_NOT_AVAILABLE" {
		t.Errorf("a secret that is not there: %v", err)
	}
}
