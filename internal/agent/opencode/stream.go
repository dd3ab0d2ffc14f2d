package opencode

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"sync"
	"time"
)

const (
	// silence is how long the stream of events may be silent: it has a heartbeat every ten
	// seconds.
	silence = 30 * time.Second
	// greeting is how long the first event may take.
	greeting = 5 * time.Second
	// lineLimit bounds one event. A tool's output is in one, so it must be large; what runs
	// in the sandbox must not fill our memory all the same.
	lineLimit = 64 << 20
	// queueLimit bounds, in bytes, what a subscriber has not taken yet. Beyond it the
	// events are dropped, and it starts again from what OpenCode has stored.
	queueLimit = 32 << 20
)

// hub reads OpenCode's events, all of them by one connection, and hands them to those
// that want them.
type hub struct {
	client *client
	mu     sync.Mutex
	// what follows is guarded by mu
	bySession map[string]*subscription
	// connected says that events arrive; changed is closed when that changes.
	connected bool
	since     time.Time
	changed   chan struct{}
}

func newHub(c *client) *hub {
	return &hub{client: c, bySession: make(map[string]*subscription), changed: make(chan struct{})}
}

// subscription is a queue of the events of a conversation and of its sub-agents.
type subscription struct {
	hub *hub
	// ready has a token when there is something to take.
	ready chan struct{}
	// what follows is guarded by hub.mu
	events   []event
	size     int
	lost     bool
	sessions []string
}

// subscribe begins with the events that come from now on. There is at most one
// subscription of a conversation.
func (h *hub) subscribe(session string) *subscription {
	h.mu.Lock()
	defer h.mu.Unlock()
	s := &subscription{hub: h, ready: make(chan struct{}, 1)}
	s.add(session)
	return s
}

// add is called with hub.mu.
func (s *subscription) add(session string) {
	if s.hub.bySession[session] == nil {
		s.hub.bySession[session] = s
		s.sessions = append(s.sessions, session)
	}
}

// follow adds a sub-agent's conversation.
func (s *subscription) follow(session string) {
	s.hub.mu.Lock()
	defer s.hub.mu.Unlock()
	s.add(session)
}

func (s *subscription) close() {
	s.hub.mu.Lock()
	defer s.hub.mu.Unlock()
	for _, id := range s.sessions {
		delete(s.hub.bySession, id)
	}
}

// take returns what has come. lost says that events before these are missing.
func (s *subscription) take() (events []event, lost bool) {
	s.hub.mu.Lock()
	defer s.hub.mu.Unlock()
	events, lost = s.events, s.lost
	s.events, s.size, s.lost = nil, 0, false
	return events, lost
}

func (s *subscription) wake() {
	select {
	case s.ready <- struct{}{}:
	default:
	}
}

// lose is called with hub.mu: what was not taken is dropped too, as the subscriber reads
// anew what is stored.
func (s *subscription) lose() {
	s.events, s.size, s.lost = nil, 0, true
	s.wake()
}

// put hands an event of this many bytes on.
func (h *hub) put(e event, size int) {
	if e.SessionID == "" {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if e.session != nil && e.session.ParentID != "" {
		if parent := h.bySession[e.session.ParentID]; parent != nil {
			parent.add(e.SessionID)
		}
	}
	s := h.bySession[e.SessionID]
	if s == nil {
		return
	}
	// A sub-agent that is asked a second time was made long ago.
	if e.Part != nil && e.Part.Type == "tool" {
		if child := e.Part.State.facts().SessionID; child != "" {
			s.add(child)
		}
	}
	if s.size += size; s.size > queueLimit {
		s.lose()
		return
	}
	s.events = append(s.events, e)
	s.wake()
}

func (h *hub) set(connected bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if connected == h.connected {
		return
	}
	h.connected, h.since = connected, time.Now()
	close(h.changed)
	h.changed = make(chan struct{})
	if connected {
		// Nothing is repeated of what came while there was no connection.
		h.loseEach()
	}
}

func (h *hub) loseAll() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.loseEach()
}

// loseEach is called with mu.
func (h *hub) loseEach() {
	seen := make(map[*subscription]bool)
	for _, s := range h.bySession {
		if !seen[s] {
			seen[s] = true
			s.lose()
		}
	}
}

// wait returns when events arrive.
func (h *hub) wait(ctx context.Context) error {
	for {
		h.mu.Lock()
		connected, changed := h.connected, h.changed
		h.mu.Unlock()
		if connected {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// run reads until ctx ends, connecting again and again, each time when up has returned.
// failed is told of each failure, with how long there has been no connection.
func (h *hub) run(ctx context.Context, up func(context.Context) bool, failed func(err error, since time.Duration)) {
	defer h.set(false)
	last := time.Now()
	for wait := 10 * time.Millisecond; up(ctx); {
		began := time.Now()
		err := h.read(ctx)
		h.set(false)
		if ctx.Err() != nil {
			return
		}
		if h.reached(began) {
			last, wait = time.Now(), 10*time.Millisecond
		}
		failed(err, time.Since(last))
		select {
		case <-time.After(wait):
		case <-ctx.Done():
		}
		wait = min(2*wait, time.Second)
	}
}

// reached says whether there was a connection since then.
func (h *hub) reached(began time.Time) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.since.After(began)
}

// read reads one connection to its end.
func (h *hub) read(ctx context.Context) error {
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	watchdog := time.AfterFunc(greeting, func() { stop(errors.New("the stream of events is silent")) })
	defer watchdog.Stop()
	response, err := h.client.open(ctx, http.MethodGet, "/global/event", "", nil)
	if err != nil {
		return errors.Join(err, context.Cause(ctx))
	}
	defer response.Body.Close()
	lines := bufio.NewReaderSize(response.Body, 64<<10)
	for {
		line, err := readLine(lines)
		if err != nil {
			return errors.Join(err, context.Cause(ctx))
		}
		watchdog.Reset(silence)
		data, ok := bytes.CutPrefix(line, []byte("data:"))
		if !ok {
			continue
		}
		e, err := decodeEvent(data)
		if err != nil {
			// What it was about is not known: everybody reads anew what is stored.
			h.loseAll()
			continue
		}
		if e.Type == "server.connected" {
			h.set(true)
		}
		h.put(e, len(line))
	}
}

// readLine reads a line of at most lineLimit bytes.
func readLine(r *bufio.Reader) ([]byte, error) {
	var long []byte
	for {
		line, err := r.ReadSlice('\n')
		switch {
		case err == nil && long == nil:
			return line, nil
		case err == nil:
			return append(long, line...), nil
		case !errors.Is(err, bufio.ErrBufferFull):
			if errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return nil, err
		}
		if long = append(long, line...); len(long) > lineLimit {
			return nil, fmt.Errorf("an event of more than %d bytes", lineLimit)
		}
	}
}
