package client_test

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/harvest-run/executord/client"
	"github.com/harvest-run/executord/client/clienttest"
)

func TestErrorsAreTakenApart(t *testing.T) {
	t.Parallel()
	refused := clienttest.Error(codes.InvalidArgument, "INVALID_FIELD", map[string]string{"limit": "65536"}, "command.args: too long",
		clienttest.Field{Name: "command.args", Description: "too long"}, clienttest.Field{Name: "labels", Description: "too many"})
	tests := []struct {
		name                        string
		err                         error
		reason, message             string
		violations                  []client.Violation
		unavailable, missing, older bool
	}{
		{name: "nil"},
		{name: "plain", err: errors.New("broken"), message: "broken"},
		{name: "context", err: fmt.Errorf("wait: %w", context.Canceled), message: "wait: context canceled"},
		{name: "refused", err: refused, reason: "INVALID_FIELD", message: "command.args: too long",
			violations: []client.Violation{{Field: "command.args", Description: "too long"}, {Field: "labels", Description: "too many"}}},
		{name: "wrapped", err: fmt.Errorf("execute: %w", refused), reason: "INVALID_FIELD", message: "execute: command.args: too long",
			violations: []client.Violation{{Field: "command.args", Description: "too long"}, {Field: "labels", Description: "too many"}}},
		{name: "joined", err: fmt.Errorf("%w for 1m: %w", client.ErrOutage, status.Error(codes.Unavailable, "no route")),
			message: "the server stayed out of reach for 1m: no route", unavailable: true},
		{name: "no connection", err: fmt.Errorf("get x: %w", status.Error(codes.Unavailable, `last error: connection error: desc = "transport: Error while dialing: dial tcp 127.0.0.1:1: connect: connection refused"`)),
			message: "get x: dial tcp 127.0.0.1:1: connect: connection refused", unavailable: true},
		{name: "not found", err: clienttest.Error(codes.NotFound, "EXECUTION_NOT_FOUND", nil, "there is no executions/x"),
			reason: "EXECUTION_NOT_FOUND", message: "there is no executions/x", missing: true},
		{name: "older server", err: status.Error(codes.Unimplemented, "unknown method"), message: "unknown method", older: true},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			if got := client.Reason(test.err); got != test.reason {
				t.Errorf("reason %q, want %q", got, test.reason)
			}
			if got := client.Message(test.err); got != test.message {
				t.Errorf("message %q, want %q", got, test.message)
			}
			if diff := cmp.Diff(test.violations, client.Violations(test.err)); diff != "" {
				t.Errorf("violations (-want +got):\n%s", diff)
			}
			if got := client.Metadata(test.err)["limit"]; (got != "") != (test.violations != nil) {
				t.Errorf("metadata %q", got)
			}
			if client.Unavailable(test.err) != test.unavailable || client.NotFound(test.err) != test.missing || client.Unimplemented(test.err) != test.older {
				t.Error("wrong kind")
			}
		})
	}
}
