package guest

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
)

// spawner starts programs, all on one thread. That thread has given up what the
// programs must not have (capabilities, the right to gain privileges, system calls,
// the cgroup of the guest), so that they are born without it and a start costs
// nothing extra, while the other threads of the guest can still mount.
type spawner struct {
	requests chan spawnRequest
	done     sync.WaitGroup
}

type spawnRequest struct {
	path   string
	args   []string
	attr   *syscall.ProcAttr
	answer chan spawnAnswer
}

type spawnAnswer struct {
	pid int
	err error
}

// newSpawner starts the thread and runs confine on it, once.
func newSpawner(confine func() error) (*spawner, error) {
	s := &spawner{requests: make(chan spawnRequest)}
	ready := make(chan error)
	s.done.Go(func() {
		// Never unlocked: a thread that was confined must not run other goroutines,
		// so it ends with this one.
		runtime.LockOSThread()
		err := confine()
		ready <- err
		if err != nil {
			return
		}
		for r := range s.requests {
			pid, err := syscall.ForkExec(r.path, r.args, r.attr)
			r.answer <- spawnAnswer{pid, err}
		}
	})
	if err := <-ready; err != nil {
		return nil, fmt.Errorf("confine the thread that starts programs: %w", err)
	}
	return s, nil
}

// close ends the thread.
func (s *spawner) close() {
	close(s.requests)
	s.done.Wait()
}

// start starts a program and returns its process id.
func (s *spawner) start(path string, args []string, attr *syscall.ProcAttr) (int, error) {
	answer := make(chan spawnAnswer, 1)
	s.requests <- spawnRequest{path, args, attr, answer}
	a := <-answer
	return a.pid, a.err
}

// startError is an error with the kind that executord is told.
type startError struct {
	kind guestv1.Error_Kind
	text string
}

func (e *startError) Error() string { return e.text }

func refuse(kind guestv1.Error_Kind, format string, args ...any) error {
	return &startError{kind, fmt.Sprintf(format, args...)}
}

// lookPath finds the file to execute for args[0] in the PATH of env, as execvp does.
func lookPath(name string, env []string, dir string) (string, error) {
	if strings.ContainsRune(name, '/') {
		if !filepath.IsAbs(name) {
			name = filepath.Join(dir, name)
		}
		return name, executable(name)
	}
	path := ""
	for _, e := range env {
		if v, ok := strings.CutPrefix(e, "PATH="); ok {
			path = v
		}
	}
	var denied error
	for _, d := range filepath.SplitList(path) {
		if !filepath.IsAbs(d) {
			d = filepath.Join(dir, d)
		}
		file := filepath.Join(d, name)
		err := executable(file)
		if err == nil {
			return file, nil
		}
		if se, ok := errors.AsType[*startError](err); ok && se.kind == guestv1.Error_KIND_NOT_EXECUTABLE && denied == nil {
			denied = err
		}
	}
	if denied != nil {
		return "", denied
	}
	return "", refuse(guestv1.Error_KIND_NO_SUCH_PROGRAM, "%q: no such program in PATH (%s)", name, path)
}

// executable says why a file cannot be executed, as far as that shows beforehand.
func executable(file string) error {
	info, err := os.Stat(file)
	switch {
	case errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ENOTDIR):
		return refuse(guestv1.Error_KIND_NO_SUCH_PROGRAM, "%q: no such file", file)
	case errors.Is(err, os.ErrPermission):
		return refuse(guestv1.Error_KIND_NOT_EXECUTABLE, "%q: permission denied", file)
	case err != nil:
		return refuse(guestv1.Error_KIND_NOT_EXECUTABLE, "%q: %v", file, errors.Unwrap(err))
	case info.IsDir():
		return refuse(guestv1.Error_KIND_NOT_EXECUTABLE, "%q: is a directory", file)
	case info.Mode()&0o111 == 0:
		return refuse(guestv1.Error_KIND_NOT_EXECUTABLE, "%q: is not executable (mode %v)", file, info.Mode().Perm())
	}
	return nil
}

// execError explains what execve of an existing file refused.
func execError(file string, err error) error {
	switch {
	case errors.Is(err, syscall.ENOENT):
		if interpreter := shebang(file); interpreter != "" {
			return refuse(guestv1.Error_KIND_NO_SUCH_PROGRAM, "%q: its interpreter %q does not exist", file, interpreter)
		}
		return refuse(guestv1.Error_KIND_NO_SUCH_PROGRAM, "%q: the loader that it names does not exist", file)
	case errors.Is(err, syscall.ENOEXEC):
		return refuse(guestv1.Error_KIND_NOT_EXECUTABLE, "%q: not a program of this machine, and a script without a #! line", file)
	case errors.Is(err, syscall.EACCES) || errors.Is(err, syscall.EPERM):
		return refuse(guestv1.Error_KIND_NOT_EXECUTABLE, "%q: permission denied", file)
	case errors.Is(err, syscall.EAGAIN) || errors.Is(err, syscall.ENOMEM) || errors.Is(err, syscall.EMFILE) || errors.Is(err, syscall.ENFILE):
		return refuse(guestv1.Error_KIND_EXHAUSTED, "start %q: %v", file, err)
	case errors.Is(err, syscall.E2BIG):
		return refuse(guestv1.Error_KIND_NOT_EXECUTABLE, "%q: arguments and environment are too long for the kernel", file)
	}
	return refuse(guestv1.Error_KIND_INTERNAL, "start %q: %v", file, err)
}

// shebang returns the interpreter that a script names.
func shebang(file string) string {
	f, err := os.Open(file)
	if err != nil {
		return ""
	}
	defer f.Close()
	line, err := bufio.NewReaderSize(f, 256).ReadSlice('\n')
	if err != nil && len(line) == 0 {
		return ""
	}
	rest, ok := strings.CutPrefix(string(line), "#!")
	if !ok {
		return ""
	}
	if fields := strings.Fields(rest); len(fields) > 0 {
		return fields[0]
	}
	return ""
}
