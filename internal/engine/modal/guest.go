package modal

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	sdk "github.com/modal-labs/modal-client/go"

	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/guest/mux"
)

const (
	// guestDirectory is where guests are in a sandbox, and so in the images made of it. The
	// name of each has a sum of its content, so that a new executord brings its own.
	guestDirectory = "/var/lib/executor/"
	// awaitGuest is a sandbox's first program: it becomes the guest once that is there.
	awaitGuest = `until [ -x "$0" ]; do sleep 0.02 2>/dev/null || sleep 1; done; exec "$0" "$@"`
	// dialGuest tells by 127 that the guest is not there.
	dialGuest = `exec "$0" dial`
	// installGuest makes what was written the guest, whole or not at all, and dials it.
	installGuest = `[ -x "$0" ] || { chmod 755 "$0.part" && mv -f "$0.part" "$0"; } && exec "$0" dial`
	noSuchFile   = 127
	// deliverTimeout bounds the writing of the guest.
	deliverTimeout = 2 * time.Minute
	// complaint bounds what is told of what a program said before it ended.
	complaint = 2 << 10
)

// entrypoint is the command of a sandbox. Secrets of the provider are in its environment,
// from where programs have them only if they were asked for.
func (e *Engine) entrypoint(s engine.Spec) []string {
	command := []string{"/bin/sh", "-c", awaitGuest, e.guestFile, "daemon", s.ID}
	if len(s.Secrets) > 0 {
		command = append(command, "inherit")
	}
	return command
}

// line is one program in a sandbox that carries pipes to the guest.
type line struct {
	session *mux.Session
	opened  time.Time
}

// openLine starts the program, for as long as ctx allows: a sandbox may have been placed
// long before it can be reached. It puts the guest there if it is not.
func (sb *sandbox) openLine(ctx context.Context) (*line, error) {
	script := dialGuest
	for pause := 100 * time.Millisecond; ; pause = min(2*pause, 5*time.Second) {
		l, err := sb.tryLine(ctx, script)
		switch {
		case err == nil:
			return l, nil
		case errors.Is(err, errNoGuest) && script == dialGuest && sb.guest == sb.engine.guestFile:
			if err = sb.deliver(ctx); err == nil {
				script = installGuest
				continue
			}
		}
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		if !inDoubt(err) || isAny(err, errNotGreeted, errNoGuest, errClosing) || sb.over() {
			return nil, err
		}
		sb.engine.cfg.Logger.InfoContext(ctx, "a sandbox cannot be reached yet", "sandbox", sb.String(), "error", err)
		select {
		case <-time.After(pause):
		case <-sb.done:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
		sb.renewHandle()
	}
}

func isAny(err error, targets ...error) bool {
	return slices.ContainsFunc(targets, func(t error) bool { return errors.Is(err, t) })
}

// tryLine starts the program once.
func (sb *sandbox) tryLine(ctx context.Context, script string) (_ *line, err error) {
	p, err := sb.current().Exec(ctx, []string{"/bin/sh", "-c", script, sb.guest}, nil)
	if err != nil {
		return nil, err
	}
	pipe := newExecPipe(p, sb.over)
	if !sb.engine.spawn(pipe.send) {
		return nil, errClosing
	}
	stop := context.AfterFunc(ctx, func() { _ = pipe.Close() })
	greeting := make([]byte, len(mux.Greeting))
	n, err := io.ReadFull(pipe, greeting)
	if !stop() {
		err = context.Cause(ctx)
	}
	if err == nil && string(greeting) == mux.Greeting {
		session, err := mux.Open(pipe)
		if err != nil {
			return nil, errors.Join(err, pipe.Close())
		}
		return &line{session: session, opened: time.Now()}, nil
	}
	_ = pipe.Close() // always nil
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
		return nil, err // the call failed, not the program
	}
	return nil, whyNotGreeted(ctx, p, greeting[:n])
}

// whyNotGreeted asks a program that ended too soon.
func whyNotGreeted(ctx context.Context, p *sdk.ContainerProcess, said []byte) error {
	ctx, cancel := within(ctx, 20*time.Second)
	defer cancel()
	code, err := p.Wait(ctx, nil)
	if err != nil {
		return err
	}
	if code == noSuchFile {
		return errNoGuest
	}
	stop := context.AfterFunc(ctx, func() { p.Stderr.Close() })
	defer stop()
	text, _ := io.ReadAll(io.LimitReader(p.Stderr, complaint)) // as much of it as there is
	p.Stderr.Close()
	text = bytes.ToValidUTF8(append(said, text...), []byte("?"))
	return fmt.Errorf("%w: it ended with %d: %q", errNotGreeted, code, strings.TrimSpace(string(text)))
}

// deliver writes the guest beside where it will be.
func (sb *sandbox) deliver(ctx context.Context) error {
	ctx, cancel := within(ctx, deliverTimeout)
	defer cancel()
	if err := sb.current().Filesystem.WriteBytes(ctx, sb.engine.cfg.Guest, sb.guest+".part", nil); err != nil {
		return fmt.Errorf("write the guest: %w", err)
	}
	return nil
}

// connect returns the session to the guest, a new one if there is none.
func (sb *sandbox) connect(ctx context.Context) (*mux.Session, error) {
	select {
	case sb.dialing <- struct{}{}:
		defer func() { <-sb.dialing }()
	case <-sb.done:
		return nil, sb.ended()
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	if sb.over() {
		return nil, sb.ended()
	}
	if l := sb.openedLine(); l != nil {
		return l.session, nil
	}
	select {
	case <-sb.engine.closing:
		return nil, errClosing
	default:
	}
	l, err := sb.openLine(ctx)
	if err != nil {
		if ctx.Err() == nil {
			err = translate(ctx, err, "reach the guest of sandbox "+sb.id)
		}
		return nil, err
	}
	if !sb.use(l) {
		l.session.Close()
		return nil, errClosing
	}
	return l.session, nil
}

// renew opens a fresh line beside the one in use, and lets that end.
func (sb *sandbox) renew(ctx context.Context) error {
	select {
	case sb.dialing <- struct{}{}:
		defer func() { <-sb.dialing }()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	old := sb.openedLine()
	l, err := sb.openLine(ctx)
	if err != nil {
		return err
	}
	if !sb.use(l) {
		l.session.Close()
		return errClosing
	}
	if old != nil {
		if retire := func() { sb.retire(old) }; !sb.engine.spawn(retire) {
			retire()
		}
	}
	return nil
}

// retire closes what can move to the new line, and the line once the rest has ended.
func (sb *sandbox) retire(l *line) {
	defer l.session.Close()
	for tick := time.NewTicker(retireLook); ; {
		conns := l.session.Conns()
		for _, c := range conns {
			if c.Movable() {
				_ = c.Close() // always nil
			}
		}
		if len(conns) == 0 {
			tick.Stop()
			return
		}
		select {
		case <-tick.C:
		case <-l.session.Done():
			return
		case <-sb.done:
			return
		case <-sb.engine.closing:
			return
		}
	}
}

// retireLook is how often a line that is given up is looked at.
const retireLook = 200 * time.Millisecond
