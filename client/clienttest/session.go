package clienttest

import (
	"context"
	"fmt"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
)

// session is one session. It is made at the first GetSession that waits: with the
// label fail=…, its sandbox cannot be made.
type session struct {
	server *Server
	state  *executorv1.Session // guarded by the Server's mu
}

func (s *session) record() *executorv1.Session {
	s.server.mu.Lock()
	defer s.server.mu.Unlock()
	return proto.CloneOf(s.state)
}

func (s *Server) session(name string) (*session, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, x := range s.sessions {
		if x.state.GetName() == name {
			return x, nil
		}
	}
	return nil, Error(codes.NotFound, "SESSION_NOT_FOUND", nil, "there is no "+name)
}

// CreateSession implements SessionService.
func (s *Server) CreateSession(_ context.Context, r *executorv1.CreateSessionRequest) (*executorv1.CreateSessionResponse, error) {
	x, err := once(s, r, func() (*session, error) { return s.create(r), nil })
	if err != nil {
		return nil, err
	}
	return &executorv1.CreateSessionResponse{Session: x.record()}, nil
}

func (s *Server) create(r *executorv1.CreateSessionRequest) *session {
	s.mu.Lock()
	defer s.mu.Unlock()
	id := len(s.sessions) + 1
	lifetime := time.Hour
	if r.GetLifetime() != nil {
		lifetime = r.GetLifetime().AsDuration()
	}
	x := &session{server: s, state: &executorv1.Session{
		Name: fmt.Sprintf("sessions/s%d", id), State: executorv1.Session_STATE_STARTING, Engine: "fake",
		Sandbox: fmt.Sprintf("box-s%d", id), Limits: r.GetLimits(), Labels: r.GetLabels(),
		Lifetime: durationpb.New(lifetime), CreateTime: at(0), ExpireTime: timestamppb.New(zero().Add(lifetime)),
	}}
	s.sessions = append(s.sessions, x)
	return x
}

// GetSession implements SessionService.
func (s *Server) GetSession(_ context.Context, r *executorv1.GetSessionRequest) (*executorv1.GetSessionResponse, error) {
	x, err := s.session(r.GetName())
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if x.state.GetState() == executorv1.Session_STATE_STARTING && r.GetWait().AsDuration() > 0 {
		x.state.State = executorv1.Session_STATE_RUNNING
		if why, bad := x.state.GetLabels()["fail"]; bad {
			x.state.State = executorv1.Session_STATE_TERMINATED
			x.state.EndReason, x.state.Detail = executorv1.Session_END_REASON_START_FAILED, why
			x.state.EndTime = at(100)
		}
	}
	return &executorv1.GetSessionResponse{Session: proto.CloneOf(x.state)}, nil
}

// ListSessions implements SessionService, in pages of at most 2.
func (s *Server) ListSessions(_ context.Context, r *executorv1.ListSessionsRequest) (*executorv1.ListSessionsResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []*executorv1.Session
	for i := len(s.sessions) - 1; i >= 0; i-- {
		state := s.sessions[i].state
		if r.GetShowTerminated() || state.GetState() != executorv1.Session_STATE_TERMINATED {
			all = append(all, proto.CloneOf(state))
		}
	}
	page, next := cut(all, r.GetPageToken(), r.GetPageSize())
	return &executorv1.ListSessionsResponse{Sessions: page, NextPageToken: next}, nil
}

// TerminateSession implements SessionService.
func (s *Server) TerminateSession(ctx context.Context, r *executorv1.TerminateSessionRequest) (*executorv1.TerminateSessionResponse, error) {
	x, err := s.session(r.GetName())
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	if x.state.GetState() != executorv1.Session_STATE_TERMINATED {
		x.state.State, x.state.EndReason = executorv1.Session_STATE_TERMINATED, executorv1.Session_END_REASON_REQUESTED
		x.state.Detail, x.state.EndTime = r.GetRequester(), at(2000)
	}
	in := append([]*execution(nil), s.executions...)
	s.mu.Unlock()
	for _, e := range in {
		if record, _, _ := e.snapshot(); strings.HasPrefix(record.GetName(), r.GetName()+"/") {
			e.stop(sessionEnded{})
			e.wait(ctx)
		}
	}
	return &executorv1.TerminateSessionResponse{Session: x.record()}, nil
}

// GetServerInfo implements AdminService.
func (s *Server) GetServerInfo(context.Context, *executorv1.GetServerInfoRequest) (*executorv1.GetServerInfoResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return proto.CloneOf(s.info), nil
}

func serverInfo() *executorv1.GetServerInfoResponse {
	return &executorv1.GetServerInfoResponse{
		Version: "v0.1.0", GoVersion: "go1.26.8", StartTime: at(0),
		RunningExecutions: 1, RunningSessions: 2,
		DefaultLimits: &executorv1.Limits{MemoryBytes: 1 << 30, CpuMillis: 2000, Pids: 512},
		WarmPool:      &executorv1.WarmPool{Size: 2, Ready: 1, Hits: 40, Misses: 3},
		Admission: &executorv1.Admission{
			Running: 1, Queued: 5, Sandboxes: 3, MaxRunning: 256, MaxQueued: 1024,
			MaxQueueWait: durationpb.New(30 * time.Second), MaxSandboxes: 4000,
		},
		Engines: []*executorv1.Engine{{
			Name: "fake", Isolation: "none", Sandboxes: 3,
			Capabilities: []*executorv1.Capability{
				{Name: "limit.memory", Available: true, Detail: "cgroup v2"},
				{Name: "language.node", Detail: "node is not on the path", Remedy: "install Node.js"},
			},
		}},
	}
}
