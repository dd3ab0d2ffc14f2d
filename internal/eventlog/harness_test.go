package eventlog

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
)

// childVariable makes the test binary do something else than test.
const childVariable = "EVENTLOG_TEST_CHILD"

func TestMain(m *testing.M) {
	if dir := os.Getenv(childVariable); dir != "" {
		os.Exit(writeUntilKilled(dir))
	}
	goleak.VerifyTestMain(m)
}

// The content of all logs of these tests is a function of the sequence alone. So
// every reader, at any time and in any process, can tell whether what it got is right.

func randomFor(sequence uint64) *rand.Rand { return rand.New(rand.NewPCG(sequence, 0x9e3779b9)) }

func entryOf(sequence uint64) Entry {
	random := randomFor(sequence)
	e := Entry{Kind: KindOutput, Stream: Stdout}
	switch n := random.IntN(10); {
	case n == 0:
		e.Kind, e.Stream = KindOutput+1+Kind(random.IntN(200)), 0
	case n < 4:
		e.Stream = Stderr
	}
	size := 0
	switch random.IntN(8) {
	case 0:
		size = random.IntN(3)
	case 1:
		size = MaxData - random.IntN(2)
	default:
		size = random.IntN(900)
	}
	e.Data = randomBytes(random, size)
	return e
}

func randomBytes(random *rand.Rand, n int) []byte {
	var seed [32]byte
	for i := range seed {
		seed[i] = byte(random.Uint32())
	}
	b := make([]byte, n)
	_, _ = rand.NewChaCha8(seed).Read(b)
	return b
}

func timeOf(sequence uint64) time.Time {
	return time.Date(2026, 11, 23, 0, 0, 0, 0, time.UTC).Add(time.Duration(sequence) * time.Millisecond)
}

// appendNext appends n entries in one Append.
func appendNext(l *Log, n int) error {
	first := l.Sequence() + 1
	entries := make([]Entry, n)
	for i := range entries {
		entries[i] = entryOf(first + uint64(i))
	}
	return l.Append(timeOf(first), entries...)
}

// fill appends n records in Appends of different sizes. The times of a batch are that
// of its first record, which is why fill uses batches that depend on the sequence only.
func fill(t testing.TB, l *Log, n int) {
	t.Helper()
	for n > 0 {
		batch := min(n, 1+int(l.Sequence()%5))
		if err := appendNext(l, batch); err != nil {
			t.Fatal(err)
		}
		n -= batch
	}
}

// expected is what a log must contain up to a sequence.
type expected struct {
	sequence uint64
	streams  [2]Total
}

// advance goes to a sequence.
func (x *expected) advance(to uint64) {
	for x.sequence < to {
		x.sequence++
		if e := entryOf(x.sequence); e.Kind == KindOutput {
			s := &x.streams[e.Stream-1]
			s.Size += int64(len(e.Data))
			s.CRC32C = checksum(s.CRC32C, e.Data)
		}
	}
}

// check compares what a reader got with what must follow.
func (x *expected) check(t testing.TB, rec Record) {
	t.Helper()
	if gap := rec.Gap; gap != nil {
		if gap.MissingEvents != rec.Sequence-x.sequence || gap.MissingEvents == 0 || rec.Sequence < x.sequence {
			t.Fatalf("gap of %d events from %d to %d", gap.MissingEvents, x.sequence, rec.Sequence)
		}
		x.advance(rec.Sequence)
		if gap.Resume != [2]int64{x.streams[0].Size, x.streams[1].Size} {
			t.Fatalf("gap up to %d resumes at %v, want %+v", rec.Sequence, gap.Resume, x.streams)
		}
		return
	}
	if rec.Sequence != x.sequence+1 {
		t.Fatalf("sequence %d follows %d", rec.Sequence, x.sequence)
	}
	want := entryOf(rec.Sequence)
	var offset int64
	if want.Kind == KindOutput {
		offset = x.streams[want.Stream-1].Size
	}
	if rec.Kind != want.Kind || rec.Stream != want.Stream || rec.Offset != offset {
		t.Fatalf("record %d is %d/%d at %d, want %d/%d at %d", rec.Sequence,
			rec.Kind, rec.Stream, rec.Offset, want.Kind, want.Stream, offset)
	}
	if !bytes.Equal(rec.Data, want.Data) {
		t.Fatalf("record %d has other data", rec.Sequence)
	}
	x.advance(rec.Sequence)
}

// checkTotals compares a log's totals with what must have been appended.
func (x *expected) checkTotals(t testing.TB, l *Log) {
	t.Helper()
	x.advance(l.Sequence())
	stdout, stderr := l.Totals()
	for i, got := range []Total{stdout, stderr} {
		got.Dropped = 0
		if got != x.streams[i] {
			t.Fatalf("stream %d totals %+v, want %+v", i+1, got, x.streams[i])
		}
	}
}

// readAll reads behind a sequence what is there now, checks it and returns the gaps.
func readAll(t testing.TB, l *Log, after uint64) (gaps []Record) {
	t.Helper()
	r := l.NewReader(after)
	defer r.Close()
	var x expected
	x.advance(after)
	for {
		rec, ok, err := r.TryNext()
		if errors.Is(err, io.EOF) || !ok && err == nil {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		x.check(t, rec)
		if rec.Gap != nil {
			gaps = append(gaps, rec)
		}
	}
	if x.sequence != max(after, l.Sequence()) {
		t.Fatalf("read to %d, want %d", x.sequence, l.Sequence())
	}
	return gaps
}

func streamsUpTo(sequence uint64) (streams [2][]byte) {
	for n := range sequence {
		if e := entryOf(n + 1); e.Kind == KindOutput {
			streams[e.Stream-1] = append(streams[e.Stream-1], e.Data...)
		}
	}
	return streams
}

func newLog(t testing.TB, cfg Config) *Log {
	t.Helper()
	if cfg.Dir == "" {
		cfg.Dir = filepath.Join(t.TempDir(), "log")
	}
	l, err := Create(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return l
}

func reopen(t testing.TB, l *Log) *Log {
	t.Helper()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	return openLog(t, Config{Dir: l.dir, RetainedBytes: l.retainedBytes, SegmentBytes: l.segmentBytes})
}

func openLog(t testing.TB, cfg Config) *Log {
	t.Helper()
	l, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return l
}

// files returns the names and sizes of a directory's files.
func files(t testing.TB, dir string) map[string]int64 {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	sizes := make(map[string]int64)
	for _, e := range entries {
		info, err := e.Info()
		if err != nil {
			t.Fatal(err)
		}
		sizes[e.Name()] = info.Size()
	}
	return sizes
}

// openFiles counts this process's descriptors of files below a directory, also of
// deleted ones.
func openFiles(t testing.TB, dir string) int {
	t.Helper()
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, fd := range fds {
		target, err := os.Readlink("/proc/self/fd/" + fd.Name())
		if err == nil && strings.HasPrefix(target, dir+"/") {
			n++
		}
	}
	return n
}

func readFile(t testing.TB, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func appendFile(t testing.TB, path string, b []byte) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.Write(b); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
}

// change replaces the content of a file.
func change(t testing.TB, path string, by func([]byte) []byte) {
	t.Helper()
	if err := os.WriteFile(path, by(readFile(t, path)), 0o600); err != nil {
		t.Fatal(err)
	}
}

// damage changes one byte of a file.
func damage(t testing.TB, path string, position int64) {
	t.Helper()
	change(t, path, func(b []byte) []byte {
		b[position] ^= 0x40
		return b
	})
}
