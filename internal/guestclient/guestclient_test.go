package guestclient

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
	"github.com/harvest-run/executord/internal/guest/wire"
)

func TestHonestGuest(t *testing.T) {
	c, l := lie(t, honest)
	if resp, err := c.Start(t.Context(), &guestv1.StartRequest{}); err != nil || resp.GetPid() != 7 {
		t.Errorf("start: %v, %v", resp, err)
	}
	out, err := c.Read(t.Context(), "x", 0, 100, time.Second)
	if err != nil {
		t.Fatal(err)
	}
	if len(out.Chunks) != 2 || string(out.Chunks[0].Data) != "ou" || string(out.Chunks[1].Data) != "t" || out.Exit != nil {
		t.Errorf("read: %+v", out)
	}
	out.Release()
	if err := c.Stop(t.Context(), "x", time.Second); err != nil {
		t.Error(err)
	}
	if err := c.Release(t.Context(), "x"); err != nil {
		t.Error(err)
	}
	if info, err := c.Info(t.Context()); err != nil || !slices.Equal(info.GetExecutions(), []string{"a"}) {
		t.Errorf("info: %v, %v", info, err)
	}
	if l.dialled() != 1 {
		t.Errorf("dialled %d times", l.dialled())
	}
}

// calls are the calls of a Client whose answer has no payload.
func calls() map[string]func(ctx context.Context, c *Client) error {
	return map[string]func(ctx context.Context, c *Client) error{
		"start": func(ctx context.Context, c *Client) error {
			_, err := c.Start(ctx, &guestv1.StartRequest{Execution: "x"})
			return err
		},
		"stop":    func(ctx context.Context, c *Client) error { return c.Stop(ctx, "x", time.Second) },
		"release": func(ctx context.Context, c *Client) error { return c.Release(ctx, "x") },
		"info": func(ctx context.Context, c *Client) error {
			_, err := c.Info(ctx)
			return err
		},
		"write": func(ctx context.Context, c *Client) error {
			_, err := c.Write(ctx, "x", 5, []byte("abc"), true, 0)
			return err
		},
		"resize": func(ctx context.Context, c *Client) error {
			return c.Resize(ctx, "x", &guestv1.TerminalSize{Rows: 1, Columns: 2})
		},
		"signal": func(ctx context.Context, c *Client) error {
			return c.Signal(ctx, "x", 15, guestv1.SignalRequest_SCOPE_TREE)
		},
		"read": func(ctx context.Context, c *Client) error {
			out, err := c.Read(ctx, "x", 0, 100, time.Second)
			if err == nil {
				out.Release()
			}
			return err
		},
	}
}

// TestWrongAnswers answers every call with every answer that belongs to another.
func TestWrongAnswers(t *testing.T) {
	answers := map[string]any{
		"start": &guestv1.StartResponse{Pid: 1}, "stop": &guestv1.StopResponse{}, "release": &guestv1.ReleaseResponse{},
		"info": &guestv1.InfoResponse{Protocol: wire.Protocol}, "read": &guestv1.ReadResponse{}, "nothing": nil,
		"write": &guestv1.WriteResponse{CommittedOffset: 8, Closed: true}, "resize": &guestv1.ResizeResponse{}, "signal": &guestv1.SignalResponse{},
	}
	for asked, call := range calls() {
		for answered, answer := range answers {
			t.Run(asked+" answered with "+answered, func(t *testing.T) {
				first := true
				c, _ := lie(t, func(_ int, p *lyingPipe) {
					for req := p.next(); req != nil; req = p.next() {
						if first {
							first = false
							p.answer(req, answer)
							continue
						}
						p.answerHonestly(req)
					}
				})
				if err := call(t.Context(), c); (err == nil) != (asked == answered) {
					t.Errorf("%v", err)
				}
				if err := call(t.Context(), c); err != nil {
					t.Errorf("and then: %v", err)
				}
			})
		}
	}
}

