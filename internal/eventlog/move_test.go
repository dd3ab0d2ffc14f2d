package eventlog

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"
)

func TestMovedLogIsTheSame(t *testing.T) {
	home := t.TempDir()
	l, err := Create(Config{Dir: filepath.Join(home, "spare")})
	if err != nil {
		t.Fatal(err)
	}
	epoch := l.Epoch()
	to := Config{Dir: filepath.Join(home, "own"), RetainedBytes: 1 << 20, SegmentBytes: 64 << 10}
	if err := l.Move(to); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(filepath.Join(home, "spare")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the old place: %v", err)
	}
	// More than one segment and more than is retained: bounds and names are the new ones.
	piece := make([]byte, 16<<10)
	for range 200 {
		if err := l.Append(time.Now(), Entry{Kind: KindOutput, Stream: Stdout, Data: piece}); err != nil {
			t.Fatal(err)
		}
	}
	stdout, _ := l.Totals()
	if stdout.Size != 200*int64(len(piece)) || stdout.Dropped == 0 {
		t.Errorf("totals %+v", stdout)
	}
	if err := l.Seal(time.Now(), Entry{Kind: KindOutput + 1}); err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	again, err := Open(to)
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	if again.Epoch() != epoch || again.Sequence() != 201 || !again.Sealed() {
		t.Errorf("epoch %s sequence %d sealed %v, want %s 201 true", again.Epoch(), again.Sequence(), again.Sealed(), epoch)
	}
}

func TestMoveIsRefused(t *testing.T) {
	home := t.TempDir()
	create := func(name string) *Log {
		t.Helper()
		l, err := Create(Config{Dir: filepath.Join(home, name)})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		return l
	}
	written := create("written")
	if err := written.Append(time.Now(), Entry{Kind: KindOutput, Stream: Stdout, Data: []byte("x")}); err != nil {
		t.Fatal(err)
	}
	if err := written.Move(Config{Dir: filepath.Join(home, "a")}); err == nil {
		t.Error("a log with records was moved under its readers")
	}
	closed := create("closed")
	closed.Close()
	if err := closed.Move(Config{Dir: filepath.Join(home, "b")}); !errors.Is(err, ErrClosed) {
		t.Errorf("closed: %v", err)
	}
	if err := create("unnamed").Move(Config{}); err == nil {
		t.Error("moved to nowhere")
	}
	// A failure leaves it where it was, and usable.
	taken := create("taken")
	stays := create("stays")
	if err := stays.Move(Config{Dir: taken.dir}); err == nil {
		t.Error("moved over another log")
	}
	if err := stays.Append(time.Now(), Entry{Kind: KindOutput, Stream: Stdout, Data: []byte("x")}); err != nil {
		t.Errorf("after a failed move: %v", err)
	}
	if _, err := os.Lstat(filepath.Join(home, "stays")); err != nil {
		t.Error(err)
	}
}
