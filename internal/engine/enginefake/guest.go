package enginefake

import (
	"bufio"
	"bytes"
	"cmp"
	"io"
	"net"
	"slices"
	"sync"
	"time"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
	"github.com/harvest-run/executord/internal/guest/wire"
)

// spoolBytes is how much output a command can leave unread before it has to wait.
const spoolBytes = 1 << 20

// command is one execution inside the fake guest.
type command struct {
	id      string
	script  Script
	began   time.Time
	started chan struct{} // closed when the start is answered
	stops   chan stop
	ended   chan struct{}
	signals chan int32
	// input is what the script reads; nil if it is not open.
	input    *input
	terminal bool

	mu     sync.Mutex
	chunks []chunk // from start on
	start  int64
	end    int64
	first  time.Time     // when the first byte came
	last   time.Time     // when the last byte came
	idle   time.Duration // its idle time-out; never changed
	// discarding gives up what comes; discarded counts it.
	discarding bool
	discarded  uint64
	exit       *guestv1.Exit
	heard      []string      // resizes and signals
	change     chan struct{} // closed when something of the above changes
}

type chunk struct {
	stream guestv1.Stream
	data   []byte
}

// changed tells those who wait. The caller holds mu.
func (c *command) changed() {
	close(c.change)
	c.change = make(chan struct{})
}

func (c *command) hasEnded() bool {
	select {
	case <-c.ended:
		return true
	default:
		return false
	}
}

func (c *command) pending() int64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.end - c.start
}

// write adds output as far as there is room; what is left has to wait for room.
func (c *command) write(stream guestv1.Stream, data []byte) (left []byte, room <-chan struct{}) {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := int(min(spoolBytes-(c.end-c.start), int64(len(data))))
	if c.discarding {
		n = len(data)
	}
	if n > 0 {
		c.last = time.Now()
		if c.end == 0 {
			c.first = c.last
		}
		c.chunks = append(c.chunks, chunk{stream, data[:n]})
		c.end += int64(n)
		if c.discarding {
			c.giveUpAll()
		}
		c.changed()
	}
	return data[n:], c.change
}

// discard gives up everything from position on.
func (c *command) discard(position int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.discarding {
		c.discarding = true
		c.giveUp(min(max(position, c.start), c.end))
		c.giveUpAll()
		c.changed()
	}
}

// giveUpAll gives up what is there. The caller holds mu.
func (c *command) giveUpAll() {
	c.discarded += uint64(c.end - c.start)
	c.chunks, c.start = nil, c.end
}

// idleFor is how long nothing was written; a program that waits for room is not idle.
func (c *command) idleFor() time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.idleForLocked()
}

func (c *command) idleForLocked() time.Duration {
	since := c.began
	if c.last.After(since) {
		since = c.last
	}
	if c.idle == 0 || c.end-c.start >= spoolBytes {
		return 0
	}
	return time.Since(since)
}

// read is what the protocol says about ReadRequest.
func (c *command) read(position int64, size int) (answer *guestv1.ReadResponse, payload []byte, wait <-chan struct{}, refused bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.discarding {
		position = c.end
	}
	if position < c.start || position > c.end {
		return nil, nil, nil, true
	}
	if position > c.start {
		c.giveUp(position)
	}
	answer = c.answerLocked()
	for _, piece := range c.chunks {
		n := min(len(piece.data), size-len(payload))
		if n == 0 {
			break
		}
		answer.Chunks = append(answer.Chunks, &guestv1.Chunk{Stream: piece.stream, Size: uint32(n)})
		payload = append(payload, piece.data[:n]...)
	}
	if position+int64(len(payload)) == c.end {
		answer.Exit = c.exit
	}
	if len(payload) == 0 && answer.Exit == nil {
		wait = c.change
	}
	return answer, payload, wait, false
}

// answer is a ReadResponse without output.
func (c *command) answer() *guestv1.ReadResponse {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.answerLocked()
}

func (c *command) answerLocked() *guestv1.ReadResponse {
	return &guestv1.ReadResponse{
		Over: c.hasEnded(), Discarding: c.discarding, IdleMs: uint64(c.idleForLocked().Milliseconds()),
	}
}

