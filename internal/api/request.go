package api

import (
	"context"
	"time"

	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/execution"
	"github.com/harvest-run/executord/internal/fault"
	"google.golang.org/protobuf/types/known/durationpb"
)

// startRequest is what ExecuteRequest and StartExecutionRequest have in common.
type startRequest interface {
	GetParent() string
	GetCommand() *executorv1.Command
	GetLimits() *executorv1.Limits
	GetOutputPolicy() *executorv1.OutputPolicy
	GetLabels() map[string]string
	GetDetachPolicy() *executorv1.DetachPolicy
	GetNetwork() *executorv1.NetworkPolicy
	GetEngine() string
	GetPlacement() *executorv1.Placement
}

// newRequest turns a request into the domain's. What the rules of the protos cannot say
// the domain checks: it names the fields as the protos do.
func newRequest(ctx context.Context, req startRequest) (execution.Request, error) {
	session, err := parseParent(req.GetParent())
	if err != nil {
		return execution.Request{}, err
	}
	command, err := newCommand(req.GetCommand())
	if err != nil {
		return execution.Request{}, err
	}
	policies, err := policiesOf(req.GetOutputPolicy(), req.GetDetachPolicy())
	if err != nil {
		return execution.Request{}, err
	}
	return execution.Request{
		Caller:        callerOf(ctx),
		Policies:      policies,
		Session:       session,
		Engine:        req.GetEngine(),
		Placement:     placementOf(req.GetPlacement()),
		Command:       command,
		Limits:        limitsOf(req.GetLimits()),
		Network:       networkOf(req.GetNetwork()),
		RetainedBytes: req.GetOutputPolicy().GetRetainedBytes(),
		Labels:        req.GetLabels(),
	}, nil
}

func newCommand(c *executorv1.Command) (execution.Command, error) {
	timeout, err := duration("command.timeout", c.GetTimeout())
	if err != nil {
		return execution.Command{}, err
	}
	command := execution.Command{
		Args:             c.GetArgs(),
		Env:              c.GetEnv(),
		WorkingDirectory: c.GetWorkingDirectory(),
		Timeout:          timeout,
		Stdin:            c.GetStdin(),
	}
	if c.GetTerminal() != nil {
		size := sizeOf(c.GetTerminal())
		command.Terminal = &size
	}
	if c.GetGracePeriod() != nil {
		grace, err := duration("command.grace_period", c.GetGracePeriod())
		if err != nil {
			return execution.Command{}, err
		}
		command.GracePeriod = &grace
	}
	if command.IdleTimeout, err = duration("command.idle_timeout", c.GetIdleTimeout()); err != nil {
		return execution.Command{}, err
	}
	if code := c.GetCode(); code != nil {
		if command.Language, err = languageOf(code.GetLanguage()); err != nil {
			return execution.Command{}, err
		}
		command.Source = code.GetSource()
	}
	return command, nil
}

// duration reads a duration, 0 if it is absent.
func duration(path string, d *durationpb.Duration) (time.Duration, error) {
	if d == nil {
		return 0, nil
	}
	if err := d.CheckValid(); err != nil {
		return 0, fault.InvalidField(reasonInvalidField, path, "is not a duration: seconds and nanos must be in range and have the same sign")
	}
	return d.AsDuration(), nil
}

// heartbeatInterval reads how long a stream may be silent.
func heartbeatInterval(d *durationpb.Duration) (time.Duration, error) {
	interval, err := duration("heartbeat_interval", d)
	if interval == 0 && err == nil {
		interval = defaultHeartbeat
	}
	return interval, err
}

func languageOf(l executorv1.Language) (execution.Language, error) {
	switch l {
	case executorv1.Language_LANGUAGE_PYTHON:
		return execution.Python, nil
	case executorv1.Language_LANGUAGE_BASH:
		return execution.Bash, nil
	case executorv1.Language_LANGUAGE_NODE:
		return execution.Node, nil
	default:
		return "", fault.InvalidField(reasonInvalidField, "command.code.language", "must be one of the languages")
	}
}

// The names of the streams in the domain.
const (
	stdout = "stdout"
	stderr = "stderr"
)

func streamName(s executorv1.Stream) (string, error) {
	switch s {
	case executorv1.Stream_STREAM_STDOUT:
		return stdout, nil
	case executorv1.Stream_STREAM_STDERR:
		return stderr, nil
	default:
		return "", fault.InvalidField(reasonInvalidField, "stream", "must be STREAM_STDOUT or STREAM_STDERR")
	}
}

// cursorOf reads a cursor; nil, the start, for one that names no place.
func cursorOf(c *executorv1.Cursor) *execution.Cursor {
	if c.GetEpoch() == "" && c.GetSequence() == 0 {
		return nil
	}
	return &execution.Cursor{Epoch: c.GetEpoch(), Sequence: c.GetSequence()}
}

func limitsOf(l *executorv1.Limits) engine.Limits {
	return engine.Limits{MemoryBytes: l.GetMemoryBytes(), CPUMillis: l.GetCpuMillis(), PIDs: l.GetPids(), DiskBytes: l.GetDiskBytes(), OpenFiles: l.GetOpenFiles()}
}

func placementOf(p *executorv1.Placement) engine.Placement {
	return engine.Placement{GPU: p.GetGpu(), Regions: p.GetRegions(), Runtime: p.GetRuntime()}
}
