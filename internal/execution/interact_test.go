package execution_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
	"github.com/harvest-run/executord/internal/engine/enginefake"
	"github.com/harvest-run/executord/internal/execution"
	"github.com/harvest-run/executord/internal/fault"
	"github.com/harvest-run/executord/internal/idempotency"
)

// open is a request whose input is open.
func open() execution.Request {
	return execution.Request{Command: execution.Command{Args: []string{"cat"}, Stdin: true}}
}

func onTerminal() execution.Request {
	return execution.Request{Command: execution.Command{Args: []string{"sh"}, Terminal: &execution.TerminalSize{Rows: 24, Columns: 80}}}
}

func at(offset int64, data string) execution.Input {
	return execution.Input{Offset: &offset, Data: []byte(data)}
}

// write writes what must be taken whole.
func (r *rig) write(ref execution.Ref, in execution.Input, want execution.InputState) {
	r.t.Helper()
	if got, err := r.WriteInput(r.t.Context(), ref, in); err != nil || got != want {
		r.t.Errorf("write %q: %+v, %v, want %+v", in.Data, got, err, want)
	}
}

func cat() enginefake.Script {
	return enginefake.Script{Steps: []enginefake.Step{enginefake.Cat()}, Exit: enginefake.Exit(0)}
}

func TestWriteInput(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, scripted(cat()))
		ref := r.start(open())
		r.write(ref, at(0, "hello "), execution.InputState{Committed: 6})
		r.write(ref, at(0, "hello world"), execution.InputState{Committed: 11})
		r.write(ref, at(3, "lo"), execution.InputState{Committed: 11})
		r.write(ref, execution.Input{}, execution.InputState{Committed: 11})
		r.write(ref, execution.Input{Data: []byte("!")}, execution.InputState{Committed: 12})
		_, err := r.WriteInput(t.Context(), ref, at(13, "x"))
		wantFault(t, err, fault.OutOfRange, "INPUT_OFFSET")
		if fe := (*fault.Error)(nil); !errors.As(err, &fe) || fe.Meta["committed_offset"] != "12" {
			t.Errorf("%+v", fe)
		}
		early := at(3, "l")
		early.Close = true
		_, err = r.WriteInput(t.Context(), ref, early)
		wantFault(t, err, fault.OutOfRange, "INPUT_OFFSET")
		r.write(ref, execution.Input{Close: true}, execution.InputState{Committed: 12, Closed: true})
		got := r.watch(ref, nil)
		if string(got.output["stdout"]) != "hello world!" || got.result.Reason != execution.Exited {
			t.Errorf("%q, %+v", got.output, got.result)
		}
		_, err = r.WriteInput(t.Context(), ref, at(12, "x"))
		wantFault(t, err, fault.FailedPrecondition, "EXECUTION_ENDED")
	})
}

