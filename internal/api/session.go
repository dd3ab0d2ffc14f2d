package api

import (
	"context"

	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
	"github.com/harvest-run/executord/internal/idempotency"
	"github.com/harvest-run/executord/internal/session"
)

// Sessions keeps long-lived sandboxes. session.Service is meant.
type Sessions interface {
	// Create records a new one and answers at once. A repeat of the request returns the
	// first one's.
	Create(ctx context.Context, r session.Request) (session.Session, error)
	// Get reads one.
	Get(ctx context.Context, ref session.Ref) (session.Session, error)
	// WaitStarted returns one when it has left Starting. When ctx ends first it returns
	// it as it is, and ctx's cause.
	WaitStarted(ctx context.Context, ref session.Ref) (session.Session, error)
	// List reads a page. next is the id behind which to go on if looking for more would
	// have taken too long, "" otherwise.
	List(ctx context.Context, q session.Query) (page []session.Session, next string, err error)
	// Terminate ends one and returns it when its sandbox is gone. When ctx ends first
	// the ending goes on.
	Terminate(ctx context.Context, ref session.Ref, requester string, key idempotency.Key) (session.Session, error)
	SessionLives
}

// sessionService implements the SessionService: its turns in turn.go, interactions in
// interaction.go.
type sessionService struct {
	executorv1.UnimplementedSessionServiceServer
	sessions Sessions
	turns    Turns
	tokens   *pageTokens
	keys     *requestKeys
	senders  *senders
}

// CreateSession implements executorv1.SessionServiceServer.
func (s *sessionService) CreateSession(ctx context.Context, req *executorv1.CreateSessionRequest) (*executorv1.CreateSessionResponse, error) {
	lifetime, err := duration("lifetime", req.GetLifetime())
	if err != nil {
		return nil, err
	}
	key, err := s.keys.of(ctx, req)
	if err != nil {
		return nil, err
	}
	idle, err := duration("idle_timeout", req.GetIdleTimeout())
	if err != nil {
		return nil, err
	}
	agent, err := agentOf(req.GetAgent())
	if err != nil {
		return nil, err
	}
	if err := checkCredentials(req.GetCredentials()); err != nil {
		return nil, err
	}
	created, err := s.sessions.Create(ctx, session.Request{
		Caller: callerOf(ctx), Engine: req.GetEngine(), Placement: placementOf(req.GetPlacement()), Limits: limitsOf(req.GetLimits()), Network: networkOf(req.GetNetwork()),
		Lifetime: lifetime, Labels: req.GetLabels(), Key: key,
		Repositories: repositoriesOf(req.GetRepositories()), Agent: agent, Image: req.GetImage(),
		Identity: session.Identity{Name: req.GetIdentity().GetName(), Email: req.GetIdentity().GetEmail()},
		Values:   req.GetCredentials().GetValues(), Secrets: req.GetCredentials().GetSecrets(), Auth: req.GetCredentials().GetOpencodeAuth(),
		IdleTimeout: idle, IdleAction: idleActionOf(req.GetIdleAction()),
	})
	if err != nil {
		return nil, err
	}
	return &executorv1.CreateSessionResponse{Session: sessionProto(created)}, nil
}

// GetSession implements executorv1.SessionServiceServer.
func (s *sessionService) GetSession(ctx context.Context, req *executorv1.GetSessionRequest) (*executorv1.GetSessionResponse, error) {
	ref, err := parseSessionName(ctx, req.GetName())
	if err != nil {
		return nil, err
	}
	timeout, err := duration("wait", req.GetWait())
	if err != nil {
		return nil, err
	}
	mask, err := parseReadMask(req.GetReadMask(), (*executorv1.Session)(nil))
	if err != nil {
		return nil, err
	}
	var found session.Session
	if timeout == 0 {
		found, err = s.sessions.Get(ctx, ref)
	} else {
		wait, cancel := context.WithTimeoutCause(ctx, timeout, errWaited)
		defer cancel()
		if found, err = s.sessions.WaitStarted(wait, ref); waited(ctx, wait, err) {
			err = nil
		}
	}
	if err != nil {
		return nil, err
	}
	answer := sessionProto(found)
	if err := s.withTurns(ctx, found, answer); err != nil {
		return nil, err
	}
	mask.apply(answer)
	return &executorv1.GetSessionResponse{Session: answer}, nil
}

// ListSessions implements executorv1.SessionServiceServer.
func (s *sessionService) ListSessions(ctx context.Context, req *executorv1.ListSessionsRequest) (*executorv1.ListSessionsResponse, error) {
	scope := "running"
	if req.GetShowTerminated() {
		scope = "all"
	}
	size := pageSize(req.GetPageSize())
	query := session.Query{Caller: callerOf(ctx), Limit: size + 1, Terminated: req.GetShowTerminated()}
	mask, err := parseReadMask(req.GetReadMask(), (*executorv1.Session)(nil))
	if err != nil {
		return nil, err
	}
	if query.Filter, err = parseFilter(req.GetFilter(), sessionFilters()); err != nil {
		return nil, err
	}
	if query.Ascending, err = parseOrder(req.GetOrderBy()); err != nil {
		return nil, err
	}
	list := listing(ctx, "ListSessions", scope, req.GetFilter(), query.Ascending)
	if query.Before, err = s.tokens.decode(list, req.GetPageToken()); err != nil {
		return nil, err
	}
	found, behind, err := s.sessions.List(ctx, query)
	if err != nil {
		return nil, err
	}
	page, next := cutPage(found, size, func(last session.Session) string {
		return s.tokens.encode(list, last.ID)
	})
	if behind != "" {
		next = s.tokens.encode(list, behind)
	}
	resp := &executorv1.ListSessionsResponse{
		Sessions:      make([]*executorv1.Session, len(page)),
		NextPageToken: next,
	}
	for i, each := range page {
		resp.Sessions[i] = sessionProto(each)
		mask.apply(resp.Sessions[i])
	}
	return resp, nil
}

// TerminateSession implements executorv1.SessionServiceServer.
func (s *sessionService) TerminateSession(ctx context.Context, req *executorv1.TerminateSessionRequest) (*executorv1.TerminateSessionResponse, error) {
	ref, err := parseSessionName(ctx, req.GetName())
	if err != nil {
		return nil, err
	}
	key, err := s.keys.of(ctx, req)
	if err != nil {
		return nil, err
	}
	ended, err := s.sessions.Terminate(ctx, ref, requester(ctx, req.GetRequester()), key)
	if err != nil {
		return nil, err
	}
	answer := sessionProto(ended)
	if err := s.withTurns(ctx, ended, answer); err != nil {
		return nil, err
	}
	return &executorv1.TerminateSessionResponse{Session: answer}, nil
}
