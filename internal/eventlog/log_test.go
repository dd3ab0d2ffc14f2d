package eventlog

import (
	"encoding/binary"
	"errors"
	"io"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestCreate(t *testing.T) {
	t.Run("new", func(t *testing.T) {
		dir := filepath.Join(t.TempDir(), "log")
		l := newLog(t, Config{Dir: dir})
		if info, err := os.Stat(dir); err != nil || info.Mode().Perm() != 0o700 {
			t.Errorf("directory: %v, %v", info, err)
		}
		if l.Sequence() != 0 || !l.LastTime().IsZero() || l.Sealed() || l.Repaired() != 0 {
			t.Errorf("new log has sequence %d, last time %v, sealed %v, repaired %d",
				l.Sequence(), l.LastTime(), l.Sealed(), l.Repaired())
		}
		if stdout, stderr := l.Totals(); stdout != (Total{}) || stderr != (Total{}) {
			t.Errorf("totals %+v %+v", stdout, stderr)
		}
		if other := newLog(t, Config{}); len(l.Epoch()) != 32 || l.Epoch() == other.Epoch() {
			t.Errorf("epochs %q and %q", l.Epoch(), other.Epoch())
		}
	})
	t.Run("a log is there", func(t *testing.T) {
		l := newLog(t, Config{})
		fill(t, l, 3)
		if _, err := Create(Config{Dir: l.dir}); !errors.Is(err, fs.ErrExist) {
			t.Errorf("got %v", err)
		}
		readAll(t, l, 0)
	})
	t.Run("records without a header are there", func(t *testing.T) {
		l := newLog(t, Config{})
		fill(t, l, 3)
		damage(t, l.active().path, 0)
		if _, err := Create(Config{Dir: l.dir}); !errors.Is(err, fs.ErrExist) {
			t.Errorf("got %v", err)
		}
	})
	t.Run("a killed Create's file is there", func(t *testing.T) {
		l := newLog(t, Config{})
		header := readFile(t, l.active().path)
		for n := range header {
			dir := t.TempDir()
			if err := os.WriteFile(filepath.Join(dir, segmentName(1)), header[:n], 0o600); err != nil {
				t.Fatal(err)
			}
			if _, err := Open(Config{Dir: dir}); !errors.Is(err, ErrNoLog) {
				t.Fatalf("Open with %d bytes of header: %v", n, err)
			}
			l := newLog(t, Config{Dir: dir})
			fill(t, l, 3)
			readAll(t, reopen(t, l), 0)
		}
	})
	t.Run("no parent", func(t *testing.T) {
		if _, err := Create(Config{Dir: filepath.Join(t.TempDir(), "a", "b")}); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("got %v", err)
		}
	})
}

func TestConfig(t *testing.T) {
	for _, tt := range []struct {
		name    string
		cfg     Config
		segment int64 // 0: refused
	}{
		{"no directory", Config{}, 0},
		{"negative retention", Config{Dir: "d", RetainedBytes: -1}, 0},
		{"negative segments", Config{Dir: "d", SegmentBytes: -1}, 0},
		{"keep everything", Config{Dir: "d"}, 8 << 20},
		{"small", Config{Dir: "d", RetainedBytes: 1 << 20}, 256 << 10},
		{"middle", Config{Dir: "d", RetainedBytes: 16 << 20}, 2 << 20},
		{"large", Config{Dir: "d", RetainedBytes: 1 << 40}, 8 << 20},
		{"given", Config{Dir: "d", RetainedBytes: 1 << 40, SegmentBytes: 5}, 5},
	} {
		t.Run(tt.name, func(t *testing.T) {
			err := tt.cfg.complete()
			if (err != nil) != (tt.segment == 0) || err == nil && tt.cfg.SegmentBytes != tt.segment {
				t.Errorf("segment bytes %d, error %v; want %d", tt.cfg.SegmentBytes, err, tt.segment)
			}
		})
	}
}

