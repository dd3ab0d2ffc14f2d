package idempotency_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"github.com/harvest-run/executord/internal/fault"
	"github.com/harvest-run/executord/internal/idempotency"
	"github.com/harvest-run/executord/internal/idempotency/idempotencytest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var key = idempotency.Key{Owner: "ada", ID: "r1", Method: "Execute", Fingerprint: "f1"}

func TestCheck(t *testing.T) {
	record := idempotency.NewRecord(key, "e1")
	if err := record.Check(key); err != nil {
		t.Error(err)
	}
	for name, change := range map[string]func(*idempotency.Key){
		"parameters": func(k *idempotency.Key) { k.Fingerprint = "f2" },
		"method":     func(k *idempotency.Key) { k.Method = "StartExecution" },
	} {
		other := key
		change(&other)
		err := record.Check(other)
		if fault.KindOf(err) != fault.AlreadyExists || fault.ReasonOf(err) != "REQUEST_ID_REUSED" {
			t.Errorf("other %s: %v", name, err)
		}
		if name == "method" && !strings.Contains(err.Error(), "Execute") {
			t.Errorf("%v does not say for what it was used", err)
		}
	}
}

// TestTogether has 50 equal requests come at once: one is carried out, however often the
// first ones fail, and the others are told what it made.
func TestTogether(t *testing.T) {
	for name, failures := range map[string]int32{"the first succeeds": 0, "the first three fail": 3} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				memory := &idempotencytest.Memory{}
				requests := &idempotency.Requests{Store: memory}
				var tried, made, told atomic.Int32
				var all sync.WaitGroup
				for range 50 {
					all.Go(func() {
						resource, done, err := requests.Begin(t.Context(), key)
						defer done()
						switch {
						case err != nil:
							t.Error(err)
						case resource != "":
							if resource != "e1" || made.Load() != 1 {
								t.Errorf("told of %q while %d were made", resource, made.Load())
							}
							told.Add(1)
						default:
							time.Sleep(time.Second)
							if tried.Add(1) <= failures {
								return
							}
							if err := memory.Once(key, "e1", func() error { made.Add(1); return nil }); err != nil {
								t.Error(err)
							}
						}
					})
				}
				all.Wait()
				if made.Load() != 1 || tried.Load() != failures+1 || told.Load() != 49-failures {
					t.Errorf("%d tried, %d made, %d told", tried.Load(), made.Load(), told.Load())
				}
			})
		})
	}
}

func TestBegin(t *testing.T) {
	memory := &idempotencytest.Memory{}
	requests := &idempotency.Requests{Store: memory}
	if err := memory.Once(key, "e1", func() error { return nil }); err != nil {
		t.Fatal(err)
	}
	other, stranger := key, key
	other.Fingerprint = "f2"
	stranger.Owner = "bob"
	for name, test := range map[string]struct {
		key      idempotency.Key
		resource string
		reason   string
	}{
		"a repeat":         {key, "e1", ""},
		"other parameters": {other, "", "REQUEST_ID_REUSED"},
		"another owner":    {stranger, "", ""},
		"no name":          {idempotency.Key{Method: "Execute", Fingerprint: "f1"}, "", ""},
	} {
		resource, done, err := requests.Begin(t.Context(), test.key)
		if resource != test.resource || fault.ReasonOf(err) != test.reason || done == nil {
			t.Errorf("%s: %q, %v", name, resource, err)
			continue
		}
		done()
	}
}

// TestDifferentNamesDoNotWait also shows that requests without a name never wait.
func TestDifferentNamesDoNotWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		requests := &idempotency.Requests{Store: &idempotencytest.Memory{}}
		second := key
		second.ID = "r2"
		for _, k := range []idempotency.Key{key, second, {}, {}} {
			if _, done, err := requests.Begin(t.Context(), k); err != nil {
				t.Error(err)
			} else {
				defer done()
			}
		}
	})
}

func TestBeginLetsGo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		requests := &idempotency.Requests{Store: &idempotencytest.Memory{}}
		_, done, err := requests.Begin(t.Context(), key)
		if err != nil {
			t.Fatal(err)
		}
		enough := errors.New("enough")
		ctx, cancel := context.WithTimeoutCause(t.Context(), time.Second, enough)
		defer cancel()
		if _, leave, err := requests.Begin(ctx, key); !errors.Is(err, enough) {
			t.Errorf("error %v", err)
		} else {
			leave()
		}
		done()
		if _, done, err := requests.Begin(t.Context(), key); err != nil {
			t.Error(err)
		} else {
			done()
		}
	})
}

