package execution_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/harvest-run/executord/internal/engine/enginefake"
	"github.com/harvest-run/executord/internal/eventlog"
	"github.com/harvest-run/executord/internal/execution"
	"github.com/harvest-run/executord/internal/fault"
)

// lines is a script that writes n numbered lines to both streams, one each 10 ms.
func lines(n int) enginefake.Script {
	s := enginefake.Script{Exit: enginefake.Exit(0)}
	for i := range n {
		step := enginefake.Stdout(10*time.Millisecond, fmt.Sprintf("out %d\n", i))
		if i%4 == 3 {
			step = enginefake.Stderr(10*time.Millisecond, fmt.Sprintf("err %d\n", i))
		}
		s.Steps = append(s.Steps, step)
	}
	return s
}

// TestWatchFrom watches from every place, while it runs and when it has ended.
func TestWatchFrom(t *testing.T) {
	for _, when := range []string{"running", "ended"} {
		t.Run(when, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				const n = 40
				r := newRig(t, scripted(lines(n)))
				ref := r.start(execution.Request{})
				all := make(chan told, 1)
				var wg sync.WaitGroup
				wg.Go(func() { all <- r.watch(ref, nil) })
				time.Sleep(105 * time.Millisecond)
				var early []told
				var afters []execution.Cursor
				e := r.get(ref)
				if when == "ended" {
					e = r.wait(ref)
				}
				for sequence := range e.Sequence + 1 {
					afters = append(afters, execution.Cursor{Epoch: e.Epoch, Sequence: sequence})
				}
				results := make([]told, len(afters))
				for i, after := range afters {
					wg.Go(func() { results[i] = r.watch(ref, &after) })
				}
				wg.Wait()
				early = results
				whole := <-all
				if len(whole.events) != n+2 {
					t.Fatalf("%d events, want %d", len(whole.events), n+2)
				}
				for i, got := range early {
					want := whole.events[i:]
					if diff := cmp.Diff(want, got.events); diff != "" && len(want) > 0 {
						t.Errorf("behind %d:\n%s", i, diff)
					}
				}
				for _, ahead := range []uint64{e.Sequence + 1, e.Sequence + 100, 1<<64 - 1} {
					if when == "running" && ahead == e.Sequence+1 {
						continue // it has got there by now
					}
					_, err := r.Watch(t.Context(), ref, &execution.Cursor{Epoch: e.Epoch, Sequence: ahead})
					wantFault(t, err, fault.OutOfRange, "CURSOR_IN_FUTURE")
					var fe *fault.Error
					if errors.As(err, &fe) && fe.Meta["sequence"] != fmt.Sprint(n+2) {
						t.Errorf("%v", fe.Meta)
					}
				}
			})
		})
	}
}

// TestWatchBehindTheEnd tells nothing and ends: the result was told before.
func TestWatchBehindTheEnd(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, scripted(lines(1)))
		ref := r.start(execution.Request{})
		e := r.wait(ref)
		w, err := r.Watch(t.Context(), ref, &execution.Cursor{Epoch: e.Epoch, Sequence: e.Sequence})
		if err != nil {
			t.Fatal(err)
		}
		defer w.Close()
		got, err := w.Next(t.Context())
		if !errors.Is(err, io.EOF) && (err != nil || got.Result == nil) {
			t.Errorf("%+v, %v", got, err)
		}
	})
}

// TestWatchAnotherEpoch starts over and says so.
func TestWatchAnotherEpoch(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, scripted(lines(3)))
		ref := r.start(execution.Request{})
		r.wait(ref)
		got := r.watch(ref, &execution.Cursor{Epoch: "other", Sequence: 100})
		if len(got.gaps) != 1 || got.gaps[0].Reason != execution.GapEpochChanged || len(got.events) != 6 || got.events[0].Cursor.Sequence != 0 {
			t.Fatalf("%+v", got.events)
		}
		want := []execution.StreamPosition{{Stream: "stdout"}, {Stream: "stderr"}}
		if diff := cmp.Diff(want, got.gaps[0].Resume); diff != "" || got.gaps[0].MissingEvents != 0 {
			t.Errorf("%+v\n%s", got.gaps[0], diff)
		}
	})
}

