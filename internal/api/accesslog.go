package api

import (
	"context"
	"log/slog"
	"strings"
	"time"

	middleware "github.com/grpc-ecosystem/go-grpc-middleware/v2"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
)

// accessLog writes a line per RPC: method, code, reason, duration, peer, caller. It never
// looks at a payload or a credential.
type accessLog struct {
	logger *slog.Logger
}

// note is what is found out about a call further down.
type note struct{ caller string }

// noteKey finds in a context the note of its call.
type noteKey struct{}

// noteCaller notes who is calling.
func noteCaller(ctx context.Context, name string) {
	if n, ok := ctx.Value(noteKey{}).(*note); ok {
		n.caller = name
	}
}

func (a *accessLog) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
	start := time.Now()
	ctx = context.WithValue(ctx, noteKey{}, &note{})
	resp, err := next(ctx, req)
	a.write(ctx, info.FullMethod, start, err)
	return resp, err
}

func (a *accessLog) stream(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, next grpc.StreamHandler) error {
	start := time.Now()
	noted := middleware.WrapServerStream(stream)
	noted.WrappedContext = context.WithValue(stream.Context(), noteKey{}, &note{})
	err := next(srv, noted)
	a.write(noted.Context(), info.FullMethod, start, err)
	return err
}

func (a *accessLog) write(ctx context.Context, method string, start time.Time, err error) {
	st := status.Convert(err)
	level := slog.LevelInfo
	if strings.HasPrefix(method, "/grpc.") {
		// Health checks come every few seconds and say nothing.
		level = slog.LevelDebug
	}
	if st.Code() == codes.Internal {
		level = slog.LevelError
	}
	if !a.logger.Enabled(ctx, level) {
		return
	}
	attrs := []slog.Attr{
		slog.String("method", method),
		slog.String("code", st.Code().String()),
		slog.Duration("duration", time.Since(start)),
	}
	if p, ok := peer.FromContext(ctx); ok {
		attrs = append(attrs, slog.String("peer", p.Addr.String()))
	}
	if n, ok := ctx.Value(noteKey{}).(*note); ok && n.caller != "" {
		attrs = append(attrs, slog.String("caller", n.caller))
	}
	for _, detail := range st.Details() {
		if info, ok := detail.(*errdetails.ErrorInfo); ok {
			attrs = append(attrs, slog.String("reason", info.GetReason()))
		}
	}
	a.logger.LogAttrs(ctx, level, "rpc", attrs...)
}
