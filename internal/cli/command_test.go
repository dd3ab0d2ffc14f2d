package cli

import (
	"bytes"
	"context"
	"io"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/harvest-run/executord/client/clienttest"
)

// invocation is one run of executorctl in process.
type invocation struct {
	args       []string
	env        []string
	stdin      string
	input      io.Reader // instead of stdin
	interrupts <-chan os.Signal
	signals    <-chan os.Signal // the others
}

// outcome is what came of it.
type outcome struct {
	code           int
	stdout, stderr string
}

// run runs executorctl against a server, or against none.
func (i invocation) run(t *testing.T, s *clienttest.Server) outcome {
	t.Helper()
	var stdout, stderr output
	return outcome{code: i.start(t, s, &stdout, &stderr), stdout: stdout.String(), stderr: stderr.String()}
}

func (i invocation) start(t *testing.T, s *clienttest.Server, stdout, stderr io.Writer) int {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	address := "127.0.0.1:1"
	if s != nil {
		address = s.Address()
	}
	env := append([]string{"EXECUTOR_ADDRESS=" + address, "USER=ann", "HOSTNAME=box"}, i.env...)
	var input io.Reader = strings.NewReader(i.stdin)
	if i.input != nil {
		input = i.input
	}
	return Main(ctx, i.args, env, input, stdout, stderr, func(wanted ...os.Signal) (<-chan os.Signal, func()) {
		if !slices.Contains(wanted, os.Interrupt) {
			return i.signals, func() {}
		}
		return i.interrupts, func() {}
	})
}

// command splits a command line at spaces; what is in single quotes stays whole.
func command(line string) []string {
	var args []string
	for i, part := range strings.Split(line, "'") {
		if i%2 == 1 {
			args = append(args, part)
		} else {
			args = append(args, strings.Fields(part)...)
		}
	}
	return args
}

// output is a buffer that can be read while it is written.
type output struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.String()
}

// eventually waits until something holds.
func eventually(t *testing.T, what string, holds func() bool) {
	t.Helper()
	for range 6000 {
		if holds() {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("it never happened: %s", what)
}
