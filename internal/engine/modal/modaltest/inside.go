package modaltest

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

const (
	// insideName is the name under which the program of the tests is started to be the
	// first process of a sandbox.
	insideName = "modaltest-inside"
	// toolsPath is where Modal has the program that the SDK's file system calls run.
	toolsPath = "/__modal/.bin/modal-sandbox-fs-tools"
)

// MaybeRun is to be the first call in the main function, or in TestMain, of a program
// that makes a Fake: the fake starts that program again to be the first process of each
// sandbox and to work on its files. It returns in the program itself only.
func MaybeRun() {
	switch filepath.Base(os.Args[0]) {
	case insideName:
		if err := runInside(); err != nil {
			fmt.Fprintln(os.Stderr, "fake of Modal: in the sandbox:", err)
			os.Exit(1)
		}
		os.Exit(0)
	case filepath.Base(toolsPath):
		os.Exit(runTools(os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
	}
}

// order is what the fake wants of the first process of a sandbox. It comes in a file of
// its own, the first of those that come with a message, so that it may have any size.
type order struct {
	// Op is "setup", "start", "signal", "dial", "mount" or "unmount".
	Op string
	// ID names what is started, or the call that is answered.
	ID    string
	Setup *setup `json:",omitempty"`

	// Of a start: the files are its input, output and errors, but with a terminal.
	Args, Env []string
	Dir       string
	Terminal  bool

	Signal int
	Port   int
}

// news is what the first process of a sandbox tells.
type news struct {
	// Kind is "ready", "started", "failed", "exited", "dialed" or "done".
	Kind, ID string
	Error    string
	Code     int
	Signal   int
}

// inside is the first process of a sandbox: it starts programs and reaps what ends.
type inside struct {
	conn *net.UnixConn

	mu      sync.Mutex
	started map[int]string // by process id, what is alive of it
}

func runInside() error {
	// What is started inherits the capabilities of the thread that starts it, which are
	// taken away from this one only.
	runtime.LockOSThread()
	file := os.NewFile(3, "orders")
	c, err := net.FileConn(file)
	if err != nil {
		return err
	}
	file.Close()
	in := &inside{conn: c.(*net.UnixConn), started: make(map[int]string)}
	// Never waited for: the process exits, and with it everything in the sandbox.
	var reaper, dials sync.WaitGroup
	children := make(chan os.Signal, 1)
	signal.Notify(children, unix.SIGCHLD)
	// What is sent to it from inside does nothing. Caught and not ignored: that would be
	// inherited by what it starts.
	signal.Notify(make(chan os.Signal, 1))
	for {
		o, files, err := in.receive()
		if err != nil {
			os.Exit(0) // the fake has ended, perhaps with news that it did not read
		}
		switch o.Op {
		case "setup":
			if err := o.Setup.enter(); err != nil {
				return err
			}
			reaper.Go(func() { in.reap(children) })
			in.tell(news{Kind: "ready"}, nil)
		case "start":
			in.start(o, files)
		case "signal":
			in.signal(o)
		case "dial":
			dials.Go(func() { in.dial(o) })
		case "mount":
			in.answer(o, in.mount(o, files))
		case "unmount":
			in.answer(o, in.unmount(o))
		}
		for _, f := range files {
			f.Close()
		}
	}
}

// receive reads an order and the files that came with it.
func (in *inside) receive() (order, []*os.File, error) {
	buf, rights := make([]byte, 16), make([]byte, unix.CmsgSpace(5*4))
	n, rn, _, _, err := in.conn.ReadMsgUnix(buf, rights)
	if err == nil && n == 0 {
		err = io.EOF
	}
	if err != nil {
		return order{}, nil, err
	}
	files, err := filesOf(rights[:rn])
	if err == nil && len(files) == 0 {
		err = errors.New("an order without its text")
	}
	if err != nil {
		return order{}, nil, err
	}
	text, err := io.ReadAll(io.NewSectionReader(files[0], 0, 1<<30))
	files[0].Close()
	if err != nil {
		return order{}, nil, err
	}
	var o order
	return o, files[1:], unmarshal(text, &o)
}

func unmarshal(text []byte, to any) error {
	if err := json.Unmarshal(text, to); err != nil {
		return fmt.Errorf("parse %q: %w", text, err)
	}
	return nil
}

// filesOf takes over the files that came with a message.
func filesOf(rights []byte) ([]*os.File, error) {
	messages, err := unix.ParseSocketControlMessage(rights)
	if err != nil {
		return nil, err
	}
	var files []*os.File
	for _, m := range messages {
		fds, err := unix.ParseUnixRights(&m)
		if err != nil {
			return nil, err
		}
		for _, fd := range fds {
			unix.CloseOnExec(fd)
			files = append(files, os.NewFile(uintptr(fd), "given"))
		}
	}
	return files, nil
}

// tell sends news; when nobody hears it any more, the next order says so.
func (in *inside) tell(n news, file *os.File) {
	text, err := json.Marshal(n)
	if err != nil {
		return
	}
	var rights []byte
	if file != nil {
		rights = unix.UnixRights(int(file.Fd()))
	}
	_, _, _ = in.conn.WriteMsgUnix(text, rights, nil)
}

// answer tells how an order went.
func (in *inside) answer(o order, err error) {
	if err != nil {
		in.tell(news{Kind: "failed", ID: o.ID, Error: err.Error()}, nil)
		return
	}
	in.tell(news{Kind: "done", ID: o.ID}, nil)
}

func (in *inside) start(o order, files []*os.File) {
	var master *os.File
	fail := func(err error) {
		code := 126
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, exec.ErrNotFound) {
			code = 127
		}
		in.tell(news{Kind: "failed", ID: o.ID, Error: err.Error(), Code: code}, nil)
	}
	attributes := &syscall.SysProcAttr{Setsid: true}
	if o.Terminal {
		m, s, err := openTerminal()
		if err != nil {
			fail(err)
			return
		}
		defer m.Close()
		defer s.Close()
		master, files = m, []*os.File{s, s, s}
		attributes.Setctty = true
	}
	if _, err := os.Stat(o.Dir); err != nil { // else it looks as if the program were missing
		fail(fmt.Errorf("working directory: %w", err))
		return
	}
	path, err := lookUp(o.Args[0], o.Env, o.Dir)
	if err != nil {
		fail(err)
		return
	}
	in.mu.Lock()
	defer in.mu.Unlock() // what has ended at once is reaped when it is known
	p, err := os.StartProcess(path, o.Args, &os.ProcAttr{Dir: o.Dir, Env: o.Env, Files: files, Sys: attributes})
	if err != nil {
		fail(err)
		return
	}
	in.started[p.Pid] = o.ID
	// At its limit of memory a sandbox loses programs, and not this one. An error is that
	// it has ended already.
	_ = os.WriteFile(fmt.Sprintf("/proc/%d/oom_score_adj", p.Pid), []byte("500"), 0o644)
	pid := p.Pid
	_ = p.Release() // reap waits for it
	in.tell(news{Kind: "started", ID: o.ID, Code: pid}, master)
}

// lookUp finds a program as execvp does, by the PATH that it is going to have.
func lookUp(name string, env []string, dir string) (string, error) {
	if strings.Contains(name, "/") {
		if !filepath.IsAbs(name) {
			return filepath.Join(dir, name), nil
		}
		return name, nil
	}
	var path string
	for _, e := range env {
		if v, ok := strings.CutPrefix(e, "PATH="); ok {
			path = v
		}
	}
	for _, d := range filepath.SplitList(path) {
		at := filepath.Join(d, name)
		if info, err := os.Stat(at); err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0 {
			return at, nil
		}
	}
	return "", fmt.Errorf("%q: %w", name, exec.ErrNotFound)
}

// openTerminal makes a terminal in the sandbox, of 80 columns and 24 rows.
func openTerminal() (master, terminal *os.File, err error) {
	master, err = os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, nil, err
	}
	n, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN)
	if err == nil {
		err = unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0)
	}
	if err == nil {
		err = unix.IoctlSetWinsize(int(master.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: 24, Col: 80})
	}
	if err == nil {
		terminal, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	}
	if err != nil {
		master.Close()
		return nil, nil, err
	}
	return master, terminal, nil
}

