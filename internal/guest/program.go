package guest

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
)

// startError is an error with the kind that executord is told.
type startError struct {
	kind guestv1.Error_Kind
	text string
	// committed is how far the input has come, with a refused write.
	committed *uint64
}

func (e *startError) Error() string { return e.text }

func refuse(kind guestv1.Error_Kind, format string, args ...any) error {
	return newStartError(kind, format, args...)
}

func newStartError(kind guestv1.Error_Kind, format string, args ...any) *startError {
	return &startError{kind: kind, text: fmt.Sprintf(format, args...)}
}

// resourceError gives an error the kind EXHAUSTED if a limit stood in the way.
func resourceError(err error) error {
	for _, limit := range []syscall.Errno{syscall.EAGAIN, syscall.ENOMEM, syscall.EMFILE, syscall.ENFILE, syscall.ENOSPC, syscall.EDQUOT} {
		if errors.Is(err, limit) {
			return refuse(guestv1.Error_KIND_EXHAUSTED, "%v", err)
		}
	}
	return err
}

// checkStart refuses what no command can be made of. Values of the environment are
// not told: they may be secret.
func checkStart(r *guestv1.StartRequest) error {
	if len(r.GetArgs()) == 0 {
		return refuse(guestv1.Error_KIND_INVALID, "no program")
	}
	for i, a := range r.GetArgs() {
		if strings.ContainsRune(a, 0) {
			return refuse(guestv1.Error_KIND_INVALID, "argument %d has a NUL byte", i)
		}
	}
	for i, e := range r.GetEnv() {
		if strings.ContainsRune(e, 0) {
			return refuse(guestv1.Error_KIND_INVALID, "variable %d has a NUL byte", i)
		}
	}
	if dir := r.GetWorkingDirectory(); !filepath.IsAbs(dir) || strings.ContainsRune(dir, 0) {
		return refuse(guestv1.Error_KIND_INVALID, "%q is not an absolute working directory", dir)
	}
	name, at := r.GetSourceName(), int(r.GetSourceArgument())
	if name != "" && (at >= len(r.GetArgs()) || name == "." || name == ".." || strings.ContainsAny(name, "/\x00")) {
		return refuse(guestv1.Error_KIND_INVALID, "source argument %d of %d, name %q", at, len(r.GetArgs()), name)
	}
	return nil
}

// workingDirectory checks the directory before the start, because execve's error
// would not tell it from a missing program.
func workingDirectory(dir string, create bool) error {
	info, err := os.Stat(dir)
	if errors.Is(err, os.ErrNotExist) && create {
		if err = os.MkdirAll(dir, 0o755); err == nil {
			return nil
		}
	}
	if err == nil && !info.IsDir() {
		err = syscall.ENOTDIR
	}
	if err == nil {
		return nil
	}
	if pe, ok := errors.AsType[*os.PathError](err); ok {
		err = pe.Err
	}
	return refuse(guestv1.Error_KIND_NO_WORKING_DIRECTORY, "working directory %q: %v", dir, err)
}

// writeSource writes the source file into a directory of its own and returns its path.
func writeSource(dir, name string, source []byte) (string, error) {
	// The parent is the guest's, but what runs in the sandbox may have removed it, or
	// may have put something where the directory goes.
	err := os.MkdirAll(filepath.Dir(dir), 0o700)
	if err == nil {
		err = os.RemoveAll(dir)
	}
	if err == nil {
		err = os.Mkdir(dir, 0o700)
	}
	if err != nil {
		return "", resourceError(fmt.Errorf("make the directory for the source: %w", err))
	}
	path := filepath.Join(dir, name)
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err == nil {
		_, err = f.Write(source)
		err = errors.Join(err, f.Close())
	}
	if err != nil {
		return "", resourceError(fmt.Errorf("write the source: %w", err))
	}
	return path, nil
}

// lookPath finds the file to execute for args[0] in the PATH of env, as execvp does.
func lookPath(name string, env []string, dir string) (string, error) {
	if name == "" {
		return "", refuse(guestv1.Error_KIND_NO_SUCH_PROGRAM, "the program's name is empty")
	}
	if strings.ContainsRune(name, '/') {
		if !filepath.IsAbs(name) {
			name = filepath.Join(dir, name)
		}
		return name, executable(name)
	}
	path := "/bin:/usr/bin"
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
	case errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) || errors.Is(err, syscall.ENAMETOOLONG):
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
	case errors.Is(err, syscall.E2BIG):
		return refuse(guestv1.Error_KIND_NOT_EXECUTABLE, "%q: arguments and environment are too long for the kernel", file)
	case errors.Is(err, syscall.ETXTBSY) || errors.Is(err, syscall.ELIBBAD) || errors.Is(err, syscall.ELOOP):
		return refuse(guestv1.Error_KIND_NOT_EXECUTABLE, "%q: %v", file, err)
	}
	return resourceError(fmt.Errorf("start %q: %w", file, err))
}

// shebang returns the interpreter that a script names, as the kernel reads it: a
// carriage return at the end of the line belongs to the name.
func shebang(file string) string {
	// O_NONBLOCK: if by now the file is a pipe, nobody may ever open its other end.
	f, err := os.OpenFile(file, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return ""
	}
	defer f.Close()
	if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() {
		return ""
	}
	head := make([]byte, 256)
	n, _ := io.ReadFull(f, head)
	return parseShebang(head[:n])
}

func parseShebang(head []byte) string {
	rest, ok := bytes.CutPrefix(head, []byte("#!"))
	if !ok {
		return ""
	}
	line, _, _ := bytes.Cut(rest, []byte("\n"))
	line = bytes.TrimLeft(line, " \t")
	if end := bytes.IndexAny(line, " \t\x00"); end >= 0 {
		line = line[:end]
	}
	return string(line)
}
