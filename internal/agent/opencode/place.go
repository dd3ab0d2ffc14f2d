package opencode

import (
	"context"
	"net"
)

// Place is where OpenCode runs: a sandbox.
type Place interface {
	// Start starts a process, or finds the one that was started by this ID.
	Start(ctx context.Context, p Process) (Running, error)
	// Run runs a short program to its end and returns what it wrote to stdout. A program
	// that fails is an error.
	Run(ctx context.Context, args []string) ([]byte, error)
	// Dial connects to a port of the sandbox's loopback.
	Dial(ctx context.Context, port uint16) (net.Conn, error)
}

// Process is a program to be started.
type Process struct {
	// ID is of letters, digits and "-".
	ID   string
	Args []string
	// Env are KEY=value, beside what the place gives every process.
	Env []string
	Dir string
}

// Running is a process that was started.
type Running interface {
	// Wait returns when it has ended, with how, for people. An error if that cannot be known:
	// the place is gone, or ctx has ended.
	Wait(ctx context.Context) (how string, err error)
	// Stop ends it and everything that it started, and returns when nothing is left. It may
	// have ended.
	Stop(ctx context.Context) error
}
