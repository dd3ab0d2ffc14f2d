package execution_test

import (
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/harvest-run/executord/internal/execution"
	"github.com/harvest-run/executord/internal/fault"
	"github.com/harvest-run/executord/internal/idempotency"
)

// shown waits until an execution has written a text to stdout.
func (r *rig) shown(ref execution.Ref, text string) {
	r.t.Helper()
	p := make([]byte, 1<<20)
	for range 6000 {
		n, _ := r.ReadOutput(r.t.Context(), ref, "stdout", 0, p)
		if strings.Contains(string(p[:n]), text) {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	n, _ := r.ReadOutput(r.t.Context(), ref, "stdout", 0, p)
	r.t.Fatalf("%q is never written, only %q", text, p[:n])
}

// Input of a real program, with a new executord in the middle of it.
func TestLocalInput(t *testing.T) {
	r := newLocalRig(t)
	data := make([]byte, 4<<20)
	_, _ = rand.NewChaCha8([32]byte{4}).Read(data)
	ref := r.start(execution.Request{Command: execution.Command{Args: []string{"cat"}, Stdin: true}})
	for at := int64(0); at < int64(len(data)); {
		n := min(1+rand.Int64N(execution.MaxInputBytes), int64(len(data))-at)
		before := at
		state, err := r.WriteInput(t.Context(), ref, at0(at, data[at:at+n], at+n == int64(len(data))))
		if err != nil {
			t.Fatal(err)
		}
		if at = state.Committed; at/(1<<20) != before/(1<<20) && at < int64(len(data)) {
			r.restart()
		}
	}
	if got := r.watch(ref, nil); string(got.output["stdout"]) != string(data) || got.result.Reason != execution.Exited {
		t.Errorf("%d bytes came back, %+v", len(got.output["stdout"]), got.result)
	}
}

func at0(offset int64, data []byte, end bool) execution.Input {
	return execution.Input{Offset: &offset, Data: data, Close: end}
}

func TestLocalTerminal(t *testing.T) {
	r := newLocalRig(t)
	ref := r.start(execution.Request{Command: execution.Command{
		Args:     []string{"bash", "--norc", "-i"},
		Env:      map[string]string{"PS1": "ready> "},
		Terminal: &execution.TerminalSize{Rows: 24, Columns: 80},
	}})
	say := func(text string) {
		t.Helper()
		if _, err := r.WriteInput(t.Context(), ref, execution.Input{Data: []byte(text)}); err != nil {
			t.Fatal(err)
		}
	}
	r.shown(ref, "ready> ")
	say("stty size; echo $TERM\r")
	r.shown(ref, "24 80\r\nxterm-256color")
	// A storm of sizes, from many at once.
	var storm sync.WaitGroup
	for i := range 4 {
		storm.Go(func() {
			for n := range 250 {
				if err := r.Resize(t.Context(), ref, execution.TerminalSize{Rows: 1 + n, Columns: 1 + i}); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	storm.Wait()
	r.restart()
	if err := r.Resize(t.Context(), ref, execution.TerminalSize{Rows: 50, Columns: 132}); err != nil {
		t.Fatal(err)
	}
	say("stty size\r")
	r.shown(ref, "50 132")
	say("sleep 1000\r")
	time.Sleep(200 * time.Millisecond)
	if err := r.Signal(t.Context(), ref, 2, execution.ScopeGroup, idempotency.Key{}); err != nil {
		t.Fatal(err)
	}
	say("echo code $?\r")
	r.shown(ref, "code 130")
	say("exit 6\r")
	if res := r.wait(ref).Result; res.Reason != execution.Exited || *res.ExitCode != 6 {
		t.Errorf("%+v", res)
	}
}

// Every end by a signal from outside is told as it is, and what is left is gone.
func TestLocalSignals(t *testing.T) {
	r := newLocalRig(t)
	for _, sig := range []int32{1, 2, 9, 11, 15, 40} {
		ref := r.start(bash("sleep 1000 & setsid sleep 1000 & echo ready; wait"))
		r.shown(ref, "ready")
		if err := r.Signal(t.Context(), ref, sig, execution.ScopeProcess, idempotency.Key{}); err != nil {
			t.Fatal(err)
		}
		res := r.wait(ref).Result
		if res.Reason != execution.Signaled || res.Signal != sig || res.ExitCode != nil || !res.TreeEmpty || res.Killed {
			t.Errorf("signal %d: %+v", sig, res)
		}
		if err := r.Signal(t.Context(), ref, sig, execution.ScopeTree, idempotency.Key{}); fault.ReasonOf(err) != "EXECUTION_ENDED" {
			t.Errorf("after signal %d: %v", sig, err)
		}
	}
	closed := r.start(execution.Request{Command: execution.Command{Args: []string{"bash", "-c", "exec <&-; echo closed; sleep 1000"}, Stdin: true}})
	r.shown(closed, "closed")
	_, err := r.WriteInput(t.Context(), closed, execution.Input{Data: []byte("x")})
	wantFault(t, err, fault.FailedPrecondition, "STDIN_CLOSED")
	r.cancel(closed, 0)
}
