package eventlog

import (
	"math"
	"sync/atomic"
)

const (
	// recentBytes bounds what a log keeps in memory for the readers at its end: two
	// of the pump's largest Appends. It is shared by all of them.
	recentBytes = 512 << 10
	// recentOverhead is what a record takes in memory beside its data.
	recentOverhead = 128
	// abandonAfter is how many times as many records as are kept the readers may fall behind before
	// nothing more is kept for them. Most that fall behind a little catch up again.
	abandonAfter = 4
)

// recent are the last records of a log, kept in memory while readers follow at its
// end: they then need no file, no checksum and no memory of their own. What is kept is
// never changed, so that all readers share it, and whoever they hand it to.
//
// Log.mu guards it, except for first and near.
type recent struct {
	// entries are without holes; the last, if there is one, is the log's last record.
	entries []recentEntry
	size    int
	// followers is how many readers were at the end since the generation began,
	// caughtUp how many of them were there since the last Append. When they are equal,
	// nobody needs the entries.
	followers  int
	caughtUp   int
	generation uint64
	// first is the sequence of the first entry; none if there is none. Readers that are
	// far behind look at it without waiting for anybody.
	first atomic.Uint64
	// near is the highest sequence that a reader wanted lately.
	near atomic.Uint64
}

const none = math.MaxUint64

// recentEntry is a record, and where the next one would begin.
type recentEntry struct {
	record
	segment *segment
	next    mark
}

func (e *recentEntry) size() int { return len(e.data) + recentOverhead }

// add takes what was appended. With none, nothing was kept of it, and what was kept before
// would leave a hole.
func (r *recent) add(entries []recentEntry) {
	r.caughtUp = 0
	if len(entries) == 0 {
		r.clear()
		return
	}
	r.entries = append(r.entries, entries...)
	for i := range entries {
		r.size += entries[i].size()
	}
	n := 0
	for ; r.size > recentBytes; n++ {
		r.size -= r.entries[n].size()
	}
	clear(r.entries[:n])
	r.entries = r.entries[n:]
	r.first.Store(r.entries[0].sequence)
	if last := r.entries[len(r.entries)-1].sequence; last-min(last, r.near.Load()) > uint64(abandonAfter*len(r.entries)) {
		r.abandon()
	}
}

// clear lets go of the entries.
func (r *recent) clear() {
	clear(r.entries)
	r.entries, r.size = r.entries[:0], 0
	r.first.Store(none)
}

// abandon keeps nothing until a reader is at the end again.
func (r *recent) abandon() {
	r.clear()
	r.entries = nil
	r.generation++
	r.followers, r.caughtUp = 0, 0
}

// following is what recent knows of a reader. Log.mu guards it.
type following struct {
	// generation is that in which it was counted; 0 if never.
	generation uint64
	// caughtUp is the log's last sequence when it was last at the end.
	caughtUp uint64
}

// followed says whether somebody will want to have in memory what is appended.
func (l *Log) followed() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.recent.followers > 0
}

// recall returns a record that is kept in memory.
func (l *Log) recall(sequence uint64) (recentEntry, bool) {
	r := &l.recent
	if first := r.first.Load(); sequence < first {
		if first != none {
			r.noteNear(sequence)
		}
		return recentEntry{}, false
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(r.entries) == 0 || sequence < r.entries[0].sequence || sequence > l.tail.sequence {
		return recentEntry{}, false
	}
	r.noteNear(sequence)
	return r.entries[sequence-r.entries[0].sequence], true
}

// noteNear raises near. Two at a time may get in each other's way, which does no harm.
func (r *recent) noteNear(sequence uint64) {
	if sequence > r.near.Load() {
		r.near.Store(sequence)
	}
}

// atEnd notes that a reader has all there is before the sequence that it wants; false if
// it has not.
func (l *Log) atEnd(f *following, want uint64) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if want <= l.tail.sequence {
		return false
	}
	r := &l.recent
	switch {
	case f.generation != r.generation:
		f.generation = r.generation
		r.followers++
		r.caughtUp++
	case f.caughtUp != l.tail.sequence:
		r.caughtUp++
	}
	f.caughtUp = l.tail.sequence
	r.noteNear(l.tail.sequence)
	if r.caughtUp == r.followers {
		r.clear()
	}
	return true
}

// leave forgets a reader.
func (l *Log) leave(f *following) {
	l.mu.Lock()
	defer l.mu.Unlock()
	r := &l.recent
	if f.generation != r.generation {
		return
	}
	r.followers--
	if f.caughtUp == l.tail.sequence {
		r.caughtUp--
	}
	f.generation = 0
	if r.caughtUp == r.followers {
		r.clear()
	}
}
