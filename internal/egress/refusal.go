package egress

import (
	"errors"
	"fmt"
	"net/http"
	"strings"
)

// refusal is why a target is not reached, for programs and for people.
type refusal struct {
	reason string
	text   string
	remedy string
}

func refuse(reason, format string, args ...any) *refusal {
	return &refusal{reason: reason, text: fmt.Sprintf(format, args...)}
}

// allowedBy adds the flag of executorctl with the rule that would allow it.
func (r *refusal) allowedBy(rule string) *refusal {
	r.remedy = "--allow " + rule
	return r
}

// Error tells what is refused and why.
func (r *refusal) Error() string { return r.text }

// body is the answer to a refused request.
func (r *refusal) body() string {
	var b strings.Builder
	fmt.Fprintf(&b, "executord refused this connection (%s): %s.\n", r.reason, r.text)
	if r.remedy != "" {
		fmt.Fprintf(&b, "To allow it, make the sandbox with %s (executorctl), or with such a rule in network.rules (API).\n", r.remedy)
	}
	return b.String()
}

// unreachable is why a target that is allowed is not reached.
type unreachable struct {
	status int
	err    error
}

func (u *unreachable) Error() string { return u.err.Error() }
func (u *unreachable) Unwrap() error { return u.err }

// fail answers a request that reaches nothing. The connection ends with it: each
// refusal costs its client a new one, and these are paced.
func fail(w http.ResponseWriter, err error) {
	header := w.Header()
	header.Set("Content-Type", "text/plain; charset=utf-8")
	header.Set("X-Content-Type-Options", "nosniff")
	header.Set("Connection", "close")
	status, body := http.StatusBadGateway, "executord could not reach it: "+err.Error()+".\n"
	if r, ok := errors.AsType[*refusal](err); ok {
		status, body = http.StatusForbidden, r.body()
		if r.reason == badTarget {
			status = http.StatusBadRequest
		}
		header.Set("Executord-Refused", r.reason)
	} else if u, ok := errors.AsType[*unreachable](err); ok {
		status = u.status
	}
	w.WriteHeader(status)
	_, _ = w.Write([]byte(body)) // a client that does not read it has left
}
