package api

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"time"

	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
	"github.com/harvest-run/executord/internal/fault"
	"github.com/harvest-run/executord/internal/idempotency"
	"github.com/harvest-run/executord/internal/journal"
	"github.com/harvest-run/executord/internal/session"
	"google.golang.org/grpc"
)

// SessionLives changes sessions. session.Service is meant.
type SessionLives interface {
	Update(ctx context.Context, ref session.Ref, u session.Update) (session.Session, error)
	Pause(ctx context.Context, ref session.Ref, key idempotency.Key) (session.Session, error)
	Resume(ctx context.Context, ref session.Ref, r session.Resumption) (session.Session, error)
	Fork(ctx context.Context, ref session.Ref, r session.Request) (session.Session, error)
	WatchSession(ctx context.Context, ref session.Ref, after *journal.Cursor) (SessionWatcher, error)
	Diff(ctx context.Context, ref session.Ref) ([]session.RepositoryDiff, error)
}

// SessionWatcher follows a session. session.Watcher is meant.
type SessionWatcher interface {
	Next(ctx context.Context) (session.Event, error)
	Cursor() journal.Cursor
	LastEventTime() time.Time
	Close()
}

// UpdateSession implements executorv1.SessionServiceServer.
func (s *sessionService) UpdateSession(ctx context.Context, req *executorv1.UpdateSessionRequest) (*executorv1.UpdateSessionResponse, error) {
	ref, err := parseSessionName(ctx, req.GetSession().GetName())
	if err != nil {
		return nil, err
	}
	u, err := updateOf(req)
	if err != nil {
		return nil, err
	}
	if u.Key, err = s.keys.of(ctx, req); err != nil {
		return nil, err
	}
	changed, err := s.sessions.Update(ctx, ref, u)
	if err != nil {
		return nil, err
	}
	return &executorv1.UpdateSessionResponse{Session: sessionProto(changed)}, nil
}

// updateOf reads what is to be changed.
func updateOf(req *executorv1.UpdateSessionRequest) (session.Update, error) {
	u := session.Update{Values: req.GetCredentials().GetValues(), Auth: req.GetCredentials().GetOpencodeAuth()}
	if len(req.GetCredentials().GetSecrets()) > 0 {
		return u, fault.InvalidField("CREDENTIALS", "credentials.secrets", "are chosen when a session is made; give values here")
	}
	to := req.GetSession()
	paths := req.GetUpdateMask().GetPaths()
	if len(paths) == 0 && len(u.Values) == 0 && u.Auth == "" {
		return u, fault.InvalidField("UPDATE_MASK", "update_mask", "names nothing to change; labels, expire_time, idle_timeout and idle_action can be changed")
	}
	for _, path := range paths {
		switch path {
		case "labels":
			u.Labels = &to.Labels
		case "expire_time":
			if err := to.GetExpireTime().CheckValid(); err != nil {
				return u, fault.InvalidField("EXPIRE_TIME", "session.expire_time", "is needed, since update_mask names it: %v", err)
			}
			at := to.GetExpireTime().AsTime()
			u.ExpireTime = &at
		case "idle_timeout":
			idle, err := duration("session.idle_timeout", to.GetIdleTimeout())
			if err != nil {
				return u, err
			}
			if idle != 0 && (idle < minIdle || idle > session.MaxLifetime) {
				return u, fault.InvalidField("IDLE_TIMEOUT", "session.idle_timeout", "must be %v to %v, or absent for never", minIdle, session.MaxLifetime)
			}
			u.IdleTimeout = &idle
		case "idle_action":
			action := idleActionOf(to.GetIdleAction())
			u.IdleAction = &action
		default:
			return u, fault.InvalidField("UPDATE_MASK", "update_mask", "%q cannot be changed; labels, expire_time, idle_timeout and idle_action can", clip(path, maxMaskPath))
		}
	}
	return u, nil
}

// minIdle is the least idle timeout, as the proto has it.
const minIdle = time.Minute

