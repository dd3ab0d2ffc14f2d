package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"github.com/harvest-run/executord/client"
	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
)

// errDetached is the cause when the user leaves by "~.".
var errDetached = errors.New("left by the escape ~. at the terminal")

// signalled is the cause when a signal ends executorctl.
type signalled struct{ syscall.Signal }

func (s signalled) Error() string { return "ended by " + unix.SignalName(s.Signal) }

// console connects this side's terminal, or stdin, to an execution.
type console struct {
	*app
	attachment *client.Attachment
	// stdin is to be forwarded.
	stdin bool
	// terminal: the execution has one.
	terminal bool

	once    sync.Once
	restore func()
}

// size is that of this side's terminal; ok is false without one.
func (a *app) size() (rows, columns int, ok bool) {
	for _, f := range []any{a.stdout, a.stdin} {
		if file, is := f.(*os.File); is {
			if columns, rows, err := term.GetSize(int(file.Fd())); err == nil && rows > 0 && columns > 0 {
				return rows, columns, true
			}
		}
	}
	return 24, 80, false
}

// terminalSize is the size that a new terminal gets.
func (a *app) terminalSize() *executorv1.TerminalSize {
	rows, columns, _ := a.size()
	return &executorv1.TerminalSize{Rows: int32(rows), Columns: int32(columns)}
}

// begin puts the terminal into raw mode, where it is to be, and starts to forward keys
// and sizes in the background until ctx ends. leave ends the following for a cause.
// The caller calls end, however the following ended.
func (c *console) begin(ctx context.Context, background *sync.WaitGroup, leave context.CancelCauseFunc) error {
	c.restore = func() {}
	raw := false
	if file, ok := c.app.stdin.(*os.File); ok && c.stdin && c.terminal && term.IsTerminal(int(file.Fd())) {
		fd := int(file.Fd())
		before, err := term.MakeRaw(fd)
		if err != nil {
			return fmt.Errorf("put the terminal into raw mode: %w", err)
		}
		raw = true
		c.raw.Store(true)
		c.restore = func() {
			_ = term.Restore(fd, before) // of a terminal that is gone nothing is left to restore
			c.raw.Store(false)
		}
	}
	// Signals in raw mode would otherwise leave the terminal as it is.
	wanted := []os.Signal{unix.SIGWINCH}
	if raw {
		wanted = append(wanted, unix.SIGTERM, unix.SIGHUP)
	}
	signals, unsubscribe := c.signals(wanted...)
	background.Go(func() {
		defer c.endOnPanic()
		defer unsubscribe()
		c.heed(ctx, signals, leave)
	})
	if c.stdin {
		background.Go(func() {
			defer c.endOnPanic()
			c.forward(ctx, raw, leave)
		})
	}
	return nil
}

// end gives the terminal back as it was. It may be called again.
func (c *console) end() { c.once.Do(c.restore) }

// endOnPanic gives the terminal back before a panic ends the process.
func (c *console) endOnPanic() {
	if v := recover(); v != nil {
		c.end()
		panic(v)
	}
}

// heed forwards the terminal's size and leaves at a signal.
func (c *console) heed(ctx context.Context, signals <-chan os.Signal, leave context.CancelCauseFunc) {
	for {
		if c.terminal {
			if rows, columns, ok := c.size(); ok {
				c.attachment.Resize(rows, columns)
			}
		}
		select {
		case sig := <-signals:
			if s, ok := sig.(syscall.Signal); ok && s != unix.SIGWINCH {
				leave(signalled{s})
				return
			}
		case <-ctx.Done():
			return
		}
	}
}

// forward sends what comes from stdin, and at its end that.
func (c *console) forward(ctx context.Context, raw bool, leave context.CancelCauseFunc) {
	keys := keyboard{c.app.stdin}
	var escapes escapes
	p := make([]byte, 32<<10)
	for {
		n, err := keys.read(ctx, p)
		data, detach := p[:n], false
		if raw {
			data, detach = escapes.filter(data)
		}
		if _, err := c.attachment.Write(data); err != nil {
			return // the program wants no more, or its end is told elsewhere
		}
		switch {
		case detach:
			leave(errDetached)
			return
		case errors.Is(err, io.EOF):
			_, _ = c.attachment.Write(escapes.rest())
			c.attachment.CloseInput()
			return
		case err != nil:
			if ctx.Err() == nil {
				c.say("read stdin: %s", err)
				c.attachment.CloseInput()
			}
			return
		}
	}
}