func TestInteractionRefused(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, enginefake.Config{Script: func(q *guestv1.StartRequest) enginefake.Script {
			return enginefake.Script{Steps: []enginefake.Step{enginefake.Shut(0), enginefake.Pause(time.Hour)}, Exit: enginefake.Exit(0)}
		}})
		plain, piped, terminal := r.start(execution.Request{}), r.start(open()), r.start(onTerminal())
		time.Sleep(time.Second)
		none := execution.Ref{ID: "none"}
		size := execution.TerminalSize{Rows: 1, Columns: 1}
		write := func(ref execution.Ref, in execution.Input) error {
			_, err := r.WriteInput(t.Context(), ref, in)
			return err
		}
		resize := func(ref execution.Ref, s execution.TerminalSize) error { return r.Resize(t.Context(), ref, s) }
		signal := func(ref execution.Ref, n int32, s execution.Scope) error {
			return r.Signal(t.Context(), ref, n, s, idempotency.Key{})
		}
		for name, c := range map[string]struct {
			err    error
			kind   fault.Kind
			reason string
		}{
			"write to nothing":         {write(none, at(0, "x")), fault.NotFound, "EXECUTION_NOT_FOUND"},
			"write elsewhere":          {write(execution.Ref{Session: "s", ID: piped.ID}, at(0, "x")), fault.NotFound, "EXECUTION_NOT_FOUND"},
			"write without stdin":      {write(plain, at(0, "x")), fault.FailedPrecondition, "STDIN_NOT_OPEN"},
			"write to what was closed": {write(piped, at(0, "x")), fault.FailedPrecondition, "STDIN_CLOSED"},
			"write too much":           {write(piped, at(0, strings.Repeat("x", execution.MaxInputBytes+1))), fault.Invalid, "INPUT_SIZE"},
			"write before the start":   {write(piped, at(-1, "x")), fault.Invalid, "OFFSET"},
			"resize nothing":           {resize(none, size), fault.NotFound, "EXECUTION_NOT_FOUND"},
			"resize a pipe":            {resize(piped, size), fault.FailedPrecondition, "NOT_A_TERMINAL"},
			"resize to no rows":        {resize(terminal, execution.TerminalSize{Columns: 1}), fault.Invalid, "TERMINAL_SIZE"},
			"resize to many columns":   {resize(terminal, execution.TerminalSize{Rows: 1, Columns: 65536}), fault.Invalid, "TERMINAL_SIZE"},
			"signal nothing":           {signal(none, 15, 0), fault.NotFound, "EXECUTION_NOT_FOUND"},
			"signal 0":                 {signal(plain, 0, 0), fault.Invalid, "SIGNAL"},
			"signal 65":                {signal(plain, 65, 0), fault.Invalid, "SIGNAL"},
			"signal nobody":            {signal(plain, 1, 3), fault.Invalid, "SIGNAL_SCOPE"},
		} {
			if fault.KindOf(c.err) != c.kind || fault.ReasonOf(c.err) != c.reason {
				t.Errorf("%s: %v, want %s", name, c.err, c.reason)
			}
		}
		for _, ref := range []execution.Ref{plain, piped, terminal} {
			r.cancel(ref, 0)
		}
		wantFault(t, write(piped, at(0, "x")), fault.FailedPrecondition, "EXECUTION_ENDED")
		wantFault(t, write(plain, at(0, "x")), fault.FailedPrecondition, "STDIN_NOT_OPEN")
		wantFault(t, resize(terminal, size), fault.FailedPrecondition, "EXECUTION_ENDED")
		wantFault(t, signal(plain, 15, 0), fault.FailedPrecondition, "EXECUTION_ENDED")
		_, err := r.Start(t.Context(), execution.Request{Command: execution.Command{Args: []string{"x"}, Terminal: &execution.TerminalSize{Rows: 70000, Columns: 1}}})
		wantFault(t, err, fault.Invalid, "TERMINAL_SIZE")
	})
}

func TestResizeAndSignal(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, enginefake.Config{Script: func(q *guestv1.StartRequest) enginefake.Script {
			if q.GetTerminal().GetRows() != 24 || q.GetTerminal().GetColumns() != 80 || !slices.Contains(q.GetEnv(), "TERM=xterm-256color") {
				t.Errorf("started with %v", q)
			}
			return enginefake.Script{Deaf: true}
		}})
		ref := r.start(onTerminal())
		if err := r.Resize(t.Context(), ref, execution.TerminalSize{Rows: 50, Columns: 132}); err != nil {
			t.Fatal(err)
		}
		for scope := range execution.Scope(3) {
			if err := r.Signal(t.Context(), ref, 10, scope, idempotency.Key{}); err != nil {
				t.Fatal(err)
			}
		}
		if got := r.fake.Heard(r.get(ref).Sandbox, ref.ID); !slices.Equal(got, []string{"resize 50x132", "signal 10 SCOPE_PROCESS", "signal 10 SCOPE_GROUP", "signal 10 SCOPE_TREE"}) {
			t.Errorf("heard %q", got)
		}
		if err := r.Signal(t.Context(), ref, 9, execution.ScopeProcess, idempotency.Key{}); err != nil {
			t.Fatal(err)
		}
		if res := r.wait(ref).Result; res.Reason != execution.Signaled || res.Signal != 9 {
			t.Errorf("%+v", res)
		}
	})
}

// A repeat of a signal that was sent sends nothing; one that was refused can be tried
// again, and a name stands for one request.
func TestRepeatedSignal(t *testing.T) {
	bubble(t, func(t *testing.T) {
		cfg := scripted(enginefake.Script{Deaf: true})
		silent := true
		var mu sync.Mutex
		cfg.Hooks.Ask = func(_ string, q *guestv1.Request) bool {
			mu.Lock()
			defer mu.Unlock()
			return q.GetSignal() == nil || !silent
		}
		r := newRig(t, cfg)
		ref := r.start(execution.Request{})
		key := func(id string) idempotency.Key {
			return idempotency.Key{ID: id, Method: "SignalExecution", Fingerprint: "10"}
		}
		err := r.Signal(t.Context(), ref, 10, execution.ScopeProcess, key("a"))
		wantFault(t, err, fault.Unavailable, "GUEST_UNREACHABLE")
		mu.Lock()
		silent = false
		mu.Unlock()
		for range 3 {
			if err := r.Signal(t.Context(), ref, 10, execution.ScopeProcess, key("a")); err != nil {
				t.Fatal(err)
			}
		}
		r.restart()
		if err := r.Signal(t.Context(), ref, 10, execution.ScopeProcess, key("a")); err != nil {
			t.Fatal(err)
		}
		other := key("a")
		other.Fingerprint = "12"
		wantFault(t, r.Signal(t.Context(), ref, 12, execution.ScopeProcess, other), fault.AlreadyExists, "REQUEST_ID_REUSED")
		if got := r.fake.Heard(r.get(ref).Sandbox, ref.ID); len(got) != 1 {
			t.Errorf("heard %q", got)
		}
		r.cancel(ref, 0)
		if err := r.Signal(t.Context(), ref, 10, execution.ScopeProcess, key("a")); err != nil {
			t.Errorf("a repeat after the end: %v", err)
		}
		wantFault(t, r.Signal(t.Context(), ref, 10, execution.ScopeProcess, key("b")), fault.FailedPrecondition, "EXECUTION_ENDED")
	})
}

