package modaltest

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// fileLimit is the largest file that can be read through the file system calls, bytes.
const fileLimit = 5 << 30

// toolsCommand is what the SDK asks the program in the sandbox for: one of them is set.
type toolsCommand struct {
	ReadFile, WriteFile, ListFiles, Stat *struct {
		Path string `json:"path"`
	}
	MakeDirectory *struct {
		Path    string `json:"path"`
		Parents bool   `json:"parents"`
	}
	Remove *struct {
		Path      string `json:"path"`
		Recursive bool   `json:"recursive"`
	}
}

// toolsError is how the program says why it failed.
type toolsError struct {
	Kind    string `json:"error_kind"`
	Message string `json:"message"`
}

// fileInfo is what it says of a file.
type fileInfo struct {
	Name          string  `json:"name"`
	Path          string  `json:"path"`
	Type          string  `json:"type"`
	Size          int64   `json:"size"`
	Mode          uint32  `json:"mode"`
	Permissions   string  `json:"permissions"`
	Owner         string  `json:"owner"`
	Group         string  `json:"group"`
	ModifiedTime  float64 `json:"modified_time"`
	SymlinkTarget *string `json:"symlink_target"`
}

// runTools is the program that the SDK's file system calls run in a sandbox. It returns
// its exit code.
func runTools(args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	err := errors.New("one argument is needed")
	if len(args) == 1 {
		var c toolsCommand
		if err = json.Unmarshal([]byte(args[0]), &c); err == nil {
			err = c.run(stdin, stdout)
		}
	}
	if err == nil {
		return 0
	}
	text, _ := json.Marshal(toolsError{Kind: kindOf(err), Message: err.Error()}) // strings only
	fmt.Fprintln(stderr, string(text))
	return 1
}

// kinded is a failure that the SDK knows.
type kinded struct {
	kind string
	err  error
}

func (k kinded) Error() string { return k.err.Error() }
func (k kinded) Unwrap() error { return k.err }

func kindOf(err error) string {
	if k, ok := errors.AsType[kinded](err); ok {
		return k.kind
	}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return "NotFound"
	case errors.Is(err, fs.ErrPermission):
		return "PermissionDenied"
	case errors.Is(err, unix.ENOTDIR):
		return "NotDirectory"
	case errors.Is(err, unix.EISDIR):
		return "IsDirectory"
	case errors.Is(err, unix.ENOTEMPTY):
		return "DirectoryNotEmpty"
	case errors.Is(err, fs.ErrExist):
		return "PathAlreadyExists"
	case errors.Is(err, unix.EROFS):
		return "NotSupported"
	}
	return "Other"
}

func (c toolsCommand) run(stdin io.Reader, stdout io.Writer) error {
	switch {
	case c.ReadFile != nil:
		return readFile(c.ReadFile.Path, stdout)
	case c.WriteFile != nil:
		return writeFile(c.WriteFile.Path, stdin)
	case c.ListFiles != nil:
		entries, err := os.ReadDir(c.ListFiles.Path)
		if err != nil {
			return err
		}
		infos := make([]fileInfo, 0, len(entries))
		for _, e := range entries {
			info, err := stat(filepath.Join(c.ListFiles.Path, e.Name()))
			if err != nil {
				return err
			}
			infos = append(infos, info)
		}
		return json.NewEncoder(stdout).Encode(infos)
	case c.Stat != nil:
		info, err := stat(c.Stat.Path)
		if err != nil {
			return err
		}
		return json.NewEncoder(stdout).Encode(info)
	case c.MakeDirectory != nil && c.MakeDirectory.Parents:
		return os.MkdirAll(c.MakeDirectory.Path, 0o755)
	case c.MakeDirectory != nil:
		return os.Mkdir(c.MakeDirectory.Path, 0o755)
	case c.Remove != nil:
		if _, err := os.Lstat(c.Remove.Path); err != nil {
			return err
		}
		if c.Remove.Recursive {
			return os.RemoveAll(c.Remove.Path)
		}
		return os.Remove(c.Remove.Path)
	}
	return kinded{"NotSupported", errors.New("the fake does not know this operation")}
}

func readFile(path string, to io.Writer) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	switch {
	case err != nil:
		return err
	case info.IsDir():
		return unix.EISDIR
	case info.Size() > fileLimit:
		return kinded{"FileTooLarge", errors.New("file exceeds the limit")}
	}
	_, err = io.Copy(to, f)
	return err
}

// writeFile replaces a file as a whole; a link is replaced and not followed.
func writeFile(path string, from io.Reader) (err error) {
	if info, err := os.Lstat(path); err == nil && info.IsDir() {
		return unix.EISDIR
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(path), ".modal-write-")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = os.Remove(f.Name())
		}
	}()
	mode := fs.FileMode(0o644)
	if info, err := os.Lstat(path); err == nil && info.Mode().IsRegular() {
		mode = info.Mode().Perm()
	}
	_, err = io.Copy(f, from)
	if err = errors.Join(err, f.Chmod(mode), f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}

func stat(path string) (fileInfo, error) {
	info, err := os.Lstat(path)
	if err != nil {
		return fileInfo{}, err
	}
	out := fileInfo{
		Name: info.Name(), Path: path, Type: "file", Size: info.Size(), Mode: uint32(info.Mode().Perm()),
		Permissions: info.Mode().String(), ModifiedTime: float64(info.ModTime().UnixNano()) / float64(time.Second),
	}
	switch {
	case info.IsDir():
		out.Type = "directory"
	case info.Mode()&fs.ModeSymlink != 0:
		out.Type = "symlink"
		target, err := os.Readlink(path)
		if err != nil {
			return fileInfo{}, err
		}
		out.SymlinkTarget = &target
	}
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return fileInfo{}, err
	}
	out.Owner, out.Group = strconv.Itoa(int(st.Uid)), strconv.Itoa(int(st.Gid))
	if u, err := user.LookupId(out.Owner); err == nil {
		out.Owner = u.Username
	}
	if g, err := user.LookupGroupId(out.Group); err == nil {
		out.Group = g.Name
	}
	return out, nil
}
