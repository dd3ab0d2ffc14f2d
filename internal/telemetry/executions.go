package telemetry

import (
	"context"
	"fmt"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"

	"github.com/harvest-run/executord/internal/execution"
)

// Executions observes executions: it implements execution.Observer.
type Executions struct {
	tracer trace.Tracer

	ended                       metric.Int64Counter
	output, cpu                 metric.Float64Counter
	duration, start, firstBytes metric.Float64Histogram
}

// Running tells how much runs at the moment.
type Running interface{ Running() int }

// NewExecutions makes the instruments.
func (t *Telemetry) NewExecutions() (*Executions, error) {
	e := &Executions{tracer: t.tracers.Tracer(scope)}
	meter := t.meters.Meter(scope)
	var err error
	counter := func(into *metric.Float64Counter, name, unit, what string) {
		if err == nil {
			*into, err = meter.Float64Counter(name, metric.WithUnit(unit), metric.WithDescription(what))
		}
	}
	// From a millisecond, which is what a start takes, to a day.
	bounds := []float64{.001, .002, .005, .01, .02, .05, .1, .2, .5, 1, 2, 5, 10, 30, 60, 300, 1800, 7200, 86400}
	histogram := func(into *metric.Float64Histogram, name, what string) {
		if err == nil {
			*into, err = meter.Float64Histogram(name, metric.WithUnit("s"), metric.WithDescription(what), metric.WithExplicitBucketBoundaries(bounds...))
		}
	}
	e.ended, err = meter.Int64Counter("executord.executions", metric.WithUnit("{execution}"), metric.WithDescription("executions that ended, by reason"))
	counter(&e.output, "executord.output", "By", "bytes that programs wrote, by stream")
	counter(&e.cpu, "executord.cpu", "s", "processor time that programs used, by mode")
	histogram(&e.duration, "executord.execution.duration", "from the start of the program to the end of its tree, by reason")
	histogram(&e.start, "executord.execution.start.duration", "from the request to the start of the program, by where it runs")
	histogram(&e.firstBytes, "executord.execution.first_output.duration", "from the request to the first byte of output, by where it runs")
	if err != nil {
		return nil, fmt.Errorf("make the instruments of executions: %w", err)
	}
	return e, nil
}

// Gauge measures how much runs, whenever somebody reads the metrics.
func (t *Telemetry) Gauge(executions, sessions Running) error {
	meter := t.meters.Meter(scope)
	for name, of := range map[string]Running{"executord.executions.running": executions, "executord.sessions.running": sessions} {
		_, err := meter.Int64ObservableUpDownCounter(name, metric.WithDescription("what has not ended"),
			metric.WithInt64Callback(func(_ context.Context, o metric.Int64Observer) error {
				o.Observe(int64(of.Running()))
				return nil
			}))
		if err != nil {
			return fmt.Errorf("make the gauge %s: %w", name, err)
		}
	}
	return nil
}

// Ended tells of an execution that has. Its spans are made now, from the times of its
// stages: whatever became of executord meanwhile, they are those that the result has.
func (e *Executions) Ended(x execution.Execution) {
	r := x.Result
	ctx := context.Background()
	reason := metric.WithAttributes(attribute.String("reason", string(r.Reason)))
	where := metric.WithAttributes(attribute.Bool("session", x.Session != ""))
	e.ended.Add(ctx, 1, reason)
	for _, total := range r.Totals {
		e.output.Add(ctx, float64(total.Size), metric.WithAttributes(attribute.String("stream", total.Stream)))
	}
	e.cpu.Add(ctx, r.Usage.CPUUser.Seconds(), metric.WithAttributes(attribute.String("mode", "user")))
	e.cpu.Add(ctx, r.Usage.CPUSystem.Seconds(), metric.WithAttributes(attribute.String("mode", "system")))
	t := r.Times
	span := func(h metric.Float64Histogram, from, to time.Time, by metric.MeasurementOption) {
		if !from.IsZero() && !to.IsZero() {
			h.Record(ctx, max(to.Sub(from), 0).Seconds(), by)
		}
	}
	span(e.duration, t.Started, t.Ended, reason)
	span(e.start, t.Queued, t.Started, where)
	span(e.firstBytes, t.Queued, t.FirstOutput, where)
	e.trace(x)
}

// trace makes the span of an execution and those of its stages below it.
func (e *Executions) trace(x execution.Execution) {
	t := x.Result.Times
	ctx := propagation.TraceContext{}.Extract(context.Background(), propagation.MapCarrier{"traceparent": x.Command.Trace})
	ctx, whole := e.tracer.Start(ctx, "execution", trace.WithTimestamp(t.Queued), trace.WithAttributes(
		attribute.String("executord.execution", x.ID),
		attribute.String("executord.engine", x.Engine),
		attribute.String("executord.sandbox", x.Sandbox),
		attribute.String("executord.reason", string(x.Result.Reason)),
	))
	if x.Session != "" {
		whole.SetAttributes(attribute.String("executord.session", x.Session))
	}
	if code := x.Result.ExitCode; code != nil {
		whole.SetAttributes(attribute.Int("process.exit.code", int(*code)))
	}
	if o := x.Result.Outcome(); o != execution.Success {
		whole.SetStatus(codes.Error, string(x.Result.Reason))
	}
	stage := func(name string, from, to time.Time) {
		if !from.IsZero() && !to.IsZero() && !to.Before(from) {
			_, s := e.tracer.Start(ctx, name, trace.WithTimestamp(from))
			s.End(trace.WithTimestamp(to))
		}
	}
	stage("sandbox", t.Queued, t.SandboxReady)
	stage("start", t.SandboxReady, t.Started)
	stage("run", t.Started, t.Ended)
	if !t.FirstOutput.IsZero() {
		whole.AddEvent("first output", trace.WithTimestamp(t.FirstOutput))
	}
	whole.End(trace.WithTimestamp(t.Ended))
}
