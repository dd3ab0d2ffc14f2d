package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"strings"

	"github.com/harvest-run/executord/internal/caller"
	"github.com/harvest-run/executord/internal/execution"
	"github.com/harvest-run/executord/internal/filter"
	"github.com/harvest-run/executord/internal/session"
)

// query gathers the text of a SELECT and its parameters. The text is made of constants
// alone: what callers say is a parameter.
type query struct {
	text strings.Builder
	args []any
	// and is what goes before the next condition.
	and string
}

// where adds a condition.
func (q *query) where(condition string, args ...any) {
	q.text.WriteString(q.and)
	q.text.WriteString(condition)
	q.args = append(q.args, args...)
	q.and = " AND "
}

// owned adds what a caller sees. The second condition lets SQLite use the partial index.
func (q *query) owned(by caller.Caller) {
	if !by.All {
		q.where("owner = ? AND owner <> 'local'", by.Owner)
	}
}

// behind adds where a page begins.
func (q *query) behind(id, last string, ascending bool) {
	if ascending {
		q.where(id+" > ?", last)
		return
	}
	if last == "" {
		last = afterAll
	}
	q.where(id+" < ?", last)
}

// page adds the order and how much of it is wanted.
func (q *query) page(id string, ascending bool, limit string, n int) (string, []any) {
	order := " DESC "
	if ascending {
		order = " "
	}
	q.text.WriteString(" ORDER BY " + id + order + limit)
	return q.text.String(), append(q.args, n)
}

// columns says how the fields of a filter are found in a table.
type columns struct {
	// reason is the expression of the field reason or end_reason, state turns the name of
	// a state into its number.
	reason string
	state  func(name string) int64
	// unfinished is the condition of records whose life goes on. What of them can change
	// is compared by the service, which knows better, and let through here.
	unfinished string
}

// filter adds the conditions of a filter. One that a record lacks the field of is only
// met by NotEqual: so IS and IS NOT, which know NULL.
func (q *query) filter(f filter.Filter, c columns) {
	for _, t := range f.Terms {
		switch t.Field {
		case "labels":
			// A name has no character that a path in quotes could take for its own.
			q.where("json_extract(labels, ?) "+same(t.Op)+" ?", `$."`+t.Key+`"`, t.Text)
		case "create_time":
			q.where("create_time "+string(t.Op)+" ?", t.Time.UnixNano())
		case "state":
			q.where("("+c.unfinished+" OR state "+same(t.Op)+" ?)", c.state(t.Text))
		case "end_time":
			op := string(t.Op)
			if t.Op == filter.Equal || t.Op == filter.NotEqual {
				op = same(t.Op)
			}
			q.where("("+c.unfinished+" OR end_time "+op+" ?)", t.Time.UnixNano())
		default:
			q.where("("+c.unfinished+" OR "+c.reason+" "+same(t.Op)+" ?)", t.Text)
		}
	}
}

// same is an operator of texts.
func same(op filter.Op) string {
	if op == filter.NotEqual {
		return "IS NOT"
	}
	return "IS"
}

// selectByLabel reads executions by a label: those with the same one lie together, in
// order. CROSS keeps the planner from beginning with all executions.
func selectByLabel() string {
	const from = "FROM executions "
	return strings.Replace(selectExecution, from, "FROM execution_labels CROSS JOIN executions ON id = execution", 1)
}

// executionsQuery is the query of a page that no prepared statement reads.
func executionsQuery(p execution.Query) (string, []any) {
	q, id, terms := chooseExecutions(p, selectExecution, selectByLabel())
	q.filter(terms, columns{
		reason: "json_extract(result, '$.reason')", unfinished: "state < 4",
		state: func(name string) int64 { return int64(execution.StateOf(name)) },
	})
	q.behind(id, p.Before, p.Ascending)
	return q.page(id, p.Ascending, "LIMIT ?", p.Limit)
}

