package modal

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	sdk "github.com/modal-labs/modal-client/go"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/harvest-run/executord/internal/fault"
)

// TestTranslate has every type of error that the SDK returns from what the engine calls,
// and every status.
func TestTranslate(t *testing.T) {
	const text = "the provider's words"
	for _, c := range []struct {
		err    error
		kind   fault.Kind
		reason string
		retry  bool
		doubt  bool
	}{
		{sdk.NotFoundError{Exception: text}, fault.NotFound, reasonNotFound, false, false},
		{sdk.AlreadyExistsError{Exception: text}, fault.AlreadyExists, reasonTaken, false, false},
		{sdk.InvalidError{Exception: text}, fault.Invalid, reasonRefused, false, false},
		{sdk.ConflictError{Exception: text}, fault.FailedPrecondition, reasonState, false, false},
		{sdk.ResourceExhaustedError{Exception: text}, fault.Exhausted, reasonExhausted, true, false},
		{sdk.TimeoutError{Exception: text}, fault.Unavailable, reasonUnavailable, true, true},
		{sdk.SandboxTimeoutError{Exception: text}, fault.Unavailable, reasonUnavailable, true, true},
		{sdk.ExecTimeoutError{Exception: text}, fault.Unavailable, reasonUnavailable, true, true},
		{sdk.ClientClosedError{Exception: text}, fault.Unavailable, reasonUnavailable, true, true},
		{sdk.InternalFailure{Exception: text}, fault.Unavailable, reasonUnavailable, true, true},
		{sdk.RemoteError{Exception: text}, fault.FailedPrecondition, reasonFailed, false, false},
		{sdk.ExecutionError{Exception: text}, fault.FailedPrecondition, reasonFailed, false, false},
		{sdk.SnapshotCreationError{Exception: text}, fault.FailedPrecondition, reasonFailed, false, false},
		{sdk.SandboxFilesystemError{Exception: text}, fault.FailedPrecondition, reasonFailed, false, false},
		{sdk.SandboxFilesystemNotFoundError{Exception: text}, fault.NotFound, reasonNotFound, false, false},
		{sdk.SandboxFilesystemPathAlreadyExistsError{Exception: text}, fault.AlreadyExists, reasonTaken, false, false},
		{sdk.SandboxFilesystemPermissionError{Exception: text}, fault.FailedPrecondition, reasonFailed, false, false},
		{sdk.SandboxFilesystemNotADirectoryError{Exception: text}, fault.FailedPrecondition, reasonFailed, false, false},
		{sdk.SandboxFilesystemIsADirectoryError{Exception: text}, fault.FailedPrecondition, reasonFailed, false, false},
		{status.Error(codes.NotFound, text), fault.NotFound, reasonNotFound, false, false},
		{status.Error(codes.AlreadyExists, text), fault.AlreadyExists, reasonTaken, false, false},
		{status.Error(codes.InvalidArgument, text), fault.Invalid, reasonRefused, false, false},
		{status.Error(codes.OutOfRange, text), fault.Invalid, reasonRefused, false, false},
		{status.Error(codes.FailedPrecondition, text), fault.FailedPrecondition, reasonState, false, false},
		{status.Error(codes.ResourceExhausted, text), fault.Exhausted, reasonExhausted, true, false},
		{status.Error(codes.Unauthenticated, text), fault.FailedPrecondition, reasonCredentials, false, false},
		{status.Error(codes.PermissionDenied, text), fault.FailedPrecondition, reasonCredentials, false, false},
		{status.Error(codes.Unimplemented, text), fault.Internal, reasonFailed, false, false},
		{status.Error(codes.DataLoss, text), fault.Internal, reasonFailed, false, false},
		{status.Error(codes.Unavailable, text), fault.Unavailable, reasonUnavailable, true, true},
		{status.Error(codes.DeadlineExceeded, text), fault.Unavailable, reasonUnavailable, true, true},
		{status.Error(codes.Aborted, text), fault.Unavailable, reasonUnavailable, true, true},
		{status.Error(codes.Canceled, text), fault.Unavailable, reasonUnavailable, true, true},
		{status.Error(codes.Internal, text), fault.Unavailable, reasonUnavailable, true, true},
		{status.Error(codes.Unknown, text), fault.Unavailable, reasonUnavailable, true, true},
		{errors.New("missing credentials: " + text), fault.FailedPrecondition, reasonCredentials, false, false},
		{errors.New(text), fault.Unavailable, reasonUnavailable, true, true},
	} {
		for _, err := range []error{c.err, fmt.Errorf("failed to get auth token: %w", c.err)} {
			told := translate(t.Context(), err, "do something")
			fe, ok := errors.AsType[*fault.Error](told)
			if !ok || fe.Kind != c.kind || fe.Reason != c.reason || (fe.RetryAfter > 0) != c.retry {
				t.Errorf("%T %v: %+v, want kind %d, reason %s", err, err, fe, c.kind, c.reason)
			}
			if !strings.Contains(told.Error(), text) || !strings.HasPrefix(told.Error(), "do something: ") {
				t.Errorf("%T: %q", err, told)
			}
			if inDoubt(err) != c.doubt {
				t.Errorf("%T %v: in doubt %v", err, err, !c.doubt)
			}
		}
	}
	if err := translate(t.Context(), nil, "x"); err != nil {
		t.Errorf("no error became %v", err)
	}
	// One that is a fault already keeps its kind.
	if err := translate(t.Context(), fault.New(fault.OutOfRange, "R", "m"), "x"); fault.KindOf(err) != fault.OutOfRange {
		t.Errorf("a fault became %v", err)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	why := errors.New("the caller has gone")
	cancel(why)
	if err := translate(ctx, status.Error(codes.Canceled, text), "x"); !errors.Is(err, why) {
		t.Errorf("after the end of the context: %v", err)
	}
}

func TestIsGone(t *testing.T) {
	for _, c := range []struct {
		err  error
		gone bool
	}{
		{nil, false}, {errors.New("x"), false}, {status.Error(codes.Unavailable, "x"), false}, {sdk.InvalidError{}, false},
		{sdk.NotFoundError{}, true}, {sdk.ConflictError{}, true}, {status.Error(codes.NotFound, "x"), true},
	} {
		if isGone(c.err) != c.gone {
			t.Errorf("%v: gone %v", c.err, !c.gone)
		}
	}
}
