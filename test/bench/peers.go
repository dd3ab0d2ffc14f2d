package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
)

// roles are what this program is when it starts itself as a helper process.
func roles() map[string]func(args []string) error {
	return map[string]func([]string) error{"crun-worker": crunWorker, "bare-server": bareServer, "plot": plot}
}

// worker is a helper process that measures on request.
type worker struct {
	process *exec.Cmd
	pipe    io.Closer // its end ends the worker
	in      *json.Encoder
	out     *json.Decoder
}

// order and report are what is said to the worker and by it.
type order struct{ Do string }
type report struct {
	Took  time.Duration
	Error string
}

func startCrun(ctx context.Context) (*worker, error) {
	cmd := exec.CommandContext(ctx, "/proc/self/exe", "crun-worker")
	cmd.Stderr = os.Stderr
	// crun 1.8 refuses a hybrid host: in the worker's own mount namespace the version 2
	// hierarchy is not mounted.
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	return &worker{cmd, in, json.NewEncoder(in), json.NewDecoder(out)}, nil
}

func (w *worker) ask(do string, took *time.Duration) error {
	if err := w.in.Encode(order{do}); err != nil {
		return err
	}
	var r report
	if err := w.out.Decode(&r); err != nil {
		return fmt.Errorf("crun worker: %w", err)
	}
	if r.Error != "" {
		return errors.New(r.Error)
	}
	if took != nil {
		*took = r.Took
	}
	return nil
}

// stop ends the worker, which then removes what it made.
func (w *worker) stop() {
	_ = w.pipe.Close()
	_ = w.process.Wait()
}

