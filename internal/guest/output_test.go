package guest

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
	"github.com/harvest-run/executord/internal/guest/wire"
	"github.com/harvest-run/executord/internal/guestclient"
	"golang.org/x/sys/unix"
)

// TestWholePipeOfInstantCommand ends a command while its pipes are full.
func TestWholePipeOfInstantCommand(t *testing.T) {
	overTrees(t, func(t *testing.T, g *guestProcess) {
		for i := range 20 {
			o := g.run(g.sh(fmt.Sprint("full-", i), "head -c 65536 /dev/zero | tr '\\0' o; head -c 65536 /dev/zero | tr '\\0' e >&2"))
			wantCode(t, o, 0)
			if !bytes.Equal(o.stdout, bytes.Repeat([]byte("o"), 64<<10)) || !bytes.Equal(o.stderr, bytes.Repeat([]byte("e"), 64<<10)) {
				t.Fatalf("got %d and %d bytes of 65536", len(o.stdout), len(o.stderr))
			}
		}
	})
}

func TestStreamsAreExact(t *testing.T) {
	overTrees(t, func(t *testing.T, g *guestProcess) {
		const size = 3 << 20
		o := g.run(g.program("random", "random", "5", strconv.Itoa(size)))
		wantCode(t, o, 0)
		if !bytes.Equal(o.stdout, randomBytes(5, size)) || !bytes.Equal(o.stderr, randomBytes(6, size)) {
			t.Errorf("%d and %d bytes that are not those written", len(o.stdout), len(o.stderr))
		}
	})
}

