package store

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/harvest-run/executord/internal/caller"
	"github.com/harvest-run/executord/internal/execution"
	"github.com/harvest-run/executord/internal/filter"
	"github.com/harvest-run/executord/internal/session"
)

// fields are those of executions and sessions together.
var fields = filter.Schema{
	Enums: map[string][]string{
		"state":      {"STARTING", "RUNNING", "STOPPING", "ENDED", "TERMINATING", "TERMINATED"},
		"reason":     {"EXITED", "OOM_KILLED"},
		"end_reason": {"REQUESTED", "EXPIRED"},
	},
	Maps: []string{"labels"}, Times: []string{"create_time", "end_time"},
}

func parse(t testing.TB, text string) filter.Filter {
	t.Helper()
	f, err := filter.Parse(text, fields)
	if err != nil {
		t.Fatalf("%s: %v", text, err)
	}
	return f
}

// row is a record as a filter sees it.
type record struct {
	state, reason string
	labels        map[string]string
	create, end   time.Time
	session       string
}

func (r record) Text(field, key string) (string, bool) {
	switch field {
	case "state":
		return r.state, true
	case "labels":
		text, ok := r.labels[key]
		return text, ok
	default:
		return r.reason, r.reason != ""
	}
}

func (r record) Time(field string) (time.Time, bool) {
	if field == "end_time" {
		return r.end, !r.end.IsZero()
	}
	return r.create, true
}

// pick returns one of some.
func pick[T any](random *rand.Rand, some ...T) T { return some[random.IntN(len(some))] }

// moment is a time that filters and records have in common more often than not.
func moment(random *rand.Rand) time.Time {
	return someTime.Add(time.Duration(random.IntN(5)-2) * pick(random, 1, time.Millisecond, time.Hour))
}

// randomFilter is a filter of up to three terms.
func randomFilter(random *rand.Rand, reason string, states, reasons []string) string {
	var terms []string
	for range random.IntN(4) {
		same := pick(random, "=", "!=")
		at := fmt.Sprintf("%s %q", pick(random, "=", "!=", "<", "<=", ">", ">="), moment(random).Format(time.RFC3339Nano))
		terms = append(terms, pick(random,
			"state "+same+" "+pick(random, states...),
			reason+" "+same+" "+pick(random, reasons...),
			"labels."+pick(random, "a", "b.c/d", "none")+" "+same+" "+pick(random, "x", "y", `"\"'"`, `""`),
			"create_time "+at, "end_time "+at,
		))
	}
	return strings.Join(terms, " AND ")
}

func randomLabels(random *rand.Rand) map[string]string {
	labels := make(map[string]string)
	for _, name := range []string{"a", "b.c/d", "unasked"} {
		if random.IntN(2) == 0 {
			labels[name] = pick(random, "x", "y", `"'`, "")
		}
	}
	if len(labels) == 0 {
		return nil
	}
	return labels
}

// The store and filter.Match agree about every ended execution. Of those that have not
// ended the store lets through what can still change.
func TestExecutionFilters(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	s := open(t, t.TempDir())
	const all = 120
	records := make(map[string]record)
	for n := range all {
		e := newExecution(number(n))
		e.State = execution.State(1 + random.IntN(4))
		e.Session = pick(random, "", "", "s1")
		e.Labels, e.CreateTime = randomLabels(random), moment(random)
		r := record{state: e.State.String(), labels: e.Labels, create: e.CreateTime, session: e.Session}
		if e.State == execution.Ended {
			e.EndTime = moment(random)
			r.end = e.EndTime
			if random.IntN(8) > 0 {
				e.Result = &execution.Result{Reason: pick(random, execution.Exited, execution.OOMKilled)}
				r.reason = string(e.Result.Reason)
			}
		}
		if err := s.InsertExecution(t.Context(), e); err != nil {
			t.Fatal(err)
		}
		records[e.ID] = r
	}
	for range 200 {
		text := randomFilter(random, "reason", []string{"STARTING", "RUNNING", "STOPPING", "ENDED"}, []string{"EXITED", "OOM_KILLED"})
		q := execution.Query{
			Filter: parse(t, text), Ascending: random.IntN(2) == 0, Limit: 10 + random.IntN(all), InAnySession: random.IntN(4) == 0,
			Unfinished: random.IntN(4) == 0,
		}
		var got []string
		for {
			page, err := s.ListExecutions(t.Context(), q)
			if err != nil {
				t.Fatalf("%s: %v", text, err)
			}
			for _, e := range page {
				if q.InAnySession && e.Session == "" || q.Unfinished && e.State == execution.Ended {
					t.Errorf("%s: %s is not asked for", text, e.ID)
				}
				// What the service does.
				if e.State == execution.Ended || q.Filter.Match(records[e.ID]) {
					got = append(got, e.ID)
				}
			}
			if len(page) < q.Limit {
				break
			}
			q.Before = page[len(page)-1].ID
		}
		want := 0
		for n := range all {
			id := number(n)
			r := records[id]
			if q.Filter.Match(r) && (!q.InAnySession || r.session != "") && (!q.Unfinished || r.state != "ENDED") {
				want++
				if !slices.Contains(got, id) {
					t.Errorf("%s: %s is left out: %+v", text, id, r)
				}
			}
		}
		if len(got) != want {
			t.Errorf("%s: %d executions, want %d", text, len(got), want)
		}
		if sorted := slices.IsSorted(got); !q.Ascending {
			sorted = slices.IsSortedFunc(got, func(a, b string) int { return strings.Compare(b, a) })
			if !sorted {
				t.Errorf("%s: not in descending order: %v", text, got)
			}
		} else if !sorted {
			t.Errorf("%s: not in ascending order: %v", text, got)
		}
	}
}

