// Package workspacetest runs commands on the host in the place of a sandbox, for tests
// of what works over a Runner. It is not linked into any program of this module.
package workspacetest

import (
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
)

// Host runs commands on the host, as a guest would in its sandbox. HOME is a directory of the test.
type Host struct {
	// Home is the HOME of commands.
	Home string
}

// NewHost makes one.
func NewHost(t testing.TB) Host {
	t.Helper()
	h := Host{t.TempDir()}
	if err := os.WriteFile(h.Config(), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	return h
}

// Config is git's configuration for the system.
func (h Host) Config() string { return filepath.Join(h.Home, "gitconfig") }

// Command makes the command that Run runs.
func (h Host) Command(ctx context.Context, c guestclient.Command) *exec.Cmd {
	name := c.Args[0]
	if !strings.Contains(name, "/") {
		for _, dir := range filepath.SplitList(c.Env["PATH"]) {
			if path := filepath.Join(dir, name); isFile(path) {
				name = path
				break
			}
		}
	}
	cmd := exec.CommandContext(ctx, name, c.Args[1:]...)
	cmd.Dir = c.Dir
	if cmd.Dir == "" {
		cmd.Dir = "/"
	}
	cmd.Env = []string{"HOME=" + h.Home, "GIT_CONFIG_SYSTEM=" + h.Config(), "GIT_CONFIG_GLOBAL=/dev/null"}
	for name, text := range c.Env {
		cmd.Env = append(cmd.Env, name+"="+text)
	}
	cmd.Stdin = bytes.NewReader(c.Input)
	return cmd
}

func isFile(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.Mode().IsRegular()
}

func exitOf(cmd *exec.Cmd, err error) (*guestv1.Exit, error) {
	if _, ok := errors.AsType[*exec.ExitError](err); err != nil && !ok {
		return nil, err
	}
	return &guestv1.Exit{Status: &guestv1.Exit_Code{Code: int32(cmd.ProcessState.ExitCode())}}, nil
}

// Run implements workspace.Runner.
func (h Host) Run(ctx context.Context, c guestclient.Command) (guestclient.Outcome, error) {
	cmd := h.Command(ctx, c)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	exit, err := exitOf(cmd, cmd.Run())
	return guestclient.Outcome{Exit: exit, Stdout: stdout.Bytes(), Stderr: stderr.Bytes()}, err
}

type sinkWriter struct {
	stream guestv1.Stream
	sink   func(guestv1.Stream, []byte) error
}

// Write implements io.Writer.
func (s sinkWriter) Write(p []byte) (int, error) { return len(p), s.sink(s.stream, p) }

// RunStream implements workspace.Runner.
func (h Host) RunStream(ctx context.Context, c guestclient.Command, sink func(guestv1.Stream, []byte) error) (*guestv1.Exit, error) {
	cmd := h.Command(ctx, c)
	cmd.Stderr = sinkWriter{guestv1.Stream_STREAM_STDERR, sink}
	return exitOf(cmd, cmd.Run())
}