// TestLies answers single calls with what does not add up. The client says so, and
// works on.
func TestLies(t *testing.T) {
	const asked = 100
	read := func(answer *guestv1.ReadResponse, payload string) func(*lyingPipe, *guestv1.Request) {
		return func(p *lyingPipe, req *guestv1.Request) { p.answer(req, answer, []byte(payload)) }
	}
	stream := func(s guestv1.Stream) *guestv1.ReadResponse {
		return &guestv1.ReadResponse{Chunks: []*guestv1.Chunk{{Stream: s, Size: 3}}}
	}
	figures := func(change func(e *guestv1.Exit)) *guestv1.ReadResponse {
		e := code(0)
		change(e)
		return exit(e)
	}
	absurd := uint64(1 << 63)
	for name, c := range map[string]struct {
		lie  func(*lyingPipe, *guestv1.Request)
		call string // "read" if empty
		want string
	}{
		"payload without chunks":   {read(chunks(), "abc"), "", "3 bytes that belong to no chunk"},
		"chunks for less":          {read(chunks(1, 1), "abc"), "", "1 bytes that belong to no chunk"},
		"chunks for more":          {read(chunks(2, 2), "abc"), "", "chunk of 2 bytes"},
		"chunks without payload":   {read(chunks(1), ""), "", "chunk of 1 bytes"},
		"an empty chunk":           {read(chunks(3, 0), "abc"), "", "chunk of 0 bytes"},
		"the largest chunk":        {read(chunks(1<<32-1, 4), "abc"), "", "chunk of 4294967295 bytes"},
		"no stream":                {read(stream(0), "abc"), "", "of stream 0"},
		"an unknown stream":        {read(stream(3), "abc"), "", "of stream 3"},
		"a negative stream":        {read(stream(-1), "abc"), "", "of stream -1"},
		"more than was asked for":  {read(chunks(asked+1), strings.Repeat("x", asked+1)), "", "where at most 100 were asked for"},
		"much more":                {read(chunks(1<<20), strings.Repeat("x", 1<<20)), "", "where at most 100 were asked for"},
		"an exit without a status": {read(exit(&guestv1.Exit{}), ""), "", "without a status"},
		"a code too large":         {read(exit(code(256)), ""), "", "exit code 256"},
		"a negative code":          {read(exit(code(-1)), ""), "", "exit code -1"},
		"signal 0":                 {read(exit(signal(0)), ""), "", "signal 0"},
		"signal 65":                {read(exit(signal(65)), ""), "", "signal 65"},
		"an unknown cause":         {read(figures(func(e *guestv1.Exit) { e.StopCause = 9 }), ""), "", "stop cause 9"},
		"an absurd run":            {read(figures(func(e *guestv1.Exit) { e.RunMicros = absurd }), ""), "", "a time of"},
		"an absurd first output":   {read(figures(func(e *guestv1.Exit) { e.FirstOutputMicros = &absurd }), ""), "", "a time of"},
		"absurd user time":         {read(figures(func(e *guestv1.Exit) { e.CpuUserMicros = absurd }), ""), "", "a time of"},
		"absurd system time":       {read(figures(func(e *guestv1.Exit) { e.CpuSystemMicros = absurd }), ""), "", "a time of"},
		"no pid":                   {func(p *lyingPipe, req *guestv1.Request) { p.answer(req, &guestv1.StartResponse{}) }, "start", "another question"},
		"a negative pid":           {func(p *lyingPipe, req *guestv1.Request) { p.answer(req, &guestv1.StartResponse{Pid: -1}) }, "start", "another question"},
		"a start with payload": {func(p *lyingPipe, req *guestv1.Request) {
			p.answer(req, &guestv1.StartResponse{Pid: 1}, make([]byte, 1<<20))
		}, "start", "nobody asked for"},
		"an info with payload": {func(p *lyingPipe, req *guestv1.Request) {
			p.answer(req, &guestv1.InfoResponse{Protocol: 1}, []byte("x"))
		}, "info", "nobody asked for"},
		"another protocol":            {func(p *lyingPipe, req *guestv1.Request) { p.answer(req, &guestv1.InfoResponse{Protocol: 2}) }, "info", "protocol 2"},
		"an error with payload":       {func(p *lyingPipe, req *guestv1.Request) { p.answer(req, &guestv1.Error{Kind: 1}, make([]byte, 1<<20)) }, "", ""},
		"an error and nothing else":   {func(p *lyingPipe, req *guestv1.Request) { p.answer(req, &guestv1.Error{}) }, "", ""},
		"an error of an unknown kind": {func(p *lyingPipe, req *guestv1.Request) { p.answer(req, &guestv1.Error{Kind: 77}) }, "start", ""},
	} {
		t.Run(name, func(t *testing.T) {
			lied := false
			client, l := lie(t, func(_ int, p *lyingPipe) {
				for req := p.next(); req != nil; req = p.next() {
					if !lied {
						lied = true
						c.lie(p, req)
						continue
					}
					p.answerHonestly(req)
				}
			})
			call := calls()[c.call]
			if c.call == "" {
				call = calls()["read"]
			}
			err := call(t.Context(), client)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v, want %q", err, c.want)
			}
			if err := call(t.Context(), client); err != nil {
				t.Errorf("and then: %v", err)
			}
			if l.dialled() != 1 {
				t.Errorf("dialled %d times", l.dialled())
			}
		})
	}
}

