package api

import (
	"context"
	"strings"

	"github.com/harvest-run/executord/internal/execution"
	"github.com/harvest-run/executord/internal/fault"
	"github.com/harvest-run/executord/internal/session"
	"github.com/harvest-run/executord/internal/turn"
)

const (
	sessionPrefix   = "sessions/"
	executionPrefix = "executions/"
	turnsPart       = "/turns/"
	interactionPart = "/interactions/"
	// anySession is the parent that stands for all sessions.
	anySession = "sessions/-"
)

// executionName is the resource name of an execution.
func executionName(ref execution.Ref) string {
	if ref.Session == "" {
		return executionPrefix + ref.ID
	}
	return sessionPrefix + ref.Session + "/" + executionPrefix + ref.ID
}

// parseExecutionName is its inverse. The rules of the protos let only such names
// through; another is a fault Invalid all the same. The name is the caller's: what it
// does not see does not exist.
func parseExecutionName(ctx context.Context, name string) (execution.Ref, error) {
	ref := execution.Ref{Caller: callerOf(ctx)}
	rest := name
	if after, ok := strings.CutPrefix(name, sessionPrefix); ok {
		ref.Session, rest, ok = strings.Cut(after, "/")
		if !ok || !isID(ref.Session) {
			return execution.Ref{}, errName("executions/{execution} or sessions/{session}/executions/{execution}")
		}
	}
	id, ok := strings.CutPrefix(rest, executionPrefix)
	if !ok || !isID(id) {
		return execution.Ref{}, errName("executions/{execution} or sessions/{session}/executions/{execution}")
	}
	ref.ID = id
	return ref, nil
}

// sessionName is the resource name of a session.
func sessionName(id string) string { return sessionPrefix + id }

// parseSessionName is its inverse, with the caller, as parseExecutionName.
func parseSessionName(ctx context.Context, name string) (session.Ref, error) {
	id, ok := strings.CutPrefix(name, sessionPrefix)
	if !ok || !isID(id) {
		return session.Ref{}, errName("sessions/{session}")
	}
	return session.Ref{ID: id, Caller: callerOf(ctx)}, nil
}

// turnName is the resource name of a turn, interactionName that of an interaction.
func turnName(session, id string) string { return sessionPrefix + session + turnsPart + id }
func interactionName(session, id string) string {
	return sessionPrefix + session + interactionPart + id
}

// parseTurnName is the inverse of turnName, with the caller, as parseExecutionName.
func parseTurnName(ctx context.Context, name string) (turn.Ref, error) {
	return parseInSession(ctx, name, turnsPart, "sessions/{session}/turns/{turn}")
}

// parseInteractionName is the inverse of interactionName, with the caller.
func parseInteractionName(ctx context.Context, name string) (turn.Ref, error) {
	return parseInSession(ctx, name, interactionPart, "sessions/{session}/interactions/{interaction}")
}

func parseInSession(ctx context.Context, name, part, form string) (turn.Ref, error) {
	rest, ok := strings.CutPrefix(name, sessionPrefix)
	session, id, found := strings.Cut(rest, part)
	if !ok || !found || !isID(session) || !isID(id) {
		return turn.Ref{}, errName(form)
	}
	return turn.Ref{Session: session, ID: id, Caller: callerOf(ctx)}, nil
}

// parseSessionParent returns the session's id in a parent that must not be empty.
func parseSessionParent(parent string) (string, error) {
	id, ok := strings.CutPrefix(parent, sessionPrefix)
	if !ok || !isID(id) {
		return "", fault.InvalidField(reasonInvalidField, "parent", "must be sessions/{session}")
	}
	return id, nil
}

// parseParent returns the session's id in a parent, "" for the empty one.
func parseParent(parent string) (string, error) {
	if parent == "" {
		return "", nil
	}
	id, ok := strings.CutPrefix(parent, sessionPrefix)
	if !ok || !isID(id) {
		return "", fault.InvalidField(reasonInvalidField, "parent", "must be empty or sessions/{session}")
	}
	return id, nil
}

func errName(form string) error {
	return fault.InvalidField(reasonInvalidField, "name", "must be %s", form)
}

// isID says whether s is 1 to 63 characters of a-z, 0-9 and "-".
func isID(s string) bool {
	if len(s) < 1 || len(s) > 63 {
		return false
	}
	for i := range len(s) {
		c := s[i]
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' {
			return false
		}
	}
	return true
}
