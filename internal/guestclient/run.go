package guestclient

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
)

// Command is a program that is run to its end, for executord's own ends: no execution,
// no log.
type Command struct {
	// ID, of 1 to 59 characters of a-z, 0-9 and "-", names the command for as long as the
	// sandbox lives: what an earlier run of this name left, perhaps one of an executord
	// that was killed, is ended first. Two runs of one name must not be under way at the
	// same time. "" makes a name that nobody else has. It cannot be that of an execution.
	ID string
	// Args are the program and its arguments; no shell.
	Args []string
	// Env are variables, beside PATH, HOME and LANG where they are not among them.
	Env map[string]string
	// Dir is the working directory; it must exist. "" is the root.
	Dir string
	// Input is what the program reads.
	Input []byte
	// Timeout ends the command, with TERM and two seconds later with KILL; Exit.StopCause
	// tells. 0 never does.
	Timeout time.Duration
	// Limit bounds what Run keeps of each stream, in bytes; 0 is DefaultLimit. RunStream
	// does not look at it.
	Limit int
	// OpenFiles bounds the open files of each process; 0 does not. Whoever starts commands
	// in a sandbox with such a limit gives it here.
	OpenFiles int64
}

// errRunOver ends the input of a command that has ended.
var errRunOver = errors.New("the command has ended")

// DefaultLimit is how much of a stream Run keeps if nothing else is said.
const DefaultLimit = 1 << 20

const (
	// runPrefix begins the ids of commands that are run. Executions' have none like it.
	runPrefix = "run-"
	// runGrace lies between TERM and KILL.
	runGrace = 2 * time.Second
	// runRead is how much output is asked for at a time.
	runRead = 256 << 10
	// cleanTime bounds what is done about a command after its caller has gone.
	cleanTime = 10 * time.Second
)

// Outcome is what a command wrote, and how it ended.
type Outcome struct {
	// Exit is never nil.
	Exit *guestv1.Exit
	// Stdout is the first that it wrote there, Stderr the last: errors come at the end.
	Stdout, Stderr []byte
	// Truncated says that there was more of one of them.
	Truncated bool
}

// Code is the exit code; 128 and the number of the signal that ended it, as in a shell.
func (o Outcome) Code() int {
	if s, ok := o.Exit.GetStatus().(*guestv1.Exit_Signal); ok {
		return 128 + int(s.Signal)
	}
	return int(o.Exit.GetCode())
}

// Run runs a command to its end. The error is about the run and nil for a program that
// failed; an Error says why there was none. If ctx ends the command is ended with KILL.
func (c *Client) Run(ctx context.Context, command Command) (Outcome, error) {
	limit := cmp.Or(max(command.Limit, 0), DefaultLimit)
	var out Outcome
	exit, err := c.RunStream(ctx, command, func(stream guestv1.Stream, data []byte) error {
		if stream == guestv1.Stream_STREAM_STDOUT {
			n := min(len(data), limit-len(out.Stdout))
			out.Stdout = append(out.Stdout, data[:n]...)
			out.Truncated = out.Truncated || n < len(data)
			return nil
		}
		out.Stderr = append(out.Stderr, data...)
		if len(out.Stderr) > 2*limit { // cut now and then, not each time
			out.Stderr, out.Truncated = bytes.Clone(last(out.Stderr, limit)), true
		}
		return nil
	})
	out.Truncated = out.Truncated || len(out.Stderr) > limit
	out.Exit, out.Stderr = exit, last(out.Stderr, limit)
	return out, err
}

func last(b []byte, n int) []byte { return b[len(b)-min(n, len(b)):] }

// RunStream is Run for more output than is to be kept: sink gets it piece by piece, in
// the order in which it was written. Its data is valid until it returns; its error ends
// the command and is returned.
func (c *Client) RunStream(ctx context.Context, command Command, sink func(stream guestv1.Stream, data []byte) error) (*guestv1.Exit, error) {
	r := command.request()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	if command.ID != "" {
		if err := c.endRun(ctx, r.GetExecution()); err != nil {
			return nil, fmt.Errorf("end the run before: %w", err)
		}
	}
	_, early, err := c.StartRead(ctx, r, runRead, maxWait)
	if err != nil {
		if KindOf(err) == guestv1.Error_KIND_UNSPECIFIED {
			err = errors.Join(err, c.abandonRun(ctx, r.GetExecution())) // it may run
		}
		return nil, err
	}
	var writer sync.WaitGroup
	feeding, over := context.WithCancelCause(ctx)
	writer.Go(func() {
		if err := c.feed(feeding, r, command.Input); err != nil && feeding.Err() == nil {
			cancel(err)
		}
	})
	exit, err := c.followRun(ctx, r.GetExecution(), early, sink)
	over(errRunOver)
	writer.Wait()
	if err != nil {
		return nil, errors.Join(err, c.abandonRun(ctx, r.GetExecution()))
	}
	// Not held against the run: it is over, and a later one of its name releases it too.
	_ = c.Release(ctx, r.GetExecution())
	return exit, nil
}

