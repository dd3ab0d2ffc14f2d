package telemetry

import (
	"context"
	"strings"
	"testing"
	"time"

	"go.opentelemetry.io/otel/codes"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"go.uber.org/goleak"

	"github.com/harvest-run/executord/internal/execution"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// ended is an execution with all its stages.
func ended(code int32) execution.Execution {
	at := func(ms int) time.Time { return time.Unix(100, 0).Add(time.Duration(ms) * time.Millisecond) }
	return execution.Execution{
		ID: "01x", Session: "01s", Engine: "local", Sandbox: "s-01s",
		Command: execution.Command{Args: []string{"secret-argument"}, Trace: "00-0102030405060708090a0b0c0d0e0f10-0102030405060708-01"},
		Labels:  map[string]string{"label": "of-the-caller"},
		Result: &execution.Result{
			Reason: execution.Exited, ExitCode: &code,
			Totals: []execution.StreamTotal{{Stream: "stdout", Size: 10}, {Stream: "stderr", Size: 1}},
			Times:  execution.Times{Queued: at(0), SandboxReady: at(5), Started: at(7), FirstOutput: at(9), Ended: at(500)},
			Usage:  execution.Usage{CPUUser: time.Second, CPUSystem: time.Second / 2},
		},
	}
}

type running int

func (r running) Running() int { return int(r) }

// measured is a Telemetry whose traces and metrics the test reads.
func measured(t *testing.T) (*Executions, *tracetest.InMemoryExporter, *sdkmetric.ManualReader, *Telemetry) {
	t.Helper()
	spans, reader := tracetest.NewInMemoryExporter(), sdkmetric.NewManualReader()
	tel, err := New(t.Context(), Config{Version: "v1", Spans: spans, Metrics: reader})
	if err != nil {
		t.Fatal(err)
	}
	e, err := tel.NewExecutions()
	if err != nil {
		t.Fatal(err)
	}
	return e, spans, reader, tel
}

func TestSpansOfAnExecution(t *testing.T) {
	e, spans, _, tel := measured(t)
	e.Ended(ended(3))
	keep := spans.GetSpans
	if err := tel.tracers.(interface{ ForceFlush(context.Context) error }).ForceFlush(t.Context()); err != nil {
		t.Fatal(err)
	}
	defer tel.Close(context.Background())
	found := make(map[string]tracetest.SpanStub)
	for _, s := range keep() {
		found[s.Name] = s
		if s.SpanContext.TraceID().String() != "0102030405060708090a0b0c0d0e0f10" {
			t.Errorf("%s is of another trace", s.Name)
		}
		for _, a := range s.Attributes {
			if strings.Contains(a.Value.String(), "secret") || strings.Contains(a.Value.String(), "caller") {
				t.Errorf("%s tells %s", s.Name, a.Value.String())
			}
		}
	}
	whole := found["execution"]
	if whole.Parent.SpanID().String() != "0102030405060708" || whole.EndTime.Sub(whole.StartTime) != 500*time.Millisecond || whole.Status.Code != codes.Error {
		t.Errorf("execution: %+v", whole)
	}
	for name, want := range map[string]time.Duration{"sandbox": 5 * time.Millisecond, "start": 2 * time.Millisecond, "run": 493 * time.Millisecond} {
		s := found[name]
		if s.Parent.SpanID() != whole.SpanContext.SpanID() || s.EndTime.Sub(s.StartTime) != want {
			t.Errorf("%s: %v below %v", name, s.EndTime.Sub(s.StartTime), s.Parent.SpanID())
		}
	}
}

// What did not come to run has no span for it.
func TestSpansOfAStartThatFailed(t *testing.T) {
	e, spans, _, tel := measured(t)
	x := ended(0)
	x.Result.Reason, x.Result.ExitCode = execution.StartFailed, nil
	x.Result.Times.Started, x.Result.Times.FirstOutput = time.Time{}, time.Time{}
	x.Command.Trace = "nonsense"
	e.Ended(x)
	if err := tel.tracers.(interface{ ForceFlush(context.Context) error }).ForceFlush(t.Context()); err != nil {
		t.Fatal(err)
	}
	defer tel.Close(context.Background())
	for _, s := range spans.GetSpans() {
		if s.Name == "run" || s.Name == "start" || s.Name == "execution" && s.Parent.IsValid() {
			t.Errorf("%s below %v", s.Name, s.Parent.SpanID())
		}
	}
}

func TestMetrics(t *testing.T) {
	e, _, reader, tel := measured(t)
	defer tel.Close(context.Background())
	if err := tel.Gauge(running(3), running(1)); err != nil {
		t.Fatal(err)
	}
	e.Ended(ended(0))
	e.Ended(ended(1))
	var got metricdata.ResourceMetrics
	if err := reader.Collect(t.Context(), &got); err != nil {
		t.Fatal(err)
	}
	seen := make(map[string]bool)
	for _, scope := range got.ScopeMetrics {
		for _, m := range scope.Metrics {
			seen[m.Name] = true
			switch d := m.Data.(type) {
			case metricdata.Sum[int64]:
				want := map[string]int64{"executord.executions": 2, "executord.executions.running": 3, "executord.sessions.running": 1}[m.Name]
				if len(d.DataPoints) != 1 || d.DataPoints[0].Value != want {
					t.Errorf("%s: %+v, want %d", m.Name, d.DataPoints, want)
				}
				checkLabels(t, m.Name, d.DataPoints[0].Attributes.Encoded(labels{}))
			case metricdata.Sum[float64]:
				for _, p := range d.DataPoints {
					checkLabels(t, m.Name, p.Attributes.Encoded(labels{}))
				}
			case metricdata.Histogram[float64]:
				if d.DataPoints[0].Count != 2 {
					t.Errorf("%s: %d", m.Name, d.DataPoints[0].Count)
				}
				checkLabels(t, m.Name, d.DataPoints[0].Attributes.Encoded(labels{}))
			}
		}
	}
	for _, name := range []string{
		"executord.executions", "executord.executions.running", "executord.sessions.running", "executord.output", "executord.cpu",
		"executord.execution.duration", "executord.execution.start.duration", "executord.execution.first_output.duration",
	} {
		if !seen[name] {
			t.Errorf("%s is not measured", name)
		}
	}
}

// checkLabels fails if a label could have as many values as there are executions.
func checkLabels(t *testing.T, name, encoded string) {
	t.Helper()
	for _, never := range []string{"01x", "01s", "secret", "caller"} {
		if strings.Contains(encoded, never) {
			t.Errorf("%s has the labels %s", name, encoded)
		}
	}
}

// By default nothing is measured, and nothing is started.
func TestNothingByDefault(t *testing.T) {
	for _, none := range []string{"", "none"} {
		t.Setenv("OTEL_TRACES_EXPORTER", none)
		t.Setenv("OTEL_METRICS_EXPORTER", none)
		tel, err := New(t.Context(), Config{})
		if err != nil {
			t.Fatal(err)
		}
		if tel.Handler() != nil || len(tel.close) != 0 {
			t.Errorf("%q: something is measured", none)
		}
		e, err := tel.NewExecutions()
		if err != nil {
			t.Fatal(err)
		}
		e.Ended(ended(0))
		if err := tel.Close(t.Context()); err != nil {
			t.Error(err)
		}
	}
}

func TestUnknownExporter(t *testing.T) {
	t.Setenv("OTEL_TRACES_EXPORTER", "pigeon")
	if _, err := New(t.Context(), Config{}); err == nil || !strings.Contains(err.Error(), "pigeon") {
		t.Errorf("%v", err)
	}
	t.Setenv("OTEL_TRACES_EXPORTER", "")
	t.Setenv("OTEL_METRICS_EXPORTER", "pigeon")
	if _, err := New(t.Context(), Config{}); err == nil || !strings.Contains(err.Error(), "pigeon") {
		t.Errorf("%v", err)
	}
}
