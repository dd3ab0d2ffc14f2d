package enginetest

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/guestclient"
)

// connectCases are about connections to servers in a sandbox.
func connectCases() []testCase {
	return []testCase{
		{"a server on the loopback is reached", connectReaches},
		{"each direction of a connection ends by itself", connectHalves},
		{"many connections are open at a time", connectMany},
		{"nobody listens where nobody listens", connectNobody},
	}
}

// echo is a server that sends back what it gets, in the order of the connections.
const echo = `import socket, threading
def serve(c):
    try:
        while data := c.recv(1 << 16): c.sendall(data)
        c.shutdown(socket.SHUT_WR)
    except OSError: pass
    c.close()
l = socket.create_server(("127.0.0.1", 8123), backlog=300)
print("ready", flush=True)
while True: threading.Thread(target=serve, args=(l.accept()[0],), daemon=True).start()`

func (b *box) connect(port uint16) net.Conn {
	b.h.t.Helper()
	conn, err := guestclient.Connect(b.h.ctx(), b, port)
	if err != nil {
		b.h.t.Fatalf("connect to port %d of %s: %v", port, b.ID(), err)
	}
	b.h.t.Cleanup(func() { conn.Close() })
	_ = conn.SetDeadline(time.Now().Add(patience))
	return conn
}

// exchange sends data and its end, and returns all that comes.
func exchange(conn net.Conn, data []byte) ([]byte, error) {
	half, ok := conn.(interface{ CloseWrite() error })
	if !ok {
		return nil, fmt.Errorf("%T does not end one direction by itself", conn)
	}
	var (
		work    sync.WaitGroup
		sendErr error
	)
	work.Go(func() {
		if _, sendErr = conn.Write(data); sendErr == nil {
			sendErr = half.CloseWrite()
		}
	})
	got, err := io.ReadAll(conn)
	work.Wait()
	if err == nil {
		err = sendErr
	}
	return got, err
}

func connectReaches(t *testing.T, h *house) {
	b := h.create("connect", engine.Limits{})
	b.begin("serve", "python3", "-c", echo)
	b.wrote("serve", "ready\n")
	for _, size := range []int{0, 1, 10_000, 8 << 20} {
		data := make([]byte, size)
		for i := range data {
			data[i] = byte(i * 7 >> 3)
		}
		if got, err := exchange(b.connect(8123), data); err != nil || !bytes.Equal(got, data) {
			t.Errorf("%d bytes came back as %d, %v", size, len(got), err)
		}
	}
	// What is open does not hold up the commands.
	conn := b.connect(8123)
	if out := b.run("echo", "meanwhile"); !exited(out, 0) {
		t.Errorf("%v", out)
	}
	if got, err := exchange(conn, []byte("still")); err != nil || string(got) != "still" {
		t.Errorf("%q, %v", got, err)
	}
}

func connectHalves(t *testing.T, h *house) {
	b := h.create("connect", engine.Limits{})
	b.begin("serve", "python3", "-c", `import socket
l = socket.create_server(("127.0.0.1", 8124))
print("ready", flush=True)
c = l.accept()[0]
c.sendall(b"greeting"); c.shutdown(socket.SHUT_WR)
got = b""
while data := c.recv(1000): got += data
print("got", got.decode(), flush=True)`)
	b.wrote("serve", "ready\n")
	conn := b.connect(8124)
	if got, err := io.ReadAll(conn); err != nil || string(got) != "greeting" {
		t.Fatalf("%q, %v", got, err)
	}
	if _, err := conn.Write([]byte("a late answer")); err != nil {
		t.Fatal(err)
	}
	if _, err := exchange(conn, nil); err != nil {
		t.Error(err)
	}
	if out := b.finish("serve"); !exited(out, 0) || string(out.stdout) != "ready\ngot a late answer\n" {
		t.Errorf("%v", out)
	}
}

func connectMany(t *testing.T, h *house) {
	b := h.create("connect", engine.Limits{})
	b.begin("serve", "python3", "-c", echo)
	b.wrote("serve", "ready\n")
	const count = 100
	var work sync.WaitGroup
	for i := range count {
		work.Go(func() {
			conn, err := guestclient.Connect(h.ctx(), b, 8123)
			if err != nil {
				t.Error(err)
				return
			}
			defer conn.Close()
			_ = conn.SetDeadline(time.Now().Add(patience))
			data := bytes.Repeat([]byte{byte(i)}, 1000+i)
			if got, err := exchange(conn, data); err != nil || !bytes.Equal(got, data) {
				t.Errorf("connection %d: %d bytes came back as %d, %v", i, len(data), len(got), err)
			}
		})
	}
	work.Wait()
	b.answers()
}

func connectNobody(t *testing.T, h *house) {
	a, b := h.create("connect-a", engine.Limits{}), h.create("connect-b", engine.Limits{})
	a.begin("serve", "python3", "-c", echo)
	a.wrote("serve", "ready\n")
	// Neither a free port, nor one of another sandbox's.
	for _, port := range []uint16{1, 8123, 65535} {
		conn, err := guestclient.Connect(h.ctx(), b, port)
		if guestclient.KindOf(err) != guestv1.Error_KIND_NOT_FOUND {
			t.Errorf("port %d: %v, %v", port, conn, err)
		}
	}
	ctx, cancel := context.WithCancel(h.ctx())
	cancel()
	if conn, err := guestclient.Connect(ctx, a, 8123); err == nil {
		conn.Close()
		t.Error("connected for one who has gone")
	}
	b.answers()
}
