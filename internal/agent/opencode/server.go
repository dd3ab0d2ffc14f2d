// Package opencode is the coding agent OpenCode 1.18: its server runs in a sandbox, and is
// driven by its HTTP API and its stream of events.
//
// A Server starts the program and starts it again when it dies. A Conversation is one of
// OpenCode's sessions; a turn is given to it and followed to its end by a rule that does
// not trust OpenCode's own signs of an end, and what it tells becomes the events of
// internal/agent. What was lost on the way is made up from what OpenCode has stored.
package opencode

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/harvest-run/executord/internal/agent"
)

const (
	// startTime is how long OpenCode may take to answer. It takes 1.2 s on an idle machine,
	// and minutes where twenty start at a time on two processors.
	startTime = 5 * time.Minute
	// deafTime is how long it may run without being reached before it is ended.
	deafTime = 60 * time.Second
	// restartLimit is how often it may die within restartWindow.
	restartLimit  = 5
	restartWindow = 10 * time.Minute
)

// Config says how OpenCode is started.
type Config struct {
	Place  Place
	Logger *slog.Logger
	// Program is the path of OpenCode's program in the place.
	Program string
	// Dir is where it starts; conversations may be elsewhere.
	Dir string
	// Home is the home directory; the default is /root.
	Home string
	// Port of the place's loopback that it listens on; the default is 8080.
	Port uint16
	// ConfigFile is the path of its configuration in the place; "" is none.
	ConfigFile string
	// Content is configuration in its JSON form that goes over that of the file; nil is none.
	Content json.RawMessage
	// Auth is the content of an auth.json, OpenCode's log-ins; "" is none. It is given to the
	// process and to nothing else.
	Auth string
	// Env are further variables for it, KEY=value.
	Env []string
	// Join goes on with a server that an executord before this one left running.
	Join bool
	// Tell is told of each change of the status, if it is set. It must not block.
	Tell func(Status)
}

// State is where a server is.
type State string

// The states.
const (
	Starting   State = "STARTING"
	Ready      State = "READY"
	Restarting State = "RESTARTING"
	Failed     State = "FAILED"
)

// Status is how a server is.
type Status struct {
	State   State
	Version string
	// Detail tells the facts behind the state, for people.
	Detail string
	// MCP are its servers of tools, by name; empty until they have been asked.
	MCP []MCP
}

// Server is an OpenCode that runs.
type Server struct {
	cfg    Config
	client *client
	hub    *hub
	stop   context.CancelCauseFunc
	owned  sync.WaitGroup
	// warmer has a token when servers of tools are wanted.
	warmer chan struct{}

	mu sync.Mutex
	// what follows is guarded by mu
	running  Running
	password string
	// generation counts starts; died says how the one before ended.
	generation int
	died       string
	lost       error
	status     Status
	directory  string        // of the newest conversation
	changed    chan struct{} // closed when one of these changes
}

// Start starts OpenCode and returns when it answers.
func Start(ctx context.Context, cfg Config) (*Server, error) {
	if cfg.Home == "" {
		cfg.Home = "/root"
	}
	if cfg.Port == 0 {
		cfg.Port = 8080
	}
	if cfg.Tell == nil {
		cfg.Tell = func(Status) {}
	}
	s := &Server{cfg: cfg, changed: make(chan struct{})}
	s.client = newClient(func(ctx context.Context) (net.Conn, error) { return cfg.Place.Dial(ctx, cfg.Port) }, s.secret)
	s.hub = newHub(s.client)
	s.tell(func(st *Status) { *st = Status{State: Starting} })

	joined := false
	if cfg.Join {
		var err error
		if joined, err = s.join(ctx); err != nil {
			return nil, err
		}
	}
	if !joined {
		if err := s.launch(ctx); err != nil {
			s.client.http.CloseIdleConnections()
			return nil, err
		}
	}
	own, stop := context.WithCancelCause(context.WithoutCancel(ctx))
	s.stop = stop
	s.warmer = make(chan struct{}, 1)
	s.owned.Go(func() { s.warm(own) })
	s.owned.Go(func() { s.supervise(own) })
	s.owned.Go(func() { s.hub.run(own, s.isUp, func(err error, since time.Duration) { s.deaf(own, err, since) }) })
	return s, nil
}

// Close lets go of the server, which runs on. Conversations cannot be used any more.
func (s *Server) Close() {
	s.stop(errors.New("the agent was let go"))
	s.owned.Wait()
	s.client.http.CloseIdleConnections()
}

// Stop ends OpenCode and everything that it started; nothing is left when it returns.
func (s *Server) Stop(ctx context.Context) error {
	s.stop(errors.New("the agent was stopped"))
	s.owned.Wait()
	s.client.http.CloseIdleConnections()
	s.mu.Lock()
	running := s.running
	s.mu.Unlock()
	if err := running.Stop(ctx); err != nil {
		return fmt.Errorf("stop opencode: %w", err)
	}
	return nil
}

// Health returns the version of a server that answers.
func (s *Server) Health(ctx context.Context) (string, error) { return s.client.health(ctx) }

// Status is how it is now.
func (s *Server) Status() Status {
	s.mu.Lock()
	defer s.mu.Unlock()
	status := s.status
	status.MCP = slices.Clone(status.MCP)
	return status
}

