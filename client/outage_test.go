package client

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"
)

var errBroken = errors.New("broken")

func TestPauseGrowsToItsLimit(t *testing.T) {
	for attempt := range 70 {
		full := lastPause
		if attempt < 7 {
			full = min(lastPause, firstPause<<max(0, attempt-1))
		}
		for range 50 {
			if d := pause(attempt); d < full/2 || d > full {
				t.Fatalf("pause(%d) = %v, want %v to %v", attempt, d, full/2, full)
			}
		}
	}
	seen := make(map[time.Duration]bool)
	for range 50 {
		seen[pause(5)] = true
	}
	if len(seen) < 2 {
		t.Error("no jitter")
	}
}

func TestOutageLastsItsLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var told []Outage
		o := outage{name: "executions/x", limit: time.Minute, tell: func(o Outage) { told = append(told, o) }}
		begin := time.Now()
		var err error
		for err == nil {
			err = o.wait(t.Context(), errBroken)
		}
		if !errors.Is(err, ErrOutage) || !errors.Is(err, errBroken) {
			t.Errorf("error %v", err)
		}
		if d := time.Since(begin); d != time.Minute {
			t.Errorf("it lasted %v", d)
		}
		var sum time.Duration
		for i, o := range told {
			sum += o.Wait
			if o.Attempt != i+1 || o.Execution != "executions/x" || !errors.Is(o.Err, errBroken) {
				t.Errorf("told %+v", o)
			}
		}
		if sum != time.Minute {
			t.Errorf("the waits are %v in all", sum)
		}
	})
}

func TestOutageBeginsAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := outage{limit: 10 * time.Second}
		for range 20 { // together far more than the limit
			for range 3 {
				if err := o.wait(t.Context(), errBroken); err != nil {
					t.Fatal(err)
				}
			}
			if o.left() == o.limit {
				t.Error("the outage does not count")
			}
			o.over()
			if o.left() != o.limit {
				t.Error("the outage is not over")
			}
		}
	})
}

func TestOutageHeedsTheServersDelay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		st, err := status.New(codes.Unavailable, "busy").WithDetails(&errdetails.RetryInfo{RetryDelay: durationpb.New(17 * time.Second)})
		if err != nil {
			t.Fatal(err)
		}
		o := outage{limit: 20 * time.Second}
		begin := time.Now()
		for range 2 {
			if err := o.wait(t.Context(), st.Err()); err != nil {
				t.Fatal(err)
			}
		}
		// The second wait is cut at the limit.
		if d := time.Since(begin); d != 20*time.Second {
			t.Errorf("waited %v", d)
		}
	})
}

func TestOutageEndsWithTheContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancelCause(t.Context())
		time.AfterFunc(30*time.Second, func() { cancel(errBroken) })
		o := outage{limit: time.Hour}
		begin := time.Now()
		var err error
		for err == nil {
			err = o.wait(ctx, errors.New("no server"))
		}
		if !errors.Is(err, errBroken) || time.Since(begin) != 30*time.Second {
			t.Errorf("error %v after %v", err, time.Since(begin))
		}
	})
}

func TestNoOutageAtAll(t *testing.T) {
	o := outage{limit: -1, tell: func(Outage) { t.Error("told of a wait") }}
	if err := o.wait(t.Context(), errBroken); !errors.Is(err, errBroken) || errors.Is(err, ErrOutage) {
		t.Errorf("error %v", err)
	}
}
