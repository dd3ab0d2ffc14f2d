package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/harvest-run/executord/client"
	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
)

// errLeft is the cause when the user leaves by Ctrl-C.
var errLeft = errors.New("left by ctrl-c")

// follower follows one execution to its end.
type follower struct {
	*app
	client *client.Client
	// cancels: the first Ctrl-C cancels the execution and the second leaves it;
	// otherwise the first leaves.
	cancels bool
	// timeout is what the execution was given, 0 if that is not known.
	timeout time.Duration
	// pace holds events back; nil does not.
	pace *replay
	// title is what a recording is called.
	title string
	// console is this side of an execution that is attached to; nil of one that is not.
	console *console
}

// sink takes the events of an execution.
type sink interface {
	event(e *executorv1.Event) error
	// end is called once the result has come and everything is proved.
	end(ctx context.Context, s *client.Stream) error
}

// follow opens a stream and passes its events on until the result. The error is an
// status for the remote exit code, or an own failure.
func (f *follower) follow(ctx context.Context, open func(context.Context) (*client.Stream, error)) error {
	ctx, leave := context.WithCancelCause(ctx)
	interrupts, unsubscribe := f.signals(os.Interrupt)
	defer unsubscribe()
	opened := make(chan *client.Stream, 1)
	var background sync.WaitGroup
	background.Go(func() {
		select {
		case <-interrupts:
		case <-ctx.Done():
			return
		}
		if f.cancels {
			f.say("cancelling; ctrl-c again leaves it")
			background.Go(func() { f.cancel(ctx, opened) })
			select {
			case <-interrupts:
			case <-ctx.Done():
				return
			}
		}
		leave(errLeft)
	})
	// Nothing is left of the waiting once the end is known.
	defer background.Wait()
	defer leave(nil)

	s, err := open(ctx)
	if err != nil {
		if errors.Is(context.Cause(ctx), errLeft) {
			f.say("%s", client.Message(err))
			return exitStatus(exitLeft)
		}
		return err
	}
	defer s.Close()
	opened <- s
	if f.console != nil {
		defer f.console.end()
		if err := f.console.begin(ctx, &background, leave); err != nil {
			return err
		}
	}
	err = f.pump(ctx, s)
	if f.console != nil {
		f.console.end()
	}
	if sig, ok := errors.AsType[signalled](err); ok {
		f.say("left %s, which goes on", s.Name())
		fmt.Fprintf(f.stderr, "hint: %s\n", f.onwards(s))
		return exitStatus(exitSignal + int(sig.Signal))
	}
	if errors.Is(err, errDetached) {
		f.say("left %s, which goes on", s.Name())
		fmt.Fprintf(f.stderr, "hint: %s\n", f.onwards(s))
		return nil
	}
	if errors.Is(err, errLeft) {
		f.say("left %s, which goes on", s.Name())
		fmt.Fprintf(f.stderr, "hint: %s\n", f.onwards(s))
		return exitStatus(exitLeft)
	}
	// What the server says about the request has hints of its own.
	if _, code := errors.AsType[exitStatus](err); err != nil && !code && s.Result() == nil && client.Reason(err) == "" {
		err = hinted{err, f.onwards(s)}
	}
	return err
}

// attach opens an attachment and follows it as follow does a stream.
func (f *follower) attach(ctx context.Context, open func(context.Context) (*client.Attachment, error)) error {
	return f.follow(ctx, func(ctx context.Context) (*client.Stream, error) {
		a, err := open(ctx)
		if err != nil {
			return nil, err
		}
		f.console.attachment = a
		return a.Stream, nil
	})
}

// pump passes events on until the result.
func (f *follower) pump(ctx context.Context, s *client.Stream) error {
	to := f.sink()
	for {
		e, err := s.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		if f.pace != nil {
			if err := f.pace.await(ctx, e); err != nil {
				return err
			}
		}
		if g := e.GetGap(); g != nil {
			f.tellGap(g)
		}
		if w := e.GetDeadlineWarning(); w != nil {
			f.tellDeadline(w)
		}
		if err := to.event(e); err != nil {
			return err
		}
	}
	if err := to.end(ctx, s); err != nil {
		return err
	}
	if text := ending(s.Result(), f.timeout); text != "" {
		f.say("%s", text)
	}
	if code := exitCode(s.Result()); code != 0 {
		return exitStatus(code)
	}
	return nil
}

