package guestfiles_test

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
	"github.com/harvest-run/executord/internal/guestclient"
	"github.com/harvest-run/executord/internal/guestfiles"
)

// runner runs the command on this host, below a directory that stands for the root.
type runner struct {
	root string
	err  error
	code int32
}

func (r *runner) Run(ctx context.Context, c guestclient.Command) (guestclient.Outcome, error) {
	if r.err != nil {
		return guestclient.Outcome{}, r.err
	}
	if r.code != 0 {
		return guestclient.Outcome{Exit: &guestv1.Exit{Status: &guestv1.Exit_Code{Code: r.code}}, Stderr: []byte("tar: no room\n")}, nil
	}
	args := append([]string(nil), c.Args[1:]...)
	for i, a := range args {
		if a == "/" {
			args[i] = r.root
		}
	}
	cmd := exec.CommandContext(ctx, c.Args[0], args...)
	cmd.Stdin = bytes.NewReader(c.Input)
	out, err := cmd.CombinedOutput()
	if err != nil {
		return guestclient.Outcome{}, errors.New(string(out))
	}
	return guestclient.Outcome{Exit: &guestv1.Exit{Status: &guestv1.Exit_Code{}}}, nil
}

func TestWrite(t *testing.T) {
	root := t.TempDir()
	// What is there is replaced, a link is not followed, a directory keeps its mode.
	if err := os.WriteFile(filepath.Join(root, "kept"), []byte("kept"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("kept", filepath.Join(root, "link")); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(root, "private"), 0o700); err != nil {
		t.Fatal(err)
	}
	long := strings.Repeat("long/", 40) + strings.Repeat("n", 120)
	files := []guestfiles.File{
		{Path: "/link", Data: []byte("new")},
		{Path: "/private/a", Mode: 0o444, Data: bytes.Repeat([]byte("x"), 1<<20)},
		{Path: "/" + long, Mode: 0o755},
		{Path: "/with blank/ü", Data: []byte("ü")},
	}
	for range 2 { // also over itself, which nobody may write to
		if err := guestfiles.Write(t.Context(), &runner{root: root}, "id", files); err != nil {
			t.Fatal(err)
		}
	}
	for _, f := range files {
		path := filepath.Join(root, f.Path)
		info, err := os.Lstat(path)
		if err != nil {
			t.Fatal(err)
		}
		want := os.FileMode(f.Mode)
		if want == 0 {
			want = 0o644
		}
		data, err := os.ReadFile(path)
		if err != nil || info.Mode() != want || !bytes.Equal(data, f.Data) {
			t.Errorf("%s: %v, %d bytes, %v", f.Path, info.Mode(), len(data), err)
		}
	}
	if data, err := os.ReadFile(filepath.Join(root, "kept")); err != nil || string(data) != "kept" {
		t.Errorf("%q, %v", data, err)
	}
	if info, err := os.Stat(filepath.Join(root, "private")); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("%v, %v", info, err)
	}
}

func TestWriteFails(t *testing.T) {
	files := []guestfiles.File{{Path: "/a"}}
	if err := guestfiles.Write(t.Context(), &runner{code: 2}, "id", files); err == nil || !strings.Contains(err.Error(), "no room") {
		t.Errorf("%v", err)
	}
	lost := errors.New("lost")
	if err := guestfiles.Write(t.Context(), &runner{err: lost}, "id", files); !errors.Is(err, lost) {
		t.Errorf("%v", err)
	}
	if err := guestfiles.Write(t.Context(), &runner{err: lost}, "id", nil); err != nil {
		t.Errorf("nothing to write: %v", err)
	}
}

// What is sent is the same for the same files, whatever their order: it is no reason to
// build anew.
func TestArchive(t *testing.T) {
	var sent [][]byte
	r := capture{&sent}
	a, b := guestfiles.File{Path: "/a", Data: []byte("1")}, guestfiles.File{Path: "/b"}
	for _, files := range [][]guestfiles.File{{a, b}, {b, a}} {
		if err := guestfiles.Write(t.Context(), r, "", files); err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(sent[0], sent[1]) {
		t.Error("the archives differ")
	}
	h, err := tar.NewReader(bytes.NewReader(sent[0])).Next()
	if err != nil || h.Name != "a" || h.Uid != 0 {
		t.Errorf("%+v, %v", h, err)
	}
}

type capture struct{ sent *[][]byte }

func (c capture) Run(_ context.Context, command guestclient.Command) (guestclient.Outcome, error) {
	*c.sent = append(*c.sent, command.Input)
	return guestclient.Outcome{Exit: &guestv1.Exit{Status: &guestv1.Exit_Code{}}}, nil
}
