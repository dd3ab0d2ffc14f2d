package execution_test

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/harvest-run/executord/internal/engine/enginefake"
	"github.com/harvest-run/executord/internal/execution"
	"github.com/harvest-run/executord/internal/fault"
)

// keeping is a rig that recovers at once and keeps what a Retention says.
func keeping(t *testing.T, retention execution.Retention, script enginefake.Script) *rig {
	t.Helper()
	r := newRig(t, scripted(script))
	r.config = func(cfg *execution.Config) { cfg.Retention = retention }
	r.restart()
	return r
}

// there are the executions that are kept, and checks that records and logs agree.
func (r *rig) there() (ids []string) {
	r.t.Helper()
	synctest.Wait()
	for _, e := range r.memory.all() {
		ids = append(ids, e.ID)
	}
	slices.Sort(ids)
	entries, err := os.ReadDir(r.dir)
	if err != nil {
		r.t.Fatal(err)
	}
	var logs []string
	for _, e := range entries {
		logs = append(logs, e.Name())
	}
	if !slices.Equal(ids, logs) {
		r.t.Errorf("records %v, logs %v", ids, logs)
	}
	var sum execution.Stored
	for _, e := range r.memory.all() {
		if e.State == execution.Ended {
			sum.Executions++
			files, _ := filepath.Glob(filepath.Join(r.dir, e.ID, "*"))
			var size int64
			for _, f := range files {
				info, err := os.Stat(f)
				if err != nil {
					r.t.Fatal(err)
				}
				size += info.Size()
			}
			if e.LogBytes != size {
				r.t.Errorf("log of %s: %d bytes are recorded, %d are there", e.ID, e.LogBytes, size)
			}
			sum.Bytes += size
		}
	}
	if stored := r.Stored(); r.Running() == 0 && stored != sum {
		r.t.Errorf("%+v are counted, %+v are there", stored, sum)
	}
	return ids
}

func done(bytes int) enginefake.Script {
	return enginefake.Script{Steps: []enginefake.Step{enginefake.Stdout(0, strings.Repeat("x", bytes))}, Exit: enginefake.Exit(0)}
}

// TestRetentionByAge removes what ended too long ago, by the server's measure or its own.
func TestRetentionByAge(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := keeping(t, execution.Retention{MaxAge: 24 * time.Hour}, done(1000))
		long := r.start(execution.Request{})
		short := r.start(execution.Request{Policies: execution.Policies{Retention: time.Hour}})
		longer := r.start(execution.Request{Policies: execution.Policies{Retention: 48 * time.Hour}})
		if got := r.wait(longer).Policies.Retention; got != 0 {
			t.Errorf("a retention of %v is in force", got)
		}
		r.wait(long)
		r.wait(short)
		time.Sleep(time.Hour - time.Minute)
		if n := len(r.there()); n != 3 {
			t.Errorf("%d are there", n)
		}
		time.Sleep(3 * time.Minute)
		if ids := r.there(); len(ids) != 2 || slices.Contains(ids, short.ID) {
			t.Errorf("%v are there", ids)
		}
		_, err := r.Get(t.Context(), short)
		wantFault(t, err, fault.NotFound, "EXECUTION_NOT_FOUND")
		r.restart() // age goes on
		time.Sleep(24 * time.Hour)
		if ids := r.there(); len(ids) != 0 {
			t.Errorf("%v are there", ids)
		}
		contains(t, r.log.String(), `reason="its own retention is over" executions=1 bytes=`, `reason="older than retention.max_age" executions=2`)
	})
}

// TestRetentionForEver keeps what nothing says should go.
func TestRetentionForEver(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := keeping(t, execution.Retention{}, done(10))
		r.wait(r.start(execution.Request{}))
		own := r.start(execution.Request{Policies: execution.Policies{Retention: time.Hour}})
		r.wait(own)
		time.Sleep(365 * 24 * time.Hour)
		if ids := r.there(); len(ids) != 1 || ids[0] == own.ID {
			t.Errorf("%v are there", ids)
		}
	})
}

