package filter_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/harvest-run/executord/internal/filter"
)

// source is a list of the numbers from 0 to size-1, of which only some fit. Each window
// takes a time to look through.
func source(size int, takes time.Duration, fits func(int) bool) filter.Source[int] {
	id := func(n int) string { return fmt.Sprintf("%06d", n) }
	behind := func(before string) int {
		n := -1
		if before != "" {
			fmt.Sscanf(before, "%d", &n)
		}
		return n + 1
	}
	return filter.Source[int]{
		Window: func(_ context.Context, before string, count int) (string, error) {
			if last := behind(before) + count - 1; last < size {
				return id(last), nil
			}
			return "", nil
		},
		Read: func(_ context.Context, before, end string, limit int) (some []int, _ error) {
			if end == "" {
				end = id(size)
			}
			for n := behind(before); n < size && id(n) <= end && len(some) < limit; n++ {
				some = append(some, n)
			}
			time.Sleep(takes)
			return some, nil
		},
		Present: func(_ context.Context, n int) (int, bool, error) { return n, fits(n), nil },
		ID:      id,
	}
}

func TestPage(t *testing.T) {
	even := func(n int) bool { return n%2 == 0 }
	all, none := func(int) bool { return true }, func(int) bool { return false }
	for name, test := range map[string]struct {
		size, limit int
		fits        func(int) bool
		want        int
	}{
		"empty":               {0, 10, all, 0},
		"fewer":               {5, 10, all, 5},
		"just as many":        {10, 10, all, 10},
		"half of them":        {1000, 50, even, 50},
		"few fit":             {10_000, 50, func(n int) bool { return n%1000 == 999 }, 10},
		"none fits":           {10_000, 50, none, 0},
		"more than a reading": {500, 300, all, 300},
		"a window to the end": {2000, 5000, all, 2000},
	} {
		t.Run(name, func(t *testing.T) {
			got, next, err := filter.Page(t.Context(), source(test.size, 0, test.fits), "", test.limit)
			if err != nil || next != "" || len(got) != test.want || !slices.IsSorted(got) || len(slices.Compact(got)) != len(got) {
				t.Errorf("%d, next %q, %v", len(got), next, err)
			}
		})
	}
}

// Page by page everything is found once, also where one is cut short.
func TestPageGivesUpLooking(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := source(20_000, 10*time.Millisecond, func(n int) bool { return n%4000 == 3999 })
		var found []int
		pages := 0
		for before := ""; ; pages++ {
			begin := time.Now()
			page, next, err := filter.Page(t.Context(), s, before, 3)
			if err != nil || time.Since(begin) > 2*time.Second {
				t.Fatalf("%v after %v", err, time.Since(begin))
			}
			found = append(found, page...)
			if next == "" && len(page) < 3 {
				break
			}
			if before = next; next == "" {
				before = s.ID(page[len(page)-1])
			}
		}
		if fmt.Sprint(found) != "[3999 7999 11999 15999 19999]" || pages < 2 {
			t.Errorf("found %v on %d pages", found, pages)
		}
	})
}

func TestPageFails(t *testing.T) {
	broken := errors.New("broken")
	for name, change := range map[string]func(*filter.Source[int]){
		"window": func(s *filter.Source[int]) {
			s.Window = func(context.Context, string, int) (string, error) { return "", broken }
		},
		"read": func(s *filter.Source[int]) {
			s.Read = func(context.Context, string, string, int) ([]int, error) { return nil, broken }
		},
		"present": func(s *filter.Source[int]) {
			s.Present = func(context.Context, int) (int, bool, error) { return 0, false, broken }
		},
	} {
		s := source(10, 0, func(int) bool { return true })
		change(&s)
		if got, next, err := filter.Page(t.Context(), s, "", 3); !errors.Is(err, broken) || got != nil || next != "" {
			t.Errorf("%s: %v, %q, %v", name, got, next, err)
		}
	}
}
