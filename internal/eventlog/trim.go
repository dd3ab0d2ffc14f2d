package eventlog

// Overhead is the most that a record takes in a log beside its data.
const Overhead = recordHeaderSize + segmentHeaderSize

// Size is what the kept segment files take together, in bytes.
func (l *Log) Size() int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.size
}

// Trim drops the oldest segments until the log has at most size bytes, but none with
// records behind the sequence upTo, and never the one being written. It is for a Log
// that was opened with DropNothing. It returns the last record of what would be dropped
// next; 0 if that is the segment being written.
func (l *Log) Trim(size int64, upTo uint64) (next uint64) {
	l.writing.Lock()
	defer l.writing.Unlock()
	if !l.closed.Load() {
		l.drop(size, upTo)
	}
	if len(l.segments) == 1 {
		return 0
	}
	return l.segments[1].base - 1
}
