package execution

import (
	"maps"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
	"github.com/harvest-run/executord/internal/fault"
)

// Limits on what a command may carry. They are those of the narrowest engine
// (Modal), so that a command that runs on one runs on all.
const (
	MaxArgsBytes   = 64 << 10
	MaxEnvBytes    = 128 << 10
	MaxSourceBytes = 1 << 20
	MaxTimeout     = 7 * 24 * time.Hour
	MaxGracePeriod = 10 * time.Minute
	// storedSourceBytes is how much of a source is kept to be shown.
	storedSourceBytes = 4 << 10
)

// Validate returns a fault (Invalid) that names the field that is wrong.
func (c Command) Validate() error {
	switch {
	case c.Source == "" && c.Language == "" && len(c.Args) == 0:
		return fault.InvalidField("COMMAND_EMPTY", "command.args", "neither args nor code says what to run")
	case (c.Source != "" || c.Language != "") && len(c.Args) > 0:
		return fault.InvalidField("COMMAND_AMBIGUOUS", "command.args", "must not be set together with code")
	case len(c.Args) > 0 && c.Args[0] == "":
		return fault.InvalidField("COMMAND_EMPTY", "command.args[0]", "the program must not be empty")
	}
	total := 0
	for i, a := range c.Args {
		total += len(a) + 1 // with the byte that ends it, as the kernel counts
		if err := noNUL("command.args["+strconv.Itoa(i)+"]", a); err != nil {
			return err
		}
	}
	if total > MaxArgsBytes {
		return fault.InvalidField("ARGS_TOO_LARGE", "command.args", "all elements together have %d bytes, at most %d are allowed; pass large data as a file", total, MaxArgsBytes).
			With("limit", strconv.Itoa(MaxArgsBytes))
	}
	if len(c.Args) == 0 {
		if _, ok := interpreters()[c.Language]; !ok {
			return fault.InvalidField("LANGUAGE_UNKNOWN", "command.code.language", "%q is not one of python, bash, node", c.Language)
		}
		if c.Source == "" || len(c.Source) > MaxSourceBytes {
			return fault.InvalidField("SOURCE_SIZE", "command.code.source", "has %d bytes, 1 to %d are allowed", len(c.Source), MaxSourceBytes)
		}
	}
	return c.validateSurroundings()
}

func (c Command) validateSurroundings() error {
	total := 0
	for _, name := range slices.Sorted(maps.Keys(c.Env)) {
		field := "command.env[" + strconv.Quote(name) + "]"
		if name == "" || strings.ContainsAny(name, "=\x00") {
			return fault.InvalidField("ENV_NAME", field, "a name must not be empty and must not contain '=' or a NUL byte")
		}
		if err := noNUL(field, c.Env[name]); err != nil {
			return err
		}
		total += len(name) + len(c.Env[name]) + 2
	}
	if total > MaxEnvBytes {
		return fault.InvalidField("ENV_TOO_LARGE", "command.env", "all variables together have %d bytes, at most %d are allowed", total, MaxEnvBytes).
			With("limit", strconv.Itoa(MaxEnvBytes))
	}
	if err := noNUL("command.working_directory", c.WorkingDirectory); err != nil {
		return err
	}
	if c.WorkingDirectory != "" && !path.IsAbs(c.WorkingDirectory) {
		return fault.InvalidField("WORKING_DIRECTORY", "command.working_directory", "%q is not absolute", c.WorkingDirectory)
	}
	if c.Timeout < 0 || c.Timeout > MaxTimeout || c.Timeout%time.Millisecond != 0 {
		return fault.InvalidField("TIMEOUT", "command.timeout", "must be whole milliseconds up to %v, not %v", MaxTimeout, c.Timeout)
	}
	if g := c.GracePeriod; g != nil && (*g < 0 || *g > MaxGracePeriod) {
		return fault.InvalidField("GRACE_PERIOD", "command.grace_period", "must be 0 to %v, not %v", MaxGracePeriod, *g)
	}
	if d := c.IdleTimeout; d != 0 && (d < MinIdleTimeout || d > MaxIdleTimeout || d%time.Millisecond != 0) {
		return fault.InvalidField("IDLE_TIMEOUT", "command.idle_timeout", "must be whole milliseconds from %v to %v, not %v", MinIdleTimeout, MaxIdleTimeout, d)
	}
	if c.Terminal != nil {
		return c.Terminal.Validate("command.terminal")
	}
	return nil
}

