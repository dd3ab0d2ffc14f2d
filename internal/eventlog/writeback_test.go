package eventlog

import (
	"os"
	"testing"
	"time"
)

// TestWriteback: a complete segment gets to the disk without anybody waiting for it.
func TestWriteback(t *testing.T) {
	l := newLog(t, Config{SegmentBytes: 256 << 10})
	fill(t, l, 20)
	if dirtyPages(t, l.active().path) == 0 {
		t.Skip("this file system has no dirty pages")
	}
	for len(l.segments) < 2 {
		fill(t, l, 1)
	}
	l.writer.writeback.group.Wait()
	deadline := time.Now().Add(20 * time.Second) // the kernel itself begins after 30 s
	for dirtyPages(t, l.segments[0].path) > 0 {
		if time.Now().After(deadline) {
			t.Fatal("the complete segment is not on the disk")
		}
		time.Sleep(time.Millisecond)
	}
	if err := l.Seal(timeOf(l.Sequence()+1), entryOf(l.Sequence()+1)); err != nil {
		t.Fatal(err)
	}
	readAll(t, l, 0)
	readAll(t, reopen(t, l), 0)
}

// TestWritebackSparesTheDisk: what retention may drop soon is not written for nothing.
func TestWritebackSparesTheDisk(t *testing.T) {
	l := newLog(t, Config{SegmentBytes: 32 << 10, RetainedBytes: 512 << 10})
	early, late := 0, 0
	for range 100 {
		fill(t, l, 10)
		if l.willStay() {
			early++
			if l.size > 256<<10 {
				t.Fatalf("a log of %d bytes is written early", l.size)
			}
		} else {
			late++
		}
	}
	if early == 0 || late == 0 || l.size < 256<<10 {
		t.Errorf("%d early, %d late, %d bytes", early, late, l.size)
	}
	if l := newLog(t, Config{SegmentBytes: 32 << 10}); !l.willStay() {
		t.Error("what is kept for ever will not stay")
	}
}

// TestWritebackBusy: a slow disk makes nobody wait and holds no more than one file.
func TestWritebackBusy(t *testing.T) {
	l := newLog(t, Config{SegmentBytes: 32 << 10})
	l.writer.writeback.busy.Store(true) // as if the disk stood still
	for len(l.segments) < 10 {
		fill(t, l, 5)
	}
	if n := openFiles(t, l.dir); n != 1 {
		t.Errorf("%d files are open", n)
	}
	l.writer.writeback.busy.Store(false)
	for len(l.segments) < 20 {
		fill(t, l, 5)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if n := openFiles(t, l.dir); n != 0 {
		t.Errorf("%d files are open after Close", n)
	}
	if l.writer.writeback.busy.Load() {
		t.Error("something still runs after Close")
	}
}

// TestWritebackOfClosedFile: a failure changes nothing.
func TestWritebackOfClosedFile(t *testing.T) {
	file, err := os.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	var w writeback
	w.begin(file) // a directory cannot be written back
	w.group.Wait()
	if w.busy.Load() {
		t.Error("still busy")
	}
}
