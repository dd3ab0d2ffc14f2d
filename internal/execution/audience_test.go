package execution

import (
	"testing"
	"testing/synctest"
	"time"
)

// TestHeldPlaces keeps the place of one who left, until he is back or his time is up.
func TestHeldPlaces(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAudience(func() {})
		fast, slow, again := &Watcher{}, &Watcher{}, &Watcher{}
		at := func(want uint64, watched bool) {
			t.Helper()
			if place, ok := a.slowest(0); ok != watched || ok && place != want {
				t.Errorf("the slowest is at %d (%v), want %d (%v)", place, ok, want, watched)
			}
		}
		a.join(fast, 50)
		a.join(slow, 10)
		at(10, true)
		a.leave(slow, true)
		at(10, true)
		if due, ok := a.release(); !ok || !due.Equal(time.Now().Add(holdTime)) {
			t.Errorf("%v, %v", due, ok)
		}
		// He comes back with what had reached him; nothing is held for him any more.
		a.join(again, 9)
		at(9, true)
		a.through(again, 60)
		at(50, true)
		if _, ok := a.release(); ok {
			t.Error("a place is held for one who is back")
		}
		// The other one does not come back.
		a.leave(fast, true)
		time.Sleep(holdTime - 1)
		at(50, true)
		time.Sleep(time.Nanosecond)
		at(60, true)
		// Without anybody nothing counts: then nothing is dropped at all.
		a.leave(again, true)
		at(0, false)
		// Who has seen the end needs no place.
		a.join(slow, 1)
		a.leave(slow, false)
		a.join(fast, 70)
		time.Sleep(holdTime)
		at(70, true)
	})
}
