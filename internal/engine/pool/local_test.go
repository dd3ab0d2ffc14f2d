package pool_test

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/engine/local"
	"github.com/harvest-run/executord/internal/engine/pool"
	"github.com/harvest-run/executord/internal/guestbinary/guestbuild"
	"github.com/harvest-run/executord/internal/guestclient"
)

// TestLocal keeps real sandboxes ready, uses them, kills one, and drains.
func TestLocal(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: sandboxes with limits")
	}
	guest, err := guestbuild.Build(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	state := t.TempDir()
	e, err := local.New(t.Context(), local.Config{
		StateDir: state, Guest: guest, UIDBase: 1879048192, UIDCount: 4000,
		Defaults: engine.Limits{MemoryBytes: 512 << 20, PIDs: 200},
	})
	if err != nil {
		t.Skipf("this host cannot make local sandboxes: %v", err)
	}
	p := pool.New(pool.Config{Engine: e, Size: 2})
	var group sync.WaitGroup
	group.Go(func() { _ = p.Run(context.Background()) })
	defer func() { p.Drain(); group.Wait() }()
	await(t, func() bool { return p.Stats().Ready == 2 })

	sb, ok := p.Claim(engine.Spec{ID: "whatever"})
	if !ok || sb.Limits().PIDs != 200 {
		t.Fatalf("claimed %v, %v", sb, ok)
	}
	run(t, sb)
	if used, err := sb.Usage(t.Context()); err != nil || used.OOMKills != 0 || used.PIDsRefused != 0 {
		t.Errorf("%+v, %v", used, err)
	}
	if _, err := sb.Terminate(t.Context()); err != nil {
		t.Fatal(err)
	}
	await(t, func() bool { return p.Stats().Ready == 2 })

	// One dies while it is ready.
	before, err := e.List(t.Context())
	if err != nil || len(before) != 2 {
		t.Fatalf("%v, %v", before, err)
	}
	killGuest(t, state, before[0])
	await(t, func() bool {
		ids, err := e.List(t.Context())
		return err == nil && !slices.Contains(ids, before[0]) && p.Stats().Ready == 2
	})
	for range 2 {
		sb, ok := p.Claim(engine.Spec{})
		if !ok || sb.ID() == before[0] {
			t.Fatalf("claimed %v, %v", sb, ok)
		}
		run(t, sb)
		if _, err := sb.Terminate(t.Context()); err != nil {
			t.Fatal(err)
		}
	}

	await(t, func() bool { return p.Stats().Ready == 2 })
	p.Drain()
	group.Wait()
	if left, err := e.List(t.Context()); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
	if err := e.Close(); err != nil {
		t.Error(err)
	}
}

// await waits for something that happens soon.
func await(t *testing.T, happened func() bool) {
	t.Helper()
	for range 4000 {
		if happened() {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	t.Fatal("it did not happen")
}

// run runs a program in a sandbox.
func run(t *testing.T, sb engine.Sandbox) {
	t.Helper()
	guest := guestclient.New(sb)
	defer guest.Close()
	if _, err := guest.Start(t.Context(), &guestv1.StartRequest{
		Execution: "x", Args: []string{"/bin/sh", "-c", "echo hello"}, Env: []string{"PATH=/bin"},
		WorkingDirectory: "/", TimeoutMs: 60_000,
	}); err != nil {
		t.Fatal(err)
	}
	var position int64
	for {
		out, err := guest.Read(t.Context(), "x", position, 1<<10, time.Second)
		if err != nil {
			t.Fatal(err)
		}
		exit := out.Exit
		for _, c := range out.Chunks {
			if string(c.Data) != "hello\n" {
				t.Errorf("it said %q", c.Data)
			}
			position += int64(len(c.Data))
		}
		out.Release()
		if exit != nil {
			if exit.GetCode() != 0 || position != 6 {
				t.Errorf("%v after %d bytes", exit, position)
			}
			return
		}
	}
}

// killGuest ends a sandbox as a crash of its guest does.
func killGuest(t *testing.T, state, id string) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(state, "local", "sandboxes", id, "sandbox.json"))
	if err != nil {
		t.Fatal(err)
	}
	var record struct{ PID int }
	if err := errors.Join(json.Unmarshal(text, &record), syscall.Kill(record.PID, syscall.SIGKILL)); err != nil {
		t.Fatal(err)
	}
}
