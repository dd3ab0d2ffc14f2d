package execution_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/engine/enginefake"
	"github.com/harvest-run/executord/internal/execution"
	"github.com/harvest-run/executord/internal/fault"
)

// smallDisk mounts a tmpfs of a few MiB for the logs.
func smallDisk(t *testing.T, size string) string {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size="+size); err != nil {
		t.Skipf("cannot mount a tmpfs: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// fill takes all the room that is left, and returns what gives it back.
func fill(t *testing.T, dir string) (free func()) {
	t.Helper()
	file := filepath.Join(dir, "ballast")
	f, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	piece := make([]byte, 64<<10)
	for {
		if _, err := f.Write(piece); err != nil {
			if !errors.Is(err, syscall.ENOSPC) {
				t.Fatal(err)
			}
			if len(piece) == 1 {
				break
			}
			piece = piece[:max(len(piece)/2, 1)]
		}
	}
	return func() {
		if err := os.Remove(file); err != nil {
			t.Error(err)
		}
	}
}

// TestDiskFull pauses programs while there is no room for their output. When there is
// room again they go on, and nothing is lost.
func TestDiskFull(t *testing.T) {
	dir := smallDisk(t, "24m")
	const size = 12 << 20
	text := strings.Repeat("0123456789abcdef", size/16)
	fake := enginefake.New(scripted(enginefake.Script{
		Steps: []enginefake.Step{enginefake.Stdout(0, "begin\n"), enginefake.Stdout(300*time.Millisecond, text)}, Exit: enginefake.Exit(0),
	}))
	t.Cleanup(fake.Shutdown)
	r := &rig{
		t: t, engine: fake, fake: fake, store: newMemory(), log: &lockedBuffer{},
		sessions: &sessions{running: make(map[string]engine.Sandbox)}, dir: filepath.Join(dir, "logs"),
	}
	r.open()
	ref := r.start(execution.Request{})
	if err := eventually(func() error { return sequenceAtLeast(r, ref, 2) }); err != nil {
		t.Fatal(err)
	}
	free := fill(t, dir)
	_, err := r.Start(t.Context(), execution.Request{Command: execution.Command{Args: []string{"x"}}})
	wantFault(t, err, fault.Exhausted, "DISK_FULL")
	entries, _ := os.ReadDir(r.dir)
	if len(entries) != 1 {
		t.Errorf("a start that failed left %v", entries)
	}
	if err := eventually(func() error {
		if !strings.Contains(r.log.String(), "cannot write, trying again") {
			return errors.New("nothing was tried")
		}
		if n := fake.Pending("e-"+ref.ID, ref.ID); n != 1<<20 {
			return fmt.Errorf("%d bytes wait in the guest: the program is not paused", n)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if e := r.get(ref); e.State != execution.Running {
		t.Errorf("state %d", e.State)
	}
	free()
	got := r.watch(ref, nil)
	if string(got.output["stdout"]) != "begin\n"+text || got.result.Reason != execution.Exited {
		t.Errorf("%d bytes, %+v", len(got.output["stdout"]), got.result)
	}
	contains(t, r.log.String(), "no space left on device", "no longer trying to write")
}

func sequenceAtLeast(r *rig, ref execution.Ref, n uint64) error {
	e, err := r.Get(r.t.Context(), ref)
	if err == nil && e.Sequence < n {
		err = fmt.Errorf("%d events", e.Sequence)
	}
	return err
}

// TestCancelOnAFullDisk ends the tree in spite of it: its output has no room, and
// perhaps it is what fills the disk.
func TestCancelOnAFullDisk(t *testing.T) {
	for _, session := range []string{"", "a"} {
		t.Run("session "+session, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				dir := smallDisk(t, "4m")
				r := newRig(t, enginefake.Config{
					Script: func(*guestv1.StartRequest) enginefake.Script {
						return enginefake.Script{Steps: []enginefake.Step{
							enginefake.Stdout(0, "begin\n"), enginefake.Stdout(2*time.Second, strings.Repeat("x", 2<<20)),
						}}
					},
				})
				if err := r.Close(); err != nil {
					t.Fatal(err)
				}
				r.dir = filepath.Join(dir, "logs")
				r.open()
				if session != "" {
					r.session(session)
				}
				ref := r.start(execution.Request{Session: session})
				time.Sleep(time.Second)
				free := fill(t, dir)
				time.Sleep(10 * time.Second)
				begin := time.Now()
				var wg sync.WaitGroup
				wg.Go(func() {
					e := r.cancel(ref, 5*time.Second)
					if e.Result.Reason != execution.Cancelled || !e.Result.TreeEmpty || time.Since(begin) > 45*time.Second {
						t.Errorf("%+v after %v", e.Result, time.Since(begin))
					}
					if want := "given up: the rest of its output could not be written"; e.Result.Evidence["cause"] != want {
						t.Errorf("evidence: %v", e.Result.Evidence)
					}
				})
				// After the grace and some the command is given up and its sandbox ended, which
				// can be what makes room. The result then waits for room.
				time.Sleep(40 * time.Second)
				if left, _ := r.fake.List(t.Context()); session == "" && len(left) != 0 {
					t.Errorf("the sandbox of a command that was cancelled is there: %v", left)
				}
				if held := r.fake.Held("s-a"); len(held) != 0 {
					t.Errorf("the guest holds %v", held)
				}
				free()
				wg.Wait()
				got := r.watch(ref, nil)
				if string(got.output["stdout"]) != "begin\n" {
					t.Errorf("%d bytes", len(got.output["stdout"]))
				}
			})
		})
	}
}

// TestCloseOnAFullDisk does not wait for room; the next executord goes on.
func TestCloseOnAFullDisk(t *testing.T) {
	bubble(t, func(t *testing.T) {
		dir := smallDisk(t, "4m")
		r := newRig(t, scripted(enginefake.Script{
			Steps: []enginefake.Step{enginefake.Stdout(0, "begin\n"), enginefake.Stdout(2*time.Second, strings.Repeat("x", 1<<20))}, Exit: enginefake.Exit(0),
		}))
		if err := r.Close(); err != nil {
			t.Fatal(err)
		}
		r.dir = filepath.Join(dir, "logs")
		r.open()
		ref := r.start(execution.Request{})
		time.Sleep(time.Second)
		free := fill(t, dir)
		time.Sleep(10 * time.Second)
		begin := time.Now()
		r.restart()
		if took := time.Since(begin); took > time.Second {
			t.Errorf("it took %v", took)
		}
		time.Sleep(10 * time.Second)
		free()
		if got := r.watch(ref, nil); len(got.output["stdout"]) != 6+1<<20 || got.result.Reason != execution.Exited {
			t.Errorf("%d bytes, %+v", len(got.output["stdout"]), got.result)
		}
	})
}