func TestOpenWithoutLog(t *testing.T) {
	for name, dir := range map[string]string{
		"no directory":    filepath.Join(t.TempDir(), "none"),
		"empty directory": t.TempDir(),
	} {
		if _, err := Open(Config{Dir: dir}); !errors.Is(err, ErrNoLog) {
			t.Errorf("%s: %v", name, err)
		}
	}
	dir := t.TempDir()
	for _, name := range []string{"1.seg", segmentName(0), "0000000000000000000x.seg", segmentName(1) + "x"} {
		if err := os.WriteFile(filepath.Join(dir, name), encodeSegmentHeader(epoch{}, tally{}), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := Open(Config{Dir: dir}); !errors.Is(err, ErrNoLog) {
		t.Errorf("only other files: %v", err)
	}
}

func TestReopen(t *testing.T) {
	l := newLog(t, Config{SegmentBytes: 64 << 10})
	for n := range 20 {
		fill(t, l, n)
		want := []any{l.Epoch(), l.Sequence(), l.LastTime(), l.tail, l.size}
		l = reopen(t, l)
		got := []any{l.Epoch(), l.Sequence(), l.LastTime(), l.tail, l.size}
		if diff := cmp.Diff(want, got, cmp.AllowUnexported(tally{}, streamTally{})); diff != "" {
			t.Fatal(diff)
		}
		if l.Repaired() != 0 || l.Sealed() {
			t.Fatalf("repaired %d, sealed %v", l.Repaired(), l.Sealed())
		}
		if gaps := readAll(t, l, 0); gaps != nil {
			t.Fatalf("gaps %+v", gaps)
		}
		new(expected).checkTotals(t, l)
	}
	if len(l.segments) < 5 {
		t.Errorf("only %d segments", len(l.segments))
	}
}

// TestReopenEmptySegment is about a process that was killed between beginning a
// segment and writing to it.
func TestReopenEmptySegment(t *testing.T) {
	l := newLog(t, Config{})
	fill(t, l, 10)
	if err := l.rotate(); err != nil {
		t.Fatal(err)
	}
	want := l.LastTime()
	l = reopen(t, l)
	if l.Sequence() != 10 || !l.LastTime().Equal(want) || want.IsZero() {
		t.Errorf("sequence %d at %v, want 10 at %v", l.Sequence(), l.LastTime(), want)
	}
	fill(t, l, 10)
	readAll(t, l, 0)
	readAll(t, reopen(t, l), 0)
}

func TestClose(t *testing.T) {
	l := newLog(t, Config{})
	fill(t, l, 5)
	r := l.NewReader(0)
	if _, _, err := r.TryNext(); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
	}
	for name, err := range map[string]error{
		"Append":            l.Append(time.Now(), Entry{Kind: 2}),
		"Seal":              l.Seal(time.Now(), Entry{Kind: 2}),
		"Sync":              l.Sync(),
		"Next":              func() error { _, err := r.Next(t.Context()); return err }(),
		"TryNext":           func() error { _, _, err := r.TryNext(); return err }(),
		"a new Reader":      func() error { _, _, err := l.NewReader(0).TryNext(); return err }(),
		"ReadStream":        func() error { _, err := l.ReadStream(Stdout, 0, make([]byte, 1)); return err }(),
		"Append of nothing": l.Append(time.Now()),
	} {
		if !errors.Is(err, ErrClosed) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if l.Sequence() != 5 {
		t.Errorf("sequence %d", l.Sequence())
	}
	if n := openFiles(t, l.dir); n != 0 {
		t.Errorf("%d files are open", n)
	}
}

func TestRemove(t *testing.T) {
	l := newLog(t, Config{SegmentBytes: 8 << 10})
	fill(t, l, 50)
	r := l.NewReader(0)
	defer r.Close()
	var x expected
	rec, _, err := r.TryNext()
	if err != nil {
		t.Fatal(err)
	}
	x.check(t, rec)
	for range 2 {
		if err := Remove(l.dir); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := os.Stat(l.dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("directory: %v", err)
	}
	// The reader goes on in the file it holds and is told what it cannot read then.
	for x.sequence < 50 {
		rec, ok, err := r.TryNext()
		if !ok || err != nil {
			t.Fatal(ok, err)
		}
		x.check(t, rec)
		if rec.Gap != nil && rec.Gap.Reason != GapDamaged {
			t.Errorf("gap %+v", rec.Gap)
		}
	}
	if _, err := l.ReadStream(Stdout, 0, make([]byte, 1)); !errors.As(err, new(*DroppedError)) {
		t.Errorf("ReadStream: %v", err)
	}

	t.Run("other files", func(t *testing.T) {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, "x"), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := Remove(dir); err == nil {
			t.Error("they were removed")
		}
	})
}

// TestDescriptors: thousands of finished logs may be open.
func TestDescriptors(t *testing.T) {
	l := newLog(t, Config{SegmentBytes: 8 << 10})
	fill(t, l, 50)
	l.writer.writeback.group.Wait() // it has the segment before for a moment
	if n := openFiles(t, l.dir); n != 1 {
		t.Errorf("%d files are open while appending, want 1", n)
	}
	l = reopen(t, l)
	if n := openFiles(t, l.dir); n != 0 {
		t.Errorf("%d files are open after Open", n)
	}
	var readers []*Reader
	for range 3 {
		readers = append(readers, l.NewReader(0))
	}
	for range 49 {
		for _, r := range readers {
			if _, ok, err := r.TryNext(); !ok || err != nil {
				t.Fatal(ok, err)
			}
		}
		if n := openFiles(t, l.dir); n > 3 {
			t.Fatalf("%d files are open with 3 readers", n)
		}
	}
	if err := l.Seal(time.Now(), entryOf(51)); err != nil {
		t.Fatal(err)
	}
	for _, r := range readers {
		for {
			if _, _, err := r.TryNext(); errors.Is(err, io.EOF) {
				break
			} else if err != nil {
				t.Fatal(err)
			}
		}
	}
	if n := openFiles(t, l.dir); n != 0 {
		t.Errorf("%d files are open after the end", n)
	}
}

// TestHeaderCutOffBeforeZero: what is missing of a header is not zero.
func TestHeaderCutOffBeforeZero(t *testing.T) {
	var e epoch
	header := encodeSegmentHeader(e, tally{})
	for n := uint32(0); header[segmentHeaderSize-1] != 0; n++ {
		binary.LittleEndian.PutUint32(e[:], n)
		header = encodeSegmentHeader(e, tally{})
	}
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, segmentName(1)), header[:segmentHeaderSize-1], 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(Config{Dir: dir}); !errors.Is(err, ErrNoLog) {
		t.Errorf("%v", err)
	}
}

func TestNames(t *testing.T) {
	for _, base := range []uint64{1, 2, 1 << 40, math.MaxUint64} {
		name := segmentName(base)
		if got, ok := parseSegmentName(name); !ok || got != base || len(name) != 24 {
			t.Errorf("%q is %d %v, want %d", name, got, ok, base)
		}
	}
	for _, name := range []string{"", ".seg", "1.seg", segmentName(0), strings.Repeat("9", 20) + ".seg",
		"+000000000000000001.seg", segmentName(1) + "~"} {
		if base, ok := parseSegmentName(name); ok {
			t.Errorf("%q is %d", name, base)
		}
	}
}
