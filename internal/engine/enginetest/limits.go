package enginetest

import (
	"strconv"
	"strings"
	"testing"
	"time"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/fault"
	"github.com/harvest-run/executord/internal/guestclient"
)

// limitCases are about limits and accounting.
func limitCases() []testCase {
	return []testCase{
		{"default limits are those of a sandbox that asks for none", defaultLimits},
		{"a limit that cannot be enforced is refused", refusedLimits},
		{"a limit below zero is refused", negativeLimits},
		{"usage grows", usageGrows},
		{"the memory limit kills, and says so", memoryLimit},
		{"shared memory counts as memory", sharedMemoryLimit},
		{"the process limit refuses forks, and says so", processLimit},
		{"the processor limit holds", processorLimit},
		{"the guest answers while everything is used up", answersAtLimits},
	}
}

func defaultLimits(t *testing.T, h *house) {
	defaults := h.engine.DefaultLimits()
	if err := h.engine.CheckLimits(defaults); err != nil {
		t.Errorf("the defaults %+v cannot be enforced: %v", defaults, err)
	}
	if got := h.create("plain", engine.Limits{}).Limits(); got != defaults {
		t.Errorf("limits %+v, want the defaults %+v", got, defaults)
	}
	for name, c := range map[string]struct {
		can  engine.Limits
		asks engine.Limits
	}{
		"memory": {engine.Limits{MemoryBytes: 1}, engine.Limits{MemoryBytes: 100 << 20}},
		"pids":   {engine.Limits{PIDs: 1}, engine.Limits{PIDs: 77}},
		"cpu":    {engine.Limits{CPUMillis: 1}, engine.Limits{CPUMillis: 777}},
		"disk":   {engine.Limits{DiskBytes: 1 << 30}, engine.Limits{DiskBytes: 99 << 20}},
		"files":  {engine.Limits{OpenFiles: 16}, engine.Limits{OpenFiles: 77}},
	} {
		if h.engine.CheckLimits(c.can) != nil {
			continue // refusedLimits looks at that
		}
		if got, want := h.create(name, c.asks).Limits(), c.asks.Or(defaults); got != want {
			t.Errorf("%s: limits %+v, want %+v", name, got, want)
		}
	}
	if defaults == (engine.Limits{}) && h.engine.CheckLimits(engine.Limits{PIDs: 100}) == nil {
		t.Error("the engine under test has no default limits though it can enforce one")
	}
}

func refusedLimits(t *testing.T, h *house) {
	refused := 0
	for name, limits := range map[string]engine.Limits{
		"memory": {MemoryBytes: 100 << 20}, "pids": {PIDs: 100}, "cpu": {CPUMillis: 500}, "disk": {DiskBytes: 64 << 20},
		"files": {OpenFiles: 1 << 40},
	} {
		err := h.engine.CheckLimits(limits)
		if err == nil {
			continue
		}
		refused++
		mustFault(t, "check "+name, err, fault.FailedPrecondition, "LIMIT_NOT_ENFORCEABLE")
		sb, err := h.engine.Create(h.ctx(), engine.Spec{ID: name, Limits: limits})
		mustFault(t, "create with "+name, err, fault.FailedPrecondition, "LIMIT_NOT_ENFORCEABLE")
		if sb != nil {
			t.Errorf("create with %s gave %v beside the error", name, sb)
		}
	}
	if refused == 0 {
		t.Error("every limit can be enforced: declare that as an exception")
	}
	h.mustList(h.ctx())
}

func negativeLimits(t *testing.T, h *house) {
	for name, limits := range map[string]engine.Limits{
		"memory": {MemoryBytes: -1}, "pids": {PIDs: -1}, "cpu": {CPUMillis: -1}, "disk": {DiskBytes: -1}, "files": {OpenFiles: -1},
	} {
		mustFault(t, "check "+name, h.engine.CheckLimits(limits), fault.Invalid, "")
		_, err := h.engine.Create(h.ctx(), engine.Spec{ID: name, Limits: limits})
		mustFault(t, "create with "+name, err, fault.Invalid, "")
	}
}

