package opencode

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// hostPlace runs processes on this host, with a home of their own. Everything that one
// starts is found by its working directory, which is below root. (Its environment would
// say more; to read that of a process that is short of memory can take minutes.)
type hostPlace struct {
	root, home string

	mu sync.Mutex
	// what follows is guarded by mu
	running map[string]*hostProcess
	conns   map[*hostConn]bool
	last    Process
}

type hostProcess struct {
	place *hostPlace
	cmd   *exec.Cmd
	log   *os.File
	ended chan struct{}
	how   string
}

type hostConn struct {
	net.Conn
	place  *hostPlace
	stream bool // guarded by place.mu: it carries events
}

func newHostPlace(root, home string) *hostPlace {
	return &hostPlace{root: root, home: home, running: make(map[string]*hostProcess), conns: make(map[*hostConn]bool)}
}

func (h *hostPlace) Start(_ context.Context, p Process) (Running, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.last = p
	if r := h.running[p.ID]; r != nil {
		return r, nil
	}
	log, err := os.OpenFile(filepath.Join(h.home, "opencode.log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	r := &hostProcess{place: h, log: log, ended: make(chan struct{}), cmd: exec.Command(p.Args[0], p.Args[1:]...)}
	r.cmd.Dir = p.Dir
	r.cmd.Env = append([]string{"PATH=/usr/local/bin:/usr/bin:/bin"}, p.Env...)
	r.cmd.Stdout, r.cmd.Stderr = log, log
	r.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := r.cmd.Start(); err != nil {
		return nil, err
	}
	h.running[p.ID] = r
	go func() {
		err := r.cmd.Wait()
		r.how = "exit code 0"
		if err != nil {
			r.how = err.Error()
		}
		log.Close()
		close(r.ended)
	}()
	return r, nil
}

func (h *hostPlace) Run(ctx context.Context, args []string) ([]byte, error) {
	return exec.CommandContext(ctx, args[0], args[1:]...).Output()
}

func (h *hostPlace) Dial(ctx context.Context, port uint16) (net.Conn, error) {
	c, err := new(net.Dialer).DialContext(ctx, "tcp", fmt.Sprintf("127.0.0.1:%d", port))
	if err != nil {
		return nil, err
	}
	conn := &hostConn{Conn: c, place: h}
	h.mu.Lock()
	h.conns[conn] = true
	h.mu.Unlock()
	return conn, nil
}

func (c *hostConn) Write(b []byte) (int, error) {
	if bytes.HasPrefix(b, []byte("GET /global/event")) {
		c.place.mu.Lock()
		c.stream = true
		c.place.mu.Unlock()
	}
	return c.Conn.Write(b)
}

func (c *hostConn) Close() error {
	c.place.mu.Lock()
	delete(c.place.conns, c)
	c.place.mu.Unlock()
	return c.Conn.Close()
}

// cut closes connections; only those that carry events, or all.
func (h *hostPlace) cut(all bool) {
	h.mu.Lock()
	var cut []*hostConn
	for c := range h.conns {
		if all || c.stream {
			cut = append(cut, c)
		}
	}
	h.mu.Unlock()
	for _, c := range cut {
		c.Conn.Close()
	}
}

// processes are those that were started here, but for OpenCode's own if others is set.
func (h *hostPlace) processes(others bool) []int {
	var found []int
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, dir := range dirs {
		cwd, err := os.Readlink(dir + "/cwd")
		if err != nil || !strings.HasPrefix(cwd, h.root+"/") {
			continue
		}
		if name, _ := os.ReadFile(dir + "/comm"); others && strings.HasPrefix(string(name), "opencode") {
			continue
		}
		if pid, err := strconv.Atoi(filepath.Base(dir)); err == nil {
			found = append(found, pid)
		}
	}
	return found
}

// kill ends OpenCode itself at once, as the kernel would if it used too much memory.
func (h *hostPlace) kill() {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, r := range h.running {
		select {
		case <-r.ended:
		default:
			r.cmd.Process.Kill()
		}
	}
}

func (r *hostProcess) Wait(ctx context.Context) (string, error) {
	select {
	case <-r.ended:
		return r.how, nil
	case <-ctx.Done():
		return "", context.Cause(ctx)
	}
}

func (r *hostProcess) Stop(ctx context.Context) error {
	for {
		pids := r.place.processes(false)
		if len(pids) == 0 {
			break
		}
		for _, pid := range pids {
			syscall.Kill(pid, syscall.SIGKILL)
		}
		select {
		case <-time.After(5 * time.Millisecond):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	<-r.ended
	return nil
}

// program is OpenCode's, as scripts/test-tools installs it.
func program() (string, error) {
	cache := os.Getenv("EXECUTORD_TEST_CACHE")
	if cache == "" {
		cache = "/var/cache/executord-test"
	}
	found, _ := filepath.Glob(cache + "/opencode*/node_modules/opencode-linux-*/bin/opencode")
	if len(found) == 0 {
		return "", fmt.Errorf("there is no OpenCode in %s: run scripts/test-tools", cache)
	}
	return found[0], nil
}

func freePort() (uint16, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	defer l.Close()
	return uint16(l.Addr().(*net.TCPAddr).Port), nil
}

// git runs git in a directory.
func git(dir string, args ...string) error {
	cmd := exec.Command("git", append([]string{"-C", dir, "-c", "user.name=Test", "-c", "user.email=test@example.com"}, args...)...)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("git %s: %w: %s", strings.Join(args, " "), err, out)
	}
	return nil
}