// TestBrokenFrames sends what is no answer at all, on every pipe. The client gives up
// after a few.
func TestBrokenFrames(t *testing.T) {
	header := func(size, payload uint32, rest string) []byte {
		b := binary.BigEndian.AppendUint32(nil, size)
		return append(binary.BigEndian.AppendUint32(b, payload), rest...)
	}
	var whole bytes.Buffer
	if err := wire.Write(&whole, &guestv1.Response{Id: 1, Answer: &guestv1.Response_Read{Read: chunks(3)}}, []byte("abc")); err != nil {
		t.Fatal(err)
	}
	for name, in := range map[string][]byte{
		"nothing":               {},
		"half a header":         whole.Bytes()[:5],
		"a header":              whole.Bytes()[:8],
		"half a message":        whole.Bytes()[:12],
		"half a payload":        whole.Bytes()[:whole.Len()-1],
		"a huge message":        header(1<<32-1, 0, "x"),
		"too large a message":   header(wire.MaxAnswer+1, 0, strings.Repeat("x", 100)),
		"a huge payload":        header(0, 1<<32-1, "x"),
		"garbage":               bytes.Repeat([]byte{0xff}, 100),
		"an empty answer":       header(0, 0, ""),
		"an unknown request":    append(header(2, 0, "\x08\x09"), whole.Bytes()...),
		"another's payload":     header(2, 1<<20, "\x08\x09"),
		"an undecodable answer": header(3, 0, "\x08\x01\x0c"),
	} {
		t.Run(name, func(t *testing.T) {
			c, l := lie(t, func(_ int, p *lyingPipe) {
				if p.next() != nil {
					_, _ = p.Write(in)
				}
			})
			for call, f := range calls() {
				before := l.dialled()
				if err := f(t.Context(), c); err == nil || KindOf(err) != guestv1.Error_KIND_UNSPECIFIED {
					t.Errorf("%s: %v", call, err)
				}
				if n := l.dialled() - before; n != attempts {
					t.Errorf("%s: dialled %d times, want %d", call, n, attempts)
				}
			}
		})
	}
}

// TestLostPipe loses the pipe at every point of a call once; the caller does not see it.
func TestLostPipe(t *testing.T) {
	var whole bytes.Buffer
	if err := wire.Write(&whole, &guestv1.Response{Id: 1, Answer: &guestv1.Response_Read{Read: chunks(3)}}, []byte("abc")); err != nil {
		t.Fatal(err)
	}
	for cut := range whole.Len() {
		c, l := lie(t, func(dial int, p *lyingPipe) {
			if dial > 1 {
				honest(dial, p)
			} else if cut > 0 && p.next() != nil {
				_, _ = p.Write(whole.Bytes()[:cut])
			}
		})
		out, err := c.Read(t.Context(), "x", 0, 100, time.Second)
		if err != nil {
			t.Fatalf("cut after %d bytes: %v", cut, err)
		}
		out.Release()
		if l.dialled() != 2 {
			t.Errorf("cut after %d bytes: dialled %d times", cut, l.dialled())
		}
	}
}