// PauseSession implements executorv1.SessionServiceServer.
func (s *sessionService) PauseSession(ctx context.Context, req *executorv1.PauseSessionRequest) (*executorv1.PauseSessionResponse, error) {
	ref, err := parseSessionName(ctx, req.GetName())
	if err != nil {
		return nil, err
	}
	key, err := s.keys.of(ctx, req)
	if err != nil {
		return nil, err
	}
	paused, err := s.sessions.Pause(ctx, ref, key)
	if err != nil {
		return nil, err
	}
	return &executorv1.PauseSessionResponse{Session: sessionProto(paused)}, nil
}

// ResumeSession implements executorv1.SessionServiceServer.
func (s *sessionService) ResumeSession(ctx context.Context, req *executorv1.ResumeSessionRequest) (*executorv1.ResumeSessionResponse, error) {
	ref, err := parseSessionName(ctx, req.GetName())
	if err != nil {
		return nil, err
	}
	if len(req.GetCredentials().GetSecrets()) > 0 {
		return nil, fault.InvalidField("CREDENTIALS", "credentials.secrets", "are chosen when a session is made; give values here")
	}
	key, err := s.keys.of(ctx, req)
	if err != nil {
		return nil, err
	}
	resumed, err := s.sessions.Resume(ctx, ref, session.Resumption{
		Values: req.GetCredentials().GetValues(), Auth: req.GetCredentials().GetOpencodeAuth(), Key: key,
	})
	if err != nil {
		return nil, err
	}
	return &executorv1.ResumeSessionResponse{Session: sessionProto(resumed)}, nil
}

// ForkSession implements executorv1.SessionServiceServer.
func (s *sessionService) ForkSession(ctx context.Context, req *executorv1.ForkSessionRequest) (*executorv1.ForkSessionResponse, error) {
	ref, err := parseSessionName(ctx, req.GetName())
	if err != nil {
		return nil, err
	}
	lifetime, err := duration("lifetime", req.GetLifetime())
	if err != nil {
		return nil, err
	}
	key, err := s.keys.of(ctx, req)
	if err != nil {
		return nil, err
	}
	forked, err := s.sessions.Fork(ctx, ref, session.Request{
		Caller: callerOf(ctx), Lifetime: lifetime, Labels: req.GetLabels(), Key: key,
		Values: req.GetCredentials().GetValues(), Secrets: req.GetCredentials().GetSecrets(), Auth: req.GetCredentials().GetOpencodeAuth(),
	})
	if err != nil {
		return nil, err
	}
	return &executorv1.ForkSessionResponse{Session: sessionProto(forked)}, nil
}

// GetDiff implements executorv1.SessionServiceServer.
func (s *sessionService) GetDiff(ctx context.Context, req *executorv1.GetDiffRequest) (*executorv1.GetDiffResponse, error) {
	ref, err := parseSessionName(ctx, req.GetName())
	if err != nil {
		return nil, err
	}
	diffs, err := s.sessions.Diff(ctx, ref)
	if err != nil {
		return nil, err
	}
	resp := &executorv1.GetDiffResponse{}
	for _, d := range diffs {
		one := &executorv1.RepositoryDiff{Path: text(d.Path), Branch: text(d.Branch), UnpushedCommits: int32(d.Unpushed), Truncated: d.Truncated}
		for _, f := range d.Files {
			one.Files = append(one.Files, fileDiffProto(f))
		}
		resp.Repositories = append(resp.Repositories, one)
	}
	return resp, nil
}

