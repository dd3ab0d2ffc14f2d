package filter

import (
	"context"
	"time"
)

const (
	// window is how many records are looked at before the time is.
	window = 2000
	// patience is how long a page is looked for. Then what was found is a page.
	patience = time.Second
	// minFetch is how many records are read at a time at least: a store cannot tell of
	// all of them whether they fit.
	minFetch = 100
)

// Source is where a filtered page comes from. Ids are in the order of the list.
type Source[T any] struct {
	// Window returns the id of the size-th record behind the one with the id before, ""
	// if there are fewer. "" for before is the beginning.
	Window func(ctx context.Context, before string, size int) (end string, err error)
	// Read reads at most limit records that may fit, behind before and up to end, "" for
	// the last there is.
	Read func(ctx context.Context, before, end string, limit int) ([]T, error)
	// Present returns a record as it is now; false if it is gone or does not fit.
	Present func(ctx context.Context, record T) (T, bool, error)
	// ID returns the id of a record.
	ID func(record T) string
}

// Page reads at most limit records from a source, those behind the one with the id
// before. It gives up looking after a second, however many records there are: then next
// is the id behind which to go on, and "" otherwise.
func Page[T any](ctx context.Context, s Source[T], before string, limit int) (found []T, next string, err error) {
	for begin := time.Now(); ; {
		end, err := s.Window(ctx, before, window)
		if err != nil {
			return nil, "", err
		}
		if found, err = s.add(ctx, found, before, end, limit); err != nil {
			return nil, "", err
		}
		if len(found) == limit || end == "" {
			return found, "", nil
		}
		before = end
		if time.Since(begin) >= patience {
			return found, before, nil
		}
	}
}

// add adds what fits between before and end, until there are limit.
func (s Source[T]) add(ctx context.Context, found []T, before, end string, limit int) ([]T, error) {
	for {
		fetch := max(limit-len(found), minFetch)
		records, err := s.Read(ctx, before, end, fetch)
		if err != nil {
			return nil, err
		}
		for _, record := range records {
			record, fits, err := s.Present(ctx, record)
			if err != nil {
				return nil, err
			}
			if fits {
				found = append(found, record)
			}
			if len(found) == limit {
				return found, nil
			}
		}
		if len(records) < fetch {
			return found, nil
		}
		before = s.ID(records[len(records)-1])
	}
}
