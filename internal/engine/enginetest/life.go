package enginetest

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/fault"
	"github.com/harvest-run/executord/internal/guestclient"
)

// lifeCases are about making sandboxes and finding them again.
func lifeCases() []testCase {
	return []testCase{
		{"it says what it is", saysWhatItIs},
		{"a created sandbox answers", createdAnswers},
		{"an id has one sandbox", oneSandbox},
		{"an id has one sandbox when many ask at once", oneSandboxConcurrently},
		{"create makes room for itself where one died", createAfterDeath},
		{"an engine after this one finds a running command and its output", reopen},
		{"an engine after this one follows to the end", followAfterReopen},
		{"an unknown id is not found", unknownID},
		{"an id that is none is refused", invalidID},
		{"list names what is there", list},
		{"a create that is given up leaves nothing", cancelledCreate},
		{"twenty creates at once", parallelCreates},
		{"any number of pipes", manyPipes},
	}
}

func saysWhatItIs(t *testing.T, h *house) {
	if h.engine.Name() == "" || h.engine.Isolation() == "" {
		t.Errorf("name %q, isolation %q: must not be empty", h.engine.Name(), h.engine.Isolation())
	}
	seen := make(map[string]bool)
	for _, c := range h.engine.Capabilities() {
		if c.Name == "" || seen[c.Name] {
			t.Errorf("capability %+v: has no name, or one that another has", c)
		}
		seen[c.Name] = true
		if c.Available && c.Remedy != "" {
			t.Errorf("capability %+v: is available and has a remedy", c)
		}
		if !c.Available && c.Detail == "" {
			t.Errorf("capability %+v: does not say why it is not there", c)
		}
	}
	for name, limits := range map[string]engine.Limits{
		"limit.memory": {MemoryBytes: 1 << 30}, "limit.pids": {PIDs: 100}, "limit.cpu": {CPUMillis: 100},
		"limit.disk": {DiskBytes: 64 << 20}, "limit.open_files": {OpenFiles: 64},
	} {
		if !seen[name] {
			t.Errorf("capability %q is not mentioned", name)
		}
		i := slices.IndexFunc(h.engine.Capabilities(), func(c engine.Capability) bool { return c.Name == name })
		if i >= 0 && h.engine.Capabilities()[i].Available != (h.engine.CheckLimits(limits) == nil) {
			t.Errorf("capability %+v, but CheckLimits says %v", h.engine.Capabilities()[i], h.engine.CheckLimits(limits))
		}
	}
}

func createdAnswers(t *testing.T, h *house) {
	b := h.create("one", engine.Limits{})
	if b.ID() != "one" {
		t.Errorf("id %q, want %q", b.ID(), "one")
	}
	info, err := b.guest.Info(h.ctx())
	if err != nil {
		t.Fatal(err)
	}
	if len(info.GetExecutions()) != 0 {
		t.Errorf("a new sandbox has executions %q", info.GetExecutions())
	}
	if out := b.run("echo", "hello"); !exited(out, 0) || string(out.stdout) != "hello\n" || len(out.stderr) > 0 {
		t.Errorf("echo: %v", out)
	}
	if out := b.run("sh", "-c", "echo out; echo err >&2; exit 7"); !exited(out, 7) || string(out.stdout) != "out\n" || string(out.stderr) != "err\n" {
		t.Errorf("exit 7: %v", out)
	}
	if out := b.run("sh", "-c", "kill -TERM $$"); !signalled(out, 15) {
		t.Errorf("TERM: %v", out)
	}
	select {
	case <-b.Done():
		t.Error("Done is closed while the sandbox lives")
	default:
	}
}

func oneSandbox(t *testing.T, h *house) {
	first := h.create("same", engine.Limits{})
	first.sh("echo mine > /workspace/mark")
	second := h.create("same", engine.Limits{})
	if got := second.sh("cat /workspace/mark"); got != "mine" {
		t.Errorf("the second create gave a sandbox with %q", got)
	}
	if got := h.open("same").sh("cat /workspace/mark"); got != "mine" {
		t.Errorf("open gave a sandbox with %q", got)
	}
	h.mustList(h.ctx(), "same")
	second.terminate()
	first.awaitDone()
	h.mustBeGone("same")
}

