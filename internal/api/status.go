package api

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"github.com/harvest-run/executord/internal/fault"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/protoadapt"
	"google.golang.org/protobuf/types/known/durationpb"
)

const (
	// errorDomain is the domain of every ErrorInfo.
	errorDomain = "executord.harvest.run"
	// drainRetryAfter is when a client that was cut off may come back.
	drainRetryAfter = time.Second
	// A status travels in headers, and some clients take no more than 8 KiB of those.
	// So its message and each text in its details are cut.
	maxMessageBytes = 512
	maxDetailBytes  = 160
)

// statuses turns errors into gRPC statuses. An internal error gets an incident id;
// the client sees that, the log the id and the error.
type statuses struct {
	logger *slog.Logger
}

// of returns the status of err, which a handler returned under ctx; resource is the
// name of what the request was about.
func (s *statuses) of(ctx context.Context, err error, resource string) error {
	// A handler that was interrupted may say so in its own words; the cause of the
	// interruption is what counts.
	if cause := context.Cause(ctx); cause != nil && isContextError(err) {
		err = cause
	}
	if e, ok := errors.AsType[*fault.Error](err); ok && e.Kind != fault.Internal {
		return s.ofFault(e, resource)
	}
	if st, ok := status.FromError(err); ok {
		// Of grpc-go's making, as from Send to a client that is gone.
		return st.Err()
	}
	if ctx.Err() != nil && isContextError(err) {
		if errors.Is(err, context.DeadlineExceeded) {
			return withDetails(codes.DeadlineExceeded, "the deadline of the call passed",
				errorInfo("DEADLINE_EXCEEDED", nil))
		}
		return withDetails(codes.Canceled, "the caller cancelled the call", errorInfo("CALL_CANCELLED", nil))
	}
	reason := fault.ReasonOf(err)
	if reason == "" {
		reason = "INTERNAL"
	}
	return s.incident(ctx, reason, slog.String("error", err.Error()))
}

// recovered returns the status of a panic.
func (s *statuses) recovered(ctx context.Context, value any) error {
	return s.incident(ctx, "PANIC",
		slog.String("panic", fmt.Sprint(value)), slog.String("stack", string(debug.Stack())))
}

// incident logs an internal error and returns the status that refers to it.
func (s *statuses) incident(ctx context.Context, reason string, facts ...slog.Attr) error {
	id := strings.ToLower(rand.Text()[:12])
	s.logger.LogAttrs(ctx, slog.LevelError, "internal error",
		append([]slog.Attr{slog.String("incident", id), slog.String("reason", reason)}, facts...)...)
	return withDetails(codes.Internal, "internal error; the server's log has it as incident "+id,
		errorInfo(reason, map[string]string{"incident": id}))
}

func (s *statuses) ofFault(e *fault.Error, resource string) error {
	// The message alone: the cause may have paths of the host in it.
	message := clip(e.Message, maxMessageBytes)
	details := []protoadapt.MessageV1{errorInfo(e.Reason, e.Meta)}
	retryAfter := e.RetryAfter
	var code codes.Code
	switch e.Kind {
	case fault.Invalid:
		code = codes.InvalidArgument
		if len(e.Fields) > 0 {
			details = append(details, badRequest(e.Fields))
		}
	case fault.NotFound:
		code = codes.NotFound
		details = append(details, resourceInfo(e.Reason, resource, message))
	case fault.AlreadyExists:
		code = codes.AlreadyExists
		if e.Reason != "REQUEST_ID_REUSED" { // which is about no resource
			details = append(details, resourceInfo(e.Reason, resource, message))
		}
	case fault.FailedPrecondition:
		code = codes.FailedPrecondition
		details = append(details, &errdetails.PreconditionFailure{
			Violations: []*errdetails.PreconditionFailure_Violation{
				{Type: e.Reason, Subject: resource, Description: message},
			},
		})
	case fault.OutOfRange:
		code = codes.OutOfRange
	case fault.Exhausted:
		code = codes.ResourceExhausted
		if len(e.Quotas) > 0 {
			details = append(details, quotaFailure(e.Quotas))
		}
	case fault.Unauthenticated:
		code = codes.Unauthenticated
	case fault.PermissionDenied:
		code = codes.PermissionDenied
	case fault.Unavailable:
		code = codes.Unavailable
		if retryAfter <= 0 {
			retryAfter = drainRetryAfter
		}
	default:
		code = codes.Internal
	}
	if retryAfter > 0 {
		details = append(details, &errdetails.RetryInfo{RetryDelay: durationpb.New(retryAfter)})
	}
	return withDetails(code, message, details...)
}

func isContextError(err error) bool {
	return errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded)
}

func errorInfo(reason string, meta map[string]string) *errdetails.ErrorInfo {
	info := &errdetails.ErrorInfo{Reason: reason, Domain: errorDomain}
	if len(meta) > 0 {
		info.Metadata = make(map[string]string, len(meta))
		for _, key := range slices.Sorted(maps.Keys(meta)) {
			info.Metadata[clip(key, maxDetailBytes)] = clip(meta[key], maxDetailBytes)
		}
	}
	return info
}

func badRequest(fields []fault.Field) *errdetails.BadRequest {
	bad := &errdetails.BadRequest{}
	for _, field := range fields {
		bad.FieldViolations = append(bad.FieldViolations, &errdetails.BadRequest_FieldViolation{
			Field: clip(field.Path, maxDetailBytes), Description: clip(field.Description, maxDetailBytes),
		})
	}
	return bad
}

func quotaFailure(quotas []fault.Quota) *errdetails.QuotaFailure {
	failure := &errdetails.QuotaFailure{}
	for _, quota := range quotas {
		failure.Violations = append(failure.Violations, &errdetails.QuotaFailure_Violation{
			Subject: clip(quota.Subject, maxDetailBytes), Description: clip(quota.Description, maxDetailBytes),
			QuotaId: quota.Name, QuotaValue: quota.Limit,
		})
	}
	return failure
}

// resourceInfo names what is meant: the session where the reason is about one.
func resourceInfo(reason, resource, description string) *errdetails.ResourceInfo {
	info := &errdetails.ResourceInfo{
		ResourceType: apiPackage + ".Execution", ResourceName: resource, Description: description,
	}
	if strings.HasPrefix(reason, "KEY_") {
		info.ResourceType = apiPackage + ".ApiKey"
	}
	if strings.HasPrefix(reason, "TURN_") {
		info.ResourceType = apiPackage + ".Turn"
	}
	if strings.HasPrefix(reason, "INTERACTION_") {
		info.ResourceType = apiPackage + ".Interaction"
	}
	if strings.HasPrefix(reason, "SESSION_") {
		info.ResourceType = apiPackage + ".Session"
		for _, below := range []string{"/executions/", turnsPart, interactionPart} {
			info.ResourceName, _, _ = strings.Cut(info.ResourceName, below)
		}
	}
	return info
}

// clip makes s fit for a status.
func clip(s string, size int) string {
	if len(s) > size {
		s = head(s, size) + "…"
	}
	return text(s)
}

func withDetails(code codes.Code, message string, details ...protoadapt.MessageV1) error {
	message = clip(message, maxMessageBytes)
	st, err := status.New(code, message).WithDetails(details...)
	if err != nil {
		// Only of a code OK or a detail that cannot be encoded; both are defects, and
		// the code and the message are still true.
		return status.Error(code, message)
	}
	return st.Err()
}
