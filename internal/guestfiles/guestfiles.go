// Package guestfiles writes files into a sandbox through its guest: all of them by one
// tar, which every image has.
package guestfiles

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"path"
	"slices"
	"strings"
	"time"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
	"github.com/harvest-run/executord/internal/guestclient"
)

// filesTime bounds the writing of files.
const filesTime = 2 * time.Minute

// maxTold bounds what is told of a tar that fails.
const maxTold = 4 << 10

// File is one file of a sandbox.
type File struct {
	// Path is absolute and clean.
	Path string
	// Mode are its permissions; 0 stands for 0644.
	Mode uint32
	Data []byte
}

// Runner runs commands in a sandbox. A guestclient.Client is one.
type Runner interface {
	Run(ctx context.Context, c guestclient.Command) (guestclient.Outcome, error)
}

// Write writes files in a sandbox, with the directories that they need, over what
// is there: all of them by one command. id names that command.
func Write(ctx context.Context, r Runner, id string, files []File) error {
	if len(files) == 0 {
		return nil
	}
	archive, err := pack(files)
	if err != nil {
		return fmt.Errorf("pack files: %w", err)
	}
	out, err := r.Run(ctx, guestclient.Command{
		ID: id, Args: []string{"tar", "-x", "-C", "/", "--no-same-owner", "--unlink-first", "-p"}, Dir: "/",
		Input: archive, Timeout: filesTime, Limit: maxTold,
	})
	if err != nil {
		return fmt.Errorf("write %d files: %w", len(files), err)
	}
	if code, ok := out.Exit.GetStatus().(*guestv1.Exit_Code); !ok || code.Code != 0 {
		return fmt.Errorf("write %d files: tar ended with %v: %s", len(files), out.Exit.GetStatus(), bytes.TrimSpace(out.Stderr))
	}
	return nil
}

// pack makes a tar archive. It has no directories: those that are there stay as they
// are, and tar makes the others.
func pack(files []File) ([]byte, error) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, f := range slices.SortedFunc(slices.Values(files), func(a, b File) int { return strings.Compare(a.Path, b.Path) }) {
		mode := f.Mode
		if mode == 0 {
			mode = 0o644
		}
		err := w.WriteHeader(&tar.Header{
			Typeflag: tar.TypeReg, Name: strings.TrimPrefix(path.Clean(f.Path), "/"), Mode: int64(mode), Size: int64(len(f.Data)),
			ModTime: time.Unix(0, 0), Format: tar.FormatPAX,
		})
		if err != nil {
			return nil, err
		}
		if _, err := w.Write(f.Data); err != nil {
			return nil, err
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return b.Bytes(), nil
}