// giveUp forgets what lies before position. The caller holds mu.
func (c *command) giveUp(position int64) {
	for c.start < position {
		piece := &c.chunks[0]
		n := min(int64(len(piece.data)), position-c.start)
		piece.data = piece.data[n:]
		c.start += n
		if len(piece.data) == 0 {
			c.chunks = c.chunks[1:]
		}
	}
	c.changed()
}

// serve answers one pipe until it ends.
func (sb *sandbox) serve(conn net.Conn) {
	var handlers sync.WaitGroup
	ended := make(chan struct{})
	defer handlers.Wait()
	defer close(ended)
	defer sb.hangUp(conn)
	var writing sync.Mutex
	r := &wire.Reader{R: bufio.NewReader(conn)}
	for {
		q := new(guestv1.Request)
		n, err := r.Read(q)
		if err != nil {
			return
		}
		payload := make([]byte, n)
		if _, err := io.ReadFull(r.R, payload); err != nil {
			return
		}
		if q.GetConnect() != nil {
			sb.connect(conn, q)
			return
		}
		handlers.Go(func() {
			if hook := sb.engine.cfg.Hooks.Ask; hook != nil && !hook(sb.id, q) {
				return
			}
			a := sb.answer(q, payload, ended)
			a.Response.Id = q.GetId()
			if hook := sb.engine.cfg.Hooks.Answer; hook != nil {
				hook(sb.id, q, a)
			}
			writing.Lock()
			defer writing.Unlock()
			switch {
			case a.Drop:
			case a.Cut:
				var frame bytes.Buffer
				_ = wire.Write(&frame, a.Response, a.Payload)
				_, _ = conn.Write(frame.Bytes()[:frame.Len()/2])
				conn.Close()
			case wire.Write(conn, a.Response, a.Payload) != nil:
				conn.Close()
			}
		})
	}
}

func (sb *sandbox) hangUp(conn net.Conn) {
	conn.Close()
	sb.mu.Lock()
	defer sb.mu.Unlock()
	delete(sb.pipes, conn)
}

func (sb *sandbox) command(id string) (*command, bool) {
	sb.mu.Lock()
	defer sb.mu.Unlock()
	c, ok := sb.commands[id]
	return c, ok
}