// broken is a Store whose disk is gone.
type broken struct{ idempotencytest.Memory }

var errDisk = errors.New("no disk")

func (*broken) FindRequest(context.Context, string, string) (idempotency.Record, error) {
	return idempotency.Record{}, errDisk
}
func (*broken) InsertRequest(context.Context, idempotency.Record) error { return errDisk }
func (*broken) Sync(context.Context) error                              { return errDisk }

func TestBrokenStore(t *testing.T) {
	requests := &idempotency.Requests{Store: &broken{}}
	for range 2 { // the second does not wait for the first, which is through
		if _, done, err := requests.Begin(t.Context(), key); !errors.Is(err, errDisk) {
			t.Errorf("error %v", err)
		} else {
			done()
		}
	}
	if err := requests.Note(t.Context(), key, "e1"); !errors.Is(err, errDisk) {
		t.Errorf("error %v", err)
	}
	if err := requests.Sync(t.Context(), key); !errors.Is(err, errDisk) {
		t.Errorf("error %v", err)
	}
	if err := errors.Join(requests.Note(t.Context(), idempotency.Key{}, "e1"), requests.Sync(t.Context(), idempotency.Key{})); err != nil {
		t.Errorf("without a name: %v", err)
	}
}

func TestNote(t *testing.T) {
	memory := &idempotencytest.Memory{}
	requests := &idempotency.Requests{Store: memory}
	for range 3 {
		if err := requests.Note(t.Context(), key, "e1"); err != nil {
			t.Error(err)
		}
	}
	other := key
	other.Fingerprint = "f2"
	if err := requests.Note(t.Context(), other, "e1"); fault.ReasonOf(err) != "REQUEST_ID_REUSED" {
		t.Errorf("error %v", err)
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if err := requests.Sync(ended, key); err != nil || memory.Syncs() != 1 {
		t.Errorf("%d syncs, %v: a caller who left must not keep it from the disk", memory.Syncs(), err)
	}
}

// expirer has a number of requests, and fails when it is told to.
type expirer struct {
	mu      sync.Mutex
	left    int
	err     error
	befores []time.Time
}

func (e *expirer) DeleteRequests(_ context.Context, before time.Time, limit int) (int, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.befores = append(e.befores, before)
	if e.err != nil {
		return 0, e.err
	}
	n := min(e.left, limit)
	e.left -= n
	return n, nil
}

func TestSweep(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := &expirer{left: 1200}
		var logs strings.Builder
		ctx, cancel := context.WithCancel(t.Context())
		var sweeping sync.WaitGroup
		sweeping.Go(func() { idempotency.Sweep(ctx, e, slog.New(slog.NewTextHandler(&logs, nil))) })
		synctest.Wait()
		e.mu.Lock()
		if e.left != 0 || len(e.befores) != 3 {
			t.Errorf("%d left after %d calls", e.left, len(e.befores))
		}
		if age := time.Since(e.befores[0]); age != idempotency.Lifetime {
			t.Errorf("forgets what is %v old", age)
		}
		e.err = errDisk
		e.mu.Unlock()
		time.Sleep(time.Hour)
		synctest.Wait()
		e.mu.Lock()
		e.err, e.left = nil, 7
		e.mu.Unlock()
		time.Sleep(time.Hour)
		synctest.Wait()
		cancel()
		sweeping.Wait()
		if e.left != 0 {
			t.Errorf("%d left after the disk came back", e.left)
		}
		for _, want := range []string{"requests=1200", "no disk", "requests=7"} {
			if !strings.Contains(logs.String(), want) {
				t.Errorf("the log does not tell %s:\n%s", want, logs.String())
			}
		}
	})
}

func Example() {
	requests := idempotency.Requests{Store: &idempotencytest.Memory{}}
	key := idempotency.Key{ID: "5f0c7d", Method: "Cancel", Fingerprint: "…"}
	fmt.Println(requests.Note(context.Background(), key, "e1"))
	// Output: <nil>
}