func oneSandboxConcurrently(t *testing.T, h *house) {
	const callers = 10
	ctx := h.ctx()
	boxes := make([]engine.Sandbox, callers)
	var wait sync.WaitGroup
	for i := range callers {
		wait.Go(func() {
			sb, err := h.engine.Create(ctx, engine.Spec{ID: "crowd"})
			if err != nil {
				t.Errorf("caller %d: %v", i, err)
			}
			boxes[i] = sb
		})
	}
	wait.Wait()
	if t.Failed() {
		return
	}
	h.box(boxes[0]).begin("mark", "sleep", "1000")
	for i, sb := range boxes {
		info, err := h.box(sb).guest.Info(ctx)
		if err != nil || !slices.Equal(info.GetExecutions(), []string{"mark"}) {
			t.Errorf("caller %d got another sandbox: %v, %v", i, info, err)
		}
	}
	h.mustList(ctx, "crowd")
}

func createAfterDeath(t *testing.T, h *house) {
	dead := h.create("again", engine.Limits{})
	dead.sh("echo old > /workspace/mark")
	h.place.KillGuest(t, "again")
	dead.awaitDone()
	fresh := h.create("again", engine.Limits{})
	if got := fresh.sh("cat /workspace/mark 2>/dev/null || echo none"); got != "none" {
		t.Errorf("the new sandbox has %q of the dead one", got)
	}
	// Whoever still has the dead one ends nothing but that.
	if _, err := dead.Terminate(h.ctx()); err != nil {
		t.Errorf("terminate the dead one again: %v", err)
	}
	if got := fresh.sh("echo alive"); got != "alive" {
		t.Errorf("the new sandbox says %q", got)
	}
}

func reopen(t *testing.T, h *house) {
	asked := h.engine.DefaultLimits()
	if asked.PIDs > 0 {
		asked.PIDs++
	}
	before := h.create("lasting", asked)
	before.begin("job", "bash", "-c", "echo before; until [ -e /workspace/go ]; do sleep 0.02; done; echo after")
	before.wrote("job", "before\n")

	h.reopen()
	h.mustList(h.ctx(), "lasting")
	after := h.open("lasting")
	if after.Limits() != asked {
		t.Errorf("limits %+v after the restart, want %+v", after.Limits(), asked)
	}
	info, err := after.guest.Info(h.ctx())
	if err != nil || !slices.Equal(info.GetExecutions(), []string{"job"}) {
		t.Fatalf("after the restart the guest has %v, %v, want job", info.GetExecutions(), err)
	}
	after.sh("touch /workspace/go")
	if out := after.finish("job"); !exited(out, 0) || string(out.stdout) != "before\nafter\n" {
		t.Errorf("job: %v", out)
	}
	after.terminate()
	h.mustBeGone("lasting")
}

func followAfterReopen(t *testing.T, h *house) {
	h.create("dies", engine.Limits{})
	h.create("stays", engine.Limits{})
	h.create("died", engine.Limits{})
	h.reopen()
	dies, stays := h.open("dies"), h.open("stays")
	h.place.KillGuest(t, "dies")
	dies.awaitDone()
	select {
	case <-stays.Done():
		t.Error("Done of another sandbox is closed too")
	default:
	}
	stays.answers()
	dies.terminate()
	h.mustBeGone("dies")

	// One that dies while nobody follows it.
	h.place.KillGuest(t, "died")
	h.reopen()
	h.mustBeGone("died")
	h.mustList(h.ctx(), "stays")
}

func unknownID(t *testing.T, h *house) {
	sb, err := h.engine.Open(h.ctx(), "nobody")
	mustFault(t, "open", err, fault.NotFound, "")
	if sb != nil {
		t.Errorf("open gave %v beside the error", sb)
	}
	h.mustList(h.ctx())
}

