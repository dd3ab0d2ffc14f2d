package api

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/harvest-run/executord/internal/fault"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

func newStatuses() (*statuses, *syncBuffer) {
	logs := &syncBuffer{}
	return &statuses{logger: slog.New(slog.NewTextHandler(logs, nil))}, logs
}

func TestStatusOfFaults(t *testing.T) {
	retry := fault.New(fault.Exhausted, "TOO_MANY", "too many run")
	retry.RetryAfter = 3 * time.Second
	full := fault.New(fault.Exhausted, "QUEUE_FULL", "no place is free").With("max_running", "4")
	full.Quotas = []fault.Quota{{Subject: "server:executions", Description: "at most 4"}, {Subject: "server:queue", Description: strings.Repeat("x", 1000)}}
	tests := map[string]struct {
		err    error
		code   codes.Code
		reason string
		check  func(*testing.T, details)
	}{
		"invalid": {
			err:  fault.InvalidField("BAD", "a.b", "must be %d", 1),
			code: codes.InvalidArgument, reason: "BAD",
			check: func(t *testing.T, d details) {
				v := d.bad.GetFieldViolations()
				if len(v) != 1 || v[0].GetField() != "a.b" || v[0].GetDescription() != "must be 1" {
					t.Errorf("%v", v)
				}
			},
		},
		"invalid without fields": {
			err:  fault.New(fault.Invalid, "BAD", "m"),
			code: codes.InvalidArgument, reason: "BAD",
		},
		"execution not found": {
			err:  fault.New(fault.NotFound, "EXECUTION_NOT_FOUND", "m"),
			code: codes.NotFound, reason: "EXECUTION_NOT_FOUND",
			check: func(t *testing.T, d details) {
				if d.resource.GetResourceType() != "harvest.executor.v1.Execution" || d.resource.GetResourceName() != "sessions/s/executions/e" {
					t.Errorf("%v", d.resource)
				}
			},
		},
		"session not found": {
			err:  fault.New(fault.NotFound, "SESSION_NOT_FOUND", "m"),
			code: codes.NotFound, reason: "SESSION_NOT_FOUND",
			check: func(t *testing.T, d details) {
				if d.resource.GetResourceType() != "harvest.executor.v1.Session" || d.resource.GetResourceName() != "sessions/s" {
					t.Errorf("%v", d.resource)
				}
			},
		},
		"exists": {
			err:  fault.New(fault.AlreadyExists, "EXISTS", "m"),
			code: codes.AlreadyExists, reason: "EXISTS",
			check: func(t *testing.T, d details) {
				if d.resource == nil {
					t.Error("no ResourceInfo")
				}
			},
		},
		"precondition": {
			err:  fault.New(fault.FailedPrecondition, "LIMIT_NOT_ENFORCEABLE", "no pids controller"),
			code: codes.FailedPrecondition, reason: "LIMIT_NOT_ENFORCEABLE",
			check: func(t *testing.T, d details) {
				v := d.precondition.GetViolations()
				if len(v) != 1 || v[0].GetType() != "LIMIT_NOT_ENFORCEABLE" || v[0].GetSubject() == "" || v[0].GetDescription() != "no pids controller" {
					t.Errorf("%v", v)
				}
			},
		},
		"out of range": {
			err:  fault.New(fault.OutOfRange, "OUTPUT_DROPPED", "m").With("first_offset", "17"),
			code: codes.OutOfRange, reason: "OUTPUT_DROPPED",
			check: func(t *testing.T, d details) {
				if d.info.GetMetadata()["first_offset"] != "17" {
					t.Errorf("%v", d.info)
				}
			},
		},
		"exhausted": {
			err: retry, code: codes.ResourceExhausted, reason: "TOO_MANY",
			check: func(t *testing.T, d details) {
				if d.retry.GetRetryDelay().AsDuration() != 3*time.Second {
					t.Errorf("%v", d.retry)
				}
			},
		},
		"exhausted with quotas": {
			err: full, code: codes.ResourceExhausted, reason: "QUEUE_FULL",
			check: func(t *testing.T, d details) {
				v := d.quota.GetViolations()
				if len(v) != 2 || v[0].GetSubject() != "server:executions" || v[0].GetDescription() != "at most 4" || len(v[1].GetDescription()) > 2*maxDetailBytes {
					t.Errorf("%v", v)
				}
				if d.info.GetMetadata()["max_running"] != "4" {
					t.Errorf("%v", d.info)
				}
			},
		},
		"exhausted without a time": {
			err:  fault.New(fault.Exhausted, "TOO_MANY", "m"),
			code: codes.ResourceExhausted, reason: "TOO_MANY",
			check: func(t *testing.T, d details) {
				if d.quota != nil {
					t.Errorf("quotas of nothing: %v", d.quota)
				}
				if d.retry != nil {
					t.Errorf("a retry is promised: %v", d.retry)
				}
			},
		},
		"unavailable": {
			err:  fault.New(fault.Unavailable, "SERVER_DRAINING", "m"),
			code: codes.Unavailable, reason: "SERVER_DRAINING",
			check: func(t *testing.T, d details) {
				if d.retry.GetRetryDelay().AsDuration() != time.Second {
					t.Errorf("%v", d.retry)
				}
			},
		},
		"wrapped, with a cause": {
			err:  fmt.Errorf("read it: %w", fault.Wrap(errors.New("open /secret/path"), fault.NotFound, "GONE", "it is gone")),
			code: codes.NotFound, reason: "GONE",
		},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			s, logs := newStatuses()
			err := s.of(t.Context(), test.err, "sessions/s/executions/e")
			d := wantError(t, err, test.code, test.reason)
			if test.check != nil {
				test.check(t, d)
			}
			if strings.Contains(err.Error(), "/secret") {
				t.Errorf("the client sees the cause: %v", err)
			}
			if logs.String() != "" {
				t.Errorf("logged %s", logs)
			}
		})
	}
}