// executionsWindow is the query of the id at which a page ends that is not filtered but
// by what an index serves.
func executionsWindow(p execution.Query) (string, []any) {
	q, id, _ := chooseExecutions(p, "SELECT id FROM executions ", "SELECT execution FROM execution_labels CROSS JOIN executions ON id = execution")
	q.behind(id, p.Before, p.Ascending)
	return q.page(id, p.Ascending, "LIMIT 1 OFFSET ?", p.Limit-1)
}

// chooseExecutions begins a query with what indexes serve. It returns the column of the
// ids and what of the filter is left to do.
func chooseExecutions(p execution.Query, all, byLabel string) (q *query, id string, rest filter.Filter) {
	q = &query{and: " WHERE "}
	label, rest, ok := takeLabel(p.Filter)
	if ok {
		q.text.WriteString(byLabel)
		q.where("execution_labels.name = ? AND execution_labels.value = ?", label.Key, label.Text)
		id = "execution"
	} else {
		q.text.WriteString(all)
		id = "id"
	}
	q.owned(p.Caller)
	switch {
	case p.Session != "":
		q.where("session = ? AND session <> ''", p.Session)
	case p.InAnySession:
		q.where("session <> ''")
	}
	if p.MinID != "" {
		q.where(id+" >= ?", p.MinID)
	}
	if p.MaxID != "" {
		q.where(id+" <= ?", p.MaxID)
	}
	if p.Unfinished {
		q.where("state < 4")
	}
	return q, id, rest
}

// takeLabel takes a term out of a filter that an index can serve.
func takeLabel(f filter.Filter) (label filter.Term, rest filter.Filter, ok bool) {
	for _, t := range f.Terms {
		if !ok && t.Field == "labels" && t.Op == filter.Equal {
			label, ok = t, true
			continue
		}
		rest.Terms = append(rest.Terms, t)
	}
	return label, rest, ok
}

// sessionsQuery is the query of a page that no prepared statement reads.
func sessionsQuery(p session.Query) (string, []any) {
	q := chooseSessions(p, selectSession)
	q.filter(p.Filter, columns{
		// Stored as '' where there is none.
		reason: "nullif(reason, '')", unfinished: "state < 4",
		state: func(name string) int64 { return int64(session.StateOf(name)) },
	})
	return q.page("id", p.Ascending, "LIMIT ?", p.Limit)
}

// sessionsWindow is the query of the id at which a page ends that is not filtered.
func sessionsWindow(p session.Query) (string, []any) {
	return chooseSessions(p, "SELECT id FROM sessions ").page("id", p.Ascending, "LIMIT 1 OFFSET ?", p.Limit-1)
}

// chooseSessions begins a query with what indexes serve.
func chooseSessions(p session.Query, all string) *query {
	q := &query{and: " WHERE "}
	q.text.WriteString(all)
	q.owned(p.Caller)
	if !p.Terminated {
		q.where("state < 4")
	}
	if p.Last != "" && p.Ascending {
		q.where("id <= ?", p.Last)
	} else if p.Last != "" {
		q.where("id >= ?", p.Last)
	}
	q.behind("id", p.Before, p.Ascending)
	return q
}

// windowEnd reads the id that a window's query finds, "" if none.
func (s *Store) windowEnd(ctx context.Context, text string, args []any) (string, error) {
	var id string
	err := s.reader.QueryRowContext(ctx, text, args...).Scan(&id)
	if errors.Is(err, sql.ErrNoRows) {
		return "", nil
	}
	if err != nil {
		return "", fmt.Errorf("find the end of a page: %w", err)
	}
	return id, nil
}

// ExecutionsWindow implements execution.Store.
func (s *Store) ExecutionsWindow(ctx context.Context, q execution.Query) (string, error) {
	text, args := executionsWindow(q)
	return s.windowEnd(ctx, text, args)
}

// SessionsWindow implements session.Store.
func (s *Store) SessionsWindow(ctx context.Context, q session.Query) (string, error) {
	text, args := sessionsWindow(q)
	return s.windowEnd(ctx, text, args)
}