// MCP asks for the state of the servers of tools. It starts those that do not run yet, and
// waits for them. OpenCode has them for each directory anew: it is asked about that of the
// newest conversation.
func (s *Server) MCP(ctx context.Context) ([]MCP, error) {
	s.mu.Lock()
	directory := cmp.Or(s.directory, s.cfg.Dir)
	s.mu.Unlock()
	found, err := s.client.mcp(ctx, directory)
	if err != nil {
		return nil, err
	}
	list := make([]MCP, 0, len(found))
	for name, m := range found {
		list = append(list, MCP{Name: name, State: m.Status, Detail: m.Error})
	}
	slices.SortFunc(list, func(a, b MCP) int { return strings.Compare(a.Name, b.Name) })
	s.tell(func(st *Status) { st.MCP = list })
	return slices.Clone(list), nil
}

// wantTools has the servers of tools of a directory started before a prompt needs them; ""
// is the one that it was.
func (s *Server) wantTools(directory string) {
	s.mu.Lock()
	if directory != "" {
		s.directory = directory
	}
	s.mu.Unlock()
	select {
	case s.warmer <- struct{}{}:
	default:
	}
}

// warm starts servers of tools when they are wanted.
func (s *Server) warm(ctx context.Context) {
	for {
		select {
		case <-s.warmer:
		case <-ctx.Done():
			return
		}
		if _, err := s.MCP(ctx); err != nil && ctx.Err() == nil {
			s.cfg.Logger.WarnContext(ctx, "the agent's tools were not asked", "error", err)
		}
	}
}

func (s *Server) secret() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.password
}

// tell changes the status and tells of it.
func (s *Server) tell(change func(*Status)) {
	s.mu.Lock()
	change(&s.status)
	status := s.status
	status.MCP = slices.Clone(status.MCP)
	close(s.changed)
	s.changed = make(chan struct{})
	s.mu.Unlock()
	s.cfg.Tell(status)
}

// life is which start of OpenCode this is.
type life struct {
	generation int
	// died is how the one before ended; lost is why there will be none any more.
	died string
	lost error
	// changed is closed when that changes.
	changed <-chan struct{}
}

func (s *Server) now() life {
	s.mu.Lock()
	defer s.mu.Unlock()
	return life{s.generation, s.died, s.lost, s.changed}
}

// isUp waits until it answers; false if that will not be.
func (s *Server) isUp(ctx context.Context) bool {
	for ctx.Err() == nil {
		s.mu.Lock()
		state, changed := s.status.State, s.changed
		s.mu.Unlock()
		switch state {
		case Ready:
			return true
		case Failed:
			return false
		}
		select {
		case <-changed:
		case <-ctx.Done():
		}
	}
	return false
}

// supervise starts OpenCode again when it has ended.
func (s *Server) supervise(ctx context.Context) {
	var deaths []time.Time
	for {
		s.mu.Lock()
		running := s.running
		s.mu.Unlock()
		how, err := running.Wait(ctx)
		if ctx.Err() != nil {
			return
		}
		if err != nil {
			s.lose(fmt.Errorf("%w: %w", agent.ErrLost, err))
			return
		}
		s.cfg.Logger.WarnContext(ctx, "the agent died", "how", how)
		s.tell(func(st *Status) { st.State, st.Detail, st.MCP = Restarting, how, nil })
		s.mu.Lock()
		s.died = how
		s.mu.Unlock()
		// What it had started would go on without it.
		if err := running.Stop(ctx); err != nil && ctx.Err() == nil {
			s.lose(fmt.Errorf("%w: end what a dead opencode left: %w", agent.ErrLost, err))
			return
		}
		s.client.http.CloseIdleConnections()
		now := time.Now()
		deaths = append(slices.DeleteFunc(deaths, func(t time.Time) bool { return now.Sub(t) > restartWindow }), now)
		if len(deaths) > restartLimit {
			s.lose(fmt.Errorf("%w: opencode died %d times within %v: %s", agent.ErrLost, len(deaths), restartWindow, how))
			return
		}
		if err := s.launch(ctx); err != nil {
			if ctx.Err() == nil {
				s.lose(fmt.Errorf("%w: opencode died (%s) and was not started again: %w", agent.ErrLost, how, err))
			}
			return
		}
		s.wantTools("")
	}
}

func (s *Server) lose(err error) {
	s.mu.Lock()
	s.lost = err
	s.mu.Unlock()
	s.tell(func(st *Status) { st.State, st.Detail = Failed, err.Error() })
}

// deaf ends an OpenCode that runs and cannot be reached, so that it is started again.
func (s *Server) deaf(ctx context.Context, err error, since time.Duration) {
	s.cfg.Logger.DebugContext(ctx, "the agent's events were lost", "error", err, "for", since)
	if since < deafTime {
		return
	}
	s.mu.Lock()
	running, state := s.running, s.status.State
	s.mu.Unlock()
	if state != Ready {
		return
	}
	s.cfg.Logger.WarnContext(ctx, "the agent is ended: it does not answer", "error", err, "for", since)
	if err := running.Stop(ctx); err != nil {
		s.cfg.Logger.WarnContext(ctx, "the agent was not ended", "error", err)
	}
}
