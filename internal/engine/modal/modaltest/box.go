package modaltest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strconv"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// box is the processes of a sandbox as the fake sees them: the first one, to which it
// talks, and what that started. They are in namespaces of their own; when the first ends,
// the kernel ends all.
type box struct {
	first *exec.Cmd
	conn  *net.UnixConn
	dir   string // for spools
	// owner has the goroutines of the box.
	owner *sync.WaitGroup
	group group
	gone  chan struct{} // closed when everything in the box has ended

	mu     sync.Mutex
	calls  map[string]chan answer
	begun  map[string]*process
	number int
}

// answer is what came back for an order.
type answer struct {
	news
	file *os.File
}

// errBoxGone is the answer of a box that has ended.
var errBoxGone = errors.New("the sandbox has ended")

// boxConfig says where a box is.
type boxConfig struct {
	dir    string          // for spools
	groups group           // of all boxes
	memory uint32          // MiB; 0 is no limit
	owner  *sync.WaitGroup // has its goroutines
	shared bool            // it has the host's network
}

// startBox starts the first process of a sandbox and waits until it is inside.
func startBox(ctx context.Context, s *setup, cfg boxConfig) (*box, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "box"), os.NewFile(uintptr(fds[1]), "orders")
	conn, err := net.FileConn(ours)
	ours.Close()
	if err != nil {
		theirs.Close()
		return nil, err
	}
	cmd := exec.Command(s.Program)
	cmd.Args = []string{insideName}
	cmd.Env = []string{"GOTRACEBACK=none", "GOMAXPROCS=2"}
	cmd.Stderr = os.Stderr
	cmd.ExtraFiles = []*os.File{theirs}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Setsid:     true,
		Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC,
	}
	if !cfg.shared {
		cmd.SysProcAttr.Cloneflags |= unix.CLONE_NEWNET
	}
	group, err := cfg.groups.of(s.Hostname, cfg.memory)
	if err == nil {
		err = group.start(cmd)
	}
	theirs.Close()
	if err != nil {
		conn.Close()
		_ = group.remove() // it is empty, or was not made
		return nil, fmt.Errorf("start the first process of a sandbox: %w", err)
	}
	b := &box{
		first: cmd, conn: conn.(*net.UnixConn), dir: cfg.dir, owner: cfg.owner, group: group, gone: make(chan struct{}),
		calls: make(map[string]chan answer), begun: make(map[string]*process),
	}
	ready := b.expect("")
	cfg.owner.Go(b.listen)
	if err = b.send(order{Op: "setup", Setup: s}); err == nil {
		_, err = b.await(ctx, ready)
	}
	if err != nil {
		b.end()
		return nil, fmt.Errorf("set up a sandbox: %w", err)
	}
	return b, nil
}

// end kills everything in the box and waits until it is gone.
func (b *box) end() {
	_ = b.first.Process.Kill() // it has ended: nothing to do
	<-b.gone
}

// listen hears the first process until it has ended.
func (b *box) listen() {
	buf, rights := make([]byte, 64<<10), make([]byte, unix.CmsgSpace(4))
	for {
		n, rn, _, _, err := b.conn.ReadMsgUnix(buf, rights)
		if err != nil || n == 0 {
			break
		}
		var a answer
		files, err := filesOf(rights[:rn])
		if err == nil && len(files) > 0 {
			a.file = files[0]
		}
		if err := unmarshal(buf[:n], &a.news); err != nil {
			continue
		}
		b.heard(a)
	}
	_ = b.first.Process.Kill() // its socket has ended, and so will it
	_ = b.first.Wait()         // how it ended says nothing
	b.conn.Close()
	b.mu.Lock()
	calls, begun := b.calls, b.begun
	b.calls, b.begun = nil, nil
	b.mu.Unlock()
	for _, c := range calls {
		close(c)
	}
	for _, p := range begun {
		p.exited(news{Signal: int(unix.SIGKILL)})
	}
	_ = b.group.remove() // Close tells of what is left
	close(b.gone)
}

func (b *box) heard(a answer) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if a.Kind == "exited" {
		if p := b.begun[a.ID]; p != nil {
			delete(b.begun, a.ID)
			p.exited(a.news)
		}
		return
	}
	if c := b.calls[a.ID]; c != nil {
		delete(b.calls, a.ID)
		c <- a
	} else if a.file != nil {
		a.file.Close()
	}
}

// expect makes a place for an answer. Without an id it is that to the setup.
func (b *box) expect(id string) chan answer {
	b.mu.Lock()
	defer b.mu.Unlock()
	c := make(chan answer, 1)
	if b.calls == nil {
		close(c)
		return c
	}
	b.calls[id] = c
	return c
}

func (b *box) await(ctx context.Context, c chan answer) (answer, error) {
	select {
	case a, ok := <-c:
		if !ok {
			return answer{}, errBoxGone
		}
		return a, nil
	case <-ctx.Done():
		return answer{}, context.Cause(ctx)
	}
}

// send sends an order, with files that stay the caller's.
func (b *box) send(o order, files ...*os.File) error {
	text, err := json.Marshal(o)
	if err != nil {
		return err
	}
	fd, err := unix.MemfdCreate("order", unix.MFD_CLOEXEC)
	if err != nil {
		return err
	}
	memory := os.NewFile(uintptr(fd), "order")
	defer memory.Close()
	if _, err := memory.Write(text); err != nil {
		return err
	}
	fds := []int{fd}
	for _, f := range files {
		if err := unix.SetNonblock(int(f.Fd()), false); err != nil { // programs do not expect it
			return err
		}
		fds = append(fds, int(f.Fd()))
	}
	if _, _, err := b.conn.WriteMsgUnix([]byte{1}, unix.UnixRights(fds...), nil); err != nil {
		return errBoxGone
	}
	return nil
}

// dial connects to a port of the sandbox's own loopback.
func (b *box) dial(ctx context.Context, port int) (net.Conn, error) {
	a, err := b.call(ctx, order{Op: "dial", Port: port})
	if err != nil {
		return nil, err
	}
	defer a.file.Close()
	return net.FileConn(a.file)
}

// ask has an order done that has nothing to give back.
func (b *box) ask(ctx context.Context, o order, files ...*os.File) error {
	_, err := b.call(ctx, o, files...)
	return err
}

// call sends an order and waits for its answer.
func (b *box) call(ctx context.Context, o order, files ...*os.File) (answer, error) {
	b.mu.Lock()
	b.number++
	o.ID = "call-" + strconv.Itoa(b.number)
	b.mu.Unlock()
	c := b.expect(o.ID)
	if err := b.send(o, files...); err != nil {
		return answer{}, err
	}
	a, err := b.await(ctx, c)
	if err == nil && a.Kind == "failed" {
		err = errors.New(a.Error)
	}
	return a, err
}
