package client_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/harvest-run/executord/client"
	"github.com/harvest-run/executord/client/clienttest"
	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
)

// program is a request that runs a program of clienttest with its stdin open.
func program(statements ...string) *executorv1.ExecuteRequest {
	return &executorv1.ExecuteRequest{Command: &executorv1.Command{Args: statements, Stdin: true}}
}

// following reads an attachment to its end beside the test.
type following struct {
	*client.Attachment
	reading sync.WaitGroup

	mu     sync.Mutex
	stdout bytes.Buffer
	err    error
}

func follow(a *client.Attachment) *following {
	f := &following{Attachment: a}
	f.reading.Go(func() {
		for {
			e, err := f.Recv()
			f.mu.Lock()
			if err != nil {
				f.err = err
				f.mu.Unlock()
				return
			}
			f.stdout.Write(e.GetOutput().GetData())
			f.mu.Unlock()
		}
	})
	return f
}

func (f *following) output() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.stdout.String()
}

func (f *following) until(t *testing.T, text string) {
	t.Helper()
	for range 6000 {
		if strings.Contains(f.output(), text) {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	t.Fatalf("%q never comes, only %q", text, f.output())
}

// end waits for the end.
func (f *following) end(t *testing.T) error {
	t.Helper()
	f.reading.Wait()
	if errors.Is(f.err, io.EOF) {
		return nil
	}
	return f.err
}

func interact(t *testing.T, c *client.Client, r *executorv1.ExecuteRequest) *following {
	t.Helper()
	a, err := c.Interact(bounded(t), r)
	if err != nil {
		t.Fatal(err)
	}
	return follow(a)
}

func write(t *testing.T, f *following, text string) {
	t.Helper()
	if n, err := f.Write([]byte(text)); n != len(text) || err != nil {
		t.Fatalf("wrote %d of %d bytes: %v", n, len(text), err)
	}
}

func TestInteract(t *testing.T) {
	t.Parallel()
	s := clienttest.Start(t)
	c := dial(t, client.Config{Address: s.Address()})
	r := program("out ready", "line", "size", "line", "cat", "exit 3")
	r.Command.Terminal = &executorv1.TerminalSize{Rows: 24, Columns: 80}
	f := interact(t, c, r)
	write(t, f, "early\n")
	f.until(t, "ready\nearly\n")
	f.Resize(50, 132)
	f.until(t, "50x132\n")
	write(t, f, "later\nrest")
	f.until(t, "later\nrest")
	f.CloseInput()
	f.CloseInput()
	if err := f.end(t); err != nil {
		t.Fatal(err)
	}
	if f.Result().GetExitCode() != 3 || !f.Whole() || f.Committed() != 16 {
		t.Errorf("%v, whole %v, committed %d", f.Result(), f.Whole(), f.Committed())
	}
	if _, err := f.Write([]byte("x")); !errors.Is(err, client.ErrInputClosed) {
		t.Errorf("a write behind the end: %v", err)
	}
}

// Whatever happens to the connection, every byte arrives once and in order, and what
// the program says comes back so.
func TestInputOverLostConnections(t *testing.T) {
	t.Parallel()
	s := clienttest.Start(t)
	c := dial(t, client.Config{Address: s.Address()})
	f := interact(t, c, program("cat"))
	data := make([]byte, 3<<20)
	r := rand.NewChaCha8([32]byte{1})
	_, _ = r.Read(data)
	var writing sync.WaitGroup
	var failed error
	writing.Go(func() {
		for rest := data; len(rest) > 0 && failed == nil; {
			n := min(len(rest), 1+rand.IntN(50000))
			_, failed = f.Write(rest[:n])
			rest = rest[n:]
		}
		f.CloseInput()
	})
	for range 8 {
		time.Sleep(time.Duration(rand.IntN(60)) * time.Millisecond)
		if err := s.Restart(); err != nil {
			t.Fatal(err)
		}
	}
	writing.Wait()
	if err := errors.Join(failed, f.end(t)); err != nil {
		t.Fatal(err)
	}
	if f.output() != string(data) || f.Committed() != int64(len(data)) {
		t.Errorf("%d bytes came back, %d are committed, want %d", len(f.output()), f.Committed(), len(data))
	}
	if n := len(s.Calls("Execute")); n != 1 {
		t.Errorf("it was started %d times", n)
	}
}

// A program that does not read holds the writer up and nothing else.
func TestInputWithoutReaders(t *testing.T) {
	t.Parallel()
	s := clienttest.Start(t)
	c := dial(t, client.Config{Address: s.Address()})
	f := interact(t, c, program("out ready", "size", "signalled", "exit 5"))
	var writing sync.WaitGroup
	var n int
	var failed error
	writing.Go(func() { n, failed = f.Write(make([]byte, 1<<20)) })
	f.until(t, "ready")
	f.Resize(3, 4)
	f.until(t, "3x4")
	if err := c.Signal(t.Context(), &executorv1.SignalExecutionRequest{Name: f.Name(), Signal: 10, Scope: executorv1.SignalScope_SIGNAL_SCOPE_TREE}); err != nil {
		t.Fatal(err)
	}
	if err := f.end(t); err != nil || f.Result().GetExitCode() != 5 {
		t.Errorf("%v, %v", err, f.Result())
	}
	writing.Wait()
	if failed == nil || n < clienttest.InputRoom || n > 3*clienttest.InputRoom {
		t.Errorf("%d bytes were accepted: %v", n, failed)
	}
}

func TestInputThatTheProgramCloses(t *testing.T) {
	t.Parallel()
	s := clienttest.Start(t)
	c := dial(t, client.Config{Address: s.Address()})
	f := interact(t, c, program("line", "shut", "out shut", "signalled"))
	write(t, f, "one\n")
	f.until(t, "shut")
	var err error
	for range 1000 {
		if _, err = f.Write([]byte("x")); err != nil {
			break
		}
		time.Sleep(time.Millisecond)
	}
	if !errors.Is(err, client.ErrInputClosed) {
		t.Errorf("%v", err)
	}
	if err := c.Signal(t.Context(), &executorv1.SignalExecutionRequest{Name: f.Name(), Signal: 15}); err != nil {
		t.Fatal(err)
	}
	if err := f.end(t); err != nil {
		t.Error(err)
	}
	if err := c.Signal(t.Context(), &executorv1.SignalExecutionRequest{Name: f.Name(), Signal: 15}); client.Reason(err) != "EXECUTION_ENDED" {
		t.Errorf("%v", err)
	}
}

func TestAttachTakesOver(t *testing.T) {
	t.Parallel()
	s := clienttest.Start(t)
	c := dial(t, client.Config{Address: s.Address()})
	first := interact(t, c, program("out ready", "cat"))
	write(t, first, "of the first, ")
	first.until(t, "of the first, ")
	second, err := c.Attach(bounded(t), first.Name(), client.AttachOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if err := follow(second).end(t); client.Reason(err) != "WRITER_ATTACHED" {
		t.Errorf("%v", err)
	}
	third, err := c.Attach(bounded(t), first.Name(), client.AttachOptions{TakeOver: true})
	if err != nil {
		t.Fatal(err)
	}
	f := follow(third)
	if err := first.end(t); client.Reason(err) != "WRITER_TAKEN_OVER" {
		t.Errorf("%v", err)
	}
	if _, err := first.Write(make([]byte, 100000)); client.Reason(err) != "WRITER_TAKEN_OVER" && !errors.Is(err, client.ErrClosed) {
		t.Errorf("%v", err)
	}
	write(t, f, "of the third")
	f.until(t, "of the first, of the third")
	// It comes back as itself, and takes over from nobody by that.
	if err := s.Restart(); err != nil {
		t.Fatal(err)
	}
	write(t, f, "!")
	f.until(t, "third!")
	calls := s.Calls("AttachExecution")
	var starts []*executorv1.AttachStart
	for _, m := range calls {
		if start := m.(*executorv1.AttachExecutionRequest).GetStart(); start != nil {
			starts = append(starts, start)
		}
	}
	last, before := starts[len(starts)-1], starts[2]
	if last.GetTakeOver() || !before.GetTakeOver() || last.GetWriter() != before.GetWriter() || last.GetAfter().GetSequence() == 0 {
		t.Errorf("%v after %v", last, before)
	}
	f.CloseInput()
	if err := f.end(t); err != nil {
		t.Error(err)
	}
	if _, err := c.Attach(t.Context(), "", client.AttachOptions{}); err == nil {
		t.Error("attached to nothing")
	}
	late, err := c.Attach(bounded(t), first.Name(), client.AttachOptions{})
	if err != nil {
		t.Fatal(err)
	}
	l := follow(late)
	if err := l.end(t); err != nil || l.output() != "ready\nof the first, of the third!" {
		t.Errorf("%v, %q", err, l.output())
	}
}

// A server whose input goes backwards, or further than it can be, is not believed.
func TestAttachToALiar(t *testing.T) {
	t.Parallel()
	s := clienttest.Start(t)
	c := dial(t, client.Config{Address: s.Address()})
	f := interact(t, c, program("cat"))
	write(t, f, "abc")
	f.until(t, "abc")
	if _, err := c.WriteInput(t.Context(), f.Name(), 3, []byte("of another"), false); err != nil {
		t.Fatal(err)
	}
	write(t, f, "d")
	if err := f.end(t); !errors.Is(err, client.ErrProtocol) || !strings.Contains(err.Error(), "another") {
		t.Errorf("%v", err)
	}
}

func TestWriteInput(t *testing.T) {
	t.Parallel()
	s := clienttest.Start(t)
	c := dial(t, client.Config{Address: s.Address()})
	stream, err := c.Execute(bounded(t), program("cat"))
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	data := bytes.Repeat([]byte("0123456789"), 100_000)
	s.Hook(func(method string, nth int) error {
		if method == "WriteInput" && nth%3 == 0 {
			return status.Error(codes.Unavailable, "reset")
		}
		return nil
	})
	at, err := c.WriteInput(bounded(t), stream.Name(), 0, data[:500_000], false)
	if err != nil || at != 500_000 {
		t.Fatalf("%d, %v", at, err)
	}
	if at, err = c.WriteInput(bounded(t), stream.Name(), 400_000, data[400_000:], true); err != nil || at != int64(len(data)) {
		t.Fatalf("%d, %v", at, err)
	}
	var got bytes.Buffer
	for {
		e, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		got.Write(e.GetOutput().GetData())
	}
	if !bytes.Equal(got.Bytes(), data) {
		t.Errorf("%d bytes came back", got.Len())
	}
	if _, err := c.WriteInput(bounded(t), stream.Name(), at, []byte("x"), false); client.Reason(err) != "EXECUTION_ENDED" {
		t.Errorf("%v", err)
	}
	if _, err := c.WriteInput(bounded(t), "executions/none", 0, []byte("x"), false); !client.NotFound(err) {
		t.Errorf("%v", err)
	}
}

func TestInteractRefused(t *testing.T) {
	t.Parallel()
	s := clienttest.Start(t)
	c := dial(t, client.Config{Address: s.Address()})
	if _, err := c.Interact(bounded(t), program("refuse INVALID_ARGUMENT NOPE command.args no")); client.Reason(err) != "NOPE" {
		t.Errorf("%v", err)
	}
	a, err := c.Interact(bounded(t), &executorv1.ExecuteRequest{Command: &executorv1.Command{Args: []string{"await"}}})
	if err != nil {
		t.Fatal(err)
	}
	if err := follow(a).end(t); client.Reason(err) != "STDIN_NOT_OPEN" {
		t.Errorf("%v", err)
	}
	// The context ends all of it, with its cause.
	ctx, cancel := context.WithCancelCause(t.Context())
	f := follow(must(c.Interact(ctx, program("cat"))))
	cancel(fmt.Errorf("enough"))
	if err := f.end(t); err == nil || !strings.Contains(err.Error(), "enough") {
		t.Errorf("%v", err)
	}
	if _, err := f.Write(make([]byte, 100_000)); err == nil || !strings.Contains(err.Error(), "enough") {
		t.Errorf("%v", err)
	}
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}
