package eventlog

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"strconv"
	"strings"
)

// A segment file is a header and records; integers are little-endian:
//
//	 0  "evntlog" and the version, 1
//	 8  epoch
//	24  sequence of the first record, which is also the file's name
//	32  time of the record before it, Unix nanoseconds; 0 if there was none
//	40  for Stdout: bytes before this segment
//	48  for Stderr: the same
//	56  for Stdout: crc32c of these bytes
//	60  for Stderr: the same
//	64  crc32c of everything before it
//
// The header carries all that the segments before it have added up to. So the log
// can be continued by reading the last segment alone, and no segment is needed to
// make sense of another.
const (
	segmentHeaderSize = 68
	segmentMagic      = "evntlog\x01"
	segmentSuffix     = ".seg"
	segmentDigits     = 20
)

// markStep is how far marks lie apart, in bytes.
const markStep = 256 << 10

type epoch [16]byte

// tally is what the records up to some place add up to.
type tally struct {
	sequence uint64 // of the last one
	time     int64  // of the last one
	streams  [2]streamTally
}

type streamTally struct {
	size int64
	crc  uint32
}

func (t *tally) sizes() [2]int64 { return [2]int64{t.streams[0].size, t.streams[1].size} }

// mark is a place in a segment where a record begins, or may once begin.
type mark struct {
	sequence uint64   // of the record
	position int64    // in the file
	offsets  [2]int64 // bytes of the streams before it
}

// segment is one file of the log. Log.mu guards what changes.
type segment struct {
	path string
	// base is the sequence of the first record.
	base uint64
	// start is what the segments before add up to.
	start tally
	// broken segments have no readable header. Nothing but path, base and end is
	// known of them. They are kept in the list so that retention deletes them.
	broken bool
	// end is how long the file is, without what is just being written.
	end int64
	// last is the sequence of the last record; base-1 if there is none yet.
	last uint64
	// marks are at least markStep apart, in the order of the file; the first is
	// that of the first record.
	marks []mark
	// dropped segments are no longer in the list.
	dropped bool
	// synced segments are complete and on the disk. Log.writing guards it.
	synced bool
}

func newSegment(dir string, start tally) *segment {
	base := start.sequence + 1
	return &segment{
		path:  filepath.Join(dir, segmentName(base)),
		base:  base,
		start: start,
		end:   segmentHeaderSize,
		last:  start.sequence,
		marks: []mark{{sequence: base, position: segmentHeaderSize, offsets: start.sizes()}},
	}
}

// addMark remembers a place, unless one nearby is known.
func (s *segment) addMark(m mark) {
	if m.position >= s.marks[len(s.marks)-1].position+markStep {
		s.marks = append(s.marks, m)
	}
}

// markOf returns the last mark not behind a sequence, which must not be less than base.
func (s *segment) markOf(sequence uint64) mark {
	return s.marks[sort.Search(len(s.marks), func(i int) bool { return s.marks[i].sequence > sequence })-1]
}

// markAt returns the last mark not behind an offset of a stream, which must not be
// less than the segment's start.
func (s *segment) markAt(stream Stream, offset int64) mark {
	// Marks can share an offset when the other stream is busy. The byte at the offset
	// then lies behind the last of them.
	i := stream.index()
	return s.marks[sort.Search(len(s.marks), func(n int) bool { return s.marks[n].offsets[i] > offset })-1]
}

func segmentName(base uint64) string {
	return fmt.Sprintf("%0*d%s", segmentDigits, base, segmentSuffix)
}

// parseSegmentName returns the base that a file is named after.
func parseSegmentName(name string) (uint64, bool) {
	digits, ok := strings.CutSuffix(name, segmentSuffix)
	if !ok || len(digits) != segmentDigits {
		return 0, false
	}
	base, err := strconv.ParseUint(digits, 10, 64)
	return base, err == nil && base > 0
}

func encodeSegmentHeader(e epoch, start tally) []byte {
	b := make([]byte, 0, segmentHeaderSize)
	b = append(b, segmentMagic...)
	b = append(b, e[:]...)
	b = binary.LittleEndian.AppendUint64(b, start.sequence+1)
	b = binary.LittleEndian.AppendUint64(b, uint64(start.time))
	b = binary.LittleEndian.AppendUint64(b, uint64(start.streams[0].size))
	b = binary.LittleEndian.AppendUint64(b, uint64(start.streams[1].size))
	b = binary.LittleEndian.AppendUint32(b, start.streams[0].crc)
	b = binary.LittleEndian.AppendUint32(b, start.streams[1].crc)
	return binary.LittleEndian.AppendUint32(b, checksum(0, b))
}

// decodeSegmentHeader reads a header; errDamaged if it is not one.
func decodeSegmentHeader(b []byte) (epoch, tally, error) {
	if len(b) < segmentHeaderSize || string(b[:8]) != segmentMagic ||
		checksum(0, b[:64]) != binary.LittleEndian.Uint32(b[64:]) {
		return epoch{}, tally{}, errDamaged
	}
	base := binary.LittleEndian.Uint64(b[24:])
	t := tally{sequence: base - 1, time: int64(binary.LittleEndian.Uint64(b[32:]))}
	for i := range t.streams {
		t.streams[i].size = int64(binary.LittleEndian.Uint64(b[40+8*i:]))
		t.streams[i].crc = binary.LittleEndian.Uint32(b[56+4*i:])
		// Far beyond what can have been written; sums stay within an int64.
		if size := t.streams[i].size; size < 0 || size > math.MaxInt64/2 {
			return epoch{}, tally{}, errDamaged
		}
	}
	if base == 0 || base > math.MaxUint64/2 || base == 1 && t != (tally{}) {
		return epoch{}, tally{}, errDamaged
	}
	return epoch(b[8:24]), t, nil
}

// readSegment looks at a file's size and header. A broken header is not an error.
func readSegment(path string, base uint64) (*segment, epoch, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, epoch{}, err
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil {
		return nil, epoch{}, err
	}
	header := make([]byte, segmentHeaderSize)
	n, err := file.ReadAt(header, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, epoch{}, err
	}
	e, start, err := decodeSegmentHeader(header[:n])
	if err != nil || start.sequence+1 != base {
		return &segment{path: path, base: base, end: info.Size(), broken: true}, epoch{}, nil
	}
	s := newSegment(filepath.Dir(path), start)
	s.end = info.Size()
	return s, e, nil
}

// listSegments returns the bases of a directory's segment files, in order.
func listSegments(dir string) ([]uint64, error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var bases []uint64
	for _, entry := range entries {
		if base, ok := parseSegmentName(entry.Name()); ok {
			bases = append(bases, base)
		}
	}
	slices.Sort(bases)
	return bases, nil
}
