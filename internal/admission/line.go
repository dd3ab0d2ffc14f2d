package admission

// line is the queue, and the one place that decides who is next: of those whose need
// can be met the one who came first. One who waits for something that another does not
// need does not keep that other waiting, so a full house of sessions does not stop the
// commands in them.
type line struct {
	// One queue for each kind of Need: all in one of them wait for the same.
	queues map[Need]*queue
	size   int
	last   uint64 // ticket that was given out
}

// queue is a list of waiters in the order in which they came.
type queue struct{ first, last *waiter }

// waiter is one who asked.
type waiter struct {
	need   Need
	ticket uint64
	// called is closed when slot or err has been set.
	called chan struct{}
	slot   *Slot
	err    error

	before, behind *waiter
}

// anything is every need.
func anything(Need) bool { return true }

// join puts one at the end.
func (l *line) join(w *waiter) {
	if l.queues == nil {
		l.queues = make(map[Need]*queue)
	}
	q := l.queues[w.need]
	if q == nil {
		q = &queue{}
		l.queues[w.need] = q
	}
	l.last++
	l.size++
	w.ticket, w.before = l.last, q.last
	if q.last != nil {
		q.last.behind = w
	} else {
		q.first = w
	}
	q.last = w
}

// next is the first of those whose need is one of some; nil if there is none.
func (l *line) next(some func(Need) bool) *waiter {
	var best *waiter
	for need, q := range l.queues {
		if q.first != nil && (best == nil || q.first.ticket < best.ticket) && some(need) {
			best = q.first
		}
	}
	return best
}

// remove takes one out who is in it.
func (l *line) remove(w *waiter) {
	q := l.queues[w.need]
	if w.before != nil {
		w.before.behind = w.behind
	} else {
		q.first = w.behind
	}
	if w.behind != nil {
		w.behind.before = w.before
	} else {
		q.last = w.before
	}
	w.before, w.behind = nil, nil
	l.size--
}

// call ends the waiting.
func (w *waiter) call(slot *Slot, err error) {
	w.slot, w.err = slot, err
	close(w.called)
}