// TestRetentionBySize removes the oldest, no more than is needed, and neither what runs
// nor what is being read.
func TestRetentionBySize(t *testing.T) {
	bubble(t, func(t *testing.T) {
		const size, limit = 100_000, 550_000
		r := keeping(t, execution.Retention{MaxTotalBytes: limit}, done(size))
		var refs []execution.Ref
		add := func() {
			refs = append(refs, r.start(execution.Request{}))
			r.wait(refs[len(refs)-1])
			time.Sleep(time.Second)
		}
		for range 5 {
			add()
		}
		if n := len(r.there()); n != 5 {
			t.Fatalf("%d are there", n)
		}
		add()
		if ids := r.there(); len(ids) != 5 || slices.Contains(ids, refs[0].ID) || r.Stored().Bytes > limit {
			t.Errorf("%v are there of %v", ids, refs)
		}
		// The oldest two are being read: others go in their place.
		var watchers []*execution.Watcher
		for _, ref := range refs[1:3] {
			w, err := r.Watch(t.Context(), ref, nil)
			if err != nil {
				t.Fatal(err)
			}
			watchers = append(watchers, w)
		}
		add()
		if ids := r.there(); len(ids) != 5 || !slices.Contains(ids, refs[1].ID) || !slices.Contains(ids, refs[2].ID) || slices.Contains(ids, refs[3].ID) {
			t.Errorf("%v are there of %v", ids, refs)
		}
		for i, w := range watchers {
			if got, err := read(t.Context(), w, refs[i+1], nil); err != nil || len(got.output["stdout"]) != size {
				t.Errorf("%d bytes, %v", len(got.output["stdout"]), err)
			}
			w.Close()
		}
		add()
		if ids := r.there(); len(ids) != 5 || slices.Contains(ids, refs[1].ID) {
			t.Errorf("%v are there of %v", ids, refs)
		}
		// Deleting by hand is counted too, and so is what an executord before has left.
		if err := r.Delete(t.Context(), refs[len(refs)-1]); err != nil {
			t.Fatal(err)
		}
		before := r.there()
		r.restart()
		if after := r.there(); len(before) != 4 || !slices.Equal(before, after) {
			t.Errorf("%v, then %v", before, after)
		}
	})
}

// TestRetentionOfManyAndOfFailures removes page by page, and goes on when it could not.
func TestRetentionOfManyAndOfFailures(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := keeping(t, execution.Retention{MaxAge: time.Hour}, done(1))
		const many = 250
		for range many {
			r.wait(r.start(execution.Request{}))
		}
		running := r.start(execution.Request{Command: execution.Command{Args: []string{"x"}}})
		r.wait(running)
		failures := 0
		r.memory.hook(func(op string, _ execution.Execution) error {
			if op == "delete ended" && failures < 3 {
				failures++
				return errors.New("disk on fire")
			}
			return nil
		}, nil)
		time.Sleep(time.Hour + 10*time.Minute)
		if ids := r.there(); len(ids) != 0 || failures != 3 {
			t.Errorf("%d are there after %d failures", len(ids), failures)
		}
		contains(t, r.log.String(), "disk on fire", "executions=251")
	})
}

// TestNoRoom refuses new work, and nothing else.
func TestNoRoom(t *testing.T) {
	bubble(t, func(t *testing.T) {
		full := fault.New(fault.Exhausted, "DISK_FULL", "no room")
		var err error
		r := newRig(t, scripted(enginefake.Script{Steps: []enginefake.Step{enginefake.Stdout(time.Minute, "x")}, Exit: enginefake.Exit(0)}))
		r.config = func(cfg *execution.Config) { cfg.CheckRoom = func() error { return err } }
		r.restart()
		runs := r.start(execution.Request{})
		err = full
		_, refused := r.Start(t.Context(), execution.Request{Command: execution.Command{Args: []string{"x"}}})
		wantFault(t, refused, fault.Exhausted, "DISK_FULL")
		if res := r.wait(runs).Result; res.Reason != execution.Exited {
			t.Errorf("%+v", res)
		}
		if n := len(r.memory.all()); n != 1 || len(r.fake.Made()) != 1 {
			t.Errorf("%d records, made %v", n, r.fake.Made())
		}
		err = nil
		r.wait(r.start(execution.Request{}))
	})
}