// cancel cancels the execution as soon as it has a name. The stream then tells its
// end.
func (f *follower) cancel(ctx context.Context, opened <-chan *client.Stream) {
	var s *client.Stream
	select {
	case s = <-opened:
	case <-ctx.Done():
		return
	}
	_, err := f.client.Cancel(ctx, &executorv1.CancelExecutionRequest{Name: s.Name(), Requester: f.who("ctrl-c")})
	if err != nil && ctx.Err() == nil {
		f.say("%s", client.Message(err))
	}
}

// onwards is the command that goes on where the stream is.
func (f *follower) onwards(s *client.Stream) string {
	text := "executorctl executions watch " + s.Name()
	if f.console != nil {
		text = "executorctl executions attach " + s.Name()
	}
	if at := s.Cursor(); at.GetSequence() > 0 {
		text += " --after " + formatCursor(at)
	}
	return text
}

// tellGap says what is missing.
func (f *follower) tellGap(g *executorv1.Gap) {
	var why string
	switch g.GetReason() {
	case executorv1.Gap_REASON_RETENTION:
		why = "the server kept no more"
	case executorv1.Gap_REASON_EPOCH_CHANGED:
		why = "the server had to begin a new log"
	case executorv1.Gap_REASON_DAMAGED:
		why = "the server's log is damaged"
	default:
		why = "for a reason that this version does not know"
	}
	var resume []string
	for _, r := range g.GetResume() {
		resume = append(resume, fmt.Sprintf("%s goes on at byte %d", strings.ToLower(enumName(r.GetStream(), "STREAM")), r.GetOffset()))
	}
	text := "output is missing here: " + why
	if n := g.GetMissingEvents(); n > 0 {
		text += fmt.Sprintf("; %d events", n)
	}
	if len(resume) > 0 {
		text += "; " + strings.Join(resume, ", ")
	}
	f.say("%s", text)
}

func (f *follower) sink() sink {
	switch f.format {
	case "json":
		return &collector{follower: f}
	case "jsonl":
		return &lines{follower: f}
	case "asciicast":
		return &cast{follower: f}
	default:
		return &copier{follower: f}
	}
}

// copier passes the program's output through.
type copier struct{ *follower }

func (c *copier) event(e *executorv1.Event) error {
	o := e.GetOutput()
	switch o.GetStream() {
	case executorv1.Stream_STREAM_STDOUT:
		if _, err := c.stdout.Write(o.GetData()); err != nil {
			return fmt.Errorf("write stdout: %w", err)
		}
	case executorv1.Stream_STREAM_STDERR:
		if _, err := c.stderr.Write(o.GetData()); err != nil {
			return fmt.Errorf("write stderr: %w", err)
		}
	}
	return nil
}

func (c *copier) end(context.Context, *client.Stream) error { return nil }

// lines prints each event as a line of JSON.
type lines struct{ *follower }

func (l *lines) event(e *executorv1.Event) error {
	text, err := protoJSON(e)
	if err != nil {
		return err
	}
	return l.line(text)
}

func (l *lines) end(context.Context, *client.Stream) error { return nil }

// collector keeps all output for one object at the end.
type collector struct {
	*follower
	stdout, stderr bytes.Buffer
}

func (c *collector) event(e *executorv1.Event) error {
	o := e.GetOutput()
	switch o.GetStream() {
	case executorv1.Stream_STREAM_STDOUT:
		c.stdout.Write(o.GetData())
	case executorv1.Stream_STREAM_STDERR:
		c.stderr.Write(o.GetData())
	}
	return nil
}

func (c *collector) end(ctx context.Context, s *client.Stream) error {
	sum := summarize(s.Name(), s.Result(), c.stdout.Bytes(), c.stderr.Bytes(), s.Whole())
	// Where it ran is not in the log. Without it the rest is worth no less.
	if answer, err := c.client.Executor().GetExecution(ctx, &executorv1.GetExecutionRequest{Name: s.Name()}); err != nil {
		c.say("where it ran is not known: %s", client.Message(err))
	} else {
		sum.Engine, sum.Sandbox = answer.GetExecution().GetEngine(), answer.GetExecution().GetSandbox()
	}
	e := json.NewEncoder(c.app.stdout)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	if err := e.Encode(sum); err != nil {
		return fmt.Errorf("write stdout: %w", err)
	}
	return nil
}
