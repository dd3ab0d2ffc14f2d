package eventlog_test

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/harvest-run/executord/internal/eventlog"
)

// TestTrim drops only what it is told to, and readers learn of it.
func TestTrim(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "log")
	cfg := eventlog.Config{Dir: dir, RetainedBytes: 1 << 20, DropNothing: true}
	l, err := eventlog.Create(cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { l.Close() }()
	piece := bytes.Repeat([]byte("x"), 31<<10)
	const records = 100
	for range records {
		if err := l.Append(time.Unix(1, 0), eventlog.Entry{Kind: eventlog.KindOutput, Stream: eventlog.Stdout, Data: piece}); err != nil {
			t.Fatal(err)
		}
	}
	if size := l.Size(); size != onDisk(t, dir) || size < records*int64(len(piece)) {
		t.Errorf("size %d, on the disk %d: something was dropped", size, onDisk(t, dir))
	}
	first := l.Trim(1<<20, 0)
	if first < 1 || first > 20 {
		t.Errorf("the first to go ends at record %d", first)
	}
	l.Trim(1<<20, first-1)
	if total, _ := l.Totals(); total.Dropped != 0 {
		t.Errorf("%d bytes dropped that nobody has read", total.Dropped)
	}
	// Up to record 20: whole segments of it, and nothing behind.
	if next := l.Trim(1<<20, 20); next <= 20 || next <= first {
		t.Errorf("the next to go ends at record %d", next)
	}
	total, _ := l.Totals()
	if n := total.Dropped / int64(len(piece)); n < 10 || n > 20 {
		t.Errorf("%d records dropped of 20 that were allowed", n)
	}
	// A log that is opened again goes on the same way.
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if l, err = eventlog.Open(cfg); err != nil {
		t.Fatal(err)
	}
	if err := l.Append(time.Unix(2, 0), eventlog.Entry{Kind: 2}); err != nil {
		t.Fatal(err)
	}
	if again, _ := l.Totals(); again.Dropped != total.Dropped {
		t.Errorf("dropped %d, then %d", total.Dropped, again.Dropped)
	}
	l.Trim(1<<20, records)
	if next := l.Trim(0, records+1); next != 0 {
		t.Errorf("the segment being written would go, up to record %d", next)
	}
	if size := l.Size(); size > 1<<20 || size != onDisk(t, dir) {
		t.Errorf("size %d, on the disk %d", size, onDisk(t, dir))
	}
	r := l.NewReader(0)
	defer r.Close()
	rec, _, err := r.TryNext()
	if err != nil || rec.Gap == nil || rec.Gap.Reason != eventlog.GapRetention {
		t.Errorf("%+v, %v", rec, err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	l.Trim(0, records) // too late, and harmless
	if _, _, err := r.TryNext(); !errors.Is(err, eventlog.ErrClosed) {
		t.Error(err)
	}
}

func onDisk(t *testing.T, dir string) (size int64) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		info, err := e.Info()
		if err != nil {
			t.Fatal(err)
		}
		size += info.Size()
	}
	return size
}