func noNUL(field, text string) error {
	if strings.ContainsRune(text, 0) {
		return fault.InvalidField("NUL_BYTE", field, "must not contain a NUL byte")
	}
	return nil
}

// withDefaults fills in what was not said.
func (c Command) withDefaults() Command {
	if c.Timeout == 0 {
		c.Timeout = DefaultTimeout
	}
	if c.GracePeriod == nil {
		grace := DefaultGracePeriod
		c.GracePeriod = &grace
	}
	if c.WorkingDirectory == "" {
		c.WorkingDirectory = DefaultWorkingDirectory
	}
	return c
}

// Stored returns the command as it may be kept and shown: without the values of
// variables, which are often secrets, and with the beginning of a long source.
func (c Command) Stored() Command {
	if c.Env != nil {
		names := make(map[string]string, len(c.Env))
		for name := range c.Env {
			names[name] = ""
		}
		c.Env = names
	}
	if len(c.Source) > storedSourceBytes {
		cut := storedSourceBytes
		for cut > 0 && !utf8.RuneStart(c.Source[cut]) {
			cut--
		}
		c.Source = c.Source[:cut]
	}
	return c
}

// interpreter is how a language's source is run.
type interpreter struct {
	// programs to try, the first that is found is taken, and their arguments before
	// the file.
	programs []string
	args     []string
	file     string
	// pkg is the Debian package that has the program.
	pkg string
}

func interpreters() map[Language]interpreter {
	return map[Language]interpreter{
		// -u: what is printed is seen when it is printed, not when a buffer is full.
		Python: {programs: []string{"python3", "python"}, args: []string{"-u"}, file: "main.py", pkg: "python3"},
		Bash:   {programs: []string{"bash"}, file: "main.sh", pkg: "bash"},
		Node:   {programs: []string{"node", "nodejs"}, file: "main.js", pkg: "nodejs"},
	}
}

// startRequest says to the guest what the command says, for the i-th program of its
// interpreter; false when there is no such.
func (c Command) startRequest(id string, i int) (*guestv1.StartRequest, bool) {
	r := &guestv1.StartRequest{
		Execution: id, Args: c.Args, Env: c.environment(id),
		WorkingDirectory: c.WorkingDirectory,
		// The default directory is promised; one that was asked for must be there.
		CreateWorkingDirectory: c.WorkingDirectory == DefaultWorkingDirectory,
		TimeoutMs:              uint64(c.Timeout.Milliseconds()),
		GraceMs:                uint64(c.GracePeriod.Milliseconds()),
		IdleMs:                 uint64(c.IdleTimeout.Milliseconds()),
		Stdin:                  c.Stdin,
	}
	if c.Terminal != nil {
		r.Terminal = c.Terminal.proto()
	}
	if len(c.Args) > 0 {
		return r, i == 0
	}
	how := interpreters()[c.Language]
	if i >= len(how.programs) {
		return nil, false
	}
	r.Args = append(append([]string{how.programs[i]}, how.args...), "")
	r.SourceArgument = uint32(len(r.Args) - 1)
	r.SourceName, r.Source = how.file, []byte(c.Source)
	return r, true
}

// environment is the sandbox's own and over it the command's.
func (c Command) environment(id string) []string {
	env := map[string]string{
		"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
		"HOME": "/root", "USER": "root", "LOGNAME": "root", "SHELL": "/bin/bash", "LANG": "C.UTF-8", "TERM": "dumb",
	}
	if c.Language == Python && len(c.Args) == 0 {
		// The source lies in a directory of its own, but its imports are those of the
		// working directory, as with `python3 -c`.
		env["PYTHONPATH"] = c.WorkingDirectory
	}
	if c.Trace != "" {
		env["TRACEPARENT"] = c.Trace
	}
	if c.Terminal != nil {
		env["TERM"] = "xterm-256color" // what nearly every terminal understands
	}
	maps.Copy(env, c.Env)
	// Last, and not to be overruled: where there are no control groups the guest knows
	// the command's processes by it.
	env["EXECUTOR_EXECUTION"] = id
	list := make([]string, 0, len(env))
	for name, value := range env {
		list = append(list, name+"="+value)
	}
	slices.Sort(list)
	return list
}