func (sb *sandbox) held() []string {
	sb.mu.Lock()
	defer sb.mu.Unlock()
	var ids []string
	for id := range sb.commands {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	return ids
}

func refuse(kind guestv1.Error_Kind, message string) *Answer {
	return &Answer{Response: &guestv1.Response{Answer: &guestv1.Response_Error{Error: Refusal(kind, message)}}}
}

// answer does one request; ended closes when its pipe does.
func (sb *sandbox) answer(q *guestv1.Request, payload []byte, ended <-chan struct{}) *Answer {
	switch call := q.GetCall().(type) {
	case *guestv1.Request_Start:
		return sb.start(call.Start)
	case *guestv1.Request_Read:
		return sb.read(call.Read, ended)
	case *guestv1.Request_Stop:
		c, ok := sb.command(call.Stop.GetExecution())
		if !ok {
			return refuse(guestv1.Error_KIND_NOT_FOUND, "no such command")
		}
		select {
		case c.stops <- stop{guestv1.StopCause_STOP_CAUSE_REQUESTED, milliseconds(call.Stop.GetGraceMs())}:
		case <-c.ended:
		case <-sb.done:
		}
		return &Answer{Response: &guestv1.Response{Answer: &guestv1.Response_Stop{Stop: &guestv1.StopResponse{}}}}
	case *guestv1.Request_Release:
		return sb.release(call.Release.GetExecution())
	case *guestv1.Request_Info:
		info := &guestv1.InfoResponse{Protocol: wire.Protocol, Executions: sb.held()}
		return &Answer{Response: &guestv1.Response{Answer: &guestv1.Response_Info{Info: info}}}
	case *guestv1.Request_Write:
		return sb.writeInput(call.Write, payload)
	case *guestv1.Request_Resize:
		return sb.resize(call.Resize)
	case *guestv1.Request_Signal:
		return sb.signal(call.Signal)
	default:
		return refuse(guestv1.Error_KIND_INVALID, "unknown request")
	}
}

func (sb *sandbox) start(r *guestv1.StartRequest) *Answer {
	script := sb.engine.cfg.Script(r)
	sb.mu.Lock()
	c, repeat := sb.commands[r.GetExecution()]
	if !repeat && script.Refuse == nil && !sb.dead {
		c = &command{
			id: r.GetExecution(), script: script, began: time.Now(), idle: milliseconds(r.GetIdleMs()), started: make(chan struct{}),
			stops: make(chan stop), signals: make(chan int32), ended: make(chan struct{}), change: make(chan struct{}),
		}
		if r.GetStdin() || r.GetTerminal() != nil {
			c.input = newInput()
		}
		c.terminal = r.GetTerminal() != nil
		sb.commands[c.id] = c
		sb.work.Go(func() {
			c.run(sb.done, milliseconds(r.GetTimeoutMs()), milliseconds(r.GetIdleMs()), milliseconds(r.GetGraceMs()))
		})
	}
	sb.mu.Unlock()
	if repeat {
		select {
		case <-c.started:
		case <-sb.done:
		}
	} else {
		select {
		case <-time.After(script.StartDelay):
		case <-sb.done:
		}
	}
	switch {
	case script.Refuse != nil:
		return refuse(script.Refuse.GetKind(), script.Refuse.GetMessage())
	case c == nil:
		return refuse(guestv1.Error_KIND_INTERNAL, errDead.Error())
	case !repeat:
		sb.engine.note(c.id)
		close(c.started)
	}
	return &Answer{Response: &guestv1.Response{Answer: &guestv1.Response_Start{Start: &guestv1.StartResponse{Pid: 2, StartMicros: cmp.Or(script.StartMicros, uint64(script.StartDelay.Microseconds()))}}}}
}

func (e *Engine) note(execution string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.started = append(e.started, execution)
}

func (sb *sandbox) read(r *guestv1.ReadRequest, ended <-chan struct{}) *Answer {
	c, ok := sb.command(r.GetExecution())
	if !ok {
		return refuse(guestv1.Error_KIND_NOT_FOUND, "no such command")
	}
	timer := time.NewTimer(milliseconds(uint64(r.GetWaitMs())))
	defer timer.Stop()
	switch r.GetMode() {
	case guestv1.ReadMode_READ_MODE_AWAIT_OVER:
		select {
		case <-c.ended:
		case <-timer.C:
		case <-ended:
		case <-sb.done:
		}
		return &Answer{Response: &guestv1.Response{Answer: &guestv1.Response_Read{Read: c.answer()}}}
	case guestv1.ReadMode_READ_MODE_DISCARD:
		c.discard(int64(r.GetPosition()))
	}
	for {
		answer, payload, wait, refused := c.read(int64(r.GetPosition()), int(r.GetMaxBytes()))
		if refused {
			return refuse(guestv1.Error_KIND_INVALID, "position is not in the spool")
		}
		if wait == nil {
			return &Answer{Response: &guestv1.Response{Answer: &guestv1.Response_Read{Read: answer}}, Payload: payload}
		}
		select {
		case <-wait:
			continue
		case <-timer.C:
		case <-ended:
		case <-sb.done:
		}
		return &Answer{Response: &guestv1.Response{Answer: &guestv1.Response_Read{Read: c.answer()}}}
	}
}

func (sb *sandbox) release(id string) *Answer {
	sb.mu.Lock()
	defer sb.mu.Unlock()
	if c, ok := sb.commands[id]; ok {
		if !c.hasEnded() {
			return refuse(guestv1.Error_KIND_INVALID, "the command still runs")
		}
		delete(sb.commands, id)
	}
	return &Answer{Response: &guestv1.Response{Answer: &guestv1.Response_Release{Release: &guestv1.ReleaseResponse{}}}}
}

func milliseconds(n uint64) time.Duration { return time.Duration(n) * time.Millisecond }
