package store

import (
	"strings"

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

// page adds where the page begins, the order and the limit.
func (q *query) page(id, last string, ascending bool, limit int) (string, []any) {
	order := " ORDER BY " + id + " DESC LIMIT ?"
	if ascending {
		order = " ORDER BY " + id + " LIMIT ?"
		q.where(id+" > ?", last)
	} else {
		if last == "" {
			last = afterAll
		}
		q.where(id+" < ?", last)
	}
	q.text.WriteString(order)
	return q.text.String(), append(q.args, limit)
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
	q := query{and: " WHERE "}
	q.text.WriteString(selectExecution)
	id := "id"
	terms := p.Filter
	if label, rest, ok := takeLabel(p.Filter); ok {
		q.text.Reset()
		q.text.WriteString(selectByLabel())
		q.where("execution_labels.name = ? AND execution_labels.value = ?", label.Key, label.Text)
		id, terms = "execution", rest
	}
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
	q.filter(terms, columns{
		reason: "json_extract(result, '$.reason')", unfinished: "state < 4",
		state: func(name string) int64 { return int64(execution.StateOf(name)) },
	})
	return q.page(id, p.Before, p.Ascending, p.Limit)
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
	q := query{and: " WHERE "}
	q.text.WriteString(selectSession)
	if !p.Terminated {
		q.where("state < 4")
	}
	q.filter(p.Filter, columns{
		// Stored as '' where there is none.
		reason: "nullif(reason, '')", unfinished: "state < 4",
		state: func(name string) int64 { return int64(session.StateOf(name)) },
	})
	return q.page("id", p.Before, p.Ascending, p.Limit)
}
