package guest

import (
	"bytes"
	"encoding/binary"
	"io"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
	"github.com/harvest-run/executord/internal/guest/wire"
	"github.com/harvest-run/executord/internal/guestclient"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
)

// frame is one request as it travels.
func frame(t testing.TB, id uint64, call any, payload ...[]byte) []byte {
	t.Helper()
	r := &guestv1.Request{Id: id}
	switch c := call.(type) {
	case *guestv1.StartRequest:
		r.Call = &guestv1.Request_Start{Start: c}
	case *guestv1.ReadRequest:
		r.Call = &guestv1.Request_Read{Read: c}
	case *guestv1.StopRequest:
		r.Call = &guestv1.Request_Stop{Stop: c}
	case *guestv1.ReleaseRequest:
		r.Call = &guestv1.Request_Release{Release: c}
	case *guestv1.WriteRequest:
		r.Call = &guestv1.Request_Write{Write: c}
	case *guestv1.ResizeRequest:
		r.Call = &guestv1.Request_Resize{Resize: c}
	case *guestv1.SignalRequest:
		r.Call = &guestv1.Request_Signal{Signal: c}
	case *guestv1.InfoRequest:
		r.Call = &guestv1.Request_Info{Info: c}
	}
	var b bytes.Buffer
	if err := wire.Write(&b, r, payload...); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// TestGarbage sends what no executord sends. The pipe may be closed; the guest and
// other pipes must not care.
func TestGarbage(t *testing.T) {
	g := startDaemon(t, "proc")
	g.start(g.sh("witness", "echo here; sleep 60"))
	header := func(size, payload uint32, rest string) []byte {
		b := binary.BigEndian.AppendUint32(nil, size)
		return append(binary.BigEndian.AppendUint32(b, payload), rest...)
	}
	var open []net.Conn
	for name, in := range map[string][]byte{
		"nothing":               {},
		"half a header":         header(9, 0, "")[:5],
		"header alone":          header(100, 0, ""),
		"half a message":        header(100, 0, "abc"),
		"half a payload":        append(frame(t, 1, nil), header(0, 1<<20, "abc")...),
		"the largest numbers":   header(1<<32-1, 1<<32-1, strings.Repeat("x", 1000)),
		"a text protocol":       []byte("GET / HTTP/1.1\r\nHost: guest\r\n\r\n"),
		"random bytes":          randomBytes(1, 100<<10),
		"an undecodable frame":  header(4, 0, "\xff\xff\xff\xff"),
		"a string not in UTF-8": header(9, 0, "\x12\x07\x0a\x05\xff\xfe\xfd\xfc\xfb"),
	} {
		t.Run(name, func(t *testing.T) {
			conn, err := g.Dial(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			_, _ = conn.Write(in) // the guest may close before it took all
			open = append(open, conn)
			if _, err := g.Info(t.Context()); err != nil {
				t.Errorf("another pipe: %v", err)
			}
		})
	}
	o := &output{}
	g.readUntil("witness", o, "here\n")
	for _, conn := range open {
		conn.Close()
	}
	g.stop("witness", 0)
	g.readAll("witness", o)
	g.release("witness")
}

// ask sends frames over a pipe of their own and returns as many answers.
func (g *guestProcess) ask(n int, frames ...[]byte) map[uint64]*guestv1.Response {
	g.t.Helper()
	conn, err := g.Dial(g.t.Context())
	if err != nil {
		g.t.Fatal(err)
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		g.t.Fatal(err)
	}
	var writer sync.WaitGroup
	defer writer.Wait()
	writer.Go(func() { _, _ = conn.Write(bytes.Join(frames, nil)) })
	answers := make(map[uint64]*guestv1.Response)
	r := &wire.Reader{R: conn, Limit: wire.MaxAnswer}
	for range n {
		resp := new(guestv1.Response)
		payload, err := r.Read(resp)
		if err == nil {
			_, err = io.CopyN(io.Discard, conn, int64(payload))
		}
		if err != nil {
			g.t.Fatalf("after %d answers of %d: %v", len(answers), n, err)
		}
		answers[resp.GetId()] = resp
	}
	return answers
}

func TestOddRequests(t *testing.T) {
	g := startDaemon(t, "proc")
	g.start(g.sh("x", "sleep 60"))
	in := g.sh("in", "sleep 60")
	in.Stdin = true
	g.start(in)
	for name, c := range map[string]struct {
		frame []byte
		kind  guestv1.Error_Kind
	}{
		"no call":             {frame(t, 7, nil), guestv1.Error_KIND_INVALID},
		"empty start":         {frame(t, 7, &guestv1.StartRequest{}), guestv1.Error_KIND_INVALID},
		"empty read":          {frame(t, 7, &guestv1.ReadRequest{}), guestv1.Error_KIND_NOT_FOUND},
		"read of 0 bytes":     {frame(t, 7, &guestv1.ReadRequest{Execution: g.full("x")}), guestv1.Error_KIND_INVALID},
		"read far beyond":     {frame(t, 7, &guestv1.ReadRequest{Execution: g.full("x"), MaxBytes: 1, Position: 1 << 63}), guestv1.Error_KIND_INVALID},
		"empty stop":          {frame(t, 7, &guestv1.StopRequest{}), guestv1.Error_KIND_NOT_FOUND},
		"empty release":       {frame(t, 7, &guestv1.ReleaseRequest{}), 0},
		"with a payload":      {frame(t, 7, &guestv1.InfoRequest{}, make([]byte, 1<<20)), 0},
		"read of the most":    {frame(t, 7, &guestv1.ReadRequest{Execution: g.full("x"), MaxBytes: 1<<32 - 1}), 0},
		"largest grace":       {frame(t, 7, &guestv1.StopRequest{Execution: g.full("x"), GraceMs: 1<<64 - 1}), 0},
		"grace again":         {frame(t, 7, &guestv1.StopRequest{Execution: g.full("x"), GraceMs: 1<<64 - 1}), 0},
		"empty write":         {frame(t, 7, &guestv1.WriteRequest{}), guestv1.Error_KIND_NOT_FOUND},
		"write to no input":   {frame(t, 7, &guestv1.WriteRequest{Execution: g.full("x")}, []byte("x")), guestv1.Error_KIND_INVALID},
		"write of too much":   {frame(t, 7, &guestv1.WriteRequest{Execution: g.full("x")}, make([]byte, 1<<20)), guestv1.Error_KIND_INVALID},
		"write far beyond":    {frame(t, 7, &guestv1.WriteRequest{Execution: g.full("in"), Offset: proto.Uint64(1<<64 - 1), WaitMs: 1<<32 - 1}, []byte("x")), guestv1.Error_KIND_INVALID},
		"write without place": {frame(t, 7, &guestv1.WriteRequest{Execution: g.full("in")}, []byte("x")), guestv1.Error_KIND_INVALID},
		"close without place": {frame(t, 7, &guestv1.WriteRequest{Execution: g.full("in"), Close: true}), guestv1.Error_KIND_INVALID},
		"the largest write":   {frame(t, 7, &guestv1.WriteRequest{Execution: g.full("in"), Offset: proto.Uint64(0)}, make([]byte, 64<<10)), 0},
		"empty resize":        {frame(t, 7, &guestv1.ResizeRequest{}), guestv1.Error_KIND_NOT_FOUND},
		"resize of a pipe":    {frame(t, 7, &guestv1.ResizeRequest{Execution: g.full("x")}), guestv1.Error_KIND_INVALID},
		"empty signal":        {frame(t, 7, &guestv1.SignalRequest{}), guestv1.Error_KIND_NOT_FOUND},
		"signal 0":            {frame(t, 7, &guestv1.SignalRequest{Execution: g.full("x"), Scope: 1}), guestv1.Error_KIND_INVALID},
		"the largest signal":  {frame(t, 7, &guestv1.SignalRequest{Execution: g.full("x"), Signal: 1<<32 - 1, Scope: 1}), guestv1.Error_KIND_INVALID},
		"signal for nobody":   {frame(t, 7, &guestv1.SignalRequest{Execution: g.full("x"), Signal: 1, Scope: 99}), guestv1.Error_KIND_INVALID},
		"largest wait at end": {frame(t, 7, &guestv1.ReadRequest{Execution: "y", MaxBytes: 1, WaitMs: 1<<32 - 1}), guestv1.Error_KIND_NOT_FOUND},
	} {
		t.Run(name, func(t *testing.T) {
			answer := g.ask(1, c.frame)[7]
			if got := answer.GetError().GetKind(); answer == nil || got != c.kind {
				t.Errorf("%v, want %v", answer, c.kind)
			}
		})
	}
	g.stop("in", 0)
	g.readAll("in", &output{})
	g.stop("x", 0)
	g.readAll("x", &output{})
	g.release("x")
}

// TestTooManyRequests opens more requests on a pipe than the guest works on.
func TestTooManyRequests(t *testing.T) {
	g := startDaemon(t, "proc")
	g.start(g.sh("x", "sleep 60"))
	var frames [][]byte
	const more = 100
	for id := range uint64(maxInFlight + more) {
		frames = append(frames, frame(t, id, &guestv1.ReadRequest{Execution: g.full("x"), MaxBytes: 1, WaitMs: 60_000}))
	}
	for id, answer := range g.ask(more, frames...) {
		if answer.GetError().GetKind() != guestv1.Error_KIND_EXHAUSTED {
			t.Errorf("request %d: %v", id, answer)
		}
	}
	g.stop("x", 0)
	g.readAll("x", &output{})
	g.release("x")
}

// TestReadsOfTheEnd asks for the end over many pipes at once; the race detector looks
// on while the same message is sent on all of them.
func TestReadsOfTheEnd(t *testing.T) {
	g := startDaemon(t, "proc")
	g.start(g.sh("x", "sleep 0.2; printf abc"))
	var all sync.WaitGroup
	for range 20 {
		all.Go(func() {
			c := guestclient.New(g)
			defer c.Close()
			o := &output{}
			for o.exit == nil {
				out, err := c.Read(t.Context(), g.full("x"), 0, 100, 20*time.Second)
				if err != nil {
					t.Error(err)
					return
				}
				o = &output{}
				o.add(out)
				out.Release()
			}
			if string(o.stdout) != "abc" {
				t.Errorf("%q", o.stdout)
			}
		})
	}
	all.Wait()
	g.release("x")
}

func TestTooManyCommands(t *testing.T) {
	g, err := New(Config{RuntimeDirectory: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	for len(g.commands) < maxCommands {
		id := string(binary.BigEndian.AppendUint32(nil, uint32(len(g.commands)))) + strings.Repeat("x", 59)
		g.commands[id] = newCommand(id)
	}
	c, fresh := g.reserve("one-more")
	if _, err := g.start(&guestv1.StartRequest{Execution: "one-more", Args: []string{"/bin/true"}, WorkingDirectory: "/"}, c, fresh); kindOf(err) != guestv1.Error_KIND_EXHAUSTED {
		t.Errorf("one more: %v", err)
	}
	if size := proto.Size(g.info()); size > wire.MaxAnswer {
		t.Errorf("what the guest holds takes %d bytes to tell", size)
	}
	if err := g.Close(); err != nil {
		t.Error(err)
	}
}

func TestServeEndsWithItsListener(t *testing.T) {
	g, err := New(Config{})
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	var serving sync.WaitGroup
	serving.Go(func() {
		if err := g.Serve(l); err != nil {
			t.Error(err)
		}
	})
	conn, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Write(frame(t, 1, &guestv1.InfoRequest{})); err != nil {
		t.Fatal(err)
	}
	if _, err := (&wire.Reader{R: conn}).Read(new(guestv1.Response)); err != nil {
		t.Error(err)
	}
	l.Close()
	conn.Close()
	serving.Wait()
	if err := g.Close(); err != nil {
		t.Error(err)
	}
}

func TestNewTellsOfConfine(t *testing.T) {
	if _, err := New(Config{Confine: func() error { return unix.EPERM }}); err == nil || !strings.Contains(err.Error(), "operation not permitted") {
		t.Errorf("a thread that cannot be confined: %v", err)
	}
}

// memoryPipe is a pipe whose other end has sent all it will and takes everything.
type memoryPipe struct {
	io.Reader
	mu      sync.Mutex
	answers bytes.Buffer
}

func (p *memoryPipe) Write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.answers.Write(b)
}

func (p *memoryPipe) Close() error { return nil }

// fuzzedGuest holds commands and starts none: the spawner is one that refuses, so
// that nothing a fuzzer makes up is executed.
func fuzzedGuest(f *testing.F) func() *Guest {
	s := &spawner{requests: make(chan spawnRequest)}
	s.done.Go(func() {
		for r := range s.requests {
			r.answer <- spawnAnswer{0, syscall.EACCES}
		}
	})
	g, err := New(Config{RuntimeDirectory: f.TempDir()})
	if err != nil {
		f.Fatal(err)
	}
	g.spawner.close()
	g.spawner = s
	f.Cleanup(func() { g.Close() })
	return func() *Guest {
		fresh := &Guest{
			spawner: g.spawner, reaper: g.reaper, null: g.null, runtimeDirectory: g.runtimeDirectory,
			stock: newStock(1), commands: make(map[string]*command),
		}
		for _, id := range []string{"ended", "runs"} {
			c := newCommand(id)
			close(c.started)
			w := newSource(c.spool, stdout, fresh.stock)
			put(w, []byte("some output"))
			w.close()
			fresh.commands[id] = c
			if id == "ended" {
				c.spool.finish(&guestv1.Exit{Status: &guestv1.Exit_Code{}})
				close(c.ended)
			}
		}
		return fresh
	}
}

// makesDirectories says whether a request is in there that makes a directory; a
// fuzzer's are to be spared the machine.
func makesDirectories(in []byte) bool {
	r := &wire.Reader{R: bytes.NewReader(in)}
	for {
		req := new(guestv1.Request)
		n, err := r.Read(req)
		if err != nil {
			return false
		}
		if req.GetStart().GetCreateWorkingDirectory() {
			return true
		}
		if _, err := io.CopyN(io.Discard, r.R, int64(n)); err != nil {
			return false
		}
	}
}

func FuzzServePipe(f *testing.F) {
	fresh := fuzzedGuest(f)
	var all []byte
	for i, call := range []any{
		nil,
		&guestv1.InfoRequest{},
		&guestv1.StartRequest{Execution: "new", Args: []string{"/bin/true"}, WorkingDirectory: "/", SourceName: "a", Source: []byte("x")},
		&guestv1.StartRequest{Execution: "runs", Args: []string{"/bin/true"}, WorkingDirectory: "/"},
		&guestv1.ReadRequest{Execution: "ended", MaxBytes: 4},
		&guestv1.ReadRequest{Execution: "runs", MaxBytes: 100, Position: 11, WaitMs: 60_000},
		&guestv1.ReadRequest{Execution: "runs", MaxBytes: 100, Position: 5},
		&guestv1.StopRequest{Execution: "runs", GraceMs: 5},
		&guestv1.StopRequest{Execution: "runs"},
		&guestv1.ReleaseRequest{Execution: "runs"},
		&guestv1.ReleaseRequest{Execution: "ended"},
	} {
		in := frame(f, uint64(i), call, []byte("payload"))
		all = append(all, in...)
		f.Add(in)
	}
	f.Add(all)
	f.Add(all[:len(all)-3])
	f.Add([]byte{0, 0, 0, 0, 0, 0, 0, 0})
	f.Fuzz(func(t *testing.T, in []byte) {
		if makesDirectories(in) {
			t.Skip()
		}
		requests := make(map[uint64]bool)
		for r := (&wire.Reader{R: bytes.NewReader(in)}); ; {
			req := new(guestv1.Request)
			n, err := r.Read(req)
			if err == nil {
				_, err = io.CopyN(io.Discard, r.R, int64(n))
			}
			if err != nil {
				break
			}
			requests[req.GetId()] = true
		}
		pipe := &memoryPipe{Reader: bytes.NewReader(in)}
		fresh().ServePipe(pipe) // returns when every request was answered
		answered := make(map[uint64]bool)
		for r := (&wire.Reader{R: &pipe.answers, Limit: wire.MaxAnswer}); ; {
			resp := new(guestv1.Response)
			n, err := r.Read(resp)
			if err == io.EOF {
				break
			}
			if err == nil {
				_, err = io.CopyN(io.Discard, &pipe.answers, int64(n))
			}
			if err != nil || resp.GetAnswer() == nil {
				t.Fatalf("answer %v: %v", resp, err)
			}
			answered[resp.GetId()] = true
		}
		for id := range requests {
			if !answered[id] {
				t.Errorf("request %d was not answered", id)
			}
			delete(answered, id)
		}
		if len(answered) > 0 {
			t.Errorf("answers to no request: %v", answered)
		}
	})
}