func TestAnsweredTwice(t *testing.T) {
	c, l := lie(t, func(dial int, p *lyingPipe) {
		req := p.next()
		p.answerHonestly(req)
		if dial == 1 {
			p.answerHonestly(req)
		}
		honest(dial, p)
	})
	for i := range 3 {
		if _, err := c.Info(t.Context()); err != nil {
			t.Fatalf("call %d: %v", i, err)
		}
	}
	if l.dialled() != 2 {
		t.Errorf("dialled %d times: the pipe of a liar goes on", l.dialled())
	}
}

func TestErrors(t *testing.T) {
	long := strings.Repeat("ü\x1b[31m\n", 10_000)
	for name, c := range map[string]struct {
		in   *guestv1.Error
		kind guestv1.Error_Kind
		text string
	}{
		"plain":                {&guestv1.Error{Kind: guestv1.Error_KIND_NOT_FOUND, Message: `no command "x"`}, guestv1.Error_KIND_NOT_FOUND, `no command "x"`},
		"no kind":              {&guestv1.Error{Message: "x"}, guestv1.Error_KIND_INTERNAL, "x"},
		"unknown kind":         {&guestv1.Error{Kind: 99, Message: "x"}, guestv1.Error_KIND_INTERNAL, "x"},
		"several lines":        {&guestv1.Error{Kind: 1, Message: "a\nb\x00c\x1b[0m"}, guestv1.Error_KIND_NOT_FOUND, "a?b?c?[0m"},
		"other scripts":        {&guestv1.Error{Kind: 1, Message: "größer 数"}, guestv1.Error_KIND_NOT_FOUND, "größer 数"},
		"longer than a screen": {&guestv1.Error{Kind: 1, Message: long}, guestv1.Error_KIND_NOT_FOUND, ""},
	} {
		t.Run(name, func(t *testing.T) {
			client, _ := lie(t, func(_ int, p *lyingPipe) {
				for req := p.next(); req != nil; req = p.next() {
					p.answer(req, c.in)
				}
			})
			for call, f := range calls() {
				err := f(t.Context(), client)
				if KindOf(err) != c.kind || c.text != "" && err.Error() != c.text {
					t.Errorf("%s: %v (%v), want %q (%v)", call, err, KindOf(err), c.text, c.kind)
				}
				if wrapped := fmt.Errorf("start: %w", err); KindOf(wrapped) != c.kind {
					t.Errorf("%s: the kind is lost in %v", call, wrapped)
				}
				if n := len(err.Error()); n > 2*maxErrorText || strings.ContainsAny(err.Error(), "\n\x1b") {
					t.Errorf("%s: an error of %d bytes: %.50q", call, n, err)
				}
			}
		})
	}
	if KindOf(nil) != guestv1.Error_KIND_UNSPECIFIED || KindOf(errors.New("x")) != guestv1.Error_KIND_UNSPECIFIED {
		t.Error("an error that is not the guest's has a kind")
	}
}

// TestSilence asks guests that do not answer, do not even read, or answer something
// else without end.
func TestSilence(t *testing.T) {
	for name, serve := range map[string]func(int, *lyingPipe){
		"reads and does not answer": func(_ int, p *lyingPipe) {
			for p.next() != nil {
			}
		},
		"does not read": func(_ int, p *lyingPipe) {
			time.Sleep(time.Hour)
		},
		"reads half": func(_ int, p *lyingPipe) {
			_, _ = p.Read(make([]byte, 5))
			time.Sleep(time.Hour)
		},
		"half an answer": func(_ int, p *lyingPipe) {
			_ = p.next()
			_, _ = p.Write([]byte{0, 0, 0, 100})
			time.Sleep(time.Hour)
		},
		"an answer byte by byte": func(_ int, p *lyingPipe) {
			_ = p.next()
			_, _ = p.Write([]byte{0, 1, 0, 0, 0, 0, 0, 0})
			for {
				time.Sleep(time.Second)
				if _, err := p.Write([]byte{1}); err != nil {
					return
				}
			}
		},
	} {
		for call, f := range calls() {
			t.Run(call+" of one that "+name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					c, _ := lie(t, serve)
					begun := time.Now()
					err := f(t.Context(), c)
					want := patience
					if call == "read" {
						want += time.Second
					}
					if took := time.Since(begun); !errors.Is(err, errSilent) || took != want {
						t.Errorf("%v after %v, want it after %v", err, took, want)
					}
				})
			})
		}
	}
}

