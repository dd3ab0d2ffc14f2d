package client

import (
	"errors"
	"io"
	"strings"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Domain is the domain of the ErrorInfo that executord puts into its errors.
const Domain = "executord.harvest.run"

// What can go wrong beside the server's own errors; compare with errors.Is.
var (
	// ErrHole means that an event, or bytes of an output stream, are missing and no
	// Gap said so.
	ErrHole = errors.New("the log has a hole that no gap announced")
	// ErrIncomplete means that what came is not, byte for byte, what the result says
	// the program wrote.
	ErrIncomplete = errors.New("the output is incomplete")
	// ErrProtocol means that the server broke the rules of the stream in another way.
	ErrProtocol = errors.New("the server broke the protocol")
	// ErrOutage means that nothing could be had from the server for MaxOutage. The
	// execution goes on; Watch can go on from Stream.Cursor.
	ErrOutage = errors.New("the server stayed out of reach")
	// ErrUnconfirmed means that a request that changes something went out and no answer
	// came for MaxOutage, or until the context ended: it may have been carried out or not.
	// The same request with the same request_id can still find out.
	ErrUnconfirmed = errors.New("it is not known whether the request was carried out")
	// ErrClosed is what Recv returns after Stream.Close.
	ErrClosed = errors.New("the stream is closed")
)

// errSilent ends an attempt whose stream sent neither an event nor a heartbeat.
var errSilent = errors.New("the stream fell silent")

// errUnreached ends an attempt that got no connection in time.
var errUnreached = errors.New("no connection in time")

// errCutOff stands for a stream that ended with status OK and without a result.
var errCutOff = errors.New("the stream ended without a result")

// Violation is one thing that is wrong with a request.
type Violation struct {
	// Field is its path in the request, such as "command.args".
	Field string
	// Description says what is wrong with it.
	Description string
}

// Reason is the UPPER_SNAKE_CASE reason that the server gave for an error, "" if it
// gave none: an error without one is not executord's but the connection's.
func Reason(err error) string { return info(err).GetReason() }

// Metadata are the facts for programs that the server added to an error; may be nil.
func Metadata(err error) map[string]string { return info(err).GetMetadata() }

// Violations are the fields of the request that the server refused; nil if none.
func Violations(err error) []Violation {
	bad, ok := detail[*errdetails.BadRequest](err)
	if !ok {
		return nil
	}
	var all []Violation
	for _, v := range bad.GetFieldViolations() {
		all = append(all, Violation{Field: v.GetField(), Description: v.GetDescription()})
	}
	return all
}

// Message is an error's text for people: err.Error() with the status in it reduced
// to what the server said, or to why there was no connection.
func Message(err error) string {
	if err == nil {
		return ""
	}
	st, inner := statusOf(err)
	if st == nil {
		return err.Error()
	}
	said := st.Message()
	// gRPC wraps a failed dial three times, and quotes it.
	const dialing = "transport: Error while dialing: "
	if i := strings.Index(said, dialing); i >= 0 && st.Code() == codes.Unavailable {
		said = strings.TrimSuffix(said[i+len(dialing):], `"`)
	}
	return strings.Replace(err.Error(), inner.Error(), said, 1)
}

// Unavailable says whether the server could not be reached or asked to try again.
func Unavailable(err error) bool { return code(err) == codes.Unavailable }

// Unauthenticated says whether the server does not know who is calling.
func Unauthenticated(err error) bool { return code(err) == codes.Unauthenticated }

// NotFound says whether the server does not know what was named.
func NotFound(err error) bool { return code(err) == codes.NotFound }

// Unimplemented says whether the server does not know the call: it is older than
// this client.
func Unimplemented(err error) bool { return code(err) == codes.Unimplemented }

// statusOf finds the status in err's chain and the error that carries it; nil if
// there is none. It does not use status.FromError, which mixes the text of the
// wrapping errors into the status.
func statusOf(err error) (*status.Status, error) {
	type carrier interface {
		error
		GRPCStatus() *status.Status
	}
	if c, ok := errors.AsType[carrier](err); ok {
		if st := c.GRPCStatus(); st != nil {
			return st, c
		}
	}
	return nil, nil
}

// code is the gRPC code in err's chain; OK if there is no status.
func code(err error) codes.Code {
	st, _ := statusOf(err)
	return st.Code()
}

// info is the ErrorInfo in err's chain; nil if there is none.
func info(err error) *errdetails.ErrorInfo {
	i, _ := detail[*errdetails.ErrorInfo](err)
	return i
}

// retryDelay is how long the server asked to wait; 0 if it did not.
func retryDelay(err error) time.Duration {
	r, ok := detail[*errdetails.RetryInfo](err)
	if !ok {
		return 0
	}
	return max(0, r.GetRetryDelay().AsDuration())
}

// detail finds the first detail of type D in the status of err's chain.
func detail[D any](err error) (found D, ok bool) {
	st, _ := statusOf(err)
	if st == nil {
		return found, false
	}
	for _, d := range st.Details() {
		if found, ok = d.(D); ok {
			return found, true
		}
	}
	return found, false
}

// resumable says whether a failure is the connection's, so that going on from the
// cursor is right, and not the server's word on the request.
func resumable(err error) bool {
	if errors.Is(err, io.EOF) || errors.Is(err, errCutOff) || errors.Is(err, errSilent) || errors.Is(err, errUnreached) {
		return true
	}
	switch code(err) {
	case codes.Unavailable:
		return true
	case codes.ResourceExhausted:
		// The server ends the stream of a reader that fell asleep; it may come back.
		return Reason(err) == "SLOW_CONSUMER"
	case codes.Internal, codes.Unknown, codes.Canceled, codes.DeadlineExceeded, codes.Aborted:
		// gRPC's own words for a stream that was reset or a proxy that gave up. With a
		// reason it is executord's word, and stands.
		return Reason(err) == ""
	default:
		return false
	}
}
