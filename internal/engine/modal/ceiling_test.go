package modal

import (
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/harvest-run/executord/internal/fault"
)

func mustRefuse(t *testing.T, err error, kind fault.Kind, atMost time.Duration) {
	t.Helper()
	fe, ok := errors.AsType[*fault.Error](err)
	if !ok || fe.Kind != kind || fe.RetryAfter <= 0 || fe.RetryAfter > atMost {
		t.Fatalf("%+v, want kind %d and a time to come back within %v", err, kind, atMost)
	}
}

func TestCeilingOfSandboxes(t *testing.T) {
	c := newCeiling(2, 1000)
	c.found("old")
	if err := c.admit("a"); err != nil {
		t.Fatal(err)
	}
	mustRefuse(t, c.admit("b"), fault.Exhausted, time.Minute)
	if err := c.admit("a"); err != nil {
		t.Errorf("the same one again: %v", err)
	}
	c.gone("old")
	if err := c.admit("b"); err != nil {
		t.Errorf("after one went: %v", err)
	}
	mustRefuse(t, c.admit("d"), fault.Exhausted, time.Minute)
}

func TestCeilingOfCreates(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const most = 5
		c := newCeiling(1000, most)
		var admitted []time.Time
		for i := range 400 {
			id := fmt.Sprint(i)
			err := c.admit(id)
			if err == nil {
				admitted = append(admitted, time.Now())
				c.gone(id)
			} else {
				mustRefuse(t, err, fault.Exhausted, time.Minute)
			}
			time.Sleep(time.Second)
		}
		if len(admitted) < 6*most {
			t.Errorf("%d in 400 s", len(admitted))
		}
		for i := most; i < len(admitted); i++ {
			if admitted[i].Sub(admitted[i-most]) < time.Minute {
				t.Errorf("%d within %v", most+1, admitted[i].Sub(admitted[i-most]))
			}
		}
	})
}

func TestBreaker(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCeiling(1000, 1000)
		try := func(ok, failed bool) error {
			err := c.admit("x")
			if err == nil {
				c.outcome(ok, failed)
				c.gone("x")
			}
			return err
		}
		for range breakAfter {
			if err := try(false, true); err != nil {
				t.Fatal(err)
			}
		}
		mustRefuse(t, try(true, false), fault.Unavailable, firstBreak)
		time.Sleep(firstBreak)
		// One probe at a time.
		if err := c.admit("probe"); err != nil {
			t.Fatal(err)
		}
		mustRefuse(t, c.admit("second"), fault.Unavailable, firstBreak)
		c.outcome(false, true)
		mustRefuse(t, try(true, false), fault.Unavailable, 2*firstBreak)
		time.Sleep(2 * firstBreak)
		// A probe that says nothing does not open it, nor close it.
		if err := try(false, false); err != nil {
			t.Fatal(err)
		}
		if err := try(true, false); err != nil {
			t.Fatal(err)
		}
		for range breakAfter - 1 {
			if err := try(false, true); err != nil {
				t.Errorf("after one worked: %v", err)
			}
		}
		// However long it goes on, somebody is let through now and then.
		for range 50 {
			time.Sleep(longBreak)
			if err := try(false, true); err != nil {
				t.Fatalf("%v after a failure: %v", longBreak, err)
			}
		}
	})
}