// What comes while the sandbox is being made waits for the program.
func TestInputWaitsForTheStart(t *testing.T) {
	bubble(t, func(t *testing.T) {
		slow := cat()
		slow.StartDelay = time.Minute / 4
		cfg := scripted(slow)
		cfg.Hooks.Create = func(ctx context.Context, _ string) error {
			time.Sleep(time.Minute)
			return ctx.Err()
		}
		r := newRig(t, cfg)
		ref := r.start(open())
		short, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := r.WriteInput(short, ref, at(0, "x")); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%v", err)
		}
		in := at(0, "early")
		in.Close = true
		r.write(ref, in, execution.InputState{Committed: 5, Closed: true})
		if got := r.watch(ref, nil); string(got.output["stdout"]) != "early" {
			t.Errorf("%q", got.output)
		}
		// One that never comes to run has ended.
		ref = r.start(open())
		var others sync.WaitGroup
		others.Go(func() { r.cancel(ref, 0) })
		_, err := r.WriteInput(t.Context(), ref, at(0, "x"))
		wantFault(t, err, fault.FailedPrecondition, "EXECUTION_ENDED")
		others.Wait()
	})
}

// A program that does not read takes what there is room for, and nobody waits for ever.
func TestInputWithoutRoom(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, scripted(enginefake.Script{Steps: []enginefake.Step{enginefake.Pause(10 * time.Minute), enginefake.Cat()}, Exit: enginefake.Exit(0)}))
		ref := r.start(open())
		piece := strings.Repeat("x", execution.MaxInputBytes)
		r.write(ref, at(0, piece), execution.InputState{Committed: execution.MaxInputBytes})
		r.write(ref, at(execution.MaxInputBytes, piece), execution.InputState{Committed: 2 * execution.MaxInputBytes})
		begun := time.Now()
		in := at(2*execution.MaxInputBytes, piece)
		in.Close = true
		r.write(ref, in, execution.InputState{Committed: enginefake.InputBytes})
		if waited := time.Since(begun); waited < time.Second || waited > time.Minute {
			t.Errorf("waited %v", waited)
		}
		time.Sleep(10 * time.Minute)
		r.write(ref, in, execution.InputState{Committed: 3 * execution.MaxInputBytes, Closed: true})
		if got := r.watch(ref, nil); len(got.output["stdout"]) != 3*execution.MaxInputBytes {
			t.Errorf("%d bytes", len(got.output["stdout"]))
		}
		// The end of the execution ends those who wait.
		ref = r.start(open())
		for range 2 {
			if _, err := r.WriteInput(t.Context(), ref, execution.Input{Data: []byte(piece)}); err != nil {
				t.Fatal(err)
			}
		}
		var others sync.WaitGroup
		others.Go(func() {
			time.Sleep(time.Second / 2)
			r.cancel(ref, 0)
		})
		if _, err := r.WriteInput(t.Context(), ref, execution.Input{Data: []byte(piece)}); fault.ReasonOf(err) != "EXECUTION_ENDED" {
			t.Errorf("%v", err)
		}
		others.Wait()
	})
}

// Over pipes that are cut and a restart in the middle, nothing is lost and nothing
// comes twice.
func TestInputOverRestarts(t *testing.T) {
	bubble(t, func(t *testing.T) {
		cfg := scripted(cat())
		cfg.Hooks.Answer = enginefake.CutEvery(7)
		r := newRig(t, cfg)
		ref := r.start(open())
		var want strings.Builder
		for i := range 100 {
			line := fmt.Sprintf("line %d\n", i)
			r.write(ref, at(int64(want.Len()), line), execution.InputState{Committed: int64(want.Len() + len(line))})
			want.WriteString(line)
			if i%30 == 20 {
				r.restart()
				r.write(ref, at(0, want.String()), execution.InputState{Committed: int64(want.Len())})
			}
		}
		// The program ends by it. Where the answer is lost, the guest may be gone by the next.
		state, err := r.WriteInput(t.Context(), ref, execution.Input{Close: true})
		if closed := (execution.InputState{Committed: int64(want.Len()), Closed: true}); err == nil && state != closed || err != nil && fault.ReasonOf(err) != "EXECUTION_ENDED" {
			t.Errorf("%+v, %v", state, err)
		}
		if got := r.watch(ref, nil); string(got.output["stdout"]) != want.String() {
			t.Errorf("%q", got.output["stdout"])
		}
	})
}

