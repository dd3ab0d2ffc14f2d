package filter_test

import (
	"testing"
	"time"

	"github.com/harvest-run/executord/internal/filter"
)

// row has the texts and times that it is made of.
type row map[string]any

func (r row) Text(field, key string) (string, bool) {
	if key != "" {
		field += "." + key
	}
	text, ok := r[field].(string)
	return text, ok
}

func (r row) Time(field string) (time.Time, bool) {
	at, ok := r[field].(time.Time)
	return at, ok
}

func TestMatch(t *testing.T) {
	running := row{"state": "RUNNING", "labels.x": "y", "labels.empty": "", "create_time": eight}
	for text, want := range map[string]bool{
		"":                                               true,
		"state = RUNNING":                                true,
		"state != RUNNING":                               false,
		"state = ENDED":                                  false,
		"state != ENDED":                                 true,
		"state = RUNNING AND labels.x=y":                 true,
		"state = RUNNING AND labels.x=z":                 false,
		"state = ENDED AND labels.x=y":                   false,
		"labels.x != z":                                  true,
		"labels.empty = ''":                              true,
		"labels.none = ''":                               false, // what is not there is not empty
		"labels.none != ''":                              true,
		"labels.none != y":                               true,
		"reason = EXITED":                                false,
		"reason != EXITED":                               true,
		"create_time = '2026-11-25T08:00:00Z'":           true,
		"create_time = '2026-11-25T09:00:00+01:00'":      true,
		"create_time != '2026-11-25T08:00:00Z'":          false,
		"create_time > '2026-11-25T08:00:00Z'":           false,
		"create_time > '2026-11-25T07:59:59.999999999Z'": true,
		"create_time >= '2026-11-25T08:00:00Z'":          true,
		"create_time < '2026-11-25T08:00:00Z'":           false,
		"create_time < '2026-11-25T08:00:00.000000001Z'": true,
		"create_time <= '2026-11-25T08:00:00Z'":          true,
		"end_time < '2026-11-25T08:00:00Z'":              false, // it has none
		"end_time >= '2026-11-25T08:00:00Z'":             false,
		"end_time = '2026-11-25T08:00:00Z'":              false,
		"end_time != '2026-11-25T08:00:00Z'":             true,
	} {
		f, err := filter.Parse(text, schema)
		if err != nil {
			t.Errorf("%s: %v", text, err)
			continue
		}
		if got := f.Match(running); got != want {
			t.Errorf("%s is %t", text, got)
		}
	}
}
