package execution

import (
	"context"
	"encoding/json"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/harvest-run/executord/internal/engine"
)

// counted is a sandbox of which only the accounting is there.
type counted struct {
	engine.Sandbox
	usage engine.Usage
	reads int
}

func (c *counted) Usage(context.Context) (engine.Usage, error) {
	c.reads++
	return c.usage, nil
}

// TestBaseline reads the accounting again unless it cannot have changed.
func TestBaseline(t *testing.T) {
	sandbox := &counted{usage: engine.Usage{OOMKills: 5}}
	g := &guest{sandbox: sandbox, stale: true}
	begin := func(kills int64, reads int) {
		t.Helper()
		got, err := g.baseline(t.Context())
		if err != nil || got.OOMKills != kills || sandbox.reads != reads {
			t.Errorf("%d kills in %d reads, %v; want %d in %d", got.OOMKills, sandbox.reads, err, kills, reads)
		}
	}
	begin(5, 1) // the first
	g.spent(&engine.Usage{OOMKills: 6})
	begin(6, 1) // nothing ran since
	sandbox.usage.OOMKills = 8
	begin(8, 2) // the one before still runs
	g.spent(&engine.Usage{OOMKills: 8})
	begin(8, 3) // so does the second
	// Two that end together, counted one after the other and told the other way round.
	g.spent(&engine.Usage{OOMKills: 9})
	g.spent(&engine.Usage{OOMKills: 8})
	begin(9, 3)
	g.spent(nil) // nobody counted
	sandbox.usage.OOMKills = 11
	begin(11, 4)
	g.spent(&engine.Usage{OOMKills: 11})
	begin(11, 4)
}

func TestSpareLogs(t *testing.T) {
	l := newLogs(t.TempDir() + "/logs")
	if log := l.takeSpare(); log != nil {
		t.Fatal("a spare where there is not even a disk")
	}
	s, err := New(Config{Dir: l.dir})
	if err != nil {
		t.Fatal(err)
	}
	taken := make(map[string]bool)
	for range spareLogs + 2 { // more than there are: the rest is made
		h, err := s.logs.create(Execution{ID: "id" + string(rune('a'+len(taken))), RetainedBytes: 1 << 20})
		if err != nil {
			t.Fatal(err)
		}
		if taken[h.Epoch()] {
			t.Error("one log for two executions")
		}
		taken[h.Epoch()] = true
		h.release()
	}
	var together sync.WaitGroup
	for range 20 * spareLogs { // each sees too few at first
		together.Go(s.logs.stock)
	}
	together.Wait()
	if n := len(s.logs.spares); n != spareLogs {
		t.Errorf("%d spares", n)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s.logs.stock() // too late, and of no effect
	again, err := New(Config{Dir: l.dir})
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	if n := len(again.logs.spares); n != spareLogs {
		t.Errorf("%d spares after a restart", n)
	}
}

// The program is told the caller's trace, unless the caller said otherwise.
func TestTraceIsHandedOn(t *testing.T) {
	c := Command{Args: []string{"x"}, Trace: "00-0102030405060708090a0b0c0d0e0f10-0102030405060708-01"}
	if env := c.environment("id"); !slices.Contains(env, "TRACEPARENT="+c.Trace) {
		t.Errorf("%q", env)
	}
	c.Env = map[string]string{"TRACEPARENT": "mine"}
	if env := c.environment("id"); !slices.Contains(env, "TRACEPARENT=mine") {
		t.Errorf("%q", env)
	}
	c = Command{Args: []string{"x"}}
	for _, variable := range c.environment("id") {
		if strings.HasPrefix(variable, "TRACEPARENT") {
			t.Errorf("%q without a trace", variable)
		}
	}
	stored, err := json.Marshal(Command{Trace: "00-01"}.Stored())
	if err != nil || strings.Contains(string(stored), "00-01") {
		t.Errorf("%s, %v", stored, err)
	}
}