func TestStatusOfInternalErrors(t *testing.T) {
	for name, test := range map[string]struct {
		err    error
		reason string
	}{
		"unknown":          {errors.New("open /secret/path"), "INTERNAL"},
		"internal fault":   {fault.New(fault.Internal, "STORE_BROKEN", "open /secret/path"), "STORE_BROKEN"},
		"own deadline":     {fmt.Errorf("dial the guest at /secret/path: %w", context.DeadlineExceeded), "INTERNAL"},
		"own cancellation": {fmt.Errorf("dial the guest at /secret/path: %w", context.Canceled), "INTERNAL"},
	} {
		t.Run(name, func(t *testing.T) {
			s, logs := newStatuses()
			err := s.of(t.Context(), test.err, "")
			d := wantError(t, err, codes.Internal, test.reason)
			incident := d.info.GetMetadata()["incident"]
			if incident == "" || !strings.Contains(status.Convert(err).Message(), incident) {
				t.Errorf("incident %q in %v", incident, err)
			}
			if strings.Contains(err.Error(), "secret") {
				t.Errorf("the client sees %v", err)
			}
			if !strings.Contains(logs.String(), incident) || !strings.Contains(logs.String(), "/secret/path") {
				t.Errorf("the log lacks it: %s", logs)
			}
		})
	}
}

func TestStatusOfContextErrors(t *testing.T) {
	cancelled, cancel := context.WithCancel(context.Background())
	cancel()
	late, cancelLate := context.WithDeadline(context.Background(), time.Unix(1, 0))
	defer cancelLate()
	draining, cancelDraining := context.WithCancelCause(context.Background())
	cancelDraining(errDraining())
	for name, test := range map[string]struct {
		ctx    context.Context
		err    error
		code   codes.Code
		reason string
	}{
		"cancelled":              {cancelled, context.Canceled, codes.Canceled, "CALL_CANCELLED"},
		"cancelled, wrapped":     {cancelled, fmt.Errorf("wait: %w", context.Canceled), codes.Canceled, "CALL_CANCELLED"},
		"deadline":               {late, context.DeadlineExceeded, codes.DeadlineExceeded, "DEADLINE_EXCEEDED"},
		"deadline as cancel":     {late, context.Canceled, codes.DeadlineExceeded, "DEADLINE_EXCEEDED"},
		"draining":               {draining, context.Cause(draining), codes.Unavailable, "SERVER_DRAINING"},
		"draining, wrapped":      {draining, fmt.Errorf("wait: %w", context.Cause(draining)), codes.Unavailable, "SERVER_DRAINING"},
		"draining, as cancelled": {draining, context.Canceled, codes.Unavailable, "SERVER_DRAINING"},
		"draining, as a fault":   {draining, fault.New(fault.NotFound, "GONE", "m"), codes.NotFound, "GONE"},
		"cancelled and broken":   {cancelled, errors.New("broken"), codes.Internal, "INTERNAL"},
	} {
		t.Run(name, func(t *testing.T) {
			s, _ := newStatuses()
			wantError(t, s.of(test.ctx, test.err, ""), test.code, test.reason)
		})
	}
}

// TestStatusIsNotChangedTwice: what grpc-go says about a broken stream is passed on.
func TestStatusIsNotChangedTwice(t *testing.T) {
	s, logs := newStatuses()
	err := s.of(t.Context(), fmt.Errorf("send: %w", status.Error(codes.Unavailable, "transport is closing")), "")
	if status.Code(err) != codes.Unavailable || logs.String() != "" {
		t.Errorf("%v; logged %s", err, logs)
	}
}

func TestHostileStatus(t *testing.T) {
	s, _ := newStatuses()
	long := strings.Repeat("\xff\x00é", 100000)
	e := fault.InvalidField("BAD", long, "%s", long).With(long, long)
	err := s.of(t.Context(), e, long)
	wantError(t, err, codes.InvalidArgument, "BAD")
	if n := len(err.Error()); n > 2*maxMessageBytes {
		t.Errorf("the message has %d bytes", n)
	}
}
