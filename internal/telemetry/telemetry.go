// Package telemetry tells operators' systems what executord does: traces and metrics by
// OpenTelemetry, sent where the standard environment variables (OTEL_TRACES_EXPORTER,
// OTEL_METRICS_EXPORTER and those of the exporters) say, and nowhere by default. It
// knows the domain's types and is known only to the daemon. Its goroutines are those of
// the exporters; Close waits for them. No label holds an id or a text of a caller.
package telemetry

import (
	"context"
	"errors"
	"fmt"
	"os"

	"go.opentelemetry.io/contrib/exporters/autoexport"
	"go.opentelemetry.io/contrib/instrumentation/google.golang.org/grpc/otelgrpc"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
	metricnoop "go.opentelemetry.io/otel/metric/noop"
	"go.opentelemetry.io/otel/propagation"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/resource"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"
	tracenoop "go.opentelemetry.io/otel/trace/noop"
	"google.golang.org/grpc/stats"
)

// scope names what measures, in traces and metrics.
const scope = "github.com/harvest-run/executord"

// Config says who is measured.
type Config struct {
	// Version is executord's.
	Version string
	// Spans and Metrics replace what the environment names; for tests.
	Spans   sdktrace.SpanExporter
	Metrics sdkmetric.Reader
}

// Telemetry sends traces and metrics, or nothing.
type Telemetry struct {
	tracers trace.TracerProvider
	meters  metric.MeterProvider
	on      bool
	close   []func(context.Context) error
}

// New reads the environment. An exporter that it names and that does not exist is an
// error; one that cannot reach its receiver is not.
func New(ctx context.Context, cfg Config) (*Telemetry, error) {
	who, err := resource.Merge(resource.Default(), resource.NewSchemaless(
		attribute.String("service.name", "executord"), attribute.String("service.version", cfg.Version)))
	if err != nil {
		return nil, fmt.Errorf("describe this program: %w", err)
	}
	t := &Telemetry{tracers: tracenoop.NewTracerProvider(), meters: metricnoop.NewMeterProvider()}
	spans := cfg.Spans
	if spans == nil {
		if spans, err = autoexport.NewSpanExporter(ctx, autoexport.WithFallbackSpanExporter(noSpans)); err != nil {
			return nil, fmt.Errorf("make the exporter of traces (OTEL_TRACES_EXPORTER=%q): %w", os.Getenv("OTEL_TRACES_EXPORTER"), err)
		}
	}
	if spans != nil && !autoexport.IsNoneSpanExporter(spans) {
		p := sdktrace.NewTracerProvider(sdktrace.WithBatcher(spans), sdktrace.WithResource(who))
		t.tracers, t.on, t.close = p, true, append(t.close, p.Shutdown)
	}
	reader := cfg.Metrics
	if reader == nil {
		if reader, err = autoexport.NewMetricReader(ctx, autoexport.WithFallbackMetricReader(noMetrics)); err != nil {
			return nil, errors.Join(fmt.Errorf("make the exporter of metrics (OTEL_METRICS_EXPORTER=%q): %w", os.Getenv("OTEL_METRICS_EXPORTER"), err), t.Close(ctx))
		}
	}
	if reader != nil && !autoexport.IsNoneMetricReader(reader) {
		p := sdkmetric.NewMeterProvider(sdkmetric.WithReader(reader), sdkmetric.WithResource(who))
		t.meters, t.on, t.close = p, true, append(t.close, p.Shutdown)
	}
	return t, nil
}

// noSpans and noMetrics are what the environment gets that names nothing: the standard
// would have it be OTLP to localhost.
func noSpans(context.Context) (sdktrace.SpanExporter, error) { return nil, nil }

func noMetrics(context.Context) (sdkmetric.Reader, error) { return nil, nil }

// Handler observes the RPCs of a gRPC server; nil if nobody wants to know, because even
// looking away takes time for each message.
func (t *Telemetry) Handler() stats.Handler {
	if !t.on {
		return nil
	}
	return otelgrpc.NewServerHandler(
		otelgrpc.WithTracerProvider(t.tracers), otelgrpc.WithMeterProvider(t.meters),
		otelgrpc.WithPropagators(propagation.TraceContext{}),
		otelgrpc.WithFilter(func(i *stats.RPCTagInfo) bool { return i.FullMethodName != "/grpc.health.v1.Health/Check" }),
	)
}

// Close sends what is left and ends the exporters.
func (t *Telemetry) Close(ctx context.Context) error {
	var errs []error
	for _, f := range t.close {
		errs = append(errs, f(ctx))
	}
	t.close = nil
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("send the last of the telemetry: %w", err)
	}
	return nil
}