func TestSessionFilters(t *testing.T) {
	random := rand.New(rand.NewPCG(3, 4))
	s := open(t, t.TempDir())
	const all = 60
	records := make(map[string]record)
	for n := range all {
		one := newSession(number(n))
		one.State = session.State(1 + random.IntN(4))
		one.Labels, one.CreateTime = randomLabels(random), moment(random)
		if one.State == session.Terminated {
			one.Reason, one.EndTime = pick(random, session.Requested, session.Expired), moment(random)
		}
		if err := s.InsertSession(t.Context(), one); err != nil {
			t.Fatal(err)
		}
		records[one.ID] = record{state: one.State.String(), reason: string(one.Reason), labels: one.Labels, create: one.CreateTime, end: one.EndTime}
	}
	for range 150 {
		text := randomFilter(random, "end_reason", []string{"STARTING", "RUNNING", "TERMINATING", "TERMINATED"}, []string{"REQUESTED", "EXPIRED"})
		q := session.Query{Filter: parse(t, text), Ascending: random.IntN(2) == 0, Limit: all, Terminated: random.IntN(3) > 0}
		page, err := s.ListSessions(t.Context(), q)
		if err != nil {
			t.Fatalf("%s: %v", text, err)
		}
		var got []string
		for _, one := range page {
			if one.State == session.Terminated || q.Filter.Match(records[one.ID]) {
				got = append(got, one.ID)
			}
		}
		var want []string
		for n := range all {
			r := records[number(n)]
			if q.Filter.Match(r) && (q.Terminated || r.state != "TERMINATED") {
				want = append(want, number(n))
			}
		}
		if !q.Ascending {
			slices.Reverse(want)
		}
		if !slices.Equal(got, want) {
			t.Errorf("%s: got %v, want %v", text, got, want)
		}
	}
}

func TestListExecutionsBetweenIDs(t *testing.T) {
	s := open(t, t.TempDir())
	for n := range 6 {
		if err := s.InsertExecution(t.Context(), newExecution(number(n))); err != nil {
			t.Fatal(err)
		}
	}
	for name, test := range map[string]struct {
		q    execution.Query
		want []string
	}{
		"from":                 {execution.Query{MinID: number(4)}, []string{number(5), number(4)}},
		"to":                   {execution.Query{MaxID: number(1)}, []string{number(1), number(0)}},
		"between, ascending":   {execution.Query{MinID: number(1), MaxID: number(3), Ascending: true}, []string{number(1), number(2), number(3)}},
		"the page behind":      {execution.Query{MinID: number(1), Before: number(3), Ascending: true}, []string{number(4), number(5)}},
		"the page before":      {execution.Query{MinID: number(1), Before: number(3)}, []string{number(2), number(1)}},
		"nothing between them": {execution.Query{MinID: number(3), MaxID: number(2)}, nil},
	} {
		test.q.Limit = 10
		page, err := s.ListExecutions(t.Context(), test.q)
		if got := ids(page); err != nil || !slices.Equal(got, test.want) {
			t.Errorf("%s: %v (%v), want %v", name, got, err, test.want)
		}
	}
}

// A query without its index would become slow only with the years.
func TestQueriesUseIndexes(t *testing.T) {
	s := open(t, t.TempDir())
	for text, want := range map[string]string{
		"labels.a = x":                         "SEARCH execution_labels USING PRIMARY KEY (name=? AND value=? AND execution<?); SEARCH executions",
		"state = ENDED AND labels.a = x":       "SEARCH execution_labels USING PRIMARY KEY (name=? AND value=? AND execution<?); SEARCH executions",
		"labels.a != x":                        "SEARCH executions USING INDEX sqlite_autoindex_executions_1 (id<?)",
		`create_time > "2026-11-25T08:00:00Z"`: "SEARCH executions USING INDEX sqlite_autoindex_executions_1 (id>? AND id<?)",
		"state = RUNNING":                      "SEARCH executions USING INDEX executions_unfinished (id>? AND id<?)",
	} {
		q := execution.Query{Caller: caller.Caller{All: true}, Filter: parse(t, text), Limit: 10}
		switch {
		case strings.HasPrefix(text, "create_time"):
			q.MinID = "a"
		case text == "state = RUNNING":
			q.MinID, q.Unfinished = "a", true
		}
		statement, args := executionsQuery(q)
		if plan := planOf(t, s, statement, args...); !strings.HasPrefix(plan, want) || strings.Contains(plan, "TEMP B-TREE") {
			t.Errorf("%s\n\tis done by %s, want %s", statement, plan, want)
		}
		statement, args = executionsWindow(q)
		if plan := planOf(t, s, statement, args...); !strings.HasPrefix(strings.Replace(plan, "COVERING ", "", 1), strings.Split(want, ";")[0]) || strings.Contains(plan, "TEMP B-TREE") {
			t.Errorf("%s\n\tis done by %s, want %s", statement, plan, want)
		}
	}
}

