package eventlog

import (
	"errors"
	"io"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestSeal(t *testing.T) {
	last := func(l *Log) Entry { return entryOf(l.Sequence() + 1) }
	check := func(t *testing.T, l *Log, sequence uint64) {
		t.Helper()
		if !l.Sealed() || l.Sequence() != sequence {
			t.Errorf("sealed %v, sequence %d", l.Sealed(), l.Sequence())
		}
		if err := l.Append(time.Now(), last(l)); !errors.Is(err, ErrSealed) {
			t.Errorf("Append: %v", err)
		}
		if err := l.Seal(time.Now(), last(l)); !errors.Is(err, ErrSealed) {
			t.Errorf("Seal: %v", err)
		}
		if err := l.Sync(); err != nil {
			t.Errorf("Sync: %v", err)
		}
		readAll(t, l, 0)
		r := l.NewReader(sequence - 1)
		defer r.Close()
		if rec, err := r.Next(t.Context()); err != nil || rec.Sequence != sequence {
			t.Errorf("%+v %v", rec, err)
		}
		for range 2 {
			if _, err := r.Next(t.Context()); !errors.Is(err, io.EOF) {
				t.Errorf("at the end: %v", err)
			}
		}
		new(expected).checkTotals(t, l)
	}
	t.Run("small", func(t *testing.T) {
		l := newLog(t, Config{})
		fill(t, l, 3)
		if err := l.Seal(timeOf(4), last(l)); err != nil {
			t.Fatal(err)
		}
		check(t, l, 4)
		if n := len(files(t, l.dir)); n != 1 {
			t.Errorf("%d segments, want 1", n)
		}
		if n := openFiles(t, l.dir); n != 0 {
			t.Errorf("%d files are open", n)
		}
		check(t, reopen(t, l), 4)
	})
	t.Run("nothing else", func(t *testing.T) {
		l := newLog(t, Config{})
		if err := l.Seal(timeOf(1), last(l)); err != nil {
			t.Fatal(err)
		}
		check(t, reopen(t, l), 1)
	})
	t.Run("large", func(t *testing.T) {
		l := newLog(t, Config{RetainedBytes: 4 << 20})
		for l.active().end < 300<<10 {
			fill(t, l, 1)
		}
		sequence := l.Sequence() + 1
		if err := l.Seal(timeOf(sequence), last(l)); err != nil {
			t.Fatal(err)
		}
		check(t, l, sequence)
		if end := l.active().end; end > segmentHeaderSize+recordHeaderSize+MaxData {
			t.Errorf("Open must read %d bytes", end)
		}
		check(t, reopen(t, l), sequence)
	})
	t.Run("behind the last record", func(t *testing.T) {
		l := newLog(t, Config{})
		fill(t, l, 3)
		if err := l.Seal(timeOf(4), last(l)); err != nil {
			t.Fatal(err)
		}
		// Nothing can follow the last record.
		rest := encodeRecord(record{sequence: 5, kind: 2, data: []byte("more")})
		appendFile(t, l.active().path, rest)
		l = reopen(t, l)
		if l.Repaired() != int64(len(rest)) {
			t.Errorf("repaired %d", l.Repaired())
		}
		check(t, l, 4)
	})
	t.Run("the disk fails", func(t *testing.T) {
		l := newLog(t, Config{SegmentBytes: 16 << 10})
		fill(t, l, 50)
		// A segment that cannot be opened cannot be synced.
		path, moved := l.segments[1].path, t.TempDir()+"/moved"
		if err := os.Rename(path, moved); err != nil {
			t.Fatal(err)
		}
		r := l.NewReader(50)
		defer r.Close()
		if err := l.Seal(timeOf(51), last(l)); err == nil {
			t.Fatal("it was sealed")
		}
		if rec, ok, err := r.TryNext(); ok || err != nil || l.Sealed() || l.Sequence() != 50 {
			t.Errorf("%+v %v, sealed %v, sequence %d", rec, err, l.Sealed(), l.Sequence())
		}
		if err := os.Rename(moved, path); err != nil {
			t.Fatal(err)
		}
		fill(t, l, 1)
		if err := l.Seal(timeOf(52), last(l)); err != nil {
			t.Fatal(err)
		}
		check(t, l, 52)
		check(t, reopen(t, l), 52)
	})
}

// TestSync: after Sync and Seal, the kernel has nothing left to write.
func TestSync(t *testing.T) {
	l := newLog(t, Config{SegmentBytes: 64 << 10})
	fill(t, l, 60)
	l = reopen(t, l) // what an earlier process wrote must be synced too
	fill(t, l, 60)
	dirty := func() (n uint64) {
		for _, s := range l.segments {
			n += dirtyPages(t, s.path)
		}
		return n
	}
	if dirty() == 0 {
		t.Skip("this file system has no dirty pages")
	}
	if err := l.Sync(); err != nil {
		t.Fatal(err)
	}
	if n := dirty(); n != 0 {
		t.Errorf("%d pages are not on the disk after Sync", n)
	}
	fill(t, l, 1)
	if err := l.Sync(); err != nil {
		t.Fatal(err)
	}
	if n := dirty(); n != 0 {
		t.Errorf("%d pages are not on the disk after another Sync", n)
	}
	fill(t, l, 20)
	if err := l.Seal(timeOf(142), entryOf(142)); err != nil {
		t.Fatal(err)
	}
	if n := dirty(); n != 0 {
		t.Errorf("%d pages are not on the disk after Seal", n)
	}
}

// dirtyPages is how many pages of a file are not on the disk.
func dirtyPages(t *testing.T, path string) uint64 {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var stat unix.Cachestat_t
	if err := unix.Cachestat(uint(f.Fd()), &unix.CachestatRange{}, &stat, 0); err != nil {
		t.Skipf("cachestat: %v", err)
	}
	return stat.Dirty + stat.Writeback
}
