package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"os"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	if os.Getenv(childVariable) != "" {
		os.Exit(child())
	}
	goleak.VerifyTestMain(m)
}

var (
	errFirst  = errors.New("first")
	errSecond = errors.New("second")
	errStop   = errors.New("enough")
)

// untilEnded waits for the context and returns f of its cause.
func untilEnded(f func(cause error) error) func(context.Context) error {
	return func(ctx context.Context) error {
		<-ctx.Done()
		return f(context.Cause(ctx))
	}
}

func TestGroupWait(t *testing.T) {
	echo := func(cause error) error { return fmt.Errorf("serve: %w", cause) }
	fail := func(err error) func(context.Context) error {
		return func(context.Context) error { return err }
	}
	tests := []struct {
		name     string
		stop     error
		routines []func(context.Context) error
		want     error
	}{
		{name: "nothing started"},
		{name: "all succeed", routines: []func(context.Context) error{fail(nil), fail(nil)}},
		{name: "an error ends the others, whose echo does not count", want: errFirst,
			routines: []func(context.Context) error{untilEnded(echo), untilEnded(echo), fail(errFirst)}},
		{name: "an error that comes while the others end does not replace the first", want: errFirst,
			routines: []func(context.Context) error{fail(errFirst), untilEnded(func(error) error { return errSecond })}},
		{name: "a stop is no error", stop: errStop,
			routines: []func(context.Context) error{untilEnded(echo), untilEnded(func(error) error { return nil })}},
		{name: "the bare context error of a stop is no error", stop: errStop,
			routines: []func(context.Context) error{untilEnded(func(error) error { return fmt.Errorf("read: %w", context.Canceled) })}},
		{name: "an error while stopping counts", stop: errStop, want: errSecond,
			routines: []func(context.Context) error{untilEnded(echo), untilEnded(func(error) error { return errSecond })}},
		{name: "a cancellation of something else counts", want: context.Canceled,
			routines: []func(context.Context) error{fail(context.Canceled)}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				g := NewGroup(t.Context())
				for _, routine := range test.routines {
					g.Go(routine)
				}
				if test.stop != nil {
					synctest.Wait()
					g.Stop(test.stop)
				}
				if err := g.Wait(); !errors.Is(err, test.want) || (err != nil) != (test.want != nil) {
					t.Errorf("Wait() = %v, want %v", err, test.want)
				}
			})
		})
	}
}

func TestGroupCauseIsTheFirstError(t *testing.T) {
	var seen error
	g := NewGroup(t.Context())
	g.Go(untilEnded(func(cause error) error { seen = cause; return nil }))
	g.Go(func(context.Context) error { return errFirst })
	g.Wait()
	if !errors.Is(seen, errFirst) {
		t.Errorf("the sibling saw the cause %v, want %v", seen, errFirst)
	}
}

func TestGroupSuccessLeavesSiblingsAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := NewGroup(t.Context())
		ended := false
		g.Go(func(context.Context) error { return nil })
		g.Go(untilEnded(func(error) error { ended = true; return nil }))
		synctest.Wait()
		if ended {
			t.Error("a routine that succeeded ended its sibling")
		}
		g.Stop(errStop)
		g.Wait()
		if !ended {
			t.Error("Wait returned before the sibling")
		}
	})
}

func TestGroupRoutineStartsAnother(t *testing.T) {
	g := NewGroup(t.Context())
	g.Go(func(context.Context) error {
		g.Go(func(context.Context) error { return errFirst })
		return nil
	})
	if err := g.Wait(); err != errFirst {
		t.Errorf("Wait() = %v, want the error of the inner routine", err)
	}
}

func TestGroupParentEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeoutCause(t.Context(), time.Second, errStop)
		defer cancel()
		g := NewGroup(ctx)
		var seen error
		g.Go(untilEnded(func(cause error) error { seen = cause; return cause }))
		if err := g.Wait(); err != nil || seen != errStop {
			t.Errorf("Wait() = %v and the cause was %v; want nil and %v", err, seen, errStop)
		}
	})
}

func TestGroupContextEndsAfterWait(t *testing.T) {
	g := NewGroup(t.Context())
	var kept context.Context
	g.Go(func(ctx context.Context) error { kept = ctx; return nil })
	g.Wait()
	if context.Cause(kept) == nil {
		t.Error("the context lives on after Wait")
	}
}

// A second group holds what the first one needs until its own end.
func TestGroupDependencies(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var order []string
		siblings := NewGroup(t.Context())
		siblings.Go(func(ctx context.Context) error {
			dependencies := NewGroup(context.WithoutCancel(ctx))
			dependencies.Go(untilEnded(func(error) error { order = append(order, "store"); return nil }))
			<-ctx.Done()
			time.Sleep(time.Second)
			order = append(order, "server")
			dependencies.Stop(context.Cause(ctx))
			return dependencies.Wait()
		})
		synctest.Wait()
		siblings.Stop(errStop)
		if err := siblings.Wait(); err != nil {
			t.Fatal(err)
		}
		if len(order) != 2 || order[0] != "server" {
			t.Errorf("ended in the order %q, want the server before its store", order)
		}
	})
}
