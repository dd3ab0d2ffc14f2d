package guest

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"strconv"
	"sync"
	"time"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
	"golang.org/x/sys/unix"
)

const (
	// maxConnections bounds the pipes that are connections to servers in the sandbox.
	maxConnections = 1024
	// connectPatience bounds how long a server that is too busy to take a connection is
	// waited for.
	connectPatience = 30 * time.Second
)

// connections lets pipes become connections to servers in the sandbox.
type connections struct{ open chan struct{} } // has room for those that are

func newConnections() connections { return connections{make(chan struct{}, maxConnections)} }

// serve makes a pipe a connection to a port. Its caller closes the pipe.
func (c *connections) serve(port uint32, id uint64, pipe io.ReadWriteCloser, buffered *bufio.Reader, only bool, out *answerer) {
	err := func() error {
		switch {
		case !only:
			return refuse(guestv1.Error_KIND_INVALID, "connect is not the first request of its pipe")
		case port == 0 || port > 65535:
			return refuse(guestv1.Error_KIND_INVALID, "port %d", port)
		}
		select {
		case c.open <- struct{}{}:
			return nil
		default:
			return refuse(guestv1.Error_KIND_EXHAUSTED, "%d connections are open already", maxConnections)
		}
	}()
	if err != nil {
		_ = out.refuse(id, err) // a pipe that is broken ends in any case
		return
	}
	defer func() { <-c.open }()
	var work sync.WaitGroup
	defer work.Wait()
	defer pipe.Close()
	// executord sends nothing before the answer, so what is seen of the pipe until then
	// can only be its end, at which nobody waits for the server any more.
	ctx, giveUp := context.WithTimeoutCause(context.Background(), connectPatience, errors.New("the server does not take the connection"))
	defer giveUp()
	seen := make(chan error, 1)
	work.Go(func() {
		_, err := buffered.Peek(1)
		seen <- err
		giveUp()
	})
	conn, err := dialLoopback(ctx, port)
	if err != nil {
		_ = out.refuse(id, err)
		return
	}
	defer func() { _ = conn.Close() }() // what was sent has been sent
	if ctx.Err() != nil || out.write(&guestv1.Response{Id: id, Answer: &guestv1.Response_Connect{Connect: &guestv1.ConnectResponse{}}}) != nil {
		reset(conn)
		return
	}
	join(pipe, buffered, conn, seen)
}

// dialLoopback connects to a port of the loopback. A server that listens at "localhost"
// may have only one of its two addresses.
func dialLoopback(ctx context.Context, port uint32) (*net.TCPConn, error) {
	var first error
	for _, host := range []string{"127.0.0.1", "::1"} {
		conn, err := new(net.Dialer).DialContext(ctx, "tcp", net.JoinHostPort(host, strconv.Itoa(int(port))))
		if err == nil {
			return conn.(*net.TCPConn), nil
		}
		if first == nil {
			first = err
		}
		if !errors.Is(err, unix.ECONNREFUSED) {
			break
		}
	}
	if errors.Is(first, unix.ECONNREFUSED) {
		return nil, refuse(guestv1.Error_KIND_NOT_FOUND, "nobody listens on port %d", port)
	}
	return nil, resourceError(first)
}
