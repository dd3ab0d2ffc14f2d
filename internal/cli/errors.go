package cli

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/harvest-run/executord/client"
)

// usageError is a wrong command line.
type usageError struct{ text string }

func (e usageError) Error() string { return e.text }

func usagef(format string, args ...any) error { return usageError{fmt.Sprintf(format, args...)} }

// exitStatus is an exit code that needs no further words.
type exitStatus int

func (s exitStatus) Error() string { return fmt.Sprintf("exit code %d", int(s)) }

// hinted is an error that knows better than the server's reason what to do about it.
type hinted struct {
	error
	hint string
}

func (h hinted) Unwrap() error { return h.error }

// failure is an error of a command that passes on the remote exit code.
type failure struct{ error }

func (f failure) Unwrap() error { return f.error }

// ownFailures marks the errors of a command that passes on the remote exit code, so
// that they cannot be taken for it.
func ownFailures(run func(*cobra.Command, []string) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error {
		if err := run(cmd, args); err != nil {
			return failure{err}
		}
		return nil
	}
}

// exit tells the error of a command and chooses the exit code.
func (a *app) exit(cmd *cobra.Command, err error) int {
	if err == nil {
		return 0
	}
	if code, ok := errors.AsType[exitStatus](err); ok {
		return int(code)
	}
	a.say("%s", client.Message(err))
	if _, ok := errors.AsType[usageError](err); ok || !a.understood {
		fmt.Fprintf(a.stderr, "hint: %s --help\n", cmd.CommandPath())
		return exitUsage
	}
	for _, v := range client.Violations(err) {
		fmt.Fprintf(a.stderr, "  %s: %s\n", printable(v.Field), printable(v.Description))
	}
	if hint := a.hint(err); hint != "" {
		fmt.Fprintf(a.stderr, "hint: %s\n", printable(hint))
	}
	if _, ok := errors.AsType[failure](err); ok {
		return exitOwn
	}
	return exitFailure
}

// hint says what to do about an error; "" if there is nothing to say.
func (a *app) hint(err error) string {
	if h, ok := errors.AsType[hinted](err); ok {
		return h.hint
	}
	switch {
	case errors.Is(err, client.ErrUnconfirmed):
		return "executorctl executions list and session list show what became of it"
	case errors.Is(err, client.ErrHole), errors.Is(err, client.ErrProtocol):
		return "the server may be older or newer than this executorctl; compare executorctl version and executorctl admin info"
	}
	switch client.Reason(err) {
	case "":
		switch {
		case client.Unavailable(err):
			return fmt.Sprintf("is executord running at %s? make up, or executord serve", a.address)
		case client.Unimplemented(err):
			return "the server is older than this executorctl, or is no executord"
		}
	case "CREDENTIALS_MISSING":
		return "give an API key: --api-key-file FILE, or the variable " + KeyVar
	case "KEY_INVALID", "KEY_EXPIRED", "KEY_REVOKED":
		return "an admin makes another one: executorctl auth keys create"
	case "TOKEN_EXPIRED", "TOKEN_INVALID":
		return "get a new token from its issuer; executorctl auth whoami tries it"
	case "ROLE_REQUIRED":
		return "executorctl auth whoami says what you may do"
	case "KEY_NOT_FOUND":
		return "executorctl auth keys list --all shows what there is"
	case "QUOTA_EXCEEDED":
		return "end or delete something of yours, or try again later"
	case "SERVER_DRAINING":
		return "the server is stopping; try again when it is back"
	case "QUEUE_FULL", "QUEUE_TIMEOUT":
		return "the server is at its limit, try again later; executorctl admin info shows how much runs"
	case "LIMIT_NOT_ENFORCEABLE":
		return "executorctl doctor says what the server's host can enforce"
	case "LIMITS_WITH_PARENT":
		return "the limits of a session are those it was created with"
	case "EXECUTION_NOT_FOUND":
		return "executorctl executions list shows what there is"
	case "WRITER_ATTACHED":
		return "--take-over ends the other's attachment; executorctl executions watch only follows"
	case "WRITER_TAKEN_OVER":
		return "it goes on; executorctl executions attach --take-over takes it back"
	case "STDIN_NOT_OPEN":
		return "only what is started with -i or -t takes input; executorctl executions watch follows any"
	case "EXECUTION_NOT_ENDED":
		return "end it first: executorctl executions cancel"
	case "SESSION_NOT_FOUND", "SESSION_NOT_RUNNING":
		return "executorctl session list --all shows what there is"
	case "ARGS_TOO_LARGE", "ENV_TOO_LARGE":
		return "pass large data as code: executorctl run --file"
	case "OUTPUT_DROPPED":
		if first := client.Metadata(err)["first_offset"]; first != "" {
			return "what is still kept begins at --offset " + first
		}
	case "CURSOR_IN_FUTURE":
		return "without --after the log is told from its start"
	case "DISK_FULL", "STATE_FULL":
		return "make room under the server's --state-dir; it recovers by itself"
	}
	return ""
}
