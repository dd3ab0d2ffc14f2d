package e2e

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"testing"

	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
)

// emitter is a program that writes known bytes: block i of a stream is 32 times the
// SHA-256 of "seed:stream:i". It takes blocks, pause in seconds and the exit code.
const emitter = `
import hashlib, sys, time, os
seed, blocks, pause, code = sys.argv_seed, sys.argv_blocks, sys.argv_pause, sys.argv_code
def block(stream, i):
    return hashlib.sha256(f"{seed}:{stream}:{i}".encode()).digest() * 32
for i in range(blocks):
    os.write(1, block("stdout", i))
    os.write(2, block("stderr", i))
    if pause: time.sleep(pause)
sys.exit(code)
`

func emit(seed string, blocks int, pause float64, code int) *executorv1.Command {
	set := fmt.Sprintf("import sys\nsys.argv_seed, sys.argv_blocks, sys.argv_pause, sys.argv_code = %q, %d, %v, %d\n", seed, blocks, pause, code)
	return python(set + emitter)
}

func emitted(seed, stream string, blocks int) []byte {
	var out bytes.Buffer
	for i := range blocks {
		sum := sha256.Sum256(fmt.Appendf(nil, "%s:%s:%d", seed, stream, i))
		out.Write(bytes.Repeat(sum[:], 32))
	}
	return out.Bytes()
}

func python(source string) *executorv1.Command {
	return &executorv1.Command{Code: &executorv1.Code{Language: executorv1.Language_LANGUAGE_PYTHON, Source: source}}
}

func bash(source string) *executorv1.Command {
	return &executorv1.Command{Code: &executorv1.Code{Language: executorv1.Language_LANGUAGE_BASH, Source: source}}
}

func argv(args ...string) *executorv1.Command { return &executorv1.Command{Args: args} }

// checker collects the events of one execution, over as many streams as it takes,
// and knows the rules that they must keep.
type checker struct {
	cursor *executorv1.Cursor
	data   map[executorv1.Stream][]byte
	gaps   []*executorv1.Gap
	result *executorv1.Result
	err    error
}

func newChecker() *checker {
	return &checker{data: make(map[executorv1.Stream][]byte)}
}

func (c *checker) fail(format string, args ...any) {
	c.err = errors.Join(c.err, fmt.Errorf(format, args...))
}

// take adds an event.
func (c *checker) take(e *executorv1.Event) {
	if e.GetHeartbeat() != nil {
		return
	}
	if c.result != nil {
		c.fail("an event after the result: %v", e)
	}
	if g := e.GetGap(); g != nil {
		c.gaps = append(c.gaps, g)
		c.cursor = e.GetCursor()
		for _, p := range g.GetResume() {
			// What is missing cannot be compared; the place is kept.
			if missing := p.GetOffset() - int64(len(c.data[p.GetStream()])); missing > 0 {
				c.data[p.GetStream()] = append(c.data[p.GetStream()], make([]byte, missing)...)
			}
		}
		return
	}
	if want := c.cursor.GetSequence() + 1; e.GetCursor().GetSequence() != want {
		c.fail("sequence %d, want %d", e.GetCursor().GetSequence(), want)
	}
	if c.cursor != nil && c.cursor.GetEpoch() != e.GetCursor().GetEpoch() {
		c.fail("the epoch changed without a gap")
	}
	c.cursor = e.GetCursor()
	switch k := e.GetKind().(type) {
	case *executorv1.Event_Started:
		if c.cursor.GetSequence() != 1 {
			c.fail("started has sequence %d", c.cursor.GetSequence())
		}
	case *executorv1.Event_Output:
		s := k.Output.GetStream()
		if k.Output.GetOffset() != int64(len(c.data[s])) {
			c.fail("%v: offset %d after %d bytes", s, k.Output.GetOffset(), len(c.data[s]))
		}
		c.data[s] = append(c.data[s], k.Output.GetData()...)
	case *executorv1.Event_Result:
		c.result = k.Result
	}
}

// stream is what both Execute and Watch give.
type stream interface {
	Recv() (*executorv1.Event, error)
}

// follow takes events until the stream ends.
func (c *checker) follow(s stream) error {
	for {
		e, err := s.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		c.take(e)
	}
}

// check fails the test unless everything came and is what the emitter wrote.
func (c *checker) check(t *testing.T, seed string, blocks, code int) {
	t.Helper()
	if c.err != nil {
		t.Error(c.err)
	}
	if c.result == nil {
		t.Fatal("no result")
	}
	if c.result.GetReason() != executorv1.Reason_REASON_EXITED || c.result.ExitCode == nil || int(c.result.GetExitCode()) != code {
		t.Errorf("result %v, want exit code %d", c.result, code)
	}
	if len(c.gaps) > 0 {
		t.Errorf("gaps: %v", c.gaps)
	}
	for name, s := range map[string]executorv1.Stream{"stdout": executorv1.Stream_STREAM_STDOUT, "stderr": executorv1.Stream_STREAM_STDERR} {
		want := emitted(seed, name, blocks)
		if !bytes.Equal(c.data[s], want) {
			t.Errorf("%s: %d bytes that are not the %d that were written", name, len(c.data[s]), len(want))
		}
		for _, total := range c.result.GetTotals() {
			if total.GetStream() == s && (total.GetSize() != int64(len(want)) || total.GetCrc32C() != crc32.Checksum(want, crc32.MakeTable(crc32.Castagnoli))) {
				t.Errorf("%s: the result says %d bytes with CRC %#x", name, total.GetSize(), total.GetCrc32C())
			}
		}
	}
}
