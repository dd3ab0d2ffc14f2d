// Package guest is the program that runs in every sandbox, on every engine, and
// owns the processes inside: it starts them, keeps their output until executord has
// it, stops their whole trees and tells how they ended. It speaks the protocol of
// proto/harvest/guest/v1 over any byte pipe. It trusts executord and nothing else.
//
// It is small on purpose: protobuf, x/sys and the standard library. It keeps
// running while executord is away.
package guest

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"slices"
	"sync"
	"time"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
	"github.com/harvest-run/executord/internal/guest/wire"
)

const (
	maxWait = time.Minute
	// maxInFlight bounds the requests of one pipe that are being worked on.
	maxInFlight = 4096
)

// Config says how a Guest starts programs.
type Config struct {
	// Confine is run once on the thread that starts every program; what it gives up
	// is given up by all of them. Nil gives up nothing.
	Confine func() error
	// Cgroups is the directory of the cgroup v2 in which each command gets its own.
	// Nil follows their processes through /proc.
	Cgroups *os.File
	// RuntimeDirectory is where source files are put; absolute.
	RuntimeDirectory string
}

// Guest holds the commands of one sandbox.
type Guest struct {
	spawner          *spawner
	reaper           *reaper
	cgroups          *os.File
	runtimeDirectory string
	buffers          *buffers

	mu       sync.Mutex
	commands map[string]*command
	running  sync.WaitGroup
}

// New makes a Guest.
func New(cfg Config) (*Guest, error) {
	confine := cfg.Confine
	if confine == nil {
		confine = func() error { return nil }
	}
	s, err := newSpawner(confine)
	if err != nil {
		return nil, err
	}
	return &Guest{
		spawner: s, reaper: newReaper(), cgroups: cfg.Cgroups,
		runtimeDirectory: cfg.RuntimeDirectory,
		buffers:          newBuffers(16),
		commands:         make(map[string]*command),
	}, nil
}

func (g *Guest) newTree(id string) (tree, error) {
	if g.cgroups == nil {
		return &procTree{id: id}, nil
	}
	return newCgroupTree(g.cgroups, id)
}

// Serve answers every pipe that is opened until the listener is closed.
func (g *Guest) Serve(l net.Listener) error {
	var pipes sync.WaitGroup
	defer pipes.Wait()
	for {
		conn, err := l.Accept()
		if errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err != nil {
			// Out of descriptors or memory: those that are open go on.
			time.Sleep(10 * time.Millisecond)
			continue
		}
		pipes.Go(func() { g.ServePipe(conn) })
	}
}

// ServePipe answers one pipe until it ends, and closes it.
func (g *Guest) ServePipe(pipe io.ReadWriteCloser) {
	ctx, cancel := context.WithCancelCause(context.Background())
	var handlers sync.WaitGroup
	defer handlers.Wait()
	defer pipe.Close()
	defer cancel(io.EOF)

	slots := make(chan struct{}, maxInFlight)
	answers := &answerer{w: pipe}
	r := &wire.Reader{R: bufio.NewReaderSize(pipe, 16<<10)}
	for {
		req := new(guestv1.Request)
		n, err := r.Read(req)
		if err != nil {
			return
		}
		if _, err := io.CopyN(io.Discard, r.R, int64(n)); err != nil {
			return
		}
		slots <- struct{}{}
		handlers.Go(func() {
			defer func() { <-slots }()
			if err := g.answer(ctx, req, answers); err != nil {
				// The pipe is broken: end its reader too.
				pipe.Close()
			}
		})
	}
}

// answerer writes answers whole, one after another.
type answerer struct {
	mu sync.Mutex
	w  io.Writer
}

func (a *answerer) write(resp *guestv1.Response, payload ...[]byte) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	return wire.Write(a.w, resp, payload...)
}

// answer does one request.
func (g *Guest) answer(ctx context.Context, req *guestv1.Request, out *answerer) error {
	resp := &guestv1.Response{Id: req.GetId()}
	var err error
	switch call := req.GetCall().(type) {
	case *guestv1.Request_Start:
		var answer *guestv1.StartResponse
		if answer, err = g.start(call.Start); err == nil {
			resp.Answer = &guestv1.Response_Start{Start: answer}
		}
	case *guestv1.Request_Read:
		var pieces []piece
		if pieces, err = g.read(ctx, call.Read, resp); err == nil {
			payload := make([][]byte, len(pieces))
			for i, p := range pieces {
				payload[i] = p.data
			}
			err := out.write(resp, payload...)
			for _, p := range pieces {
				p.buf.release()
			}
			return err
		}
	case *guestv1.Request_Stop:
		if err = g.stop(call.Stop); err == nil {
			resp.Answer = &guestv1.Response_Stop{Stop: &guestv1.StopResponse{}}
		}
	case *guestv1.Request_Release:
		if err = g.release(call.Release); err == nil {
			resp.Answer = &guestv1.Response_Release{Release: &guestv1.ReleaseResponse{}}
		}
	case *guestv1.Request_Info:
		resp.Answer = &guestv1.Response_Info{Info: g.info()}
	default:
		err = refuse(guestv1.Error_KIND_INVALID, "a request that this guest (protocol %d) does not know", wire.Protocol)
	}
	if err != nil {
		resp.Answer = &guestv1.Response_Error{Error: errorOf(err)}
	}
	return out.write(resp)
}