// TestCancelled cancels calls at guests that hang. The caller is let go at once.
func TestCancelled(t *testing.T) {
	cause := errors.New("the caller has had enough")
	for name, serve := range map[string]func(int, *lyingPipe){
		"does not answer": func(_ int, p *lyingPipe) {
			for p.next() != nil {
			}
		},
		"does not read": func(_ int, p *lyingPipe) { time.Sleep(time.Hour) },
		"hangs up":      func(_ int, p *lyingPipe) { time.Sleep(4 * time.Millisecond) },
	} {
		for call, f := range calls() {
			t.Run(call+" of one that "+name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					c, _ := lie(t, serve)
					ctx, cancel := context.WithCancelCause(t.Context())
					var all sync.WaitGroup
					for range 5 {
						all.Go(func() {
							if err := f(ctx, c); !errors.Is(err, cause) {
								t.Errorf("%v", err)
							}
						})
					}
					time.Sleep(5 * time.Millisecond)
					cancel(cause)
					begun := time.Now()
					all.Wait()
					if took := time.Since(begun); took > 0 {
						t.Errorf("let go after %v", took)
					}
				})
			})
		}
	}
}

// TestCancelledReadLeavesThePipe cancels a long read; its answer comes late and
// belongs to nobody.
func TestCancelledReadLeavesThePipe(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, l := lie(t, func(_ int, p *lyingPipe) {
			late := p.next()
			for req := p.next(); req != nil; req = p.next() {
				p.answer(late, chunks(50_000), make([]byte, 50_000))
				p.answerHonestly(req)
				late = req // answered twice from here on, were there a third
			}
		})
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := c.Read(ctx, "x", 0, 50_000, time.Minute); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%v", err)
		}
		if _, err := c.Info(t.Context()); err != nil {
			t.Error(err)
		}
		if l.dialled() != 1 {
			t.Errorf("dialled %d times", l.dialled())
		}
	})
}

// TestOthersSurviveSilence keeps a read open while another call is not answered: the
// pipe is given up, and the read goes on over the next.
func TestOthersSurviveSilence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, l := lie(t, func(dial int, p *lyingPipe) {
			if dial > 1 {
				honest(dial, p)
				return
			}
			for p.next() != nil {
			}
		})
		var reading sync.WaitGroup
		reading.Go(func() {
			out, err := c.Read(t.Context(), "x", 0, 100, time.Minute)
			if err != nil {
				t.Error(err)
				return
			}
			out.Release()
		})
		synctest.Wait()
		if _, err := c.Info(t.Context()); !errors.Is(err, errSilent) {
			t.Errorf("%v", err)
		}
		reading.Wait()
		if l.dialled() != 2 {
			t.Errorf("dialled %d times", l.dialled())
		}
	})
}

// TestConcurrentCalls answers many reads in an order of its own, and hangs up now and
// then; each caller gets what it asked for.
func TestConcurrentCalls(t *testing.T) {
	c, l := lie(t, func(dial int, p *lyingPipe) {
		requests := make(chan *guestv1.Request, 100)
		var answering sync.WaitGroup
		defer answering.Wait()
		defer close(requests)
		answering.Go(func() {
			for first := range requests {
				waiting := []*guestv1.Request{first}
				for more := true; more; {
					select {
					case req, ok := <-requests:
						if more = ok; ok {
							waiting = append(waiting, req)
						}
					default:
						more = false
					}
				}
				for _, req := range slices.Backward(waiting) {
					at := req.GetRead().GetPosition()
					p.answer(req, chunks(uint32(at)), bytes.Repeat([]byte{byte(at)}, int(at)))
				}
			}
		})
		for n := 0; dial > 3 || n < 40; n++ {
			req := p.next()
			if req == nil {
				return
			}
			requests <- req
		}
		p.Close()
	})
	var all sync.WaitGroup
	for w := range 16 {
		all.Go(func() {
			for i := range 50 {
				at := int64(1 + w*5000 + i)
				out, err := c.Read(t.Context(), "x", at, 1<<20, time.Second)
				if err != nil {
					t.Error(err)
					return
				}
				data := out.Chunks[0].Data
				if len(data) != int(at) || bytes.Count(data, []byte{byte(at)}) != len(data) {
					t.Errorf("read at %d got %d bytes of another", at, len(data))
				}
				out.Release()
				out.Release() // does nothing
			}
		})
	}
	all.Wait()
	if l.dialled() != 4 {
		t.Errorf("dialled %d times", l.dialled())
	}
}

