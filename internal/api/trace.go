package api

import (
	"context"

	"go.opentelemetry.io/otel/propagation"
	"google.golang.org/grpc/metadata"
)

// traceHeader is the W3C's name for the trace context, in headers and carriers.
const traceHeader = "traceparent"

// traceparent is the trace context that a command is started in: the span of its RPC
// where that is traced, else what the caller sent; "" if that is none or not well formed.
func traceparent(ctx context.Context) string {
	var w3c propagation.TraceContext
	carrier := propagation.MapCarrier{}
	if w3c.Inject(ctx, carrier); carrier[traceHeader] == "" {
		if sent := metadata.ValueFromIncomingContext(ctx, traceHeader); len(sent) == 1 {
			w3c.Inject(w3c.Extract(ctx, propagation.MapCarrier{traceHeader: sent[0]}), carrier)
		}
	}
	return carrier[traceHeader]
}
