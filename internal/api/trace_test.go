package api

import (
	"context"
	"testing"

	"go.opentelemetry.io/otel/trace"
	"google.golang.org/grpc/metadata"
)

func TestTraceparent(t *testing.T) {
	const sent = "00-0102030405060708090a0b0c0d0e0f10-0102030405060708-01"
	incoming := func(values ...string) context.Context {
		md := metadata.MD{}
		md.Append("traceparent", values...)
		return metadata.NewIncomingContext(t.Context(), md)
	}
	own := trace.ContextWithSpanContext(incoming(sent), trace.NewSpanContext(trace.SpanContextConfig{
		TraceID: trace.TraceID{9}, SpanID: trace.SpanID{8}, TraceFlags: trace.FlagsSampled,
	}))
	for name, test := range map[string]struct {
		ctx  context.Context
		want string
	}{
		"nothing":         {t.Context(), ""},
		"sent":            {incoming(sent), sent},
		"malformed":       {incoming("00-xyz"), ""},
		"all zero":        {incoming("00-00000000000000000000000000000000-0000000000000000-00"), ""},
		"sent twice":      {incoming(sent, sent), ""},
		"our own span":    {own, "00-09000000000000000000000000000000-0800000000000000-01"},
		"with a line end": {incoming(sent + "\nX=1"), ""},
	} {
		t.Run(name, func(t *testing.T) {
			if got := traceparent(test.ctx); got != test.want {
				t.Errorf("%q, want %q", got, test.want)
			}
		})
	}
}