func TestClose(t *testing.T) {
	t.Run("while calls are under way", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			c, _ := lie(t, func(_ int, p *lyingPipe) {
				for p.next() != nil {
				}
			})
			var all sync.WaitGroup
			for _, f := range calls() {
				for range 5 {
					all.Go(func() {
						if err := f(t.Context(), c); !errors.Is(err, errClosed) {
							t.Errorf("%v", err)
						}
					})
				}
			}
			synctest.Wait()
			begun := time.Now()
			c.Close()
			c.Close()
			all.Wait()
			for _, f := range calls() {
				if err := f(t.Context(), c); !errors.Is(err, errClosed) {
					t.Errorf("after Close: %v", err)
				}
			}
			if took := time.Since(begun); took > 0 {
				t.Errorf("took %v", took)
			}
		})
	})
	t.Run("while one writes and others wait for their turn", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			c, _ := lie(t, func(_ int, p *lyingPipe) { time.Sleep(time.Hour) })
			var all sync.WaitGroup
			for _, f := range calls() {
				all.Go(func() {
					if err := f(t.Context(), c); !errors.Is(err, errClosed) {
						t.Errorf("%v", err)
					}
				})
			}
			synctest.Wait()
			c.Close()
			all.Wait()
		})
	})
	t.Run("while it dials", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			c := New(dialerFunc(func(ctx context.Context) (net.Conn, error) {
				<-ctx.Done()
				return nil, ctx.Err()
			}))
			var all sync.WaitGroup
			for range 5 {
				all.Go(func() {
					if _, err := c.Info(t.Context()); !errors.Is(err, errClosed) {
						t.Errorf("%v", err)
					}
				})
			}
			synctest.Wait()
			begun := time.Now()
			c.Close()
			all.Wait()
			if took := time.Since(begun); took > 0 {
				t.Errorf("took %v", took)
			}
		})
	})
	t.Run("while a dial succeeds", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			ours, theirs := net.Pipe()
			defer theirs.Close()
			c := New(dialerFunc(func(context.Context) (net.Conn, error) {
				time.Sleep(time.Second) // deaf to its context
				return ours, nil
			}))
			var call sync.WaitGroup
			call.Go(func() {
				if _, err := c.Info(t.Context()); !errors.Is(err, errClosed) {
					t.Errorf("%v", err)
				}
			})
			synctest.Wait()
			c.Close()
			if _, err := ours.Write([]byte("x")); err == nil {
				t.Error("the pipe was left open")
			}
			call.Wait()
		})
	})
	t.Run("between two attempts", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			c := New(dialerFunc(func(context.Context) (net.Conn, error) { return nil, errors.New("refused") }))
			var call sync.WaitGroup
			call.Go(func() {
				if _, err := c.Info(t.Context()); !errors.Is(err, errClosed) {
					t.Errorf("%v", err)
				}
			})
			time.Sleep(firstPause / 2)
			c.Close()
			begun := time.Now()
			call.Wait()
			if took := time.Since(begun); took > 0 {
				t.Errorf("took %v", took)
			}
		})
	})
	t.Run("unused", func(t *testing.T) { New(nil).Close() })
}

type dialerFunc func(ctx context.Context) (net.Conn, error)

func (f dialerFunc) Dial(ctx context.Context) (net.Conn, error) { return f(ctx) }