// usage reads it and fails the test if it cannot.
func (b *box) usage() engine.Usage {
	b.h.t.Helper()
	u, err := b.Usage(b.h.ctx())
	if err != nil {
		b.h.t.Fatalf("usage of %s: %v", b.ID(), err)
	}
	return u
}

func usageGrows(t *testing.T, h *house) {
	b := h.create("usage", engine.Limits{})
	b.sh("true")
	before := b.usage()
	if before.OOMKills != 0 || before.PIDsRefused != 0 {
		t.Errorf("usage at the start: %+v", before)
	}
	b.sh(`python3 -c 'x = b"x" * (100 << 20)'`)
	if after := b.usage(); after.PeakMemoryBytes < 100<<20 || after.PeakMemoryBytes < before.PeakMemoryBytes {
		t.Errorf("peak memory %d after 100 MiB were in use, before %d", after.PeakMemoryBytes, before.PeakMemoryBytes)
	}
	before = b.usage()
	out := b.run("python3", "-c", `import time
while time.process_time() < 0.5: pass`)
	after := b.usage()
	if !exited(out, 0) || after.CPU-before.CPU < 400*time.Millisecond {
		t.Errorf("cpu %v after half a second of work, before %v; %v", after.CPU, before.CPU, out)
	}
	if busy := time.Duration(out.exit.GetCpuUserMicros()+out.exit.GetCpuSystemMicros()) * time.Microsecond; after.CPU < busy {
		t.Errorf("cpu of the sandbox %v, of its command %v", after.CPU, busy)
	}
	if after.PeakMemoryBytes < 100<<20 {
		t.Errorf("peak memory fell to %d", after.PeakMemoryBytes)
	}
}

func memoryLimit(t *testing.T, h *house) {
	const limit = 128 << 20
	b := h.create("memory", engine.Limits{MemoryBytes: limit})
	if out := b.run("python3", "-c", `x = b"x" * (32 << 20); print(len(x))`); !exited(out, 0) {
		t.Errorf("within the limit: %v", out)
	}
	if u := b.usage(); u.OOMKills != 0 {
		t.Errorf("usage within the limit: %+v", u)
	}
	for i := range 2 {
		out := b.run("python3", "-c", `x = []
while True: x.append(b"x" * (1 << 20))`)
		if !signalled(out, 9) {
			t.Errorf("over the limit: %v", out)
		}
		u := b.usage()
		if u.OOMKills < int64(i+1) || u.PeakMemoryBytes > limit || u.PeakMemoryBytes < limit/2 {
			t.Errorf("usage after kill %d: %+v", i+1, u)
		}
		b.answers()
	}
	if out := b.run("echo", "on it goes"); !exited(out, 0) {
		t.Errorf("after the kill: %v", out)
	}
}

func sharedMemoryLimit(t *testing.T, h *house) {
	const limit = 128 << 20
	b := h.create("shm", engine.Limits{MemoryBytes: limit})
	out := b.run("bash", "-c", "head -c 1G /dev/zero > /dev/shm/fill; echo; stat -c %s /dev/shm/fill")
	size, _ := strconv.ParseInt(strings.TrimSpace(string(out.stdout)), 10, 64)
	if !signalled(out, 9) && (size == 0 || size > limit) {
		t.Errorf("filling /dev/shm: %v, want an end below the limit", out)
	}
	b.answers()
	if out := b.run("rm", "/dev/shm/fill"); !exited(out, 0) {
		t.Errorf("after it was full: %v", out)
	}
}

// forkBomb forks until it is refused and then stays.
const forkBomb = `
import os, time
n = 0
while True:
    try: pid = os.fork()
    except OSError as e:
        print("refused after", n, e.errno, flush=True)
        break
    if pid == 0:
        time.sleep(1000)
    n += 1
time.sleep(1000)
`

