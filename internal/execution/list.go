package execution

import (
	"context"
	"slices"
	"strings"
	"time"

	"github.com/oklog/ulid/v2"

	"github.com/harvest-run/executord/internal/fault"
	"github.com/harvest-run/executord/internal/filter"
)

// newID makes an id that sorts by time.
func newID(now time.Time) string {
	return strings.ToLower(ulid.MustNew(ulid.Timestamp(now), ulid.DefaultEntropy()).String())
}

// List reads a page of executions, each as it is now. What the Filter says of state,
// reason and end_time it says of that: the store, which learns of them later, only
// answers for those that have ended. next is "" unless looking for a whole page would
// have taken too long; then the list goes on behind the execution with that id.
func (s *Service) List(ctx context.Context, q Query) (page []Execution, next string, err error) {
	if len(q.Filter.Terms) == 0 {
		page, err = s.cfg.Store.ListExecutions(ctx, q)
		for i, e := range page {
			if r, ok := s.find(e.ID); ok {
				page[i] = r.snapshot()
			}
		}
		return page, "", err
	}
	q.MinID, q.MaxID = idsBetween(q.Filter)
	q.Unfinished = slices.ContainsFunc(q.Filter.Terms, func(t filter.Term) bool {
		return t.Field == "state" && (t.Text == Ended.String()) == (t.Op == filter.NotEqual)
	})
	return filter.Page(ctx, filter.Source[Execution]{
		Window: func(ctx context.Context, before string, size int) (string, error) {
			piece := q
			piece.Before, piece.Limit = before, size
			return s.cfg.Store.ExecutionsWindow(ctx, piece)
		},
		Read: func(ctx context.Context, before, end string, limit int) ([]Execution, error) {
			piece := q
			piece.Before, piece.Limit = before, limit
			switch {
			case end == "":
			case q.Ascending:
				piece.MaxID = end
			default:
				piece.MinID = end
			}
			return s.cfg.Store.ListExecutions(ctx, piece)
		},
		Present: func(ctx context.Context, e Execution) (Execution, bool, error) {
			e, there, err := s.present(ctx, e)
			return e, there && q.Filter.Match(row{e}), err
		},
		ID: func(e Execution) string { return e.ID },
	}, q.Before, q.Limit)
}

// present returns a record of the store as it is now; false if it is gone.
func (s *Service) present(ctx context.Context, e Execution) (Execution, bool, error) {
	if e.State == Ended {
		return e, true, nil
	}
	e, err := s.get(ctx, e.ID) // it may have ended since the store was asked
	if fault.KindOf(err) == fault.NotFound {
		return e, false, nil
	}
	return e, err == nil, err
}

// idsBetween returns the bounds of ids that follow from what a filter says of
// create_time, "" for none: an id begins with its millisecond.
func idsBetween(f filter.Filter) (lowest, highest string) {
	for _, t := range f.Terms {
		if t.Field != "create_time" {
			continue
		}
		var from, to ulid.ULID
		// It cannot fail: a filter's times lie in years that an id can name.
		_ = from.SetTime(ulid.Timestamp(t.Time))
		_ = to.SetTime(ulid.Timestamp(t.Time))
		_ = to.SetEntropy(slices.Repeat([]byte{0xff}, 10))
		switch t.Op {
		case filter.Greater, filter.GreaterOrEqual, filter.Equal:
			lowest = max(lowest, strings.ToLower(from.String()))
		}
		switch t.Op {
		case filter.Less, filter.LessOrEqual, filter.Equal:
			if id := strings.ToLower(to.String()); highest == "" || id < highest {
				highest = id
			}
		}
	}
	return lowest, highest
}

// row is an execution as a filter sees it.
type row struct{ e Execution }

// Text implements filter.Row.
func (r row) Text(field, key string) (string, bool) {
	switch field {
	case "state":
		return r.e.State.String(), true
	case "reason":
		if r.e.Result == nil {
			return "", false
		}
		return string(r.e.Result.Reason), true
	default:
		text, ok := r.e.Labels[key]
		return text, ok
	}
}

// Time implements filter.Row.
func (r row) Time(field string) (time.Time, bool) {
	at := r.e.CreateTime
	if field == "end_time" {
		at = r.e.EndTime
	}
	return at, !at.IsZero()
}

// stateNames are those of the API.
func stateNames() []string {
	return []string{Starting: "STARTING", Running: "RUNNING", Stopping: "STOPPING", Ended: "ENDED"}
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
