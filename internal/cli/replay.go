package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/harvest-run/executord/client"
	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
)

// replay holds events back until as much time has passed as lay between them when they
// were recorded. What comes live is never held back: it is late already.
type replay struct {
	// speed divides the time; 2 is twice as fast.
	speed float64
	// longest bounds a pause, after speed; 0 does not.
	longest time.Duration

	last time.Time // when the event before was recorded
	due  time.Time // when that one was to be told
}

// await waits until an event is due. When ctx ends first it returns the cause.
func (r *replay) await(ctx context.Context, e *executorv1.Event) error {
	at := e.GetEventTime().AsTime()
	if e.GetEventTime() == nil || e.GetHeartbeat() != nil {
		return nil
	}
	now := time.Now()
	if r.last.IsZero() {
		r.last, r.due = at, now
		return nil
	}
	pause := time.Duration(float64(max(at.Sub(r.last), 0)) / r.speed)
	if r.longest > 0 {
		pause = min(pause, r.longest)
	}
	r.last, r.due = at, r.due.Add(pause)
	if r.due.Before(now) {
		r.due = now // the time that was lost is not made up for by haste
		return nil
	}
	t := time.NewTimer(r.due.Sub(now))
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// cast writes what a program said as a recording that asciinema and its players
// understand (asciicast version 2): a header, and a line for each piece of output with
// the seconds since the first event.
type cast struct {
	*follower
	begun time.Time
	// rest is the beginning of a character whose end has not come yet, by stream.
	rest map[executorv1.Stream][]byte
}

// castHeader is the first line. The order of the fields is that of the format's text.
type castHeader struct {
	Version   int    `json:"version"`
	Width     int    `json:"width"`
	Height    int    `json:"height"`
	Timestamp int64  `json:"timestamp,omitempty"`
	Title     string `json:"title,omitempty"`
}

// A recording has to name the size of a terminal, also of a program that had none.
const castWidth, castHeight = 80, 24

func (c *cast) event(e *executorv1.Event) error {
	if c.rest == nil {
		c.rest = make(map[executorv1.Stream][]byte)
		c.begun = e.GetEventTime().AsTime()
		header := castHeader{Version: 2, Width: castWidth, Height: castHeight, Timestamp: c.begun.Unix(), Title: c.title}
		if err := c.write(header); err != nil {
			return err
		}
	}
	if g := e.GetGap(); g != nil {
		clear(c.rest)
		return c.mark(e, "output is missing here")
	}
	o := e.GetOutput()
	if len(o.GetData()) == 0 {
		return nil
	}
	data := append(c.rest[o.GetStream()], o.GetData()...)
	whole := len(data) - incomplete(data)
	c.rest[o.GetStream()] = bytes.Clone(data[whole:])
	return c.output(e.GetEventTime().AsTime(), data[:whole])
}

// incomplete is how many bytes at the end are the beginning of a character.
func incomplete(data []byte) int {
	for n := 1; n < utf8.UTFMax && n <= len(data); n++ {
		if b := data[len(data)-n]; utf8.RuneStart(b) {
			if !utf8.FullRune(data[len(data)-n:]) {
				return n
			}
			return 0
		}
	}
	return 0
}

// output writes a piece. A program without a terminal ends its lines as a terminal does
// not want them.
func (c *cast) output(at time.Time, data []byte) error {
	if len(data) == 0 {
		return nil
	}
	text := strings.ToValidUTF8(string(data), "\uFFFD")
	text = strings.ReplaceAll(strings.ReplaceAll(text, "\r\n", "\n"), "\n", "\r\n")
	return c.write([]any{c.seconds(at), "o", text})
}

// mark writes a marker, which players show in their time line.
func (c *cast) mark(e *executorv1.Event, text string) error {
	return c.write([]any{c.seconds(e.GetEventTime().AsTime()), "m", text})
}

// seconds is the time since the first event, to the microsecond.
func (c *cast) seconds(at time.Time) float64 {
	return float64(max(at.Sub(c.begun), 0).Microseconds()) / 1e6
}

func (c *cast) write(line any) error {
	var text bytes.Buffer
	e := json.NewEncoder(&text)
	e.SetEscapeHTML(false)
	if err := e.Encode(line); err != nil {
		return fmt.Errorf("encode the recording: %w", err)
	}
	return c.line(bytes.TrimSuffix(text.Bytes(), []byte("\n")))
}

func (c *cast) end(_ context.Context, s *client.Stream) error {
	ended := s.Result().GetTimes().GetEnded().AsTime()
	for _, stream := range []executorv1.Stream{executorv1.Stream_STREAM_STDOUT, executorv1.Stream_STREAM_STDERR} {
		if err := c.output(ended, c.rest[stream]); err != nil {
			return err
		}
	}
	text := strings.ToLower(enumName(s.Result().GetReason(), "REASON"))
	if code := s.Result().ExitCode; code != nil {
		text = fmt.Sprintf("%s %d", text, *code)
	}
	return c.write([]any{c.seconds(ended), "m", text})
}
