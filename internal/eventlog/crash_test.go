package eventlog

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// writeUntilKilled is what the child of TestKill does: it goes on with the log in dir,
// and tells descriptor 3 the sequence after each Append.
func writeUntilKilled(dir string) int {
	retained, _ := strconv.ParseInt(os.Getenv(childVariable+"_RETAINED"), 10, 64)
	cfg := Config{Dir: dir, RetainedBytes: retained, SegmentBytes: 48 << 10}
	l, err := Open(cfg)
	if errors.Is(err, ErrNoLog) {
		l, err = Create(cfg)
	}
	told := os.NewFile(3, "pipe")
	for err == nil {
		if err = appendNext(l, 1+int(l.Sequence()%40)); err == nil {
			_, err = told.Write(binary.LittleEndian.AppendUint64(nil, l.Sequence()))
		}
	}
	fmt.Fprintln(os.Stderr, err)
	return 1
}

// TestKill kills a writer with SIGKILL again and again. What it was told to be
// appended must be there, whatever else it was doing.
func TestKill(t *testing.T) {
	rounds := 25
	if testing.Short() {
		rounds = 5
	}
	for name, retained := range map[string]int64{"keeping everything": 0, "with retention": 400 << 10} {
		t.Run(name, func(t *testing.T) {
			cfg := Config{Dir: filepath.Join(t.TempDir(), "log"), RetainedBytes: retained, SegmentBytes: 48 << 10}
			random := randomFor(uint64(retained))
			var told, unfinished, untold int
			before := uint64(0)
			var x expected
			for range rounds {
				acknowledged := killWriter(t, cfg, random.IntN(40), time.Duration(random.IntN(1000))*time.Microsecond)
				l, err := Open(cfg)
				if errors.Is(err, ErrNoLog) && acknowledged == 0 && before == 0 {
					continue
				}
				if err != nil {
					t.Fatal(err)
				}
				if l.Sequence() < max(acknowledged, before) {
					t.Fatalf("sequence %d, but %d was acknowledged", l.Sequence(), max(acknowledged, before))
				}
				if acknowledged > 0 {
					told++
				}
				if l.Repaired() > 0 {
					unfinished++
				}
				if l.Sequence() > max(acknowledged, before) {
					untold++
				}
				x.checkTotals(t, l)
				gaps := readAll(t, l, before)
				if len(gaps) > 1 || len(gaps) > 0 && (retained == 0 || gaps[0].Gap.Reason != GapRetention) {
					t.Fatalf("gaps %+v", gaps)
				}
				before = l.Sequence()
				if err := l.Close(); err != nil {
					t.Fatal(err)
				}
			}
			if told == 0 {
				t.Error("no writer was killed while it wrote")
			}
			readAll(t, openLog(t, cfg), 0)
			t.Logf("%d records; %d of %d writers were killed after they told something, %d had appended more than told, %d left an unfinished write",
				before, told, rounds, untold, unfinished)
		})
	}
}

// killWriter runs a writer, kills it after so many Appends, or after a while if there
// are to be none, and returns the last sequence that it told.
func killWriter(t *testing.T, cfg Config, appends int, pause time.Duration) uint64 {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	cmd := exec.Command(os.Args[0])
	var stderr strings.Builder
	cmd.Env = append(os.Environ(), childVariable+"="+cfg.Dir, fmt.Sprintf("%s_RETAINED=%d", childVariable, cfg.RetainedBytes))
	cmd.ExtraFiles = []*os.File{w}
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	_ = w.Close()
	var last atomic.Uint64
	var wg sync.WaitGroup
	enough := make(chan struct{})
	wg.Go(func() {
		b := make([]byte, 8)
		n := 0
		for ; ; n++ {
			if n == appends {
				close(enough)
			}
			if _, err := io.ReadFull(r, b); err != nil {
				break
			}
			last.Store(binary.LittleEndian.Uint64(b))
		}
		if n < appends {
			close(enough) // it ended by itself
		}
	})
	<-enough
	if appends == 0 {
		pause *= 20 // it has to start, and may be killed while it opens the log
	}
	for now := time.Now(); time.Since(now) < pause; {
		// Sleeping would always end at the same places.
	}
	_ = cmd.Process.Kill()
	wg.Wait()
	err = cmd.Wait()
	if status, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); !ok || status.Signal() != syscall.SIGKILL {
		t.Fatalf("the writer ended by itself: %v %s", err, stderr.String())
	}
	return last.Load()
}

