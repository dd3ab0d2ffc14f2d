// Package fault holds the kinds of error that this system tells its callers
// apart. The domain returns them, internal/api turns them into gRPC statuses;
// nothing below the api knows a gRPC code. It imports only the standard library.
package fault

import (
	"errors"
	"fmt"
	"time"
)

// Kind says what a caller can do about an error.
type Kind uint8

// The kinds. Internal is the zero value, so that an error nobody classified is
// treated as ours.
const (
	// Internal is a defect or a broken host; nothing the caller can mend.
	Internal Kind = iota
	// Invalid means that the request itself is wrong, whatever the state.
	Invalid
	// NotFound means that the named thing does not exist for this caller.
	NotFound
	// AlreadyExists means that the thing to be made is there, and is another.
	AlreadyExists
	// FailedPrecondition means that the state must change before a repeat can work.
	FailedPrecondition
	// OutOfRange means that a position lies outside what exists.
	OutOfRange
	// Exhausted means that a quota or the host has no room now.
	Exhausted
	// Unavailable means that the same request may work shortly; only where a retry is right.
	Unavailable
	// Unauthenticated means that the caller did not show who it is.
	Unauthenticated
	// PermissionDenied means that the caller is known and may not do this.
	PermissionDenied
)

// Field is one thing that is wrong with a request.
type Field struct {
	// Path of the field in the request, such as "command.args".
	Path string
	// What is wrong with it and what it should be.
	Description string
}

// Quota is one bound that was reached.
type Quota struct {
	// Subject is what is bounded, and whose: "server:queue", "key:ci".
	Subject string
	// Description says what the bound is and how to get along with it.
	Description string
	// Name of what is bounded, such as "running_executions", and the bound; "" and 0 if
	// Subject says it.
	Name  string
	Limit int64
}

// Exceeded makes an Exhausted error about a caller's quota, with reason QUOTA_EXCEEDED.
// retryAfter says when a repeat may work.
func Exceeded(q Quota, retryAfter time.Duration, format string, args ...any) *Error {
	e := New(Exhausted, "QUOTA_EXCEEDED", format, args...)
	q.Description = e.Message
	e.Quotas, e.RetryAfter = []Quota{q}, retryAfter
	return e.With("quota", q.Name).With("limit", fmt.Sprint(q.Limit))
}

// Error is an error with its kind and the facts a program can act on.
type Error struct {
	Kind Kind
	// Reason is the UPPER_SNAKE_CASE name that programs compare.
	Reason string
	// Message is for people: lower-case, the facts.
	Message string
	// Fields are the wrong fields, for Invalid.
	Fields []Field
	// Quotas are the bounds that were reached, for Exhausted.
	Quotas []Quota
	// Meta are further facts for programs.
	Meta map[string]string
	// RetryAfter says when a repeat may work, for Unavailable and Exhausted; 0 if unknown.
	RetryAfter time.Duration
	// Err is the cause, if another error is it.
	Err error
}

// New makes an error of a kind.
func New(kind Kind, reason, format string, args ...any) *Error {
	return &Error{Kind: kind, Reason: reason, Message: fmt.Sprintf(format, args...)}
}

// Wrap makes an error of a kind with a cause.
func Wrap(err error, kind Kind, reason, format string, args ...any) *Error {
	return &Error{Kind: kind, Reason: reason, Message: fmt.Sprintf(format, args...), Err: err}
}

// InvalidField makes an Invalid error about one field.
func InvalidField(reason, path, format string, args ...any) *Error {
	description := fmt.Sprintf(format, args...)
	return &Error{
		Kind: Invalid, Reason: reason, Message: path + ": " + description,
		Fields: []Field{{Path: path, Description: description}},
	}
}

// With adds a fact for programs and returns the same error.
func (e *Error) With(key, value string) *Error {
	if e.Meta == nil {
		e.Meta = make(map[string]string)
	}
	e.Meta[key] = value
	return e
}

// Error tells the message and the cause.
func (e *Error) Error() string {
	if e.Err != nil {
		return e.Message + ": " + e.Err.Error()
	}
	return e.Message
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// KindOf returns the kind of the first Error in err's chain, Internal if there is none.
func KindOf(err error) Kind {
	if fe, ok := errors.AsType[*Error](err); ok {
		return fe.Kind
	}
	return Internal
}

// ReasonOf returns the reason of the first Error in err's chain, "" if there is none.
func ReasonOf(err error) string {
	if fe, ok := errors.AsType[*Error](err); ok {
		return fe.Reason
	}
	return ""
}
