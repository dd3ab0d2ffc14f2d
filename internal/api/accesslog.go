package api

import (
	"context"
	"log/slog"
	"strings"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
)

// accessLog writes a line per RPC: method, code, reason, duration, peer. It never
// looks at a payload.
type accessLog struct {
	logger *slog.Logger
}

func (a *accessLog) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
	start := time.Now()
	resp, err := next(ctx, req)
	a.write(ctx, info.FullMethod, start, err)
	return resp, err
}

func (a *accessLog) stream(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, next grpc.StreamHandler) error {
	start := time.Now()
	err := next(srv, stream)
	a.write(stream.Context(), info.FullMethod, start, err)
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
	for _, detail := range st.Details() {
		if info, ok := detail.(*errdetails.ErrorInfo); ok {
			attrs = append(attrs, slog.String("reason", info.GetReason()))
		}
	}
	a.logger.LogAttrs(ctx, level, "rpc", attrs...)
}