// crunWorker runs containers over the host's /usr, each with an overlay of its own
// and with the limits that executord sets, and tells the time to the first byte.
func crunWorker([]string) error {
	if err := unix.Unmount("/sys/fs/cgroup/unified", unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return err
	}
	dir, err := os.MkdirTemp("", "bench-crun-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	c := &crunBench{dir: dir}
	if err := c.prepare(); err != nil {
		return err
	}
	in, out := json.NewDecoder(bufio.NewReader(os.Stdin)), json.NewEncoder(os.Stdout)
	for {
		var o order
		if err := in.Decode(&o); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		took, err := c.do(o.Do)
		r := report{Took: took}
		if err != nil {
			r.Error = o.Do + ": " + err.Error()
		}
		if err := out.Encode(r); err != nil {
			return err
		}
	}
}

type crunBench struct {
	dir  string
	n    atomic.Int64
	live string // id of the container for exec
}

// prepare makes the lower layer: a skeleton like executord's.
func (c *crunBench) prepare() error {
	lower := filepath.Join(c.dir, "lower")
	for _, d := range []string{"usr", "proc", "dev", "sys", "tmp", "etc", "workspace"} {
		if err := os.MkdirAll(filepath.Join(lower, d), 0o755); err != nil {
			return err
		}
	}
	for _, l := range []string{"bin", "sbin", "lib", "lib64"} {
		if err := os.Symlink("usr/"+l, filepath.Join(lower, l)); err != nil {
			return err
		}
	}
	return nil
}

// bundle mounts the overlays and writes the configuration of one container.
func (c *crunBench) bundle(id string, args ...string) (string, error) {
	b := filepath.Join(c.dir, id)
	for _, d := range []string{"rootfs", "upper", "work", "uupper", "uwork"} {
		if err := os.MkdirAll(filepath.Join(b, d), 0o755); err != nil {
			return "", err
		}
	}
	root := filepath.Join(b, "rootfs")
	if err := unix.Mount("overlay", root, "overlay", 0, "lowerdir="+c.dir+"/lower,upperdir="+b+"/upper,workdir="+b+"/work"); err != nil {
		return "", err
	}
	if err := unix.Mount("overlay", root+"/usr", "overlay", 0, "lowerdir=/usr,upperdir="+b+"/uupper,workdir="+b+"/uwork"); err != nil {
		return "", err
	}
	namespaces := []map[string]string{{"type": "pid"}, {"type": "mount"}, {"type": "network"}, {"type": "ipc"}, {"type": "uts"}}
	config := map[string]any{
		"ociVersion": "1.0.2",
		"process": map[string]any{
			"args": args, "cwd": "/workspace", "env": []string{"PATH=/usr/bin:/bin"}, "user": map[string]int{"uid": 0, "gid": 0}, "noNewPrivileges": true,
		},
		"root": map[string]any{"path": "rootfs"}, "hostname": id,
		"mounts": []map[string]any{
			{"destination": "/proc", "type": "proc", "source": "proc"},
			{"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": []string{"nosuid", "mode=755"}},
			{"destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": []string{"newinstance", "ptmxmode=0666"}},
			{"destination": "/dev/shm", "type": "tmpfs", "source": "shm"},
			{"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": []string{"ro"}},
		},
		"linux": map[string]any{
			"namespaces": namespaces, "cgroupsPath": "/bench-crun/" + id,
			"resources":   map[string]any{"memory": map[string]any{"limit": 2 << 30}, "pids": map[string]any{"limit": 1024}},
			"maskedPaths": []string{"/proc/kcore", "/proc/keys", "/proc/timer_list"}, "readonlyPaths": []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys"},
		},
	}
	text, err := json.Marshal(config)
	if err != nil {
		return "", err
	}
	return b, os.WriteFile(filepath.Join(b, "config.json"), text, 0o644)
}

func (c *crunBench) unbundle(b string) error {
	return errors.Join(unix.Unmount(b+"/rootfs/usr", unix.MNT_DETACH), unix.Unmount(b+"/rootfs", unix.MNT_DETACH), os.RemoveAll(b))
}

func (c *crunBench) crun(args ...string) *exec.Cmd {
	return exec.Command("crun", append([]string{"--root", filepath.Join(c.dir, "state")}, args...)...)
}

func (c *crunBench) do(what string) (time.Duration, error) {
	switch what {
	case "run":
		return c.run()
	case "many":
		begun := time.Now()
		err := together(inFlight, func(int) error {
			for range rateTurns {
				if _, err := c.run(); err != nil {
					return err
				}
			}
			return nil
		})
		return time.Since(begun), err
	case "kill":
		return c.kill()
	case "start":
		c.live = "live"
		b, err := c.bundle(c.live, "/bin/sleep", "100000")
		if err != nil {
			return 0, err
		}
		// Not with pipes: the container would hold them open.
		return 0, errors.Join(c.crun("create", "--bundle", b, c.live).Run(), c.crun("start", c.live).Run())
	case "exec":
		return firstByteOf(c.crun("exec", c.live, "/bin/echo", "hi"), time.Now())
	case "end":
		out, err := c.crun("delete", "--force", c.live).CombinedOutput()
		if err != nil {
			return 0, fmt.Errorf("%w: %s", err, out)
		}
		return 0, c.unbundle(filepath.Join(c.dir, c.live))
	}
	return 0, errors.New("unknown order")
}

// run makes a fresh sandbox, of which the overlay is a part as in executord, and ends it.
func (c *crunBench) run() (time.Duration, error) {
	id := "run" + strconv.FormatInt(c.n.Add(1), 10)
	begun := time.Now()
	b, err := c.bundle(id, "/bin/echo", "hi")
	if err != nil {
		return 0, err
	}
	took, err := firstByteOf(c.crun("run", "--bundle", b, id), begun)
	return took, errors.Join(err, c.unbundle(b))
}

// kill fills a container with processes and tells how long its end takes.
func (c *crunBench) kill() (time.Duration, error) {
	id := "kill" + strconv.FormatInt(c.n.Add(1), 10)
	b, err := c.bundle(id, "/bin/sh", "-c", crowd(100))
	if err != nil {
		return 0, err
	}
	cmd := c.crun("run", "--bundle", b, id)
	out, err := cmd.StdoutPipe()
	if err != nil {
		return 0, err
	}
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	_, err = io.ReadFull(out, make([]byte, 1))
	begun := time.Now()
	err = errors.Join(err, c.crun("kill", id, "KILL").Run())
	_ = cmd.Wait() // it removes the container, and tells that it was killed
	err = errors.Join(err, c.unbundle(b))
	return time.Since(begun), err
}

// firstByteOf runs a command to its end and returns the time to its first byte.
func firstByteOf(cmd *exec.Cmd, begun time.Time) (time.Duration, error) {
	out, err := cmd.StdoutPipe()
	if err != nil {
		return 0, err
	}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	if _, err := io.ReadFull(out, make([]byte, 1)); err != nil {
		return 0, errors.Join(err, cmd.Wait())
	}
	took := time.Since(begun)
	_, _ = io.Copy(io.Discard, out)
	return took, cmd.Wait()
}

// bare is a server of its own process that streams a pipe with stock grpc-go and the
// same messages and chunk size as executord, and does nothing else.
type bare struct {
	process *exec.Cmd
	conn    *grpc.ClientConn
}

const bareAddress = "127.0.0.1:17071"

// chunk is the data of one message, as in executord.
const chunk = 31744

func startBareServer(ctx context.Context) (*bare, error) {
	cmd := exec.CommandContext(ctx, "/proc/self/exe", "bare-server")
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	conn, err := grpc.NewClient(bareAddress, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithDefaultCallOptions(grpc.WaitForReady(true)))
	return &bare{cmd, conn}, err
}

func (b *bare) stop() {
	b.conn.Close()
	_ = b.process.Process.Kill()
	_ = b.process.Wait()
}

func (b *bare) stream(ctx context.Context, n int64) (time.Duration, error) {
	begun := time.Now()
	s, err := executorv1.NewExecutorServiceClient(b.conn).ReadOutput(ctx, &executorv1.ReadOutputRequest{Limit: n})
	if err != nil {
		return 0, err
	}
	var got int64
	for {
		resp, err := s.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return 0, err
		}
		got += int64(len(resp.GetData()))
	}
	if got != n {
		return 0, fmt.Errorf("bare server sent %d of %d bytes", got, n)
	}
	return time.Since(begun), nil
}

type bareService struct {
	executorv1.UnimplementedExecutorServiceServer
}

func bareServer([]string) error {
	l, err := net.Listen("tcp", bareAddress)
	if err != nil {
		return err
	}
	s := grpc.NewServer()
	executorv1.RegisterExecutorServiceServer(s, bareService{})
	return s.Serve(l)
}

// ReadOutput runs head and sends what it writes.
func (bareService) ReadOutput(r *executorv1.ReadOutputRequest, s grpc.ServerStreamingServer[executorv1.ReadOutputResponse]) error {
	cmd := exec.Command("head", "-c", strconv.FormatInt(r.GetLimit(), 10), "/dev/zero")
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	var offset int64
	for {
		data := make([]byte, chunk)
		n, err := io.ReadFull(out, data)
		if n > 0 {
			if err := s.Send(&executorv1.ReadOutputResponse{Offset: offset, Data: data[:n]}); err != nil {
				return err
			}
			offset += int64(n)
		}
		if err != nil {
			return cmd.Wait()
		}
	}
}
