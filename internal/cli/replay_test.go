package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"
	"unicode/utf8"

	"google.golang.org/protobuf/types/known/timestamppb"

	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
)

// wrote is an output event some time after the beginning of all.
func wrote(after time.Duration, stream executorv1.Stream, data string) *executorv1.Event {
	return &executorv1.Event{
		EventTime: timestamppb.New(time.Unix(1000, 0).Add(after)),
		Kind:      &executorv1.Event_Output{Output: &executorv1.OutputChunk{Stream: stream, Data: []byte(data)}},
	}
}

const (
	toStdout = executorv1.Stream_STREAM_STDOUT
	toStderr = executorv1.Stream_STREAM_STDERR
)

func TestReplay(t *testing.T) {
	tests := []struct {
		name string
		r    replay
		// each event was recorded so long after the first, and is told so long after it.
		recorded, told []time.Duration
	}{
		{"as it was", replay{speed: 1}, []time.Duration{0, time.Second, time.Second, 5 * time.Second}, []time.Duration{0, time.Second, time.Second, 5 * time.Second}},
		{"faster", replay{speed: 10}, []time.Duration{0, time.Second, 5 * time.Second}, []time.Duration{0, time.Second / 10, time.Second / 2}},
		{"slower", replay{speed: .5}, []time.Duration{0, time.Second}, []time.Duration{0, 2 * time.Second}},
		{"no long pauses", replay{speed: 1, longest: time.Second}, []time.Duration{0, time.Hour, time.Hour + time.Millisecond}, []time.Duration{0, time.Second, time.Second + time.Millisecond}},
		{"a clock that was set back", replay{speed: 1}, []time.Duration{0, 2 * time.Second, time.Second, 3 * time.Second}, []time.Duration{0, 2 * time.Second, 2 * time.Second, 4 * time.Second}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				begun := time.Now()
				for i, after := range test.recorded {
					if err := test.r.await(t.Context(), wrote(after, toStdout, "x")); err != nil {
						t.Fatal(err)
					}
					if told := time.Since(begun); told != test.told[i] {
						t.Errorf("event %d is told after %v, want %v", i, told, test.told[i])
					}
				}
			})
		})
	}
}

// A reader that is slow, or events that come live, are not made up for by haste.
func TestReplayThatIsLate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := replay{speed: 1}
		await := func(after time.Duration) {
			t.Helper()
			if err := r.await(t.Context(), wrote(after, toStdout, "x")); err != nil {
				t.Fatal(err)
			}
		}
		await(0)
		time.Sleep(10 * time.Second)
		begun := time.Now()
		await(time.Second) // was due nine seconds ago
		await(3 * time.Second)
		if took := time.Since(begun); took != 2*time.Second {
			t.Errorf("%v", took)
		}
		// Heartbeats are none of the program's doings.
		if err := r.await(t.Context(), &executorv1.Event{EventTime: timestamppb.New(time.Unix(9000, 0)), Kind: &executorv1.Event_Heartbeat{}}); err != nil {
			t.Error(err)
		}
	})
}

func TestReplayIsInterrupted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := replay{speed: 1}
		_ = r.await(t.Context(), wrote(0, toStdout, "x"))
		left := errors.New("left")
		ctx, cancel := context.WithCancelCause(t.Context())
		time.AfterFunc(time.Second, func() { cancel(left) })
		if err := r.await(ctx, wrote(time.Hour, toStdout, "x")); !errors.Is(err, left) {
			t.Errorf("%v", err)
		}
	})
}

// record makes a recording of events.
func record(t *testing.T, events ...*executorv1.Event) (header castHeader, lines [][]any) {
	t.Helper()
	var stdout bytes.Buffer
	c := &cast{follower: &follower{app: &app{stdout: &stdout}, title: "echo <hi>"}}
	for _, e := range events {
		if err := c.event(e); err != nil {
			t.Fatal(err)
		}
	}
	for i, line := range strings.Split(strings.TrimSuffix(stdout.String(), "\n"), "\n") {
		if !utf8.ValidString(line) {
			t.Errorf("line %d is not UTF-8: %q", i, line)
		}
		if i == 0 {
			if err := json.Unmarshal([]byte(line), &header); err != nil {
				t.Fatalf("header %q: %v", line, err)
			}
			continue
		}
		var fields []any
		if err := json.Unmarshal([]byte(line), &fields); err != nil || len(fields) != 3 {
			t.Fatalf("line %d %q: %v", i, line, err)
		}
		lines = append(lines, fields)
	}
	return header, lines
}

func TestCast(t *testing.T) {
	started := &executorv1.Event{EventTime: timestamppb.New(time.Unix(1000, 0)), Kind: &executorv1.Event_Started{Started: &executorv1.Started{}}}
	gap := &executorv1.Event{EventTime: timestamppb.New(time.Unix(1003, 0)), Kind: &executorv1.Event_Gap{Gap: &executorv1.Gap{}}}
	header, lines := record(t, started,
		wrote(time.Second, toStdout, "a\nb\r\n"),
		wrote(1500*time.Millisecond, toStdout, "\xc3"), // half a character
		wrote(2*time.Second, toStderr, "err\xff"),      // not one at all
		wrote(2500*time.Millisecond, toStdout, "\xa4!"),
		gap,
	)
	if header != (castHeader{Version: 2, Width: 80, Height: 24, Timestamp: 1000, Title: "echo <hi>"}) {
		t.Errorf("header %+v", header)
	}
	want := [][]any{
		{1.0, "o", "a\r\nb\r\n"}, {2.0, "o", "err\uFFFD"}, {2.5, "o", "ä!"}, {3.0, "m", "output is missing here"},
	}
	if len(lines) != len(want) {
		t.Fatalf("%v", lines)
	}
	for i := range want {
		for j := range want[i] {
			if lines[i][j] != want[i][j] {
				t.Errorf("line %d: %q, want %q", i, lines[i], want[i])
			}
		}
	}
}

// FuzzCast cuts any bytes anywhere: the recording is valid and, for valid text, whole.
func FuzzCast(f *testing.F) {
	f.Add("häß€𝄞\n", 3)
	f.Add("\xff\xfe\xc3", 1)
	f.Fuzz(func(t *testing.T, text string, cut int) {
		if strings.ContainsAny(text, "\r\n") || text == "" {
			return
		}
		cut = max(0, min(cut, len(text)))
		_, lines := record(t, wrote(0, toStdout, text[:cut]), wrote(0, toStdout, text[cut:]), wrote(0, toStdout, "."))
		var all strings.Builder
		for _, line := range lines {
			all.WriteString(line[2].(string))
		}
		if utf8.ValidString(text) && all.String() != text+"." {
			t.Errorf("%q became %q", text, all.String())
		}
	})
}
