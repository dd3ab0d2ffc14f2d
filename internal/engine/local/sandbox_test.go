package local

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/fault"
)

// Terminate says why it could not end a sandbox, and can be asked again.
func TestTerminateOfWhatDoesNotDie(t *testing.T) {
	needRoot(t)
	e := newEngine(t)
	freezer := filepath.Join("/sys/fs/cgroup/freezer", "executord-test-"+e.key())
	if err := os.Mkdir(freezer, 0o755); err != nil {
		t.Skipf("no freezer of version 1 here: %v", err)
	}
	t.Cleanup(func() {
		if err := os.Remove(freezer); err != nil {
			t.Error(err)
		}
	})
	sb := sandboxFor(t, e, engine.Spec{ID: "stuck"})
	set := func(file, text string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(freezer, file), []byte(text), 0); err != nil {
			t.Fatal(err)
		}
	}
	set("cgroup.procs", strconv.Itoa(sb.(*sandbox).process.pid))
	set("freezer.state", "FROZEN")
	cause := errors.New("enough")
	ctx, cancel := context.WithTimeoutCause(t.Context(), 50*time.Millisecond, cause)
	defer cancel()
	if _, err := sb.Terminate(ctx); !errors.Is(err, cause) {
		t.Errorf("%v, want the context's cause", err)
	}
	select {
	case <-sb.Done():
		t.Error("Done is closed while the guest is there")
	default:
	}
	if ids, err := e.List(t.Context()); err != nil || !slices.Equal(ids, []string{"stuck"}) {
		t.Errorf("listed: %q, %v: it must still be known", ids, err)
	}
	set("freezer.state", "THAWED")
	if _, err := sb.Terminate(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestTerminateAfterClose(t *testing.T) {
	cfg := testConfig(t)
	e := openEngine(t, cfg)
	sb, err := e.Create(t.Context(), engine.Spec{ID: "left"})
	if err != nil {
		t.Fatal(err)
	}
	if err := e.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := sb.Terminate(t.Context()); err == nil {
		t.Error("a sandbox was ended whose end nobody can see")
	}
	e = engineOver(t, cfg)
	if sb, err = e.Open(t.Context(), "left"); fault.KindOf(err) == fault.NotFound {
		return // it was killed, and is gone
	} else if err != nil {
		t.Fatal(err)
	}
	if _, err := sb.Terminate(t.Context()); err != nil {
		t.Error(err)
	}
}

func FuzzReadRecord(f *testing.F) {
	f.Add([]byte(`{"limits":{"memory_bytes":1},"groups":{"v1":{"memory":"/x"},"v2":"/y","in_v2":["cpu"]},"pid":1,"start_ticks":2,"boot":"b"}`))
	f.Add([]byte(`{`))
	f.Fuzz(func(t *testing.T, text []byte) {
		path := filepath.Join(t.TempDir(), recordName)
		if err := os.WriteFile(path, text, 0o600); err != nil {
			t.Fatal(err)
		}
		// Damaged or read, never taken for missing: that would be the end of a sandbox
		// without its being looked for.
		if _, err := readRecord(path); err != nil && (!errors.Is(err, errDamaged) || errors.Is(err, os.ErrProcessDone)) {
			t.Error(err)
		}
	})
}

// What is logged of a damaged record names the sandbox.
func TestDamagedRecordIsLogged(t *testing.T) {
	cfg := testConfig(t)
	var out strings.Builder
	cfg.Logger = slog.New(slog.NewTextHandler(&out, nil))
	e := engineOver(t, cfg)
	writeRecord(t, e, "garbage")
	mustBeGone(t, e, "half")
	if !strings.Contains(out.String(), "sandbox=half") {
		t.Errorf("logged: %q", out.String())
	}
}