// IsRun says whether a command that a guest holds is one of Run's, whose output somebody
// may be reading.
func IsRun(id string) bool { return strings.HasPrefix(id, runPrefix) }

// request makes the request that starts a command.
func (c Command) request() *guestv1.StartRequest {
	id := runPrefix + c.ID
	if c.ID == "" {
		id = runPrefix + strings.ToLower(rand.Text())
	}
	env := map[string]string{
		"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LANG": "C.UTF-8",
	}
	maps.Copy(env, c.Env)
	env["EXECUTOR_EXECUTION"] = id // by it a guest without control groups knows the command's own
	r := &guestv1.StartRequest{
		Execution: id, Args: c.Args, WorkingDirectory: cmp.Or(c.Dir, "/"), Stdin: len(c.Input) > 0,
		TimeoutMs: uint64(milliseconds(c.Timeout)), GraceMs: uint64(milliseconds(runGrace)), OpenFiles: uint64(max(c.OpenFiles, 0)),
	}
	for _, name := range slices.Sorted(maps.Keys(env)) {
		r.Env = append(r.Env, name+"="+env[name])
	}
	return r
}

// feed writes the input. A program need not read all of it.
func (c *Client) feed(ctx context.Context, r *guestv1.StartRequest, input []byte) error {
	for offset := 0; r.GetStdin(); {
		data := input[offset:min(offset+MaxWrite, len(input))]
		end := offset+len(data) == len(input)
		w, err := c.Write(ctx, r.GetExecution(), int64(offset), data, end, maxWriteWait)
		switch kind := KindOf(err); {
		case kind == guestv1.Error_KIND_CLOSED, kind == guestv1.Error_KIND_ENDED, kind == guestv1.Error_KIND_NOT_FOUND:
			return nil
		case err != nil:
			return fmt.Errorf("write the input of a command: %w", err)
		case w.Committed > int64(len(input)) || w.Committed < int64(offset):
			return errWrongAnswer
		case w.Closed:
			return nil
		}
		offset = int(w.Committed)
	}
	return nil
}

// followRun reads a command to its end.
func (c *Client) followRun(ctx context.Context, id string, early *Early, sink func(guestv1.Stream, []byte) error) (*guestv1.Exit, error) {
	waiting, cancel := context.WithTimeoutCause(ctx, maxWait+patience, errSilent)
	defer cancel()
	out, err := early.Output(waiting)
	if err != nil {
		out, err = c.Read(ctx, id, 0, runRead, maxWait)
	}
	for position := int64(0); err == nil; out, err = c.Read(ctx, id, position, runRead, maxWait) {
		for _, chunk := range out.Chunks {
			position += int64(len(chunk.Data))
			if err := sink(chunk.Stream, chunk.Data); err != nil {
				out.Release()
				return nil, err
			}
		}
		out.Release()
		if out.Exit != nil {
			return out.Exit, nil
		}
	}
	return nil, err
}

// abandonRun ends a command that nobody waits for any more, whatever ended that.
func (c *Client) abandonRun(ctx context.Context, id string) error {
	ctx, cancel := context.WithTimeoutCause(context.WithoutCancel(ctx), cleanTime, errSilent)
	defer cancel()
	if err := c.endRun(ctx, id); err != nil {
		return fmt.Errorf("end a command that nobody waits for: %w", err)
	}
	return nil
}

// endRun ends and releases a command if there is one of this name.
func (c *Client) endRun(ctx context.Context, id string) error {
	err := c.Stop(ctx, id, 0)
	if KindOf(err) == guestv1.Error_KIND_NOT_FOUND {
		return nil
	}
	for err == nil {
		var out *Output
		if out, err = c.Discard(ctx, id, 0, maxWait); err != nil {
			break
		}
		out.Release()
		if out.Exit != nil {
			return c.Release(ctx, id)
		}
	}
	return err
}
