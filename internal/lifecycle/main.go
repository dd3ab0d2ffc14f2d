package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// ErrSignalled is in the chain of the context's cause when a signal began the stop;
// the message names the signal, such as "stopped by SIGTERM".
var ErrSignalled = errors.New("stopped by")

// RunMain runs a program until all of its routines have ended and returns its exit
// code. run is the first routine of the group and may start others. The first SIGINT
// or SIGTERM ends their context with a cause of ErrSignalled. The caller must exit
// with the code at once: after a second signal routines may still be running.
//
// The code is 0 if no routine failed, also after a signal; 1 if one did, with a line
// about it on standard error; and 128+n after a second signal n.
func RunMain(ctx context.Context, name string, run func(ctx context.Context, group *Group) error) int {
	// Two places, so that a second signal is not lost while the first is handled.
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM)
	defer signal.Stop(signals)
	return Main{Name: name, Signals: signals, Stderr: os.Stderr}.Run(ctx, run)
}

// Main is RunMain with its surroundings given.
type Main struct {
	// Name begins the lines on Stderr.
	Name string
	// Signals delivers the signals.
	Signals <-chan os.Signal
	// Stderr is where the error that ended the program is told.
	Stderr io.Writer
}

// Run does what RunMain does.
func (m Main) Run(ctx context.Context, run func(ctx context.Context, group *Group) error) int {
	group := NewGroup(ctx)
	group.Go(func(ctx context.Context) error { return run(ctx, group) })

	// Waited for unless a second signal comes: then nothing is waited for any more.
	var waiter sync.WaitGroup
	done := make(chan error, 1)
	waiter.Go(func() { done <- group.Wait() })

	stopping := false
	for {
		select {
		case err := <-done:
			waiter.Wait()
			if err != nil {
				fmt.Fprintf(m.Stderr, "%s: %v\n", m.Name, err)
				return 1
			}
			return 0
		case s := <-m.Signals:
			if stopping {
				fmt.Fprintf(m.Stderr, "%s: %s again, leaving at once\n", m.Name, signalName(s))
				return 128 + signalNumber(s)
			}
			stopping = true
			group.Stop(fmt.Errorf("%w %s", ErrSignalled, signalName(s)))
		}
	}
}

// signalName is the name people know, such as SIGTERM.
func signalName(s os.Signal) string {
	if n, ok := s.(syscall.Signal); ok {
		if name := unix.SignalName(n); name != "" {
			return name
		}
	}
	return s.String()
}

// signalNumber is the number of a signal, 0 for what is none of this system.
func signalNumber(s os.Signal) int {
	if n, ok := s.(syscall.Signal); ok {
		return int(n)
	}
	return 0
}
