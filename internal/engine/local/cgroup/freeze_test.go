package cgroup

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"
)

// What is frozen stands still, can be killed, and goes on when it is thawed; neither is
// an error for one that is or is not.
func TestFreeze(t *testing.T) {
	h := host(t, "")
	if ok, why := h.CanKill(); !ok {
		t.Skip(why)
	}
	g := h.Open("frozen")
	f, err := g.CreateForGuest()
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
	defer func() {
		if err := errors.Join(g.Kill(t.Context()), g.Remove()); err != nil {
			t.Error(err)
		}
	}()
	if err := g.CreateForCommands(0); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(g.Thaw(), g.Freeze(t.Context()), g.Freeze(t.Context()), g.Thaw()); err != nil {
		t.Errorf("without processes: %v", err)
	}
	dir, err := g.OpenCommands()
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	clock := t.TempDir() + "/clock"
	cmd := exec.Command("bash", "-c", "while :; do date +%N > "+clock+"; sleep 0.01; done")
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(dir.Fd())}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	read := func() []byte {
		text, err := os.ReadFile(clock)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
		return text
	}
	goesOn := func() {
		t.Helper()
		was := read()
		for deadline := time.Now().Add(time.Minute); bytes.Equal(read(), was) || len(read()) == 0; time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatal("it does not go on")
			}
		}
	}
	goesOn()
	if err := g.Freeze(t.Context()); err != nil {
		t.Fatal(err)
	}
	was := read()
	time.Sleep(100 * time.Millisecond)
	if !bytes.Equal(read(), was) {
		t.Error("what is frozen goes on")
	}
	if err := g.Thaw(); err != nil {
		t.Fatal(err)
	}
	goesOn()
	if err := errors.Join(g.Freeze(t.Context()), g.Kill(t.Context())); err != nil {
		t.Errorf("kill what is frozen: %v", err)
	}
	_ = cmd.Wait()
}

func TestFreezeRefuses(t *testing.T) {
	h := host(t, "")
	nothing := h.Open("nothing")
	if err := nothing.Freeze(t.Context()); err == nil {
		t.Error("froze what is not there")
	}
	if err := nothing.Thaw(); err != nil {
		t.Errorf("thaw what is not there: %v", err)
	}
	none := &Group{host: h}
	if err := none.Freeze(context.Background()); err == nil {
		t.Error("froze without version 2")
	}
	if err := none.Thaw(); err != nil {
		t.Error(err)
	}
}