func processLimit(t *testing.T, h *house) {
	const limit = 40
	b := h.create("forks", engine.Limits{PIDs: limit})
	b.begin("bomb", "python3", "-c", forkBomb)
	b.wrote("bomb", "refused after")
	if u := b.usage(); u.PIDsRefused < 1 {
		t.Errorf("usage after a fork was refused: %+v", u)
	}
	b.answers()
	// Nothing more can be started, and that is said.
	_, err := b.guest.Start(h.ctx(), request("more", "true"))
	if guestclient.KindOf(err) != guestv1.Error_KIND_EXHAUSTED {
		t.Errorf("a start at the limit: %v, want KIND_EXHAUSTED", err)
	}
	if err := b.guest.Stop(h.ctx(), "bomb", 0); err != nil {
		t.Fatal(err)
	}
	out := b.finish("bomb")
	// All but the bomb itself are its children.
	if want := "refused after " + strconv.Itoa(limit-1) + " 11\n"; !strings.Contains(string(out.stdout), want) {
		t.Errorf("the bomb: %v, want %q", out, want)
	}
	if out.exit.GetReaped() < limit-1 || !out.exit.GetTreeEmpty() {
		t.Errorf("the end of the bomb: %v, want %d reaped and an empty tree", out.exit, limit-1)
	}
	if out := b.run("echo", "on it goes"); !exited(out, 0) {
		t.Errorf("after the bomb: %v", out)
	}
}

func processorLimit(t *testing.T, h *house) {
	const share = 0.05 // so little that without the limit it is exceeded on a busy machine too
	b := h.create("slow", engine.Limits{CPUMillis: share * 1000})
	b.sh("true")
	before, start := b.usage(), time.Now()
	out := b.run("bash", "-c", "for i in 1 2 3; do (timeout 1.5 bash -c 'while :; do :; done') & done; wait; true")
	wall := time.Since(start)
	cpu := b.usage().CPU - before.CPU
	if !exited(out, 0) {
		t.Fatal(out)
	}
	// Three loops would use all processors; a quota may be overrun by a period or two.
	if ratio := cpu.Seconds() / wall.Seconds(); ratio > 3*share {
		t.Errorf("used %v in %v: %.2f processors, want about %.2f", cpu, wall, ratio, share)
	}
	if cpu < 20*time.Millisecond {
		t.Errorf("used only %v in %v: the loops did not run", cpu, wall)
	}
}

func answersAtLimits(t *testing.T, h *house) {
	b := h.create("full", engine.Limits{MemoryBytes: 64 << 20, PIDs: 32, CPUMillis: 100})
	b.begin("bomb", "python3", "-c", forkBomb)
	b.wrote("bomb", "refused after")
	// Processes that are born again each time one is killed for memory.
	if err := b.guest.Stop(h.ctx(), "bomb", 0); err != nil {
		t.Fatal(err)
	}
	b.finish("bomb")
	b.begin("hog", "python3", "-c", `import os, sys
print("hog", flush=True)
while True:
    try: pid = os.fork()
    except OSError: pid = -1
    if pid == 0:
        os.setsid()
        x = []
        while True: x.append(bytearray(1 << 20))
    if pid < 0:
        try: os.wait()
        except OSError: pass`)
	b.wrote("hog", "hog\n")
	eventually(t, "something is killed for memory", func() bool { b.answers(); return b.usage().OOMKills > 0 })
	for range 20 {
		b.answers()
	}
	if err := b.guest.Stop(h.ctx(), "hog", 0); err != nil {
		t.Fatal(err)
	}
	if out := b.finish("hog"); !out.exit.GetTreeEmpty() {
		t.Errorf("the end: %v, want an empty tree", out)
	}
	if out := b.run("echo", "on it goes"); !exited(out, 0) {
		t.Errorf("afterwards: %v", out)
	}
}
