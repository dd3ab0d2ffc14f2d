package provision

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"time"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
	"github.com/harvest-run/executord/internal/agent/opencode"
	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/guestclient"
)

const (
	// processPrefix begins the guest's names of agents' processes, which are no executions.
	processPrefix = "agent-"
	// processGrace lies between TERM and KILL of one.
	processGrace = 5 * time.Second
	// listenWait is how long one answer about a process is waited for.
	listenWait = 30 * time.Second
	// runTime bounds a short program.
	runTime = 2 * time.Minute
	// maxSaid is how much of what a process wrote last is told when it dies.
	maxSaid = 2 << 10
)

// place is a sandbox as opencode wants it.
type place struct {
	sandbox engine.Sandbox
	guest   *guestclient.Client
	env     func([]string) []string
}

// Start implements opencode.Place. The guest makes one process of one ID, however often it
// is asked.
func (p place) Start(ctx context.Context, process opencode.Process) (opencode.Running, error) {
	id := processPrefix + process.ID
	env := p.env(append([]string{
		"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8", "EXECUTOR_EXECUTION=" + id,
	}, process.Env...))
	_, err := p.guest.Start(ctx, &guestv1.StartRequest{Execution: id, Args: process.Args, Env: env, WorkingDirectory: process.Dir, CreateWorkingDirectory: true})
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", process.Args[0], err)
	}
	return running{p.guest, id}, nil
}

// Run implements opencode.Place.
func (p place) Run(ctx context.Context, args []string) ([]byte, error) {
	out, err := p.guest.Run(ctx, guestclient.Command{Args: args, Dir: "/", Timeout: runTime})
	if err != nil {
		return nil, err
	}
	if code := out.Code(); code != 0 {
		return nil, fmt.Errorf("%s ended with code %d: %s", args[0], code, strings.TrimSpace(string(out.Stderr)))
	}
	return out.Stdout, nil
}

// Dial implements opencode.Place.
func (p place) Dial(ctx context.Context, port uint16) (net.Conn, error) {
	return guestclient.Connect(ctx, p.sandbox, port)
}

// running is a process of an agent.
type running struct {
	guest *guestclient.Client
	id    string
}

// Wait implements opencode.Running. What the process writes is read, and the last of it
// kept to tell why it died.
func (r running) Wait(ctx context.Context) (string, error) {
	var position int64
	var said []byte
	for {
		out, err := r.guest.Read(ctx, r.id, position, 64<<10, listenWait)
		if guestclient.KindOf(err) == guestv1.Error_KIND_INVALID {
			// An executord before this one has read on: only the end is asked for.
			return r.end(ctx)
		}
		if err != nil {
			return "", err
		}
		for _, chunk := range out.Chunks {
			position += int64(len(chunk.Data))
			said = append(said, chunk.Data...)
		}
		if n := len(said) - maxSaid; n > 0 {
			said = append([]byte(nil), said[n:]...)
		}
		exit := out.Exit
		out.Release()
		if exit != nil {
			return r.over(ctx, exit, said)
		}
	}
}

// end waits for the end alone.
func (r running) end(ctx context.Context) (string, error) {
	for {
		out, err := r.guest.Discard(ctx, r.id, 0, listenWait)
		if err != nil {
			return "", err
		}
		exit := out.Exit
		out.Release()
		if exit != nil {
			return r.over(ctx, exit, nil)
		}
	}
}

func (r running) over(ctx context.Context, exit *guestv1.Exit, said []byte) (string, error) {
	how := fmt.Sprintf("it exited with %d", exit.GetCode())
	if s, ok := exit.GetStatus().(*guestv1.Exit_Signal); ok {
		how = fmt.Sprintf("signal %d ended it", s.Signal)
	}
	if text := strings.TrimSpace(strings.ToValidUTF8(string(said), "")); text != "" {
		how += ": " + text
	}
	return how, r.guest.Release(ctx, r.id)
}

// Stop implements opencode.Running.
func (r running) Stop(ctx context.Context) error {
	err := r.guest.Stop(ctx, r.id, processGrace)
	if guestclient.KindOf(err) == guestv1.Error_KIND_NOT_FOUND {
		return nil
	}
	if err != nil {
		return err
	}
	_, err = r.end(ctx)
	if guestclient.KindOf(err) == guestv1.Error_KIND_NOT_FOUND {
		return nil // released by who waited for it
	}
	if ctx.Err() != nil {
		return errors.Join(err, context.Cause(ctx))
	}
	return err
}