func TestDial(t *testing.T) {
	t.Run("refused", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			refused := errors.New("refused")
			dials := 0
			c := New(dialerFunc(func(context.Context) (net.Conn, error) {
				dials++
				return nil, refused
			}))
			defer c.Close()
			begun := time.Now()
			if _, err := c.Info(t.Context()); !errors.Is(err, refused) || dials != attempts {
				t.Errorf("%v after %d attempts", err, dials)
			}
			if took := time.Since(begun); took != 7*firstPause {
				t.Errorf("gave up after %v", took)
			}
		})
	})
	t.Run("one for all", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			var dials atomic.Int64
			l := &liar{t: t, serve: honest}
			c := New(dialerFunc(func(ctx context.Context) (net.Conn, error) {
				dials.Add(1)
				time.Sleep(time.Second)
				return l.Dial(ctx)
			}))
			var all sync.WaitGroup
			for range 20 {
				all.Go(func() {
					if _, err := c.Info(t.Context()); err != nil {
						t.Error(err)
					}
				})
			}
			all.Wait()
			if dials.Load() != 1 {
				t.Errorf("dialled %d times", dials.Load())
			}
			c.Close()
			l.work.Wait()
		})
	})
	t.Run("the one who dials goes", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			l := &liar{t: t, serve: honest}
			var dials atomic.Int64
			c := New(dialerFunc(func(ctx context.Context) (net.Conn, error) {
				if dials.Add(1) == 1 {
					<-ctx.Done()
					return nil, ctx.Err()
				}
				return l.Dial(ctx)
			}))
			ctx, cancel := context.WithCancel(t.Context())
			var all sync.WaitGroup
			all.Go(func() {
				if _, err := c.Info(ctx); !errors.Is(err, context.Canceled) {
					t.Errorf("%v", err)
				}
			})
			synctest.Wait()
			all.Go(func() {
				if _, err := c.Info(t.Context()); err != nil {
					t.Errorf("the other: %v", err)
				}
			})
			synctest.Wait()
			cancel()
			all.Wait()
			c.Close()
			l.work.Wait()
		})
	})
	t.Run("hangs", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			c := New(dialerFunc(func(ctx context.Context) (net.Conn, error) {
				<-ctx.Done()
				return nil, context.Cause(ctx)
			}))
			defer c.Close()
			if _, err := c.Info(t.Context()); !errors.Is(err, errSilent) {
				t.Errorf("%v", err)
			}
		})
	})
}

// TestUnsendable asks for what cannot be sent; the pipe and its other users stay.
func TestUnsendable(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, l := lie(t, func(_ int, p *lyingPipe) {
			waiting := p.next()
			if p.next() == nil {
				return
			}
			p.answer(waiting, chunks())
			for p.next() != nil {
			}
		})
		var reading sync.WaitGroup
		reading.Go(func() {
			if _, err := c.Read(t.Context(), "x", 0, 100, time.Minute); err != nil {
				t.Error(err)
			}
		})
		synctest.Wait()
		for name, r := range map[string]*guestv1.StartRequest{
			"not UTF-8": {Args: []string{"\xff"}},
			"too large": {Source: make([]byte, wire.MaxMessage)},
		} {
			if _, err := c.Start(t.Context(), r); !errors.Is(err, wire.ErrUnsendable) {
				t.Errorf("%s: %v", name, err)
			}
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, _ = c.Info(ctx) // lets the guest answer the read
		reading.Wait()
		if l.dialled() != 1 {
			t.Errorf("dialled %d times", l.dialled())
		}
	})
}

// TestWhatIsAsked looks at requests as the guest gets them.
func TestWhatIsAsked(t *testing.T) {
	got := make(chan *guestv1.Request, 1)
	c, _ := lie(t, func(_ int, p *lyingPipe) {
		for req := p.next(); req != nil; req = p.next() {
			got <- req
			p.answerHonestly(req)
		}
	})
	for grace, want := range map[time.Duration]uint64{0: 0, -time.Hour: 0, 1: 1, time.Millisecond: 1, time.Millisecond + 1: 2, time.Minute: 60_000, 1<<63 - 1: (1<<63-1)/1_000_000 + 1} {
		if err := c.Stop(t.Context(), "x", grace); err != nil {
			t.Fatal(err)
		}
		if ms := (<-got).GetStop().GetGraceMs(); ms != want {
			t.Errorf("a grace of %v is %d ms, want %d", grace, ms, want)
		}
	}
	for wait, want := range map[time.Duration]uint32{0: 0, -time.Second: 0, 1: 1, 20 * time.Second: 20_000, time.Hour: 60_000} {
		out, err := c.Read(t.Context(), "x", 1<<40, 100, wait)
		if err != nil {
			t.Fatal(err)
		}
		out.Release()
		if r := (<-got).GetRead(); r.GetWaitMs() != want || r.GetPosition() != 1<<40 || r.GetMaxBytes() != 100 || r.GetExecution() != "x" {
			t.Errorf("a wait of %v is %v", wait, r)
		}
	}
	for _, bad := range []struct {
		position int64
		n        int
	}{{-1, 100}, {0, 0}, {0, -5}, {0, wire.MaxPayload + 1}} {
		if _, err := c.Read(t.Context(), "x", bad.position, bad.n, 0); err == nil {
			t.Errorf("a read of %d bytes at %d was tried", bad.n, bad.position)
		}
	}
	select {
	case req := <-got:
		t.Errorf("the guest was asked %v", req)
	default:
	}
}

