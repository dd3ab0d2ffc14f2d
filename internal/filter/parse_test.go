package filter_test

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/harvest-run/executord/internal/filter"
)

var schema = filter.Schema{
	Enums: map[string][]string{"state": {"RUNNING", "ENDED"}, "reason": {"EXITED", "OOM_KILLED"}},
	Maps:  []string{"labels"}, Times: []string{"create_time", "end_time"},
}

var eight = time.Date(2026, 11, 25, 8, 0, 0, 0, time.UTC)

func TestParse(t *testing.T) {
	state := filter.Term{Field: "state", Op: filter.Equal, Text: "RUNNING"}
	label := func(name string, op filter.Op, value string) filter.Term {
		return filter.Term{Field: "labels", Key: name, Op: op, Text: value}
	}
	for text, want := range map[string][]filter.Term{
		"":                                     nil,
		" \t\r\n":                              nil,
		"state = RUNNING":                      {state},
		"state=RUNNING":                        {state},
		`state = "RUNNING"`:                    {state},
		"state = STATE_RUNNING":                {state},
		"state != ENDED":                       {{Field: "state", Op: filter.NotEqual, Text: "ENDED"}},
		"reason = REASON_OOM_KILLED":           {{Field: "reason", Op: filter.Equal, Text: "OOM_KILLED"}},
		"labels.x = y":                         {label("x", filter.Equal, "y")},
		`labels.x = "y z"`:                     {label("x", filter.Equal, "y z")},
		`labels.x = 'y"z'`:                     {label("x", filter.Equal, `y"z`)},
		`labels.x = "\"\\\n"`:                  {label("x", filter.Equal, `"\n`)},
		`labels.x = ""`:                        {label("x", filter.Equal, "")},
		"labels.a.b/c-d_e!=1":                  {label("a.b/c-d_e", filter.NotEqual, "1")},
		"labels.AND = OR":                      {label("AND", filter.Equal, "OR")},
		`labels.ü = "ü"`:                       nil, // refused
		"state = RUNNING AND labels.x = y":     {state, label("x", filter.Equal, "y")},
		`create_time > "2026-11-25T08:00:00Z"`: {{Field: "create_time", Op: filter.Greater, Time: eight}},
		`create_time >= "2026-11-25T09:00:00+01:00"`:   {{Field: "create_time", Op: filter.GreaterOrEqual, Time: eight}},
		`end_time<"2026-11-25T08:00:00.5Z"`:            {{Field: "end_time", Op: filter.Less, Time: eight.Add(time.Second / 2)}},
		`end_time <= '2026-11-25T08:00:00.000000001Z'`: {{Field: "end_time", Op: filter.LessOrEqual, Time: eight.Add(1)}},
	} {
		f, err := filter.Parse(text, schema)
		if strings.Contains(text, "labels.ü") {
			if err == nil {
				t.Errorf("%s is taken", text)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", text, err)
			continue
		}
		if diff := cmp.Diff(want, f.Terms); diff != "" {
			t.Errorf("%s differs (-want +got):\n%s", text, diff)
		}
	}
}

func TestParseRefuses(t *testing.T) {
	for text, want := range map[string]struct {
		position int
		says     string
	}{
		"RUNNING":                                        {1, "the fields are"},
		"name = x":                                       {1, "the fields are reason, state, create_time, end_time, labels.NAME"},
		"State = RUNNING":                                {1, "the fields are"},
		"state":                                          {6, "the end: state is compared by = or !="},
		"state =":                                        {8, "the end: a value is expected"},
		"state = = RUNNING":                              {9, "a value is expected"},
		"state = running":                                {9, "state is one of RUNNING, ENDED"},
		"state = STATE_STATE_RUNNING":                    {9, "state is one of"},
		"state > RUNNING":                                {7, "= or !="},
		"state == RUNNING":                               {8, "a value is expected"},
		"state : RUNNING":                                {7, "neither part of a word nor an operator"},
		"labels.x < y":                                   {10, "labels.x is compared by = or !="},
		"labels = y":                                     {1, "labels.NAME"},
		"labels. = y":                                    {1, "labels.NAME"},
		"labels.x = y labels.z = y":                      {14, "comparisons are joined by AND"},
		"state = RUNNING OR state=ENDED":                 {17, "comparisons are joined by AND"},
		"state = RUNNING and state=X":                    {17, "comparisons are joined by AND"},
		"state = RUNNING AND":                            {20, "a field is expected"},
		"AND state = RUNNING":                            {1, "a field is expected"},
		"NOT state = RUNNING":                            {1, "OR and NOT are not supported"},
		"-state = RUNNING":                               {1, "the fields are"},
		"!state = RUNNING":                               {1, "NOT is not supported"},
		"state ! RUNNING":                                {7, "NOT is not supported"},
		"(state = RUNNING)":                              {1, "parentheses are not supported"},
		"state = RUNNING AND (":                          {21, "parentheses are not supported"},
		`"state" = RUNNING`:                              {1, "a field is expected"},
		`labels.x = "y`:                                  {12, "a quote is not closed"},
		`labels.x = "y\"`:                                {12, "a quote is not closed"},
		`labels.x = "\`:                                  {12, "a quote is not closed"},
		"labels.x = ü":                                   {12, "'ü' is neither"},
		"labels.x = \x00":                                {12, "neither"},
		"labels.x = \xff":                                {12, "neither"},
		"create_time > 2026-11-25":                       {15, "a time is expected"},
		`create_time > "yesterday"`:                      {15, "a time is expected"},
		`create_time > "1969-12-31T23:59:59Z"`:           {15, "1970 to 2261"},
		`create_time > "2262-01-01T00:00:00Z"`:           {15, "1970 to 2261"},
		`create_time > "2262-01-01T00:00:00+01:00"`:      {0, ""}, // 2261 in UTC
		`create_time = RUNNING AND state = ENDED`:        {15, "a time is expected"},
		strings.Repeat(" ", filter.MaxBytes+1):           {filter.MaxBytes + 1, "at most 2048"},
		"labels.x = " + strings.Repeat("y", 1000) + " z": {1013, "comparisons are joined by AND"},
	} {
		f, err := filter.Parse(text, schema)
		if want.position == 0 {
			if err != nil {
				t.Errorf("%s: %v", text, err)
			}
			continue
		}
		wrong, ok := errors.AsType[*filter.Error](err)
		if !ok || wrong.Position != want.position || !strings.Contains(wrong.Message, want.says) || f.Terms != nil {
			t.Errorf("%.60q: %+v, want byte %d and %q", text, err, want.position, want.says)
		}
		if ok && len(wrong.Error()) > 400 {
			t.Errorf("%.60q: the error has %d bytes", text, len(wrong.Error()))
		}
	}
}

// TestBomb: what is too deep, too long or full of quotes is refused without reading on.
// The time of the worst text that is taken is the measure, so that the test holds on any
// machine.
func TestBomb(t *testing.T) {
	longest := strings.Repeat("state=ENDED AND ", 200)[:filter.MaxBytes-32] + "AND state=ENDED"
	longest = longest[:strings.LastIndex(longest[:len(longest)-20], " AND ")]
	if f, err := filter.Parse(longest, schema); err != nil || len(f.Terms) < 100 {
		t.Fatalf("%d terms, %v", len(f.Terms), err)
	}
	took := func(text string) time.Duration {
		best := time.Hour
		for range 20 {
			begin := time.Now()
			_, _ = filter.Parse(text, schema)
			best = min(best, time.Since(begin))
		}
		return best
	}
	good := took(longest)
	for name, text := range map[string]string{
		"10,000 parentheses":   strings.Repeat("(", 10_000),
		"parentheses that fit": strings.Repeat("(", filter.MaxBytes),
		"closed parentheses":   strings.Repeat("(", 5_000) + strings.Repeat(")", 5_000),
		"a megabyte":           strings.Repeat("state = ENDED AND ", 60_000),
		"quotes":               "labels.x = " + strings.Repeat(`\"`, 1000),
		"NOT":                  strings.Repeat("NOT ", 500),
		"minus":                strings.Repeat("-", filter.MaxBytes),
	} {
		if _, err := filter.Parse(text, schema); err == nil {
			t.Errorf("%s: taken", name)
		}
		if bad := took(text); bad > 10*good+time.Millisecond {
			t.Errorf("%s took %v, the longest good filter %v", name, bad, good)
		}
	}
}

// FuzzParse: no text makes it panic or hang; what it takes it takes again when it is
// written out, and an error points into the text.
func FuzzParse(f *testing.F) {
	for _, text := range []string{
		"", "state = RUNNING", `labels.x != "a\"b" AND create_time >= "2026-11-25T08:00:00Z"`, "((((", `labels.x = 'y`, "state = OR AND", "end_time<'1970-01-01T00:00:00Z'",
	} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		got, err := filter.Parse(text, schema)
		if err != nil {
			wrong, ok := errors.AsType[*filter.Error](err)
			if !ok || wrong.Position < 1 || wrong.Position > len(text)+1 || wrong.Message == "" || got.Terms != nil {
				t.Fatalf("%+v, %v", got, err)
			}
			return
		}
		written := write(got)
		if len(written) > filter.MaxBytes { // quotes that were not needed before
			return
		}
		again, err := filter.Parse(written, schema)
		if err != nil {
			t.Fatalf("%q is written %q: %v", text, written, err)
		}
		if diff := cmp.Diff(got, again); diff != "" {
			t.Fatalf("%q differs (-first +second):\n%s", text, diff)
		}
	})
}

// write is a text of a filter.
func write(f filter.Filter) string {
	var terms []string
	for _, term := range f.Terms {
		field := term.Field
		if term.Key != "" {
			field += "." + term.Key
		}
		value := strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(term.Text)
		if !term.Time.IsZero() {
			value = term.Time.Format(time.RFC3339Nano)
		}
		terms = append(terms, field+string(term.Op)+`"`+value+`"`)
	}
	return strings.Join(terms, " AND ")
}