// TestManyWatchers read at their own pace; one never reads and one leaves. None holds
// up the program or another.
func TestManyWatchers(t *testing.T) {
	bubble(t, func(t *testing.T) {
		const n = 100
		r := newRig(t, scripted(lines(n)))
		ref := r.start(execution.Request{})
		begin := time.Now()
		lazy, err := r.Watch(t.Context(), ref, nil)
		if err != nil {
			t.Fatal(err)
		}
		defer lazy.Close()
		leaving, err := r.Watch(t.Context(), ref, nil)
		if err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		for i := range 8 {
			wg.Go(func() {
				w, err := r.Watch(t.Context(), ref, nil)
				if err != nil {
					t.Error(err)
					return
				}
				defer w.Close()
				count := 0
				for {
					e, err := w.Next(t.Context())
					if errors.Is(err, io.EOF) {
						break
					}
					if err != nil || e.Cursor.Sequence != uint64(count)+1 {
						t.Errorf("watcher %d: %+v, %v", i, e.Cursor, err)
						return
					}
					count++
					time.Sleep(time.Duration(i*i) * time.Millisecond)
				}
				if count != n+2 {
					t.Errorf("watcher %d was told %d events", i, count)
				}
			})
		}
		wg.Go(func() {
			for range 5 {
				if _, err := leaving.Next(t.Context()); err != nil {
					t.Error(err)
				}
			}
			leaving.Close()
		})
		r.wait(ref)
		if took := time.Since(begin); took > n*10*time.Millisecond+10*time.Millisecond {
			t.Errorf("the program took %v", took)
		}
		wg.Wait()
	})
}

// TestNextMayBeCalledAgain after its context has ended, and misses nothing.
func TestNextMayBeCalledAgain(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, scripted(lines(20)))
		ref := r.start(execution.Request{})
		w, err := r.Watch(t.Context(), ref, nil)
		if err != nil {
			t.Fatal(err)
		}
		defer w.Close()
		because := errors.New("a heartbeat is due")
		beats, next := 0, uint64(1)
		for {
			ctx, cancel := context.WithTimeoutCause(t.Context(), 3*time.Millisecond, because)
			e, err := w.Next(ctx)
			cancel()
			if errors.Is(err, io.EOF) {
				break
			}
			if errors.Is(err, because) {
				beats++
				if w.Cursor().Sequence != next-1 || w.LastEventTime().After(time.Now()) || w.LastEventTime().IsZero() {
					t.Errorf("between events: %v, %v", w.Cursor(), w.LastEventTime())
				}
				continue
			}
			if err != nil || e.Cursor.Sequence != next {
				t.Fatalf("%+v, %v", e, err)
			}
			next++
		}
		if beats < 20 || next != 23 {
			t.Errorf("%d beats, %d events", beats, next-1)
		}
		if _, err := w.Next(t.Context()); !errors.Is(err, io.EOF) {
			t.Errorf("behind the end: %v", err)
		}
	})
}

// segments are the files of a log, the oldest first.
func segments(t *testing.T, r *rig, ref execution.Ref) []string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(r.dir, ref.ID, "*"))
	if err != nil || len(files) == 0 {
		t.Fatalf("%v, %v", files, err)
	}
	slices.Sort(files)
	return files
}

// TestLogWithoutItsEnd has the end of a finished log damaged: watchers still get the
// result, exactly once, and what is missing is told.
func TestLogWithoutItsEnd(t *testing.T) {
	for name, damage := range map[string]func(t *testing.T, file string){
		"cut off": func(t *testing.T, file string) {
			info, err := os.Stat(file)
			if err == nil {
				err = os.Truncate(file, info.Size()-3)
			}
			if err != nil {
				t.Fatal(err)
			}
		},
		"overwritten": func(t *testing.T, file string) {
			text, err := os.ReadFile(file)
			if err == nil {
				text[len(text)-10] ^= 0xff
				err = os.WriteFile(file, text, 0o600)
			}
			if err != nil {
				t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				r := newRig(t, scripted(lines(10)))
				ref := r.start(execution.Request{})
				e := r.wait(ref)
				synctest.Wait()
				files := segments(t, r, ref)
				damage(t, files[len(files)-1])
				for range 2 {
					got := r.watch(ref, nil)
					if diff := cmp.Diff(e.Result, got.result); diff != "" {
						t.Errorf("result: %s", diff)
					}
					if string(got.output["stderr"]) != "err 3\nerr 7\n" {
						t.Errorf("%q", got.output)
					}
				}
				var wg sync.WaitGroup
				for range 4 {
					wg.Go(func() { r.watch(ref, nil) })
				}
				wg.Wait()
				contains(t, r.log.String(), "had no end")
			})
		})
	}
}

