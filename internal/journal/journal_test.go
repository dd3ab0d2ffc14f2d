package journal_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/harvest-run/executord/internal/fault"
	"github.com/harvest-run/executord/internal/journal"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func open(t *testing.T, dir string, retained int64) *journal.Set {
	t.Helper()
	s, err := journal.NewSet(journal.Config{Dir: dir, What: "turn", RetainedBytes: retained})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func all(t *testing.T, s *journal.Set, id string, after *journal.Cursor) []journal.Event {
	t.Helper()
	w, err := s.Watch(id, after)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	ctx, stop := context.WithTimeout(t.Context(), time.Minute)
	defer stop()
	var events []journal.Event
	for {
		e, err := w.Next(ctx)
		if errors.Is(err, io.EOF) {
			return events
		}
		if err != nil {
			t.Fatal(err)
		}
		if w.Cursor() != e.Cursor {
			t.Fatalf("cursor %v after %v", w.Cursor(), e.Cursor)
		}
		events = append(events, e)
	}
}

func entry(i int) []byte {
	sizes := []int{0, 1, 100, 31736, 31737, 63472, 63473, 200_000}
	return bytes.Repeat([]byte{byte('a' + i%26)}, sizes[i%len(sizes)])
}

// TestEntries of all sizes come back as they were, from each place.
func TestEntries(t *testing.T) {
	s := open(t, t.TempDir(), 0)
	j, err := s.Create("a")
	if err != nil {
		t.Fatal(err)
	}
	const n = 20
	var places []journal.Cursor
	for i := range n {
		add := j.Append
		if i == n-1 {
			add = j.End
		}
		at, err := add(time.Unix(int64(i), 0), entry(i))
		if err != nil {
			t.Fatal(err)
		}
		if at.Sequence != uint64(i+1) || at != j.Cursor() {
			t.Fatalf("entry %d is at %v, the journal at %v", i, at, j.Cursor())
		}
		places = append(places, at)
	}
	if !j.Ended() {
		t.Error("not ended")
	}
	if _, err := j.Append(time.Now(), nil); !errors.Is(err, journal.ErrEnded) {
		t.Errorf("append behind the end: %v", err)
	}
	j.Close()
	j.Close()
	for from := range n {
		var after *journal.Cursor
		if from > 0 {
			after = &places[from-1]
		}
		events := all(t, s, "a", after)
		if len(events) != n-from {
			t.Fatalf("%d events from %d", len(events), from)
		}
		for k, e := range events {
			i := from + k
			if e.Gap != nil || e.Cursor != places[i] || !bytes.Equal(e.Data, entry(i)) || e.Last != (i == n-1) || e.Time.Unix() != int64(i) {
				t.Fatalf("event %d from %d: %v, %d bytes, last %v", i, from, e.Cursor, len(e.Data), e.Last)
			}
		}
	}
	if events := all(t, s, "a", &places[n-1]); len(events) != 0 {
		t.Errorf("behind the end: %v", events)
	}
	future := places[n-1]
	future.Sequence++
	if _, err := s.Watch("a", &future); fault.KindOf(err) != fault.OutOfRange {
		t.Errorf("a cursor in the future: %v", err)
	}
	if _, err := s.Watch("b", nil); fault.KindOf(err) != fault.NotFound {
		t.Errorf("no journal: %v", err)
	}
	other := all(t, s, "a", &journal.Cursor{Epoch: "other", Sequence: 7})
	if len(other) != n+1 || other[0].Gap == nil || other[0].Gap.Reason != journal.GapEpochChanged || other[1].Cursor.Sequence != 1 {
		t.Errorf("another epoch: %d events, first %v", len(other), other[0])
	}
}

func TestTooLarge(t *testing.T) {
	s := open(t, t.TempDir(), 0)
	j, err := s.Create("a")
	if err != nil {
		t.Fatal(err)
	}
	defer j.Close()
	if _, err := j.Append(time.Now(), make([]byte, journal.MaxEntry+1)); err == nil || j.Cursor().Sequence != 0 {
		t.Errorf("%v, at %v", err, j.Cursor())
	}
}

// TestFollow watches while it is written, by several, and after it was closed.
func TestFollow(t *testing.T) {
	s := open(t, t.TempDir(), 0)
	j, err := s.Create("a")
	if err != nil {
		t.Fatal(err)
	}
	defer j.Close()
	const n = 200
	done := make(chan error, 3)
	for range 3 {
		w, err := s.Watch("a", nil)
		if err != nil {
			t.Fatal(err)
		}
		go func() {
			defer w.Close()
			for i := 0; ; i++ {
				e, err := w.Next(t.Context())
				if errors.Is(err, io.EOF) && i == n {
					done <- nil
					return
				}
				if err != nil || !bytes.Equal(e.Data, entry(i)) {
					done <- fmt.Errorf("event %d: %w", i, err)
					return
				}
			}
		}()
	}
	for i := range n {
		add := j.Append
		if i == n-1 {
			add = j.End
		}
		if _, err := add(time.Now(), entry(i)); err != nil {
			t.Fatal(err)
		}
	}
	for range 3 {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	w, err := s.Watch("a", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	if w.LastEventTime().IsZero() {
		t.Error("no time of the last event")
	}
	s.Close()
	if _, err := w.Next(t.Context()); !errors.Is(err, journal.ErrClosed) {
		t.Errorf("closed: %v", err)
	}
}

// TestCutOff cuts a journal off at many lengths, as a kill can, and goes on: numbers have
// no holes and no entry is told in half.
func TestCutOff(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, 0)
	j, err := s.Create("whole")
	if err != nil {
		t.Fatal(err)
	}
	for i := range 10 {
		if _, err := j.Append(time.Now(), entry(i)); err != nil {
			t.Fatal(err)
		}
	}
	j.Close()
	s.Close()
	files, err := os.ReadDir(filepath.Join(dir, "whole"))
	if err != nil || len(files) != 1 {
		t.Fatal(files, err)
	}
	data, err := os.ReadFile(filepath.Join(dir, "whole", files[0].Name()))
	if err != nil {
		t.Fatal(err)
	}
	for cut := 40; cut < len(data); cut += 7919 {
		dir := t.TempDir()
		if err := os.Mkdir(filepath.Join(dir, "a"), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "a", files[0].Name()), data[:cut], 0o600); err != nil {
			t.Fatal(err)
		}
		s := open(t, dir, 0)
		j, err := s.Open("a")
		if fault.KindOf(err) == fault.NotFound {
			continue
		}
		if err != nil {
			t.Fatalf("cut at %d: %v", cut, err)
		}
		kept := int(j.Cursor().Sequence)
		if _, err := j.End(time.Now(), []byte("the end")); err != nil {
			t.Fatalf("cut at %d: %v", cut, err)
		}
		j.Close()
		events := all(t, s, "a", nil)
		if len(events) != kept+1 {
			t.Fatalf("cut at %d: %d events, %d were kept", cut, len(events), kept)
		}
		for i, e := range events {
			want := entry(i)
			if i == kept {
				want = []byte("the end")
			}
			if e.Gap != nil || e.Cursor.Sequence != uint64(i+1) || !bytes.Equal(e.Data, want) {
				t.Fatalf("cut at %d: event %d is %v with %d bytes", cut, i, e.Cursor, len(e.Data))
			}
		}
	}
}

// TestRetention drops the oldest; what is missing is counted in entries.
func TestRetention(t *testing.T) {
	s := open(t, t.TempDir(), 1<<20)
	j, err := s.Create("a")
	if err != nil {
		t.Fatal(err)
	}
	defer j.Close()
	const n = 40
	for i := range n {
		add := j.Append
		if i == n-1 {
			add = j.End
		}
		if _, err := add(time.Now(), bytes.Repeat([]byte{byte(i)}, 100_000)); err != nil {
			t.Fatal(err)
		}
	}
	events := all(t, s, "a", nil)
	gap := events[0].Gap
	if gap == nil || gap.Reason != journal.GapRetention || int(gap.MissingEvents) != n-len(events)+1 || events[0].Cursor.Sequence != gap.MissingEvents {
		t.Fatalf("%d events, the first %v %v", len(events), events[0].Cursor, gap)
	}
	for i, e := range events[1:] {
		if int(e.Cursor.Sequence) != n-len(events)+2+i || len(e.Data) != 100_000 || int(e.Data[0]) != int(e.Cursor.Sequence-1) {
			t.Fatalf("event %v has %d bytes of %d", e.Cursor, len(e.Data), e.Data[0])
		}
	}
}

func TestRemove(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, 0)
	j, err := s.Create("a")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Create("a"); err == nil || !strings.Contains(err.Error(), "turn a") {
		t.Errorf("made twice: %v", err)
	}
	if err := s.Remove("a"); err != nil {
		t.Fatal(err)
	}
	if _, err := j.Append(time.Now(), []byte("x")); err != nil {
		t.Errorf("who has it open goes on: %v", err)
	}
	j.Close()
	if _, err := s.Open("a"); fault.KindOf(err) != fault.NotFound {
		t.Errorf("after the last has gone: %v", err)
	}
	if err := s.Remove("a"); err != nil {
		t.Errorf("removed again: %v", err)
	}
	for _, id := range []string{"known", "stray"} {
		j, err := s.Create(id)
		if err != nil {
			t.Fatal(err)
		}
		j.Close()
	}
	if err := s.Strays(func(id string) (bool, error) { return id == "known", nil }); err != nil {
		t.Fatal(err)
	}
	left, err := os.ReadDir(dir)
	if err != nil || len(left) != 1 || left[0].Name() != "known" {
		t.Errorf("%v %v", left, err)
	}
	s.Close()
	if _, err := s.Create("b"); !errors.Is(err, journal.ErrClosed) {
		t.Errorf("create after the close: %v", err)
	}
	if _, err := s.Open("known"); !errors.Is(err, journal.ErrClosed) {
		t.Errorf("open after the close: %v", err)
	}
}