// WatchSession implements executorv1.SessionServiceServer.
func (s *sessionService) WatchSession(req *executorv1.WatchSessionRequest, stream grpc.ServerStreamingServer[executorv1.WatchSessionResponse]) error {
	interval, err := heartbeatInterval(req.GetHeartbeatInterval())
	if err != nil {
		return err
	}
	ref, err := parseSessionName(stream.Context(), req.GetName())
	if err != nil {
		return err
	}
	watcher, err := s.sessions.WatchSession(stream.Context(), ref, journalCursorOf(req.GetAfter()))
	if err != nil {
		return err
	}
	return follow(stream.Context(), s.senders, following[session.Event, *executorv1.SessionEvent]{
		source: watcher, interval: interval,
		convert: func(e session.Event) *executorv1.SessionEvent { return sessionEventProto(ref.ID, e) },
		send: func(e *executorv1.SessionEvent) error {
			return stream.Send(&executorv1.WatchSessionResponse{Event: e})
		},
		beat: func() *executorv1.SessionEvent {
			return &executorv1.SessionEvent{
				Cursor: journalCursorProto(watcher.Cursor()),
				Kind:   &executorv1.SessionEvent_Heartbeat{Heartbeat: &executorv1.Heartbeat{LastEventTime: timestamp(watcher.LastEventTime())}},
			}
		},
	})
}

// repositoriesOf reads what is to be cloned.
func repositoriesOf(all []*executorv1.Repository) []session.Repository {
	var out []session.Repository
	for _, r := range all {
		out = append(out, session.Repository{URL: r.GetUrl(), Branch: r.GetBranch(), Depth: int(r.GetDepth()), Directory: r.GetDirectory()})
	}
	return out
}

// agentOf reads which agent is asked for; nil for none.
func agentOf(a *executorv1.AgentSpec) (*session.AgentSpec, error) {
	if a.GetKind() == executorv1.AgentSpec_KIND_UNSPECIFIED {
		return nil, nil
	}
	timeout, err := duration("agent.interactions.timeout", a.GetInteractions().GetTimeout())
	if err != nil {
		return nil, err
	}
	turn, err := duration("agent.limit.turn_timeout", a.GetLimit().GetTurnTimeout())
	if err != nil {
		return nil, err
	}
	return &session.AgentSpec{
		Kind:  "opencode",
		Model: session.Model{Provider: a.GetModel().GetProvider(), Model: a.GetModel().GetModel(), BaseURL: a.GetModel().GetBaseUrl()},
		Interactions: session.InteractionPolicy{
			Mode: modeOf(a.GetInteractions().GetMode()), Timeout: timeout,
			Allow: a.GetInteractions().GetDefaultAnswer() == executorv1.InteractionPolicy_ANSWER_ALLOW,
		},
		Limit:        session.SpendLimit{CostMicros: a.GetLimit().GetCostMicros(), Turns: int(a.GetLimit().GetTurns()), TurnTimeout: turn},
		Instructions: a.GetInstructions(),
	}, nil
}

func modeOf(m executorv1.InteractionPolicy_Mode) string {
	return map[executorv1.InteractionPolicy_Mode]string{
		executorv1.InteractionPolicy_MODE_ALLOW: "ALLOW", executorv1.InteractionPolicy_MODE_ASK: "ASK", executorv1.InteractionPolicy_MODE_DENY: "DENY",
	}[m]
}

func idleActionOf(a executorv1.IdleAction) session.IdleAction {
	return map[executorv1.IdleAction]session.IdleAction{
		executorv1.IdleAction_IDLE_ACTION_PAUSE: session.IdlePause, executorv1.IdleAction_IDLE_ACTION_TERMINATE: session.IdleTerminate,
	}[a]
}

// withTurns adds what the turns of a session tell of it.
func (s *sessionService) withTurns(ctx context.Context, record session.Session, to *executorv1.Session) error {
	if record.Details.Agent == nil {
		return nil
	}
	used, err := s.turns.Usage(ctx, record.ID)
	if err != nil {
		return err
	}
	to.Usage = agentUsageProto(used)
	if id := s.turns.Running(record.ID); id != "" {
		to.RunningTurn = turnName(record.ID, id)
	}
	return nil
}

// checkCredentials refuses a name that is given twice, as a value and as a secret.
func checkCredentials(c *executorv1.Credentials) error {
	for _, name := range slices.Sorted(maps.Keys(c.GetSecrets())) {
		if _, ok := c.GetValues()[name]; ok {
			return fault.InvalidField("CREDENTIALS", fmt.Sprintf("credentials.secrets[%q]", name), "is among the values, too; give it once")
		}
	}
	return nil
}