// signal sends a signal to the process group of what was started.
func (in *inside) signal(o order) {
	in.mu.Lock()
	defer in.mu.Unlock()
	for pid, id := range in.started {
		if id == o.ID {
			_ = unix.Kill(-pid, unix.Signal(o.Signal)) // it has ended: nothing to do
		}
	}
}

// dial connects to a port of the sandbox's own loopback.
func (in *inside) dial(o order) {
	c, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", o.Port))
	if err != nil {
		in.tell(news{Kind: "failed", ID: o.ID, Error: err.Error()}, nil)
		return
	}
	defer c.Close()
	file, err := c.(*net.TCPConn).File()
	if err != nil {
		in.tell(news{Kind: "failed", ID: o.ID, Error: err.Error()}, nil)
		return
	}
	defer file.Close()
	in.tell(news{Kind: "dialed", ID: o.ID}, file)
}

// reap waits for every process that ends, whoever had started it.
func (in *inside) reap(children <-chan os.Signal) {
	for range children {
		for {
			var status unix.WaitStatus
			pid, err := unix.Wait4(-1, &status, unix.WNOHANG, nil)
			if errors.Is(err, unix.EINTR) {
				continue
			}
			if err != nil || pid == 0 {
				break
			}
			in.mu.Lock()
			id, ok := in.started[pid]
			delete(in.started, pid)
			in.mu.Unlock()
			if !ok {
				continue
			}
			n := news{Kind: "exited", ID: id, Code: status.ExitStatus()}
			if status.Signaled() {
				n.Code, n.Signal = 0, int(status.Signal())
			}
			in.tell(n, nil)
		}
	}
}
