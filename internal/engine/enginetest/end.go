package enginetest

import (
	"strings"
	"sync"
	"testing"

	"github.com/harvest-run/executord/internal/engine"
)

// endCases are about ending sandboxes.
func endCases() []testCase {
	return []testCase{
		{"terminate ends every process", terminateAll},
		{"terminate can be repeated", terminateTwice},
		{"terminate can be asked for by many at once", terminateConcurrently},
		{"terminate ends a sandbox that nothing ran in", terminateUnused},
		{"terminate removes what a sandbox made hard to remove", terminateHardTree},
		{"a guest that dies ends its sandbox", guestDies},
		{"what is left of a dead sandbox is removed by open", openRemoves},
		{"signals from inside do not end the guest", signalsFromInside},
	}
}

// escape starts processes that try to outlive their command: in sessions of their
// own, orphaned, deaf to signals.
const escape = `
import os, signal, time
def child(escape):
    if os.fork():
        return
    if escape:
        os.setsid()
        if os.fork():
            os._exit(0)
    for s in range(1, 32):
        try: signal.signal(s, signal.SIG_IGN)
        except (OSError, ValueError): pass
    while True:
        time.sleep(1000)
for i in range(100):
    child(i % 2)
print("ready", flush=True)
time.sleep(1000)
`

func terminateAll(t *testing.T, h *house) {
	limits := h.engine.DefaultLimits()
	if limits.PIDs > 0 {
		limits.PIDs = 500
	}
	b := h.create("crowded", limits)
	b.begin("escape", "python3", "-c", escape)
	b.wrote("escape", "ready\n")
	remains := b.terminate()
	if remains.Processes < 101 {
		t.Errorf("terminate found %d processes, want 101 or more", remains.Processes)
	}
	h.mustBeGone("crowded")
	h.mustList(h.ctx())
}

func terminateTwice(t *testing.T, h *house) {
	b := h.create("twice", engine.Limits{})
	b.begin("sleep", "sleep", "1000")
	first := b.terminate()
	if second := b.terminate(); second != first {
		t.Errorf("the second terminate says %+v, the first %+v", second, first)
	}
	h.mustBeGone("twice")
	// Its id is free again, and ending the old one does not touch the new one.
	fresh := h.create("twice", engine.Limits{})
	b.terminate()
	fresh.answers()
}

func terminateConcurrently(t *testing.T, h *house) {
	b := h.create("often", engine.Limits{})
	b.begin("sleep", "sleep", "1000")
	ctx := h.ctx()
	var wait sync.WaitGroup
	for range 10 {
		wait.Go(func() {
			if _, err := b.Terminate(ctx); err != nil {
				t.Errorf("terminate: %v", err)
			}
			select {
			case <-b.Done():
			default:
				t.Error("terminate returned before the end")
			}
		})
	}
	wait.Wait()
	h.mustBeGone("often")
}

func terminateUnused(t *testing.T, h *house) {
	if remains := h.create("unused", engine.Limits{}).terminate(); remains.Processes != 0 {
		t.Errorf("terminate found %d processes where nothing ran", remains.Processes)
	}
	h.mustBeGone("unused")
}

// hardTree makes what removing stumbles over: directories closed to everybody,
// deeper than a path can be long, with names of every byte, and links outwards.
const hardTree = `
import os
os.chdir("/workspace")
os.makedirs("closed/inner")
open("closed/inner/file", "w").close()
os.chmod("closed/inner", 0)
os.chmod("closed", 0)
os.symlink("/", "root")
os.symlink("..", "up")
os.symlink("loop", "loop")
os.mkdir("names")
for i in range(1, 256):
    if i != 47:
        open(b"names/" + bytes([i]) + b"x" * 200, "w").close()
os.mkfifo("fifo")
os.link("fifo", "fifo2")
for _ in range(3000):
    os.mkdir("d" * 50)
    os.chdir("d" * 50)
open("bottom", "w").close()
`

func terminateHardTree(t *testing.T, h *house) {
	b := h.create("untidy", engine.Limits{})
	if out := b.run("python3", "-c", hardTree); !exited(out, 0) {
		t.Fatalf("make the tree: %v", out)
	}
	b.terminate()
	h.mustBeGone("untidy")
}

func guestDies(t *testing.T, h *house) {
	b := h.create("crash", engine.Limits{})
	b.begin("sleep", "sleep", "1000")
	if _, err := b.Usage(h.ctx()); err != nil {
		t.Errorf("usage before the end: %v", err)
	}
	h.place.KillGuest(t, "crash")
	b.awaitDone()
	if _, err := b.Usage(h.ctx()); err != nil {
		t.Errorf("usage after the end: %v", err)
	}
	b.terminate()
	h.mustBeGone("crash")
	h.mustList(h.ctx())
}

func openRemoves(t *testing.T, h *house) {
	h.create("left", engine.Limits{}).begin("sleep", "sleep", "1000")
	h.reopen()
	h.place.KillGuest(t, "left")
	h.mustList(h.ctx(), "left")
	h.mustBeGone("left")
	h.mustList(h.ctx())
}

func signalsFromInside(t *testing.T, h *house) {
	b := h.create("signals", engine.Limits{})
	for _, signal := range strings.Fields("HUP INT QUIT USR1 USR2 PIPE ALRM TERM CHLD CONT STOP TSTP TTIN TTOU URG XCPU XFSZ VTALRM PROF WINCH IO PWR SYS TRAP KILL") {
		if out := b.run("bash", "-c", "kill -"+signal+" 1; exit 0"); !exited(out, 0) {
			t.Fatalf("after kill -%s 1: %v", signal, out)
		}
		b.answers()
	}
}
