package modal

import (
	"bytes"
	"errors"
	"io"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	sdk "github.com/modal-labs/modal-client/go"
)

// slowInput is a standard input whose every write takes a round trip.
type slowInput struct {
	trip   time.Duration
	fail   error
	writes [][]byte
	closed bool
}

func (s *slowInput) Write(p []byte) (int, error) {
	time.Sleep(s.trip)
	if s.fail != nil {
		return 0, s.fail
	}
	s.writes = append(s.writes, bytes.Clone(p))
	return len(p), nil
}

func (s *slowInput) Close() error { s.closed = true; return nil }

func testPipe(in *slowInput, over bool) (*execPipe, *io.PipeWriter, *sync.WaitGroup) {
	r, w := io.Pipe()
	e := newExecPipe(&sdk.ContainerProcess{Stdin: in, Stdout: r}, func() bool { return over })
	var work sync.WaitGroup
	work.Go(e.send)
	return e, w, &work
}

// What is written while a write is on its way goes with the next.
func TestWritesAreGathered(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		in := &slowInput{trip: 100 * time.Millisecond}
		e, _, work := testPipe(in, false)
		var all []byte
		for i := range 1000 {
			p := bytes.Repeat([]byte{byte(i)}, 100)
			all = append(all, p...)
			if n, err := e.Write(p); n != len(p) || err != nil {
				t.Fatal(n, err)
			}
			if i == 0 {
				time.Sleep(50 * time.Millisecond)
			}
		}
		time.Sleep(time.Second)
		synctest.Wait()
		if got := bytes.Join(in.writes, nil); !bytes.Equal(got, all) || len(in.writes) != 2 {
			t.Errorf("%d bytes of %d in %d calls, want 2 calls", len(got), len(all), len(in.writes))
		}
		e.Close()
		work.Wait()
		if !in.closed {
			t.Error("the program's input was not ended")
		}
	})
}

func TestGatheringIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		in := &slowInput{trip: time.Second}
		e, _, work := testPipe(in, true)
		start := time.Now()
		for range 10 {
			if _, err := e.Write(make([]byte, maxBatch)); err != nil {
				t.Fatal(err)
			}
		}
		if took := time.Since(start); took < 8*time.Second {
			t.Errorf("10 batches were taken in %v, at one a second", took)
		}
		e.Close()
		work.Wait()
		if in.closed {
			t.Error("a sandbox that has ended was called")
		}
	})
}

func TestAFailedWriteEndsThePipe(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		in := &slowInput{fail: errors.New("the worker has died")}
		e, _, work := testPipe(in, false)
		if _, err := e.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		if _, err := e.Read(make([]byte, 1)); err == nil {
			t.Error("read went on")
		}
		work.Wait()
		if _, err := e.Write([]byte("x")); !errors.Is(err, in.fail) {
			t.Errorf("write: %v", err)
		}
	})
}

func TestCloseEndsAWriteThatWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		in := &slowInput{trip: time.Hour}
		e, _, work := testPipe(in, false)
		var writer sync.WaitGroup
		writer.Go(func() {
			for {
				if _, err := e.Write(make([]byte, maxBatch)); err != nil {
					return
				}
			}
		})
		time.Sleep(time.Minute)
		e.Close()
		writer.Wait()
		work.Wait()
	})
}
