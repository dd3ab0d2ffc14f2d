package modal

import (
	"context"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
	"github.com/harvest-run/executord/internal/engine/modal/modaltest"
	"github.com/harvest-run/executord/internal/guestclient"
)

// server sends what it is asked for, or takes what comes and says how much that was.
const server = `import socket, threading
l = socket.create_server(("127.0.0.1", 9000))
print("ready", flush=True)
def serve(c):
    with c:
        if c.recv(1) == b"d":
            left = 64 << 20
            while left:
                left -= c.send(bytes(min(left, 1 << 20)))
        else:
            n = 0
            while True:
                b = c.recv(1 << 20)
                if not b: break
                n += len(b)
            c.sendall(str(n).encode())
while True:
    threading.Thread(target=serve, args=(l.accept()[0],)).start()`

// TestMeasure prints what the pipe to a sandbox of the fake gives, at the times that a
// provider may be away. It asserts nothing; the numbers are in docs/modal.md.
func TestMeasure(t *testing.T) {
	if os.Getenv("EXECUTORD_MEASURE") == "" {
		t.Skip("set EXECUTORD_MEASURE=1 to measure")
	}
	for _, trip := range []time.Duration{0, 20 * time.Millisecond, 100 * time.Millisecond} {
		h := newHouse(t, modaltest.Config{RoundTrip: trip}, nil)
		size := 64 << 20
		if trip > 50*time.Millisecond {
			size = 16 << 20
		}
		begun := time.Now()
		sb := h.create("measured")
		created := time.Since(begun)
		c := h.client(sb)
		begun = time.Now()
		h.run(c, "true")
		first := time.Since(begun)
		var infos, runs []time.Duration
		for range 15 {
			begun := time.Now()
			if _, err := c.Info(h.ctx()); err != nil {
				t.Fatal(err)
			}
			infos = append(infos, time.Since(begun))
			begun = time.Now()
			h.run(c, "true")
			runs = append(runs, time.Since(begun))
		}
		rate := func(bytes int, d time.Duration) string {
			return fmt.Sprintf("%.1f MB/s", float64(bytes)/1e6/d.Seconds())
		}
		begun = time.Now()
		total := 0
		_, err := c.RunStream(h.ctx(), command("head", "-c", strconv.Itoa(size), "/dev/zero"), func(_ guestv1.Stream, data []byte) error { total += len(data); return nil })
		if err != nil || total != size {
			t.Fatal(total, err)
		}
		output := rate(total, time.Since(begun))
		in := command("wc", "-c")
		in.Input = make([]byte, size/4)
		begun = time.Now()
		if out, err := c.Run(h.ctx(), in); err != nil || string(out.Stdout) != strconv.Itoa(size/4)+"\n" {
			t.Fatalf("%q %v", out.Stdout, err)
		}
		input := rate(size/4, time.Since(begun))

		serving, stop := context.WithCancelCause(h.Context())
		var servers sync.WaitGroup
		servers.Go(func() { _, _ = c.Run(serving, command("python3", "-c", server)) })
		connect := func() io.ReadWriteCloser {
			for {
				conn, err := guestclient.Connect(h.ctx(), sb, 9000)
				if err == nil {
					return conn
				}
				time.Sleep(20 * time.Millisecond)
			}
		}
		down := connect()
		begun = time.Now()
		_, _ = down.Write([]byte("d"))
		n, err := io.Copy(io.Discard, down)
		if err != nil || n != 64<<20 {
			t.Fatal(n, err)
		}
		received := rate(int(n), time.Since(begun))
		down.Close()
		up := connect()
		begun = time.Now()
		_, _ = up.Write([]byte("u"))
		if _, err := up.Write(make([]byte, 32<<20)); err != nil {
			t.Fatal(err)
		}
		_ = up.(interface{ CloseWrite() error }).CloseWrite()
		_, _ = io.ReadAll(up)
		sent := rate(32<<20, time.Since(begun))
		up.Close()
		median := func(d []time.Duration) time.Duration { slices.Sort(d); return d[len(d)/2].Round(10 * time.Microsecond) }
		fmt.Printf("round trip %v: create %v (cold image: the guest is delivered), first exec %v, request %v, exec %v, output %s, input %s, connection in %s, out %s\n",
			trip, created.Round(time.Millisecond), first.Round(100*time.Microsecond), median(infos), median(runs), output, input, sent, received)
		stop(nil)
		servers.Wait()
		if err := h.engine.Close(); err != nil {
			t.Error(err)
		}
	}
}
