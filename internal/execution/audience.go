package execution

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strconv"
	"sync"
	"time"
)

// attendTime is how long a caller who is about to watch may take to come. It takes a
// moment; a machine that has too much to do may make it long.
const attendTime = 10 * time.Second

// holdTime is how long the place of a watcher who left is kept for him: who comes back
// after his connection broke finds what he had not read.
const holdTime = 15 * time.Second

// audience is who watches an execution that has not ended, and how far they are.
type audience struct {
	mu sync.Mutex
	// places is for each the last event that it is through with. It lags behind where
	// nobody asks for it.
	places map[*Watcher]uint64
	// held are places of those who left, until somebody comes back to one or its time is up.
	held []heldPlace
	// empty is since when nobody watches.
	empty time.Time
	// expected is until when somebody is counted who is about to watch.
	expected time.Time
	// change is closed when somebody comes or goes; nil if nobody waits for it.
	change chan struct{}
	// wanted is how far the slowest has to be before it is news.
	wanted uint64
	// news tells that the slowest is that far, or is somebody else.
	news func()
}

// heldPlace is where somebody was who left.
type heldPlace struct {
	place uint64
	until time.Time
}

func newAudience(news func()) *audience {
	return &audience{places: make(map[*Watcher]uint64), empty: time.Now(), news: news}
}

// expect counts somebody in who is about to watch.
func (a *audience) expect() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.expected = time.Now().Add(attendTime)
}

// join counts a watcher that begins behind an event.
func (a *audience) join(w *Watcher, place uint64) {
	a.mu.Lock()
	a.places[w] = place
	if len(a.held) > 0 { // the nearest is most likely his own
		nearest := slices.MinFunc(a.held, func(x, y heldPlace) int {
			return cmp.Compare(distance(x.place, place), distance(y.place, place))
		})
		i := slices.Index(a.held, nearest)
		a.held = slices.Delete(a.held, i, i+1)
	}
	a.expected = time.Time{}
	a.changedLocked()
	a.mu.Unlock()
	a.news()
}

func distance(a, b uint64) uint64 { return max(a, b) - min(a, b) }

// leave takes a watcher out. If hold is set his place is kept for a while.
func (a *audience) leave(w *Watcher, hold bool) {
	a.mu.Lock()
	if place, here := a.places[w]; here && hold {
		a.held = append(a.held, heldPlace{place, time.Now().Add(holdTime)})
	}
	delete(a.places, w)
	if len(a.places) == 0 {
		a.empty = time.Now()
	}
	a.changedLocked()
	a.mu.Unlock()
	a.news()
}

// through notes that a watcher is through with an event.
func (a *audience) through(w *Watcher, place uint64) {
	a.mu.Lock()
	news := a.places[w] < a.wanted && place >= a.wanted
	a.places[w] = place
	a.mu.Unlock()
	if news {
		a.news()
	}
}

// slowest is how far all are who watch, or left a moment ago; false if nobody watches. A
// place from wanted on is told as news.
func (a *audience) slowest(wanted uint64) (place uint64, ok bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.wanted = wanted
	for _, p := range a.places {
		if !ok || p < place {
			place, ok = p, true
		}
	}
	now := time.Now()
	a.held = slices.DeleteFunc(a.held, func(h heldPlace) bool { return !now.Before(h.until) })
	for _, h := range a.held {
		place = min(place, h.place)
	}
	return place, ok
}

// release is when the next place that is held is given up; false if there is none.
func (a *audience) release() (at time.Time, ok bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, h := range a.held {
		if !ok || h.until.Before(at) {
			at, ok = h.until, true
		}
	}
	return at, ok
}

// alone is when nobody will have watched for the grace, false while somebody does, and
// what is closed when that changes.
func (a *audience) alone(grace time.Duration) (at time.Time, ok bool, change <-chan struct{}) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.change == nil {
		a.change = make(chan struct{})
	}
	return latest(a.empty.Add(grace), a.expected), len(a.places) == 0, a.change
}

func (a *audience) changedLocked() {
	if a.change != nil {
		close(a.change)
		a.change = nil
	}
}

// attend ends the run when nobody has watched it for the grace of its detach policy. It
// returns when the run is through.
func (r *run) attend(ctx context.Context) {
	grace := *r.record.Policies.DetachGrace
	for {
		at, alone, change := r.audience.alone(grace)
		var due <-chan time.Time
		timer := time.NewTimer(time.Until(at))
		if alone {
			due = timer.C
		}
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-change:
			timer.Stop()
			continue
		case <-due:
		}
		if r.service.isDraining() {
			// It may be we who sent the watchers away. The next executord counts anew.
			return
		}
		if _, alone, _ := r.audience.alone(grace); !alone {
			continue
		}
		r.stop(stopOrder{
			reason: Abandoned, detail: fmt.Sprintf("nobody watched it for %v", grace),
			evidence: map[string]string{"detach_grace_ms": strconv.FormatInt(grace.Milliseconds(), 10)},
		})
		return
	}
}

func (s *Service) isDraining() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.draining
}