// A window ends at the id of its last record, in both directions, and counts what an
// index serves.
func TestWindows(t *testing.T) {
	s := open(t, t.TempDir())
	for n := range 10 {
		e := newExecution(number(n))
		e.Labels = map[string]string{"half": fmt.Sprint(n % 2)}
		if n >= 6 {
			e.State = execution.Ended
		}
		one := newSession(number(n))
		if n >= 6 {
			one.State = session.Terminated
		}
		if err := s.InsertExecution(t.Context(), e); err != nil {
			t.Fatal(err)
		}
		if err := s.InsertSession(t.Context(), one); err != nil {
			t.Fatal(err)
		}
	}
	for name, test := range map[string]struct {
		q    execution.Query
		want string
	}{
		"newest first":     {execution.Query{Limit: 3}, number(7)},
		"behind another":   {execution.Query{Limit: 3, Before: number(5)}, number(2)},
		"oldest first":     {execution.Query{Limit: 3, Ascending: true}, number(2)},
		"just all":         {execution.Query{Limit: 10}, number(0)},
		"more than all":    {execution.Query{Limit: 11}, ""},
		"unfinished":       {execution.Query{Limit: 3, Unfinished: true}, number(3)},
		"between ids":      {execution.Query{Limit: 2, MinID: number(3), MaxID: number(5)}, number(4)},
		"with a label":     {execution.Query{Limit: 3, Filter: parse(t, "labels.half = 1")}, number(5)},
		"with a label, up": {execution.Query{Limit: 5, Filter: parse(t, "labels.half = 1 AND reason = EXITED"), Ascending: true}, number(9)},
		"without a label":  {execution.Query{Limit: 3, Filter: parse(t, "labels.half != 1")}, number(7)},
		"in no session":    {execution.Query{Limit: 1, InAnySession: true}, ""},
	} {
		if got, err := s.ExecutionsWindow(t.Context(), test.q); err != nil || got != test.want {
			t.Errorf("%s: %q (%v), want %q", name, got, err, test.want)
		}
	}
	for name, test := range map[string]struct {
		q    session.Query
		want string
	}{
		"alive":     {session.Query{Limit: 3}, number(3)},
		"all":       {session.Query{Limit: 3, Terminated: true}, number(7)},
		"ascending": {session.Query{Limit: 3, Ascending: true, Before: number(1)}, number(4)},
		"more":      {session.Query{Limit: 7}, ""},
	} {
		if got, err := s.SessionsWindow(t.Context(), test.q); err != nil || got != test.want {
			t.Errorf("sessions, %s: %q (%v), want %q", name, got, err, test.want)
		}
	}
	page, err := s.ListSessions(t.Context(), session.Query{Limit: 9, Last: number(4)})
	if err != nil || len(page) != 2 {
		t.Errorf("%d sessions down to the last (%v), want 2", len(page), err)
	}
	page, err = s.ListSessions(t.Context(), session.Query{Limit: 9, Last: number(4), Ascending: true})
	if err != nil || len(page) != 5 {
		t.Errorf("%d sessions up to the last (%v), want 5", len(page), err)
	}
}

// Values are parameters: none of them gets into the text.
func TestQueryKeepsValuesApart(t *testing.T) {
	const evil = `x' OR 1=1; DROP TABLE executions; --`
	for _, text := range []string{
		`labels.a = "` + evil + `"`, `labels.a != "` + evil + `" AND labels.b = "` + evil + `"`,
	} {
		statement, args := executionsQuery(execution.Query{Filter: parse(t, text), Session: evil, Before: evil, MinID: evil, MaxID: evil, Limit: 1})
		if strings.Contains(statement, "DROP") || strings.Count(statement, "?") != len(args) {
			t.Errorf("%s with %d parameters", statement, len(args))
		}
		statement, args = sessionsQuery(session.Query{Filter: parse(t, text), Before: evil, Limit: 1})
		if strings.Contains(statement, "DROP") || strings.Count(statement, "?") != len(args) {
			t.Errorf("%s with %d parameters", statement, len(args))
		}
	}
}

// The longest filter is one that SQLite takes.
func TestLongestFilter(t *testing.T) {
	s := open(t, t.TempDir())
	text := strings.Repeat(`labels.a=x AND `, 200)
	text = text[:strings.LastIndex(text[:filter.MaxBytes], " AND ")]
	if page, err := s.ListExecutions(t.Context(), execution.Query{Filter: parse(t, text), Limit: 10}); err != nil || len(page) != 0 {
		t.Errorf("%v, %v", ids(page), err)
	}
}
