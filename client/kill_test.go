package client_test

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"

	"github.com/harvest-run/executord/client"
	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
)

// serverEnv makes the test binary a server on that address.
const serverEnv = "EXECUTORD_CLIENT_TEST_SERVER"

// longLog is the same in every process, as a log on disk is.
func longLog() []*executorv1.Event {
	random := rand.New(rand.NewPCG(1, 2))
	log := []*executorv1.Event{started(1)}
	var offsets [2]int64
	for i := range 400 {
		which := random.IntN(2)
		data := make([]byte, 1+random.IntN(2000))
		for j := range data {
			data[j] = byte(random.Uint32())
		}
		log = append(log, chunk(uint64(i+2), executorv1.Stream(which+1), offsets[which], string(data)))
		offsets[which] += int64(len(data))
	}
	return append(log, result(402, log...))
}

// slowServer tells longLog, an event at a time, so that a kill finds it at work.
type slowServer struct {
	executorv1.UnimplementedExecutorServiceServer
	log []*executorv1.Event
}

func (s *slowServer) tell(after *executorv1.Cursor, send func(*executorv1.Event) error) error {
	for _, e := range behind(s.log, after) {
		if err := send(e); err != nil {
			return err
		}
		time.Sleep(time.Millisecond)
	}
	return nil
}

func (s *slowServer) Execute(_ *executorv1.ExecuteRequest, stream executorv1.ExecutorService_ExecuteServer) error {
	return s.tell(nil, func(e *executorv1.Event) error { return stream.Send(&executorv1.ExecuteResponse{Event: e}) })
}

func (s *slowServer) WatchExecution(r *executorv1.WatchExecutionRequest, stream executorv1.ExecutorService_WatchExecutionServer) error {
	return s.tell(r.GetAfter(), func(e *executorv1.Event) error { return stream.Send(&executorv1.WatchExecutionResponse{Event: e}) })
}

func serveForever(address string) error {
	listener, err := net.Listen("tcp", address)
	if err != nil {
		return err
	}
	server := grpc.NewServer()
	executorv1.RegisterExecutorServiceServer(server, &slowServer{log: longLog()})
	return server.Serve(listener)
}

// serverProcess starts a server that dies with the test.
func serverProcess(t *testing.T, address string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), serverEnv+"="+address)
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return cmd
}

// kill ends it as kill -9 does, whatever it is doing.
func kill(t *testing.T, cmd *exec.Cmd) {
	t.Helper()
	if err := cmd.Process.Kill(); err != nil {
		t.Error(err)
	}
	_ = cmd.Wait()
}

// TestKill kills the server process in mid-stream, again and again, and has it come
// back on the same address after a while.
func TestKill(t *testing.T) {
	if testing.Short() {
		t.Skip("starts processes")
	}
	t.Parallel()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := listener.Addr().String()
	if err := listener.Close(); err != nil {
		t.Fatal(err)
	}

	server := serverProcess(t, address)
	defer func() { kill(t, server) }()
	c := dial(t, client.Config{Address: address})
	ctx := bounded(t)
	var stream *client.Stream
	for {
		if stream, err = c.Execute(ctx, execute("exit 0")); err == nil {
			break
		}
		if !client.Unavailable(err) {
			t.Fatal(err)
		}
		time.Sleep(20 * time.Millisecond)
	}

	var out, want [2]bytes.Buffer
	var events, kills int
	for {
		e, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatalf("after %d events and %d kills: %v", events, kills, err)
		}
		events++
		if o := e.GetOutput(); o != nil {
			out[o.GetStream()-1].Write(o.GetData())
		}
		if events%70 == 0 {
			kill(t, server)
			kills++
			if kills%2 == 0 {
				time.Sleep(300 * time.Millisecond) // long enough for some attempts in vain
			}
			server = serverProcess(t, address)
		}
	}
	for _, e := range longLog() {
		if o := e.GetOutput(); o != nil {
			want[o.GetStream()-1].Write(o.GetData())
		}
	}
	if kills < 5 || events != 402 {
		t.Errorf("%d events, %d kills", events, kills)
	}
	for i := range out {
		if !bytes.Equal(out[i].Bytes(), want[i].Bytes()) {
			t.Errorf("stream %d differs: %d bytes, want %d", i+1, out[i].Len(), want[i].Len())
		}
	}
	if !stream.Whole() || stream.Result().GetExitCode() != 0 {
		t.Errorf("whole %v, result %v", stream.Whole(), stream.Result())
	}
}
