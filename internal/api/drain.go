package api

import (
	"context"

	middleware "github.com/grpc-ecosystem/go-grpc-middleware/v2"
	"github.com/harvest-run/executord/internal/fault"
	"google.golang.org/grpc"
)

// drain ends the contexts of all RPCs when the server stops, with the fault that
// their clients get as the cause.
type drain struct {
	// follow has f called when the server stops; what it returns undoes that.
	follow func(f func()) (undo func() bool)
}

// scope derives the context of one RPC. end must be called when it has ended.
func (d *drain) scope(parent context.Context) (ctx context.Context, end func()) {
	ctx, cancel := context.WithCancelCause(parent)
	undo := d.follow(func() { cancel(errDraining()) })
	return ctx, func() {
		undo()
		cancel(context.Canceled)
	}
}

func (d *drain) unary(ctx context.Context, req any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
	ctx, end := d.scope(ctx)
	defer end()
	return next(ctx, req)
}

func (d *drain) stream(srv any, stream grpc.ServerStream, _ *grpc.StreamServerInfo, next grpc.StreamHandler) error {
	ctx, end := d.scope(stream.Context())
	defer end()
	scoped := middleware.WrapServerStream(stream)
	scoped.WrappedContext = ctx
	return next(srv, scoped)
}

// errDraining tells a client that it was cut off because the server stops.
func errDraining() error {
	e := fault.New(fault.Unavailable, "SERVER_DRAINING",
		"the server is stopping; nothing is lost: go on watching from the last cursor")
	e.RetryAfter = drainRetryAfter
	return e
}