func TestGuestThatIsSilent(t *testing.T) {
	bubble(t, func(t *testing.T) {
		cfg := scripted(cat())
		cfg.Hooks.Ask = func(_ string, q *guestv1.Request) bool { return q.GetWrite() == nil }
		r := newRig(t, cfg)
		ref := r.start(open())
		_, err := r.WriteInput(t.Context(), ref, at(0, "x"))
		wantFault(t, err, fault.Unavailable, "GUEST_UNREACHABLE")
		ctx, cancel := context.WithTimeoutCause(t.Context(), time.Second, errors.New("gone"))
		defer cancel()
		if _, err := r.WriteInput(ctx, ref, at(0, "x")); err == nil || err.Error() != "gone" {
			t.Errorf("%v", err)
		}
		r.fake.Die(r.get(ref).Sandbox)
		synctest.Wait()
		_, err = r.WriteInput(t.Context(), ref, at(0, "x"))
		wantFault(t, err, fault.FailedPrecondition, "EXECUTION_ENDED")
	})
}

func TestAttachments(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, scripted(cat()))
		attach := func(ref execution.Ref, writer string, takeOver bool, reason string) *execution.Attachment {
			t.Helper()
			a, err := r.Attach(t.Context(), ref, writer, takeOver)
			if fault.ReasonOf(err) != reason || (err == nil) != (reason == "") {
				t.Fatalf("attach: %v, want %q", err, reason)
			}
			if a != nil {
				t.Cleanup(a.Close)
			}
			return a
		}
		lost := func(a *execution.Attachment) bool {
			select {
			case <-a.Lost():
				return fault.ReasonOf(a.Err()) == "WRITER_TAKEN_OVER"
			default:
				return false
			}
		}
		attach(execution.Ref{ID: "none"}, "", false, "EXECUTION_NOT_FOUND")
		plain := r.start(execution.Request{})
		attach(plain, "", false, "STDIN_NOT_OPEN")

		ref := r.start(open())
		a := attach(ref, "", false, "")
		attach(ref, "", false, "WRITER_ATTACHED")
		attach(ref, "b", false, "WRITER_ATTACHED")
		if lost(a) {
			t.Error("lost to one that was refused")
		}
		if s, err := a.Write(t.Context(), at(0, "of a, ")); err != nil || s.Committed != 6 {
			t.Errorf("%+v, %v", s, err)
		}
		b := attach(ref, "b", true, "")
		if !lost(a) || lost(b) {
			t.Error("not taken over")
		}
		if _, err := a.Write(t.Context(), at(6, "of a again")); fault.ReasonOf(err) != "WRITER_TAKEN_OVER" {
			t.Errorf("one that was taken over from wrote on: %v", err)
		}
		a.Close() // of one that has lost it
		attach(ref, "", false, "WRITER_ATTACHED")
		again := attach(ref, "b", false, "")
		if !lost(b) || lost(again) {
			t.Error("a writer cannot replace itself")
		}
		if s, err := again.Write(t.Context(), execution.Input{Data: []byte("of b")}); err != nil || s.Committed < 10 {
			t.Errorf("%+v, %v", s, err)
		}
		if err := again.Resize(t.Context(), execution.TerminalSize{Rows: 1, Columns: 1}); fault.ReasonOf(err) != "NOT_A_TERMINAL" {
			t.Errorf("%v", err)
		}
		again.Close()
		again.Close()
		c := attach(ref, "c", false, "")
		// A unary write is another's affair, offsets keep it apart.
		if _, err := r.WriteInput(t.Context(), ref, execution.Input{Close: true}); err != nil {
			t.Error(err)
		}
		r.wait(ref)
		if _, err := c.Write(t.Context(), execution.Input{Data: []byte("x")}); fault.ReasonOf(err) != "EXECUTION_ENDED" {
			t.Errorf("%v", err)
		}
		late := attach(ref, "", false, "")
		if _, err := late.Write(t.Context(), execution.Input{Data: []byte("x")}); fault.ReasonOf(err) != "EXECUTION_ENDED" {
			t.Errorf("%v", err)
		}
	})
}
