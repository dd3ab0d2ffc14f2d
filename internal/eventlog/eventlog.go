// Package eventlog keeps the events of one thing, such as an execution, in a directory:
// append-only, ordered, numbered from 1 without holes. One writer appends, any number of readers
// follow at their own pace; each reads the files (in practice the page cache) or, at
// the log's end, shares a bounded piece of memory with the others, so that none of them
// slows the writer down. What Append returned for survives kill -9
// of the process; what Seal returned for survives a power cut. The oldest segments
// are dropped when a log outgrows its bound, and what a reader misses is told as a
// Gap. The package imports nothing of this module. A Log has at most one goroutine, which
// has the disk begin with what Seal will wait for; Close waits for it.
package eventlog

import (
	"errors"
	"fmt"
	"time"
)

// Kind says what a record is. Kinds above KindOutput belong to the caller: the log
// does not look into their data. 0 is not a kind.
type Kind uint8

// KindOutput is a piece of an output stream.
const KindOutput Kind = 1

// Stream is one of a program's outputs.
type Stream uint8

// The streams.
const (
	Stdout Stream = 1
	Stderr Stream = 2
)

// MaxData is the most bytes of one record's data.
const MaxData = 31744

// Entry is what is appended.
type Entry struct {
	Kind Kind
	// Stream is looked at only for KindOutput.
	Stream Stream
	// Data is at most MaxData bytes. It is not kept after Append returns.
	Data []byte
}

// Record is what is read: a record, or a Gap in place of those that are missing.
type Record struct {
	// Sequence counts the records of the log from 1; with a Gap, it is that of the
	// last missing one.
	Sequence uint64
	// Time is the one given to Append, in UTC; zero with a Gap.
	Time time.Time
	Kind Kind
	// Stream and Offset are set for KindOutput. Offset is the position of the first
	// byte of Data in its stream, from 0.
	Stream Stream
	Offset int64
	// Data belongs to the receiver. It is never changed afterwards, but shares its
	// memory with its neighbours: who keeps a little of it for long should copy it.
	Data []byte
	// Gap, if not nil, says that records are missing here.
	Gap *Gap
}

// Gap says what is missing.
type Gap struct {
	Reason GapReason
	// MissingEvents is how many records are missing, at least 1.
	MissingEvents uint64
	// Resume is, for Stdout and Stderr, the offset of the next byte that can follow.
	Resume [2]int64
}

// GapReason says why records are missing.
type GapReason uint8

// The reasons.
const (
	// GapRetention: they were dropped to keep the log within Config.RetainedBytes.
	GapRetention GapReason = 1
	// GapEpochChanged: the reader's cursor belongs to another log. Only callers make it.
	GapEpochChanged GapReason = 2
	// GapDamaged: the stored bytes are not what was written.
	GapDamaged GapReason = 3
)

// Total sums up one stream.
type Total struct {
	// Size is how many bytes were ever appended.
	Size int64
	// CRC32C is their checksum (Castagnoli).
	CRC32C uint32
	// Dropped is how many of them, from the start, are no longer kept.
	Dropped int64
}

// Config of a log.
type Config struct {
	// Dir is the log's directory; nothing else may lie in it.
	Dir string
	// RetainedBytes bounds the segment files' sum; the segment being written is kept
	// whatever its size. 0 keeps everything. It takes effect with the next Append.
	RetainedBytes int64
	// SegmentBytes is where a new segment is begun. One Append is never divided, so
	// a large one makes a larger segment. 0 stands for an eighth of RetainedBytes,
	// but at least 256 KiB and at most 8 MiB.
	SegmentBytes int64
	// DropNothing keeps everything until Trim says otherwise. RetainedBytes then only
	// sizes the segments.
	DropNothing bool
}

// bound is what Append keeps the log within; 0 is no bound.
func (cfg *Config) bound() int64 {
	if cfg.DropNothing {
		return 0
	}
	return cfg.RetainedBytes
}

const (
	minSegmentBytes = 256 << 10
	maxSegmentBytes = 8 << 20
)

func (cfg *Config) complete() error {
	switch {
	case cfg.Dir == "":
		return errors.New("no directory given")
	case cfg.RetainedBytes < 0:
		return fmt.Errorf("retained bytes %d are negative", cfg.RetainedBytes)
	case cfg.SegmentBytes < 0:
		return fmt.Errorf("segment bytes %d are negative", cfg.SegmentBytes)
	case cfg.SegmentBytes > 0:
	case cfg.RetainedBytes == 0:
		cfg.SegmentBytes = maxSegmentBytes
	default:
		cfg.SegmentBytes = min(max(cfg.RetainedBytes/8, minSegmentBytes), maxSegmentBytes)
	}
	return nil
}

var (
	// ErrNoLog means that a directory is not there or holds no readable segment.
	ErrNoLog = errors.New("no event log")
	// ErrSealed means that nothing can be appended any more.
	ErrSealed = errors.New("event log is sealed")
	// ErrClosed means that the Log or the Reader was closed.
	ErrClosed = errors.New("event log is closed")
)

// DroppedError means that the bytes asked for are not kept any more, or are damaged.
type DroppedError struct {
	// First is the offset of the next byte that may be there. It is greater than the
	// offset asked for.
	First int64
}

// Error tells where the stream goes on.
func (e *DroppedError) Error() string {
	return fmt.Sprintf("output is gone up to offset %d", e.First)
}