// TestDiskFull uses a file system that is small.
func TestDiskFull(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=600k"); err != nil {
		t.Skipf("mount: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	for _, segmentBytes := range []int64{96 << 10, 8 << 20, 20 << 10} {
		t.Run(fmt.Sprint(segmentBytes), func(t *testing.T) {
			filler := filepath.Join(dir, "filler")
			if err := os.WriteFile(filler, make([]byte, 200<<10), 0o600); err != nil {
				t.Fatal(err)
			}
			cfg := Config{Dir: filepath.Join(dir, "log"), SegmentBytes: segmentBytes}
			fillUp(t, cfg, unix.ENOSPC, func() {
				if err := os.Remove(filler); err != nil {
					t.Fatal(err)
				}
			})
			if err := Remove(cfg.Dir); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// TestFileTooLarge does the same without a right to mount. The limit is that of a
// process, so it needs one of its own.
func TestFileTooLarge(t *testing.T) {
	const variable = childVariable + "_LIMITED"
	if os.Getenv(variable) == "" {
		cmd := exec.Command(os.Args[0], "-test.run=^TestFileTooLarge$", "-test.v")
		cmd.Env = append(os.Environ(), variable+"=1")
		out, err := cmd.CombinedOutput()
		if err != nil || !strings.Contains(string(out), "--- PASS: TestFileTooLarge") {
			t.Errorf("%v\n%s", err, out)
		}
		return
	}
	signal.Ignore(unix.SIGXFSZ)
	limit := func(n uint64) {
		var now unix.Rlimit
		if err := unix.Getrlimit(unix.RLIMIT_FSIZE, &now); err != nil {
			t.Fatal(err)
		}
		now.Cur = min(n, now.Max)
		if err := unix.Setrlimit(unix.RLIMIT_FSIZE, &now); err != nil {
			t.Fatal(err)
		}
	}
	limit(70 << 10)
	fillUp(t, Config{Dir: filepath.Join(t.TempDir(), "log"), SegmentBytes: 200 << 10}, unix.EFBIG, func() { limit(1 << 62) })
}

// fillUp appends until there is no space, and goes on once there is.
func fillUp(t *testing.T, cfg Config, want error, makeSpace func()) {
	l := newLog(t, cfg)
	r := l.NewReader(0)
	defer r.Close()
	var x expected
	refused := 0
	for n := 0; refused < 40; n++ {
		before, size := l.tail, l.size
		batch := 1 + n%9
		switch err := appendNext(l, batch); {
		case err == nil:
			if l.Sequence() != before.sequence+uint64(batch) {
				t.Fatalf("sequence %d after %d", l.Sequence(), before.sequence)
			}
		case !errors.Is(err, want):
			t.Fatalf("got %v, want %v", err, want)
		default:
			refused++
			if err := l.Seal(timeOf(1), Entry{Kind: 2, Data: make([]byte, MaxData)}); !errors.Is(err, want) {
				t.Fatalf("Seal: got %v, want %v", err, want)
			}
			if l.tail != before || l.Sealed() || l.size < size || l.size > size+segmentHeaderSize {
				t.Fatalf("an Append that failed changed %+v, %d to %+v, %d", before, size, l.tail, l.size)
			}
		}
		for _, s := range l.segments {
			if got := files(t, l.dir)[filepath.Base(s.path)]; got != s.end {
				t.Fatalf("file of %d bytes, want %d", got, s.end)
			}
		}
		for {
			rec, ok, err := r.TryNext()
			if err != nil {
				t.Fatal(err)
			}
			if !ok {
				break
			}
			x.check(t, rec)
		}
		if x.sequence != l.Sequence() {
			t.Fatalf("a reader is at %d of %d", x.sequence, l.Sequence())
		}
	}
	if l.Sequence() == 0 {
		t.Fatal("there was no space at all")
	}
	again := func() {
		t.Helper()
		tail := l.tail
		l = reopen(t, l)
		if l.tail != tail || l.Repaired() != 0 {
			t.Fatalf("reopened: %+v, repaired %d; want %+v", l.tail, l.Repaired(), tail)
		}
		if gaps := readAll(t, l, 0); gaps != nil {
			t.Fatalf("gaps %+v", gaps)
		}
		new(expected).checkTotals(t, l)
	}
	sequence := l.Sequence()
	makeSpace()
	fill(t, l, 7)
	again()
	if err := l.Seal(timeOf(1), entryOf(l.Sequence()+1)); err != nil {
		t.Fatal(err)
	}
	again()
	if !l.Sealed() || l.Sequence() != sequence+8 {
		t.Errorf("sealed %v, sequence %d", l.Sealed(), l.Sequence())
	}
}