func errorOf(err error) *guestv1.Error {
	e := &guestv1.Error{Kind: guestv1.Error_KIND_INTERNAL, Message: err.Error()}
	if se, ok := errors.AsType[*startError](err); ok {
		e.Kind = se.kind
	}
	return e
}

func (g *Guest) start(r *guestv1.StartRequest) (*guestv1.StartResponse, error) {
	arrived := time.Now()
	id := r.GetExecution()
	if !validID(id) {
		return nil, refuse(guestv1.Error_KIND_INVALID, "execution id %q", id)
	}
	g.mu.Lock()
	c, repeat := g.commands[id]
	if !repeat {
		c = &command{
			id: id, spool: newSpool(spoolBytes, g.buffers),
			started: make(chan struct{}), stops: make(chan stop, 1), ended: make(chan struct{}),
		}
		g.commands[id] = c
	}
	g.mu.Unlock()
	if repeat {
		<-c.started
	} else {
		c.failed = c.start(g, r, arrived)
		if c.failed != nil {
			// Not held: a later start with this id is a new try.
			g.mu.Lock()
			delete(g.commands, id)
			g.mu.Unlock()
		} else {
			g.running.Go(func() { c.run(g.buffers, milliseconds(r.GetTimeoutMs()), milliseconds(r.GetGraceMs())) })
		}
		close(c.started)
	}
	if c.failed != nil {
		return nil, c.failed
	}
	return &guestv1.StartResponse{Pid: int32(c.pid), StartMicros: c.micros}, nil
}

func (g *Guest) command(id string) (*command, error) {
	g.mu.Lock()
	c, ok := g.commands[id]
	g.mu.Unlock()
	if ok {
		<-c.started
	}
	if !ok || c.failed != nil {
		return nil, refuse(guestv1.Error_KIND_NOT_FOUND, "no command %q", id)
	}
	return c, nil
}

func (g *Guest) read(ctx context.Context, r *guestv1.ReadRequest, resp *guestv1.Response) ([]piece, error) {
	c, err := g.command(r.GetExecution())
	if err != nil {
		return nil, err
	}
	limit := int(min(r.GetMaxBytes(), wire.MaxPayload))
	if limit == 0 {
		return nil, refuse(guestv1.Error_KIND_INVALID, "max_bytes is 0")
	}
	answer := &guestv1.ReadResponse{}
	resp.Answer = &guestv1.Response_Read{Read: answer}
	timer := time.NewTimer(min(milliseconds(uint64(r.GetWaitMs())), maxWait))
	defer timer.Stop()
	for {
		pieces, exit, wait, err := c.spool.read(int64(r.GetPosition()), limit)
		if err != nil {
			return nil, refuse(guestv1.Error_KIND_INVALID, "position %d: %v", r.GetPosition(), err)
		}
		if wait == nil {
			for _, p := range pieces {
				answer.Chunks = append(answer.Chunks, &guestv1.Chunk{Stream: p.stream, Size: uint32(len(p.data))})
			}
			answer.Exit = exit
			return pieces, nil
		}
		select {
		case <-wait:
		case <-timer.C:
			return nil, nil
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

func (g *Guest) stop(r *guestv1.StopRequest) error {
	c, err := g.command(r.GetExecution())
	if err != nil {
		return err
	}
	s := stop{guestv1.StopCause_STOP_CAUSE_REQUESTED, milliseconds(r.GetGraceMs())}
	select {
	case c.stops <- s:
	case <-c.ended:
	}
	return nil
}

func (g *Guest) release(r *guestv1.ReleaseRequest) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	c, ok := g.commands[r.GetExecution()]
	if !ok {
		return nil
	}
	select {
	case <-c.ended:
		delete(g.commands, c.id)
		c.spool.discard()
		return nil
	default:
		return refuse(guestv1.Error_KIND_INVALID, "command %q still runs", c.id)
	}
}

func (g *Guest) info() *guestv1.InfoResponse {
	g.mu.Lock()
	defer g.mu.Unlock()
	info := &guestv1.InfoResponse{Protocol: wire.Protocol, CommandCgroups: g.cgroups != nil}
	for id := range g.commands {
		info.Executions = append(info.Executions, id)
	}
	slices.Sort(info.Executions)
	return info
}

func validID(id string) bool {
	if len(id) == 0 || len(id) > 63 {
		return false
	}
	for _, r := range id {
		if (r < 'a' || r > 'z') && (r < '0' || r > '9') && r != '-' {
			return false
		}
	}
	return true
}

func milliseconds(n uint64) time.Duration {
	// Past 300 years a Duration overflows; nothing runs that long.
	return time.Duration(min(n, 1<<40)) * time.Millisecond
}

// Close waits for what runs and gives up the Guest's threads. Only tests end a guest
// in order; in a sandbox it is killed with everything else.
func (g *Guest) Close() error {
	g.running.Wait()
	g.reaper.close()
	g.spawner.close()
	return nil
}
