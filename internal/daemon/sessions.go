package daemon

import (
	"context"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/harvest-run/executord/internal/agent"
	"github.com/harvest-run/executord/internal/api"
	"github.com/harvest-run/executord/internal/caller"
	"github.com/harvest-run/executord/internal/egress"
	"github.com/harvest-run/executord/internal/fault"
	"github.com/harvest-run/executord/internal/journal"
	"github.com/harvest-run/executord/internal/provision"
	"github.com/harvest-run/executord/internal/session"
	"github.com/harvest-run/executord/internal/store"
	"github.com/harvest-run/executord/internal/turn"
)

// openTurns makes the service of turns, which is told of the sessions later.
func (c Config) openTurns(d *Daemon, st *store.Store) (*turn.Service, error) {
	turns, err := turn.New(turn.Config{
		Store: st, Dir: filepath.Join(c.Settings.GetStateDir(), "turns"), MaxAge: c.Settings.GetRetention().GetMaxAge().AsDuration(),
		CheckRoom: d.disk.Check, Logger: c.Logger,
	})
	if err != nil {
		return nil, fmt.Errorf("make the service of turns: %w", err)
	}
	return turns, nil
}

// sessionHome is a session.Service as turns want it.
type sessionHome struct{ *session.Service }

// Visible implements turn.Sessions.
func (h sessionHome) Visible(ctx context.Context, id string, by caller.Caller) error {
	_, err := h.Get(ctx, session.Ref{ID: id, Caller: by})
	return err
}

// Profile implements turn.Sessions.
func (h sessionHome) Profile(ctx context.Context, id string, by caller.Caller) (turn.Profile, error) {
	s, err := h.Get(ctx, session.Ref{ID: id, Caller: by})
	if err != nil {
		return turn.Profile{}, err
	}
	spec := s.Details.Agent
	switch {
	case spec == nil:
		return turn.Profile{}, fault.New(fault.FailedPrecondition, "NO_AGENT", "session %q has no agent; make one with an agent", id)
	case s.State.Stage() != session.Starting && s.State.Stage() != session.Running:
		return turn.Profile{}, fault.New(fault.FailedPrecondition, "SESSION_NOT_RUNNING", "session %q is %s", id, s.State)
	}
	return turn.Profile{
		Model:  agent.Model{Provider: spec.Model.Provider, Model: spec.Model.Model, BaseURL: spec.Model.BaseURL},
		Limit:  turn.Limit{CostMicros: spec.Limit.CostMicros, Turns: spec.Limit.Turns, TurnTimeout: spec.Limit.TurnTimeout},
		Policy: turn.Policy{Mode: turn.Mode(spec.Interactions.Mode), Timeout: spec.Interactions.Timeout, Allow: spec.Interactions.Allow},
	}, nil
}

// Note implements turn.Sessions.
func (h sessionHome) Note(id string, n turn.Note) {
	if t := n.Turn; t != nil {
		note := session.TurnNote{ID: t.ID, State: t.State.String()}
		if t.Result != nil {
			note.Outcome, note.CostMicros = string(t.Result.Outcome), t.Result.Usage.CostMicros
		}
		h.NoteTurn(id, note)
	}
	if i := n.Interaction; i != nil {
		h.NoteInteraction(id, session.AskedNote{ID: i.ID, Pending: i.State == turn.Pending})
	}
}

// watchableSessions is a session.Service as the api wants it: with a Watcher that is an
// interface.
type watchableSessions struct{ *session.Service }

// WatchSession implements api.Sessions.
func (w watchableSessions) WatchSession(ctx context.Context, ref session.Ref, after *journal.Cursor) (api.SessionWatcher, error) {
	watcher, err := w.Watch(ctx, ref, after)
	if err != nil {
		return nil, err // and not a nil pointer in an interface
	}
	return watcher, nil
}

// watchableTurns is a turn.Service as the api wants it.
type watchableTurns struct{ *turn.Service }

// Watch implements api.Turns.
func (w watchableTurns) Watch(ctx context.Context, ref turn.Ref, after *journal.Cursor) (api.TurnWatcher, error) {
	watcher, err := w.Service.Watch(ctx, ref, after)
	if err != nil {
		return nil, err
	}
	return watcher, nil
}

// openProvision makes what fits the sandboxes of sessions out.
func (c Config) openProvision(d *Daemon, images provision.Images, network *egress.Gateway) *provision.Provisioner {
	settings := c.Settings.GetSessions()
	provider, model, _ := strings.Cut(settings.GetModel(), "/")
	made := provision.New(provision.Config{
		Images: images, Broker: d.broker, Network: network, Secrets: d.secrets,
		Identity: session.Identity{Name: settings.GetAuthorName(), Email: settings.GetAuthorEmail()},
		Model:    session.Model{Provider: provider, Model: model},
		Plain:    len(c.Settings.GetBroker().GetPrivateUpstreams()) > 0, Logger: c.Logger,
	})
	d.opened.add("provision", made.Close)
	return made
}
