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
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
	"github.com/harvest-run/executord/internal/guest/wire"
)

const (
	maxWait = time.Minute
	// maxInFlight bounds the requests of one pipe that are being worked on.
	maxInFlight = 4096
	// maxCommands bounds the commands that are held, so that their ids fit into one
	// answer.
	maxCommands = 1024
	// maxErrorText bounds the text of an error that is answered.
	maxErrorText = 2 << 10
	// stockBlocks is how many of the largest blocks are kept for the next use: what a
	// flood of output goes round in.
	stockBlocks = 12
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
	// Environment is what programs get beside what their start names.
	Environment []string
}

// Guest holds the commands of one sandbox.
type Guest struct {
	spawner          *spawner
	reaper           *reaper
	cgroups          *os.File
	null             *os.File
	runtimeDirectory string
	environment      []string
	stock            *stock
	listeners        listeners
	connections      connections

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
	// What this process was started with, on purpose or by somebody's mistake, is not
	// for the programs.
	if err := keepOpenFilesFromPrograms(); err != nil {
		return nil, fmt.Errorf("keep open files from programs: %w", err)
	}
	// Opened once: what runs in the sandbox may put something else there.
	null, err := os.Open(os.DevNull)
	if err != nil {
		return nil, fmt.Errorf("open what programs read from: %w", err)
	}
	s, err := newSpawner(confine)
	if err != nil {
		null.Close()
		return nil, err
	}
	return &Guest{
		spawner: s, reaper: newReaper(), cgroups: cfg.Cgroups, null: null,
		runtimeDirectory: cfg.RuntimeDirectory, environment: cfg.Environment, stock: newStock(stockBlocks), connections: newConnections(),
		commands: make(map[string]*command),
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
	buffered := bufio.NewReaderSize(pipe, 16<<10)
	r := &wire.Reader{R: buffered}
	for first := true; ; {
		req := new(guestv1.Request)
		n, err := r.Read(req)
		if err != nil {
			return
		}
		payload, fits, err := takePayload(r.R, req, n)
		if err != nil {
			return
		}
		if !fits {
			err := refuse(guestv1.Error_KIND_INVALID, "a write of %d bytes, more than %d", n, maxWrite)
			if answers.refuse(req.GetId(), err) != nil {
				return
			}
			continue
		}
		if accept := req.GetAccept(); accept != nil {
			g.listeners.serve(accept.GetListener(), req.GetId(), pipe, buffered, first, answers)
			return
		}
		if connect := req.GetConnect(); connect != nil {
			g.connections.serve(connect.GetPort(), req.GetId(), pipe, buffered, first, answers)
			return
		}
		first = false
		select {
		case slots <- struct{}{}:
		default:
			// Not waited for: then the end of the pipe would not be seen.
			err := refuse(guestv1.Error_KIND_EXHAUSTED, "%d requests are open already", maxInFlight)
			if answers.refuse(req.GetId(), err) != nil {
				return
			}
			continue
		}
		// Here and not beside the other requests: one that comes behind a start on the
		// same pipe finds the command, whichever of them is worked on first.
		var c *command
		var fresh bool
		if start := req.GetStart(); start != nil {
			c, fresh = g.reserve(start.GetExecution())
		}
		handlers.Go(func() {
			defer func() { <-slots }()
			if err := g.answer(ctx, req, payload, c, fresh, answers); err != nil {
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

func (a *answerer) refuse(id uint64, why error) error {
	return a.write(&guestv1.Response{Id: id, Answer: &guestv1.Response_Error{Error: errorOf(why)}})
}

// answer does one request; c and fresh are what reserve gave a start.
func (g *Guest) answer(ctx context.Context, req *guestv1.Request, payload []byte, c *command, fresh bool, out *answerer) error {
	resp := &guestv1.Response{Id: req.GetId()}
	var err error
	switch call := req.GetCall().(type) {
	case *guestv1.Request_Start:
		var answer *guestv1.StartResponse
		if answer, err = g.start(call.Start, c, fresh); err == nil {
			resp.Answer = &guestv1.Response_Start{Start: answer}
		}
	case *guestv1.Request_Read:
		var pieces []piece
		if pieces, err = g.read(ctx, call.Read, resp); err == nil {
			output := make([][]byte, len(pieces))
			for i, p := range pieces {
				output[i] = p.data
			}
			err := out.write(resp, output...)
			for _, p := range pieces {
				p.block.release()
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
	case *guestv1.Request_Write:
		var answer *guestv1.WriteResponse
		if answer, err = g.write(call.Write, payload); err == nil {
			resp.Answer = &guestv1.Response_Write{Write: answer}
		}
	case *guestv1.Request_Resize:
		if err = g.resize(call.Resize); err == nil {
			resp.Answer = &guestv1.Response_Resize{Resize: &guestv1.ResizeResponse{}}
		}
	case *guestv1.Request_Signal:
		if err = g.signal(call.Signal); err == nil {
			resp.Answer = &guestv1.Response_Signal{Signal: &guestv1.SignalResponse{}}
		}
	case *guestv1.Request_Listen:
		var port uint32
		if port, err = g.listeners.listen(call.Listen.GetName(), call.Listen.GetPort()); err == nil {
			resp.Answer = &guestv1.Response_Listen{Listen: &guestv1.ListenResponse{Port: port}}
		}
	case *guestv1.Request_Usage:
		resp.Answer = &guestv1.Response_Usage{Usage: g.usage()}
	default:
		err = refuse(guestv1.Error_KIND_INVALID, "a request that this guest (protocol %d) does not know", wire.Protocol)
	}
	if err != nil {
		return out.refuse(req.GetId(), err)
	}
	if err := out.write(resp); !errors.Is(err, wire.ErrUnsendable) {
		return err
	}
	return out.refuse(req.GetId(), errors.New("the answer cannot be sent"))
}

func errorOf(err error) *guestv1.Error {
	// It has to fit into an answer, whatever names and paths are in it.
	text := err.Error()
	e := &guestv1.Error{Kind: guestv1.Error_KIND_INTERNAL, Message: strings.ToValidUTF8(text[:min(len(text), maxErrorText)], "?")}
	if se, ok := errors.AsType[*startError](err); ok {
		e.Kind, e.CommittedOffset = se.kind, se.committed
	}
	return e
}

// reserve returns the command with an id, and whether it is a new one that the caller
// has to start; whoever asks for it meanwhile waits for that. Nil if there can be none.
func (g *Guest) reserve(id string) (c *command, fresh bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if c, held := g.commands[id]; held {
		return c, false
	}
	if len(g.commands) >= maxCommands || !validID(id) {
		return nil, false
	}
	c = newCommand(id)
	g.commands[id] = c
	return c, true
}

// start starts what was reserved, or joins the command that has the id already.
func (g *Guest) start(r *guestv1.StartRequest, c *command, fresh bool) (*guestv1.StartResponse, error) {
	switch {
	case c == nil && !validID(r.GetExecution()):
		return nil, refuse(guestv1.Error_KIND_INVALID, "execution id %q", r.GetExecution())
	case c == nil:
		return nil, refuse(guestv1.Error_KIND_EXHAUSTED, "%d commands are held already", maxCommands)
	case !fresh:
		<-c.started
	default:
		if c.failed = c.start(g, r, time.Now()); c.failed != nil {
			// Not held: a later start with this id is a new try.
			g.mu.Lock()
			delete(g.commands, c.id)
			g.mu.Unlock()
		} else {
			g.running.Go(func() {
				c.run(g.stock, milliseconds(r.GetTimeoutMs()), milliseconds(r.GetIdleMs()), milliseconds(r.GetGraceMs()))
			})
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
	limit := int64(min(r.GetMaxBytes(), wire.MaxPayload))
	position := int64(r.GetPosition())
	var over <-chan struct{}
	switch r.GetMode() {
	case guestv1.ReadMode_READ_MODE_UNSPECIFIED:
	case guestv1.ReadMode_READ_MODE_AWAIT_OVER:
		over = c.over
	case guestv1.ReadMode_READ_MODE_DISCARD:
		c.spool.discardFrom(position)
		limit = wire.MaxPayload
	default:
		return nil, refuse(guestv1.Error_KIND_INVALID, "read mode %d", r.GetMode())
	}
	if limit == 0 && over == nil {
		return nil, refuse(guestv1.Error_KIND_INVALID, "max_bytes is 0")
	}
	answer := &guestv1.ReadResponse{}
	resp.Answer = &guestv1.Response_Read{Read: answer}
	timer := time.NewTimer(min(milliseconds(uint64(r.GetWaitMs())), maxWait))
	defer timer.Stop()
	for {
		answer.IdleMs = uint64(c.idle(time.Now()).Milliseconds())
		answer.Over = c.isOver()
		var wait <-chan struct{}
		if over != nil {
			wait = over
			if answer.Over {
				return nil, nil
			}
		} else {
			var pieces []piece
			var exit *guestv1.Exit
			pieces, exit, wait, err = c.spool.read(position, limit)
			if err != nil {
				return nil, refuse(guestv1.Error_KIND_INVALID, "position %d %v", r.GetPosition(), err)
			}
			answer.Discarding = c.spool.discarding()
			if wait == nil {
				for _, p := range pieces {
					answer.Chunks = append(answer.Chunks, &guestv1.Chunk{Stream: p.stream, Size: uint32(len(p.data))})
				}
				answer.Exit = exit
				return pieces, nil
			}
		}
		select {
		case <-wait:
		case <-timer.C:
			answer.IdleMs = uint64(c.idle(time.Now()).Milliseconds())
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
	c.stop(guestv1.StopCause_STOP_CAUSE_REQUESTED, milliseconds(r.GetGraceMs()))
	return nil
}

func (g *Guest) release(r *guestv1.ReleaseRequest) error {
	g.mu.Lock()
	c, ok := g.commands[r.GetExecution()]
	g.mu.Unlock()
	if !ok {
		return nil
	}
	if !c.spool.finished() {
		return refuse(guestv1.Error_KIND_INVALID, "command %q still runs", c.id)
	}
	<-c.ended // the rest of its clean-up
	g.mu.Lock()
	if g.commands[c.id] == c {
		delete(g.commands, c.id)
	}
	if len(g.commands) == 0 {
		g.stock.empty()
	}
	g.mu.Unlock()
	c.spool.discard()
	return nil
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
	g.listeners.close()
	g.reaper.close()
	g.spawner.close()
	return g.null.Close()
}