// TestPayloadsAreReused reads and releases, and looks at what is allocated.
func TestPayloadsAreReused(t *testing.T) {
	p := &sync.Pool{}
	a := newPayload(100<<10, p)
	if len(a.bytes()) != 100<<10 {
		t.Errorf("%d bytes", len(a.bytes()))
	}
	a.release()
	for n, pooled := range map[int]bool{1: false, pooledFrom - 1: false, pooledFrom: true, pooledSize: true, pooledSize + 1: false, wire.MaxPayload: false} {
		b := newPayload(n, p)
		if len(b.bytes()) != n || (b.home != nil) != pooled {
			t.Errorf("a payload of %d bytes has %d, pooled %v", n, len(b.bytes()), b.home != nil)
		}
		b.release()
	}
	var none *payload
	if none.bytes() != nil || newPayload(0, p) != nil {
		t.Error("nothing is something")
	}
	none.release()
}

// FuzzAnswers lets a guest say anything. What gets through is what it should be.
func FuzzAnswers(f *testing.F) {
	add := func(answers ...*guestv1.Response) {
		var b bytes.Buffer
		for _, a := range answers {
			if err := wire.Write(&b, a, []byte("payload")); err != nil {
				f.Fatal(err)
			}
		}
		f.Add(b.Bytes())
	}
	add(&guestv1.Response{Id: 1, Answer: &guestv1.Response_Read{Read: chunks(4, 3)}})
	add(&guestv1.Response{Id: 1, Answer: &guestv1.Response_Read{Read: exit(signal(9))}})
	add(&guestv1.Response{Id: 1, Answer: &guestv1.Response_Error{Error: &guestv1.Error{Kind: 3, Message: "x"}}})
	add(&guestv1.Response{Id: 2}, &guestv1.Response{Id: 1})
	f.Fuzz(func(t *testing.T, in []byte) {
		ours, theirs := net.Pipe()
		var guest sync.WaitGroup
		guest.Go(func() {
			defer theirs.Close()
			if _, err := (&wire.Reader{R: theirs}).Read(new(guestv1.Request)); err == nil {
				_, _ = theirs.Write(in)
			}
		})
		p := newPipe(ours, &sync.Pool{})
		a, err := p.ask(t.Context(), &guestv1.Request{Call: &guestv1.Request_Read{Read: &guestv1.ReadRequest{}}}, nil)
		if err == nil {
			if e := a.response.GetError(); e != nil && KindOf(errorOf(e)) == guestv1.Error_KIND_UNSPECIFIED {
				t.Errorf("an error without a kind: %v", e)
			}
			if out, err := outputOf(a, 100); err == nil {
				total := 0
				for _, c := range out.Chunks {
					total += len(c.Data)
					if len(c.Data) == 0 || c.Stream != guestv1.Stream_STREAM_STDOUT && c.Stream != guestv1.Stream_STREAM_STDERR {
						t.Errorf("a chunk of %d bytes of stream %d", len(c.Data), c.Stream)
					}
				}
				if total > 100 || out.Exit != nil && out.Exit.GetStatus() == nil {
					t.Errorf("%d bytes, %v", total, out.Exit)
				}
			}
			a.release()
		}
		p.close(errClosed)
		guest.Wait()
	})
}
