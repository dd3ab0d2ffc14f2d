// Package filter reads the filters of lists, a small part of AIP-160: comparisons that
// are joined by AND. What it does not know it refuses, and says at which byte and what
// would be right; it never guesses. A Filter is data: a store turns it into a query with
// parameters, and Match applies it to a record in memory. The two must agree.
package filter

import (
	"fmt"
	"strings"
	"time"
)

// MaxBytes bounds the text of a filter.
const MaxBytes = 2048

// Op is how a comparison compares.
type Op string

// The operators. A field that a record lacks only matches NotEqual.
const (
	Equal          Op = "="
	NotEqual       Op = "!="
	Less           Op = "<"
	LessOrEqual    Op = "<="
	Greater        Op = ">"
	GreaterOrEqual Op = ">="
)

// Term is one comparison.
type Term struct {
	// Field is its name; Key is what follows after the dot where the field is a map.
	Field, Key string
	Op         Op
	// Text is what an enum or an entry of a map is compared with, Time what a time is.
	Text string
	Time time.Time
}

// Filter is true where all of its terms are. The zero Filter is true everywhere.
type Filter struct{ Terms []Term }

// Schema says which fields there are.
type Schema struct {
	// Enums are fields with a fixed set of names, each with those that are allowed.
	Enums map[string][]string
	// Maps are fields from strings to strings, such as "labels".
	Maps []string
	// Times are points in time.
	Times []string
}

// Error says what is wrong with a filter.
type Error struct {
	// Position is the byte at which it begins, from 1.
	Position int
	// Message says what is wrong there and what is allowed.
	Message string
}

// Error tells both.
func (e *Error) Error() string { return fmt.Sprintf("at byte %d: %s", e.Position, e.Message) }

// Row is a record to apply a Filter to. The methods return false for what it lacks.
type Row interface {
	Text(field, key string) (string, bool)
	Time(field string) (time.Time, bool)
}

// Match says whether the filter is true of a record.
func (f Filter) Match(row Row) bool {
	for _, t := range f.Terms {
		if !t.match(row) {
			return false
		}
	}
	return true
}

func (t Term) match(row Row) bool {
	var order int
	if t.Time.IsZero() {
		text, ok := row.Text(t.Field, t.Key)
		if !ok {
			return t.Op == NotEqual
		}
		order = strings.Compare(text, t.Text)
	} else {
		at, ok := row.Time(t.Field)
		if !ok {
			return t.Op == NotEqual
		}
		order = at.Compare(t.Time)
	}
	switch t.Op {
	case Equal:
		return order == 0
	case NotEqual:
		return order != 0
	case Less:
		return order < 0
	case LessOrEqual:
		return order <= 0
	case Greater:
		return order > 0
	default:
		return order >= 0
	}
}