// TestLogDamagedWhileRead tells a Gap and takes the result from the store.
func TestLogDamagedWhileRead(t *testing.T) {
	bubble(t, func(t *testing.T) {
		script := lines(4)
		script.Steps = append(script.Steps, enginefake.Stdout(0, strings.Repeat("x", 900<<10)))
		r := newRig(t, scripted(script))
		ref := r.start(execution.Request{})
		w, err := r.Watch(t.Context(), ref, nil)
		if err != nil {
			t.Fatal(err)
		}
		defer w.Close()
		e := r.wait(ref)
		// The log is open, and all its files but the first go away under it.
		for i, file := range segments(t, r, ref) {
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if i > 0 {
				text = text[:len(text)/2]
			}
			if err := os.WriteFile(file, text, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		got, err := read(t.Context(), w, ref, nil)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(e.Result, got.result); diff != "" {
			t.Error(diff)
		}
		if len(got.gaps) != 1 || got.gaps[0].Reason != execution.GapDamaged {
			t.Errorf("gaps: %+v", got.gaps)
		}
	})
}

// TestLogOfLaterVersion has entries in a log that this executord does not know: watchers
// are told that they are there, so that the sequence has no hole, and that is all.
func TestLogOfLaterVersion(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, scripted(lines(1)))
		ref := r.start(execution.Request{})
		e := r.wait(ref)
		synctest.Wait()
		dir := filepath.Join(r.dir, ref.ID)
		if err := eventlog.Remove(dir); err != nil {
			t.Fatal(err)
		}
		l, err := eventlog.Create(eventlog.Config{Dir: dir})
		if err != nil {
			t.Fatal(err)
		}
		const started, result, unknown = eventlog.KindOutput + 1, eventlog.KindOutput + 2, eventlog.Kind(200)
		text, err := json.Marshal(e.Result)
		if err == nil {
			err = l.Append(time.Now(), eventlog.Entry{Kind: started}, eventlog.Entry{Kind: unknown, Data: []byte("a")},
				eventlog.Entry{Kind: eventlog.KindOutput, Stream: eventlog.Stdout, Data: []byte("out 0\n")}, eventlog.Entry{Kind: unknown})
		}
		if err == nil {
			err = l.Seal(time.Now(), eventlog.Entry{Kind: result, Data: text})
		}
		if err := errors.Join(err, l.Close()); err != nil {
			t.Fatal(err)
		}
		for after := range uint64(5) {
			got := r.watch(ref, &execution.Cursor{Epoch: l.Epoch(), Sequence: after})
			if len(got.events) != 5-int(after) || len(got.gaps) > 0 {
				t.Fatalf("after %d: %+v", after, got.events)
			}
			for _, e := range got.events {
				if n := e.Cursor.Sequence; (n == 2 || n == 4) != (e.Started == nil && e.Output == nil && e.Result == nil) || e.Time.IsZero() {
					t.Errorf("event %+v", e)
				}
			}
			if diff := cmp.Diff(e.Result, got.result); diff != "" {
				t.Error(diff)
			}
		}
	})
}

// TestLogIsGone says so.
func TestLogIsGone(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, scripted(lines(1)))
		ref := r.start(execution.Request{})
		r.wait(ref)
		synctest.Wait()
		if err := os.RemoveAll(filepath.Join(r.dir, ref.ID)); err != nil {
			t.Fatal(err)
		}
		_, err := r.Watch(t.Context(), ref, nil)
		wantFault(t, err, fault.NotFound, "LOG_NOT_FOUND")
		_, err = r.ReadOutput(t.Context(), ref, "stdout", 0, make([]byte, 1))
		wantFault(t, err, fault.NotFound, "LOG_NOT_FOUND")
		if e := r.get(ref); e.Result == nil {
			t.Error("the record went with the log")
		}
		if err := r.Delete(t.Context(), ref); err != nil {
			t.Error(err)
		}
	})
}
