package guest

import (
	"fmt"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// providerPrefix begins the variables that a provider gives its own programs.
const providerPrefix = "MODAL_"

// workspace is where commands run that are not told where.
const workspace = "/workspace"

// RunDaemon is the guest in a box that somebody else has made and confined: it makes no
// namespaces, mounts and control groups, answers on a socket in a private place of its
// own, and follows processes through /proc. Best it is the box's first process, so that it
// ends with the box and the box with it; where another guest is in the place already,
// that one stays and this one returns.
//
// hostname is what the box is called if its maker allows it. inherit gives programs the
// variables that this process was started with, where a start names none of that name:
// secrets that the provider put there.
func RunDaemon(hostname string, inherit bool) error {
	runtime.GOMAXPROCS(min(runtime.NumCPU(), 2))
	outliveSignals()
	dir := place()
	lock, held, err := claim(dir)
	if held {
		conn, err := reach(dir, startPatience)
		if err != nil {
			return fmt.Errorf("another guest holds %s: %w", dir, err)
		}
		return conn.Close()
	}
	if err != nil {
		return fmt.Errorf("take the place of the guest: %w", err)
	}
	defer lock.Close()
	// Things that not every box has or allows; none is needed.
	_ = unix.Sethostname([]byte(hostname))
	_ = unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) // orphans come here, first process or not
	_ = unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0)        // hides secrets of the environment from other users
	syscall.Umask(0o022)
	_ = os.MkdirAll(workspace, 0o755) // as sandboxes of the local engine have it

	cfg := Config{RuntimeDirectory: dir}
	if inherit {
		cfg.Environment = inherited(os.Environ())
	}
	g, err := New(cfg)
	if err != nil {
		return err
	}
	l, err := listen(dir)
	if err != nil {
		return err
	}
	return g.Serve(l)
}

// listen makes the socket. The lock is held, so that one that is there is of a guest that
// is no more, or came with a snapshot.
func listen(dir string) (net.Listener, error) {
	path := filepath.Join(dir, socketFile)
	if err := os.RemoveAll(path); err != nil {
		return nil, err
	}
	return net.Listen("unix", path)
}

// outliveSignals keeps the guest from being ended by signals that can be caught. A first
// process is spared the others too, by the kernel; and unlike there, a fault of its own
// must still end it.
func outliveSignals() {
	if os.Getpid() == 1 {
		shrugOffSignals()
		return
	}
	// Never read: what does not fit is dropped. They are caught and not ignored, because
	// programs would be born with what is ignored.
	signal.Notify(make(chan os.Signal, 1),
		syscall.SIGHUP, syscall.SIGINT, syscall.SIGQUIT, syscall.SIGTERM, syscall.SIGUSR1, syscall.SIGUSR2, syscall.SIGALRM,
		syscall.SIGVTALRM, syscall.SIGPROF, syscall.SIGXCPU, syscall.SIGXFSZ, syscall.SIGIO, syscall.SIGPWR, syscall.SIGSYS,
		syscall.SIGTRAP, syscall.SIGTSTP, syscall.SIGTTIN, syscall.SIGTTOU, syscall.SIGPIPE)
}

// inherited are the variables that programs get from the box.
func inherited(environ []string) []string {
	var kept []string
	for _, e := range environ {
		name, _, _ := strings.Cut(e, "=")
		if name != "" && !strings.HasPrefix(name, providerPrefix) {
			kept = append(kept, e)
		}
	}
	return kept
}

// withInherited returns env and those of inherited whose names are not in it.
func withInherited(env, inherited []string) []string {
	if len(inherited) == 0 {
		return env
	}
	named := make(map[string]bool, len(env))
	for _, e := range env {
		name, _, _ := strings.Cut(e, "=")
		named[name] = true
	}
	all := append([]string(nil), env...)
	for _, e := range inherited {
		if name, _, _ := strings.Cut(e, "="); !named[name] {
			all = append(all, e)
		}
	}
	return all
}
