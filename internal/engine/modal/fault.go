package modal

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	sdk "github.com/modal-labs/modal-client/go"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/harvest-run/executord/internal/fault"
)

// Reasons of the faults that come from the provider.
const (
	reasonUnavailable = "PROVIDER_UNAVAILABLE"
	reasonExhausted   = "PROVIDER_EXHAUSTED"
	reasonRefused     = "PROVIDER_REFUSED"
	reasonCredentials = "PROVIDER_CREDENTIALS"
	reasonNotFound    = "PROVIDER_NOT_FOUND"
	reasonTaken       = "PROVIDER_ALREADY_EXISTS"
	reasonState       = "PROVIDER_STATE"
	reasonFailed      = "PROVIDER_FAILED"
)

// When a repeat may work.
const (
	retrySoon  = 2 * time.Second
	retryLater = 15 * time.Second
)

// translate makes a fault of an error of the SDK, which returns values of its own types
// in some places and gRPC statuses in others. The provider's words are kept.
func translate(ctx context.Context, err error, doing string) error {
	if err == nil {
		return nil
	}
	// The SDK tells the end of a context as a status.
	if ctx.Err() != nil {
		return fmt.Errorf("%s: %w", doing, context.Cause(ctx))
	}
	if _, ok := errors.AsType[*fault.Error](err); ok {
		return fmt.Errorf("%s: %w", doing, err)
	}
	kind, reason, retry := classify(err)
	f := fault.Wrap(err, kind, reason, "%s", doing)
	f.RetryAfter = retry
	return f
}

// classify says which kind of fault an error is.
func classify(err error) (fault.Kind, string, time.Duration) {
	switch {
	case is[sdk.NotFoundError](err), is[sdk.SandboxFilesystemNotFoundError](err):
		return fault.NotFound, reasonNotFound, 0
	case is[sdk.AlreadyExistsError](err), is[sdk.SandboxFilesystemPathAlreadyExistsError](err):
		return fault.AlreadyExists, reasonTaken, 0
	case is[sdk.InvalidError](err):
		return fault.Invalid, reasonRefused, 0
	case is[sdk.ConflictError](err):
		return fault.FailedPrecondition, reasonState, 0
	case is[sdk.ResourceExhaustedError](err):
		return fault.Exhausted, reasonExhausted, retryLater
	case is[sdk.TimeoutError](err), is[sdk.SandboxTimeoutError](err), is[sdk.ExecTimeoutError](err), is[sdk.ClientClosedError](err), is[sdk.InternalFailure](err):
		return fault.Unavailable, reasonUnavailable, retrySoon
	case is[sdk.RemoteError](err), is[sdk.ExecutionError](err), is[sdk.SnapshotCreationError](err), is[sdk.SandboxFilesystemError](err),
		is[sdk.SandboxFilesystemNotADirectoryError](err), is[sdk.SandboxFilesystemIsADirectoryError](err), is[sdk.SandboxFilesystemPermissionError](err):
		return fault.FailedPrecondition, reasonFailed, 0
	}
	if s, ok := status.FromError(err); ok {
		return classifyStatus(s.Code())
	}
	if strings.Contains(err.Error(), "missing credentials") {
		return fault.FailedPrecondition, reasonCredentials, 0
	}
	// A lost connection, most likely.
	return fault.Unavailable, reasonUnavailable, retrySoon
}

func classifyStatus(code codes.Code) (fault.Kind, string, time.Duration) {
	switch code {
	case codes.NotFound:
		return fault.NotFound, reasonNotFound, 0
	case codes.AlreadyExists:
		return fault.AlreadyExists, reasonTaken, 0
	case codes.InvalidArgument, codes.OutOfRange:
		return fault.Invalid, reasonRefused, 0
	case codes.FailedPrecondition:
		return fault.FailedPrecondition, reasonState, 0
	case codes.ResourceExhausted:
		return fault.Exhausted, reasonExhausted, retryLater
	case codes.Unauthenticated, codes.PermissionDenied:
		// executord's own credentials, not those of who called it.
		return fault.FailedPrecondition, reasonCredentials, 0
	case codes.Unimplemented, codes.DataLoss:
		return fault.Internal, reasonFailed, 0
	}
	return fault.Unavailable, reasonUnavailable, retrySoon
}

func is[E error](err error) bool {
	_, ok := errors.AsType[E](err)
	return ok
}

// inDoubt says whether a call with this error may have been carried out all the same.
func inDoubt(err error) bool {
	kind, _, _ := classify(err)
	return kind == fault.Unavailable
}

// isGone says whether an error means that a sandbox has ended.
func isGone(err error) bool {
	return is[sdk.NotFoundError](err) || is[sdk.ConflictError](err) || status.Code(err) == codes.NotFound
}

// words are what the provider said, for people.
func words(err error) string {
	// Not of what it is wrapped in: that is ours.
	if s, ok := errors.AsType[interface {
		error
		GRPCStatus() *status.Status
	}](err); ok {
		return s.GRPCStatus().Message()
	}
	return err.Error()
}

// notFound is the fault for an id that nothing is left of.
func notFound(id string) error {
	return fault.New(fault.NotFound, "SANDBOX_NOT_FOUND", "no sandbox %q", id)
}
