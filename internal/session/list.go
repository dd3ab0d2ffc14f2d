package session

import (
	"context"
	"slices"
	"time"

	"github.com/harvest-run/executord/internal/caller"
	"github.com/harvest-run/executord/internal/fault"
	"github.com/harvest-run/executord/internal/filter"
)

// List reads a page of sessions, each as it is now. What the Filter says of state,
// end_reason and end_time it says of that: the store, which learns of some later, only
// answers for those that have ended. next is "" unless looking for a whole page would
// have taken too long; then the list goes on behind the session with that id.
func (s *Service) List(ctx context.Context, q Query) (page []Session, next string, err error) {
	if len(q.Filter.Terms) == 0 {
		page, err = s.cfg.Store.ListSessions(ctx, q)
		for i, record := range page {
			if l, ok := s.find(record.ID); ok {
				page[i] = l.snapshot()
			}
		}
		return page, "", err
	}
	return filter.Page(ctx, filter.Source[Session]{
		Window: func(ctx context.Context, before string, size int) (string, error) {
			piece := q
			piece.Before, piece.Limit = before, size
			return s.cfg.Store.SessionsWindow(ctx, piece)
		},
		Read: func(ctx context.Context, before, end string, limit int) ([]Session, error) {
			piece := q
			piece.Before, piece.Last, piece.Limit = before, end, limit
			return s.cfg.Store.ListSessions(ctx, piece)
		},
		Present: func(ctx context.Context, record Session) (Session, bool, error) {
			record, there, err := s.present(ctx, record)
			return record, there && (q.Terminated || record.State != Terminated) && q.Filter.Match(row{record}), err
		},
		ID: func(record Session) string { return record.ID },
	}, q.Before, q.Limit)
}

// present returns a record of the store as it is now; false if it is gone.
func (s *Service) present(ctx context.Context, record Session) (Session, bool, error) {
	if record.State == Terminated {
		return record, true, nil
	}
	record, err := s.Get(ctx, Ref{ID: record.ID, Caller: caller.Caller{All: true}}) // it may have ended since the store was asked
	if fault.KindOf(err) == fault.NotFound {
		return record, false, nil
	}
	return record, err == nil, err
}

// row is a session as a filter sees it.
type row struct{ s Session }

// Text implements filter.Row.
func (r row) Text(field, key string) (string, bool) {
	switch field {
	case "state":
		return r.s.State.String(), true
	case "end_reason":
		return string(r.s.Reason), r.s.Reason != ""
	default:
		text, ok := r.s.Labels[key]
		return text, ok
	}
}

// Time implements filter.Row.
func (r row) Time(field string) (time.Time, bool) {
	at := r.s.CreateTime
	if field == "end_time" {
		at = r.s.EndTime
	}
	return at, !at.IsZero()
}

// stateNames are those of the API.
func stateNames() []string {
	return []string{
		Starting: "STARTING", Running: "RUNNING", Terminating: "TERMINATING", Terminated: "TERMINATED",
		Pausing: "PAUSING", Paused: "PAUSED", Resuming: "RESUMING",
	}
}

// String returns the name of a state, "" of none.
func (s State) String() string {
	if names := stateNames(); int(s) < len(names) {
		return names[s]
	}
	return ""
}

// StateOf is the inverse of String; 0 for what is no name.
func StateOf(name string) State {
	return State(max(slices.Index(stateNames(), name), 0))
}
