package execution

import (
	"testing"
	"time"

	"github.com/harvest-run/executord/internal/filter"
)

// The bounds of ids hold every id of a time that fits, to the millisecond.
func TestIDsBetween(t *testing.T) {
	at := time.Date(2026, 11, 25, 8, 0, 0, 123_456_789, time.UTC)
	for _, op := range []filter.Op{filter.Equal, filter.NotEqual, filter.Less, filter.LessOrEqual, filter.Greater, filter.GreaterOrEqual} {
		term := filter.Term{Field: "create_time", Op: op, Time: at}
		f := filter.Filter{Terms: []filter.Term{{Field: "end_time", Op: filter.Less, Time: at}, term}}
		lowest, highest := idsBetween(f)
		for _, offset := range []time.Duration{-time.Hour, -time.Millisecond, -1, 0, 1, time.Millisecond, time.Hour} {
			e := Execution{CreateTime: at.Add(offset)}
			e.ID = newID(e.CreateTime)
			inside := (lowest == "" || e.ID >= lowest) && (highest == "" || e.ID <= highest)
			if (filter.Filter{Terms: []filter.Term{term}}).Match(row{e}) && !inside {
				t.Errorf("%s %v: %s is not in %s…%s", op, offset, e.ID, lowest, highest)
			}
			if far := offset == time.Hour || offset == -time.Hour; far && inside && op == filter.Equal {
				t.Errorf("%s %v: %s is in %s…%s", op, offset, e.ID, lowest, highest)
			}
		}
	}
	if lowest, highest := idsBetween(filter.Filter{Terms: []filter.Term{
		{Field: "create_time", Op: filter.Greater, Time: at}, {Field: "create_time", Op: filter.Greater, Time: at.Add(time.Hour)},
		{Field: "create_time", Op: filter.Less, Time: at.Add(3 * time.Hour)}, {Field: "create_time", Op: filter.Less, Time: at.Add(2 * time.Hour)},
	}}); lowest < newID(at.Add(59*time.Minute)) || highest > newID(at.Add(121*time.Minute)) {
		t.Errorf("%s…%s is not the narrowest", lowest, highest)
	}
}

func TestStateNames(t *testing.T) {
	for s := range State(10) {
		if name := s.String(); (name != "") != (s >= Starting && s <= Ended) || name != "" && StateOf(name) != s {
			t.Errorf("%d is called %q", s, name)
		}
	}
	for _, name := range []string{"", "running", "NONE"} {
		if s := StateOf(name); s != 0 {
			t.Errorf("%q is %d", name, s)
		}
	}
}
