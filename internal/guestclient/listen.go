package guestclient

import (
	"context"
	"fmt"
	"net"
	"time"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
	"github.com/harvest-run/executord/internal/guest/wire"
)

// Listen makes a listener on the sandbox's loopback, or joins the one of this name,
// and returns its port. port 0 takes any free one.
func (c *Client) Listen(ctx context.Context, name string, port uint16) (uint16, error) {
	r := &guestv1.ListenRequest{Name: name, Port: uint32(port)}
	resp, err := c.ask(ctx, &guestv1.Request{Call: &guestv1.Request_Listen{Listen: r}})
	if err != nil {
		return 0, err
	}
	got := resp.GetListen().GetPort()
	if got == 0 || got > 65535 {
		return 0, errWrongAnswer
	}
	return uint16(got), nil
}

// Accept dials a guest and waits for the next connection to a listener in its
// sandbox, for as long as ctx allows. What it returns is that connection: bytes both
// ways as the program in the sandbox sends and reads them, none of them read ahead.
func Accept(ctx context.Context, d Dialer, listener string) (net.Conn, error) {
	r := &guestv1.Request{Call: &guestv1.Request_Accept{Accept: &guestv1.AcceptRequest{Listener: listener}}}
	return become(ctx, d, r, func(resp *guestv1.Response) bool { return resp.GetAccept() != nil })
}

// Connect dials a guest and has it connect to a port of its sandbox's loopback. What it
// returns is that connection: bytes both ways as the server in the sandbox sends and
// reads them. An Error of KIND_NOT_FOUND means that nobody listens there. Where the pipe
// can do it, as CloseWrite, the directions end one by one.
func Connect(ctx context.Context, d Dialer, port uint16) (net.Conn, error) {
	r := &guestv1.Request{Call: &guestv1.Request_Connect{Connect: &guestv1.ConnectRequest{Port: uint32(port)}}}
	return become(ctx, d, r, func(resp *guestv1.Response) bool { return resp.GetConnect() != nil })
}

// become dials a guest and sends the only request that the pipe ever carries: from its
// answer on it is a connection of the sandbox's.
func become(ctx context.Context, d Dialer, r *guestv1.Request, answers func(*guestv1.Response) bool) (_ net.Conn, err error) {
	conn, err := d.Dial(ctx)
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer func() {
		if !stop() && err == nil {
			err = context.Cause(ctx) // the deadline is set, or about to be
		}
		if err != nil {
			conn.Close()
		}
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
	}()
	const id = 1
	r.Id = id
	if err := wire.Write(conn, r); err != nil {
		return nil, fmt.Errorf("ask the guest for a connection: %w", err)
	}
	// Not buffered: what comes after the frame is the connection's.
	resp := new(guestv1.Response)
	payload, err := (&wire.Reader{R: conn, Limit: wire.MaxAnswer}).Read(resp)
	switch {
	case err != nil:
		return nil, fmt.Errorf("wait for a connection from the guest: %w", noEOF(err))
	case resp.GetError() != nil:
		return nil, errorOf(resp.GetError())
	case resp.GetId() != id || !answers(resp) || payload != 0:
		return nil, errWrongAnswer
	}
	return conn, nil
}