func TestOrderOfStreams(t *testing.T) {
	g := startDaemon(t, "proc")
	fifo := filepath.Join(g.dir, "turn")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	turn, err := os.OpenFile(fifo, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer turn.Close()
	const n = 60
	g.start(g.program("order", "alternate", fifo, strconv.Itoa(n)))
	live := &output{}
	for i := range n {
		if _, err := turn.Write([]byte{1}); err != nil {
			t.Fatal(err)
		}
		// The next is written when this one was seen, without giving anything up.
		for seen := int64(0); seen <= int64(i); {
			out, err := g.Read(t.Context(), "order", 0, 1<<20, 20*time.Second)
			if err != nil {
				t.Fatal(err)
			}
			live = &output{}
			live.add(out)
			seen = live.size
			out.Release()
		}
	}
	o := g.readAll("order", &output{})
	if len(o.order) != n {
		t.Fatalf("%d chunks, want %d", len(o.order), n)
	}
	for i, s := range o.order {
		if s != guestv1.Stream(1+i%2) {
			t.Fatalf("order of the streams: %v", o.order)
		}
	}
	g.release("order")
}

func TestPacketsAreWhole(t *testing.T) {
	g := startDaemon(t, "proc")
	o := g.run(g.program("packets", "packets", "2000"))
	wantCode(t, o, 0)
	var want []byte
	for i := range 2000 {
		want = append(want, bytes.Repeat([]byte{byte(i)}, 1+(i*997)%4096)...)
	}
	if !bytes.Equal(o.stdout, want) {
		t.Errorf("%d bytes, want %d", len(o.stdout), len(want))
	}
}

// rss is the resident memory of a process.
func rss(t *testing.T, pid int) int {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	_, after, _ := strings.Cut(string(text), "VmRSS:")
	kib, err := strconv.Atoi(strings.Fields(after)[0])
	if err != nil {
		t.Fatal(err)
	}
	return kib << 10
}

func TestFloodInFlatMemory(t *testing.T) {
	g := startDaemon(t, "proc")
	const size = 200 << 20
	g.start(g.sh("flood", fmt.Sprintf("head -c %d /dev/zero", size)))
	total, early, most := int64(0), 0, 0
	for n := 0; ; n++ {
		out, err := g.Read(t.Context(), "flood", total, 256<<10, 20*time.Second)
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range out.Chunks {
			if total += int64(len(c.Data)); bytes.Count(c.Data, []byte{0}) != len(c.Data) {
				t.Fatal("bytes that were not written")
			}
		}
		exit := out.Exit
		out.Release()
		if n%16 == 0 {
			if most = max(most, rss(t, g.pid)); total < size/4 {
				early = most
			}
		}
		if exit != nil {
			break
		}
	}
	if total != size {
		t.Errorf("%d bytes, want %d", total, size)
	}
	if most > 2*early {
		t.Errorf("resident memory grew from %d to %d bytes", early, most)
	}
	g.release("flood")
}

// taken is how many bytes a program "progress" got rid of.
func taken(file string) int {
	text, err := os.ReadFile(file)
	if err != nil || len(text) < 8 {
		return 0
	}
	return int(binary.LittleEndian.Uint64(text))
}

// TestSlowReader stops reading for a while.
func TestSlowReader(t *testing.T) {
	overTrees(t, func(t *testing.T, g *guestProcess) {
		const size = 8 << 20
		file := filepath.Join(g.dir, "progress")
		g.start(g.program("slow", "progress", file, strconv.Itoa(size)))
		taken := func() int { return taken(file) }
		stand := func() int { // where the program comes to a stand
			for last := -1; ; time.Sleep(200 * time.Millisecond) {
				now := taken()
				if now == last && now > 0 {
					return now
				}
				last = now
			}
		}
		before := rss(t, g.pid)
		at := stand()
		if bound := spoolBytes + largePipe + 2*largestBlock; at < spoolBytes || at > bound {
			t.Errorf("a program that nobody reads wrote %d bytes, want %d to %d", at, spoolBytes, bound)
		}
		if now := rss(t, g.pid); now > before+8*spoolBytes {
			t.Errorf("resident memory grew from %d to %d bytes", before, now)
		}
		o := &output{}
		g.read("slow", o)
		g.read("slow", o) // gives up the first piece: the program goes on and stands again
		if next := stand(); next <= at || next > at+2*256<<10+largePipe {
			t.Errorf("after %d bytes were read it went on from %d to %d", o.size, at, next)
		}
		g.readAll("slow", o)
		if !bytes.Equal(o.stdout, randomBytes(0, size)) {
			t.Errorf("%d bytes that are not those written", len(o.stdout))
		}
		g.release("slow")
	})
}

// TestSingleBytes writes what costs most to keep: single bytes, to one stream after
// the other.
func TestSingleBytes(t *testing.T) {
	g := startDaemon(t, "proc")
	const n = 200_000
	wantCode(t, g.run(g.request("first", "/bin/true")), 0)
	before := rss(t, g.pid)
	g.start(g.program("single", "single", strconv.Itoa(n)))
	time.Sleep(300 * time.Millisecond) // until it is full, more or less
	most := 0
	o := &output{}
	for o.exit == nil {
		g.read("single", o)
		most = max(most, rss(t, g.pid))
	}
	if most > before+32*spoolBytes {
		t.Errorf("resident memory grew from %d to %d bytes", before, most)
	}
	for i, data := range [][]byte{o.stdout, o.stderr} {
		if len(data) != n/2 {
			t.Fatalf("stream %d has %d bytes, want %d", i+1, len(data), n/2)
		}
		for j, b := range data {
			if b != byte(2*j+i) {
				t.Fatalf("byte %d of stream %d is %d", j, i+1, b)
			}
		}
	}
	g.release("single")
}

func TestPositions(t *testing.T) {
	g := startDaemon(t, "proc")
	g.start(g.sh("x", "printf 0123456789; printf abcdef >&2; sleep 60"))
	o := &output{}
	for o.size < 16 {
		out, err := g.Read(t.Context(), "x", 0, 100, 10*time.Second)
		if err != nil {
			t.Fatal(err)
		}
		o = &output{}
		o.add(out)
		out.Release()
	}
	read := func(position int64, n int) (string, error) {
		out, err := g.Read(t.Context(), "x", position, n, time.Millisecond)
		if err != nil {
			return "", err
		}
		defer out.Release()
		var text strings.Builder
		for _, c := range out.Chunks {
			fmt.Fprintf(&text, "%d:%s ", c.Stream, c.Data)
		}
		return text.String(), nil
	}
	// In one order or the other, as the guest saw it.
	swapped := o.order[0] == guestv1.Stream_STREAM_STDERR
	for _, c := range []struct {
		position      int64
		n             int
		want, swapped string
		refused       bool
	}{
		{position: 0, n: 100, want: "1:0123456789 2:abcdef ", swapped: "2:abcdef 1:0123456789 "},
		{position: 0, n: 100, want: "1:0123456789 2:abcdef ", swapped: "2:abcdef 1:0123456789 "},
		{position: 0, n: 12, want: "1:0123456789 2:ab ", swapped: "2:abcdef 1:012345 "},
		{position: 4, n: 100, want: "1:456789 2:abcdef ", swapped: "2:ef 1:0123456789 "},
		{position: 4, n: 1, want: "1:4 ", swapped: "2:e "},
		{position: 3, n: 100, refused: true},
		{position: 0, n: 100, refused: true},
		{position: 17, n: 100, refused: true},
		{position: 1 << 62, n: 100, refused: true},
		{position: 16, n: 100},
		{position: 15, n: 100, refused: true},
		{position: 16, n: 100},
	} {
		want := c.want
		if swapped {
			want = c.swapped
		}
		got, err := read(c.position, c.n)
		if got != want || (guestclient.KindOf(err) == guestv1.Error_KIND_INVALID) != c.refused || (err != nil) != c.refused {
			t.Errorf("read %d at %d: %q, %v; want %q, refused %v", c.n, c.position, got, err, want, c.refused)
		}
	}
	g.stop("x", 0)
	end, err := g.Read(t.Context(), "x", 16, 100, 10*time.Second)
	if err != nil || end.Exit == nil || len(end.Chunks) > 0 {
		t.Errorf("the end: %v, %v", end, err)
	}
	g.release("x")
}

// TestReadWaits compares a read for which something comes, one for which nothing
// comes in time, and one that is not to wait.
func TestReadWaits(t *testing.T) {
	g := startDaemon(t, "proc")
	fifo := filepath.Join(g.dir, "go")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	g.start(g.sh("x", "read line < go; echo $line"))
	timed := func(wait time.Duration) (int, time.Duration) {
		begun := time.Now()
		out, err := g.Read(t.Context(), "x", 0, 100, wait)
		if err != nil {
			t.Fatal(err)
		}
		defer out.Release()
		if out.Exit != nil {
			t.Error("it ended")
		}
		return len(out.Chunks), time.Since(begun)
	}
	if n, took := timed(300 * time.Millisecond); n != 0 || took < 290*time.Millisecond {
		t.Errorf("nothing was there, and %d chunks came after %v", n, took)
	}
	if n, took := timed(0); n != 0 || took > 10*time.Second {
		t.Errorf("not to wait, and %d chunks came after %v", n, took)
	}
	answered := make(chan time.Duration)
	var reads sync.WaitGroup
	defer reads.Wait()
	reads.Go(func() {
		_, took := timed(50 * time.Second)
		answered <- took
	})
	if err := os.WriteFile(fifo, []byte("hello\n"), 0); err != nil {
		t.Fatal(err)
	}
	if took := <-answered; took > 25*time.Second {
		t.Errorf("what came was told after %v", took)
	}
	g.readAll("x", &output{})
	g.release("x")
}

// breakingDialer opens pipes that break after a number of bytes from the guest.
type breakingDialer struct {
	guestclient.Dialer
	dialled atomic.Int64
	after   func(n int64) int
}

func (d *breakingDialer) Dial(ctx context.Context) (net.Conn, error) {
	conn, err := d.Dialer.Dial(ctx)
	if err != nil {
		return nil, err
	}
	return &breakingConn{Conn: conn, left: d.after(d.dialled.Add(1))}, nil
}

type breakingConn struct {
	net.Conn
	left int // used by the reader alone
}

func (c *breakingConn) Read(p []byte) (int, error) {
	if c.left <= 0 {
		c.Conn.Close()
		return 0, errors.New("the pipe broke")
	}
	n, err := c.Conn.Read(p[:min(len(p), c.left)])
	c.left -= n
	return n, err
}

// TestLostPipes reads over pipes that break in the middle of answers.
func TestLostPipes(t *testing.T) {
	overTrees(t, func(t *testing.T, g *guestProcess) {
		const size = 4 << 20
		breaking := &breakingDialer{Dialer: g, after: func(n int64) int {
			if n%3 == 0 {
				return 5 // in the header of the first answer
			}
			return int(n * 7919 % (400 << 10))
		}}
		c := guestclient.New(breaking)
		defer c.Close()
		if _, err := c.Start(t.Context(), g.program("x", "random", "9", strconv.Itoa(size))); err != nil {
			t.Fatal(err)
		}
		o := &output{}
		failed := 0
		for o.exit == nil {
			out, err := c.Read(t.Context(), g.full("x"), o.size, 128<<10, 20*time.Second)
			if err != nil {
				if failed++; failed > 1000 || guestclient.KindOf(err) != guestv1.Error_KIND_UNSPECIFIED {
					t.Fatal(err)
				}
				continue // a few breaks in a row: whoever reads goes on
			}
			o.add(out)
			out.Release()
		}
		if !bytes.Equal(o.stdout, randomBytes(9, size)) || !bytes.Equal(o.stderr, randomBytes(10, size)) {
			t.Errorf("%d and %d bytes that are not those written", len(o.stdout), len(o.stderr))
		}
		if breaking.dialled.Load() < 10 {
			t.Errorf("only %d pipes were lost", breaking.dialled.Load())
		}
		g.release("x")
	})
}

// TestPipeClosedWhileReadsWait leaves long reads behind; the end of the guest, which
// waits for them, must not come late.
func TestPipeClosedWhileReadsWait(t *testing.T) {
	g := startDaemon(t, "proc")
	g.start(g.sh("x", "sleep 60"))
	for range 3 {
		conn, err := g.Dial(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for id := range uint64(100) {
			read := &guestv1.ReadRequest{Execution: g.full("x"), MaxBytes: 100, WaitMs: 60_000}
			if err := wire.Write(conn, &guestv1.Request{Id: id, Call: &guestv1.Request_Read{Read: read}}); err != nil {
				t.Fatal(err)
			}
		}
		time.Sleep(10 * time.Millisecond)
		conn.Close()
	}
	g.stop("x", 0)
	g.readAll("x", &output{})
	g.release("x")
}

// TestUnreadPipe asks for much over one pipe and reads no answer; other pipes do not
// suffer.
func TestUnreadPipe(t *testing.T) {
	g := startDaemon(t, "proc")
	g.start(g.sh("x", "head -c 900000 /dev/zero; sleep 60"))
	conn, err := g.Dial(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	for id := range uint64(50) {
		read := &guestv1.ReadRequest{Execution: g.full("x"), MaxBytes: 1 << 20, WaitMs: 1000}
		if err := wire.Write(conn, &guestv1.Request{Id: id, Call: &guestv1.Request_Read{Read: read}}); err != nil {
			t.Fatal(err)
		}
	}
	o := &output{}
	for o.size < 900000 {
		g.read("x", o)
	}
	g.stop("x", 0)
	g.readAll("x", o)
	g.release("x")
	wantCode(t, g.run(g.request("y", "/bin/true")), 0)
}