func invalidID(t *testing.T, h *house) {
	h.create("witness", engine.Limits{})
	for _, id := range []string{"", ".", "..", "../witness", "a/b", "/", "UPPER", "under_score", "ünï", "a b", "nul\x00", strings.Repeat("x", 64)} {
		sb, err := h.engine.Create(h.ctx(), engine.Spec{ID: id})
		mustFault(t, fmt.Sprintf("create %q", id), err, fault.Invalid, "")
		if sb != nil {
			t.Errorf("create %q gave %v beside the error", id, sb)
		}
		_, err = h.engine.Open(h.ctx(), id)
		mustFault(t, fmt.Sprintf("open %q", id), err, fault.NotFound, "")
	}
	h.mustList(h.ctx(), "witness")
	h.open("witness").answers()
	longest := h.create("0-"+strings.Repeat("z", 61), engine.Limits{})
	longest.answers()
}

func list(t *testing.T, h *house) {
	h.mustList(h.ctx())
	a := h.create("a", engine.Limits{})
	h.create("b", engine.Limits{})
	h.mustList(h.ctx(), "a", "b")
	a.terminate()
	h.mustList(h.ctx(), "b")
	// One that died is listed until somebody ends it: it has left something.
	h.place.KillGuest(t, "b")
	h.open("b").awaitDone()
	h.mustList(h.ctx(), "b")
}

func cancelledCreate(t *testing.T, h *house) {
	reason := errors.New("the caller has had enough")
	gone, cancel := context.WithCancelCause(h.ctx())
	cancel(reason)
	if sb, err := h.engine.Create(gone, engine.Spec{ID: "never"}); !errors.Is(err, reason) || sb != nil {
		t.Errorf("create with an ended context: %v, %v, want the context's cause", sb, err)
	}
	h.mustList(h.ctx())

	// As long as one takes, so that the ends fall into all parts of it.
	start := time.Now()
	h.create("measure", engine.Limits{}).terminate()
	usual := time.Since(start)
	cancelled := 0
	for i := range 25 {
		ctx, cancel := context.WithCancelCause(h.ctx())
		timer := time.AfterFunc(time.Duration(rand.Float64()*float64(usual)), func() { cancel(reason) })
		sb, err := h.engine.Create(ctx, engine.Spec{ID: fmt.Sprintf("hasty-%d", i)})
		timer.Stop()
		cancel(nil)
		switch {
		case err == nil:
			h.box(sb).terminate()
		case errors.Is(err, reason):
			cancelled++
		default:
			t.Errorf("create %d: %v, want the context's cause", i, err)
		}
		h.mustList(h.ctx())
	}
	t.Logf("%d of 25 creates were given up", cancelled)
}

func parallelCreates(t *testing.T, h *house) {
	const n = 20
	ctx := h.ctx()
	boxes := make([]engine.Sandbox, n)
	var wait sync.WaitGroup
	for i := range n {
		wait.Go(func() {
			id := fmt.Sprintf("many-%d", i)
			sb, err := h.engine.Create(ctx, engine.Spec{ID: id})
			if err != nil {
				t.Errorf("create %s: %v", id, err)
				return
			}
			boxes[i] = sb
			guest := guestclient.New(sb)
			defer guest.Close()
			if _, err := guest.Start(ctx, request("say", "bash", "-c", "echo "+id+" >> /workspace/who; sleep 0.2; cat /workspace/who")); err != nil {
				t.Errorf("start in %s: %v", id, err)
				return
			}
			out, err := follow(ctx, guest, "say")
			if err != nil || !exited(out, 0) || string(out.stdout) != id+"\n" {
				t.Errorf("who is in %s: %v, %v", id, out, err)
			}
		})
	}
	wait.Wait()
	for _, sb := range boxes {
		if sb != nil {
			wait.Go(func() {
				if _, err := sb.Terminate(ctx); err != nil {
					t.Errorf("terminate: %v", err)
				}
			})
		}
	}
	wait.Wait()
	h.mustList(ctx)
}

func manyPipes(t *testing.T, h *house) {
	b := h.create("pipes", engine.Limits{})
	for range 16 {
		other := h.box(b.Sandbox)
		other.answers()
	}
	b.terminate()
	if conn, err := b.Dial(h.ctx()); err == nil {
		conn.Close()
		t.Error("a sandbox that was ended can be dialled")
	}
}
