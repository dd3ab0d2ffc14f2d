package local

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"

	"github.com/harvest-run/executord/internal/engine/local/cgroup"
	"github.com/harvest-run/executord/internal/guest/forkserver"
)

// blank is a guest that is no sandbox yet: a process in namespaces of its own that waits
// for its Setup, a range of user ids, and control groups without limits. It has no root
// file system, no name and no directory, and ends when executord does.
type blank struct {
	engine  *Engine
	first   uint32        // of its user and group ids, as root
	ids     *os.File      // holds them; nil for an ordinary user, and once somebody took it over
	group   *cgroup.Group // nil for an ordinary user
	born    *os.File      // the control group that the guest is cloned into
	setup   *net.UnixConn // where it waits
	theirs  *os.File      // the other end, until it is forked
	process *process      // nil until it is forked
	note    string        // the file that tells of its control groups; empty without one
}

// reserve takes what a guest needs that nothing is made for yet. name is for its control
// groups.
func (e *Engine) reserve(name string) (*blank, error) {
	b := &blank{engine: e}
	if !e.root {
		return b, nil
	}
	var err error
	if b.first, b.ids, err = e.uids.claim(); err != nil {
		return nil, err
	}
	b.group = e.groups.Open(name)
	return b, nil
}

// owner is the host's user id of root in it.
func (b *blank) owner() int {
	if b.engine.root {
		return int(b.first)
	}
	return os.Geteuid()
}

// prepare makes what the guest is forked with.
func (b *blank) prepare() (err error) {
	if b.group != nil {
		if b.born, err = b.group.CreateForGuest(); err != nil {
			return err
		}
	}
	b.setup, b.theirs, err = setupSocket()
	return err
}

// fork starts the guest.
func (b *blank) fork(ctx context.Context, hostNetwork bool) (err error) {
	request := forkserver.Request{
		UID: uint32(os.Geteuid()), GID: uint32(os.Getegid()), IDs: 1, Cgroup: b.born != nil, HostNetwork: hostNetwork,
	}
	if b.engine.root {
		request.UID, request.GID, request.IDs, request.Setgroups = b.first, b.first, idsPerSandbox, true
	}
	b.process, err = b.engine.forker.fork(ctx, request, b.theirs, b.born)
	b.theirs.Close() // so that the end of the guest's is noticed
	b.theirs = nil
	if b.born != nil {
		b.born.Close()
		b.born = nil
	}
	return err
}

// close closes what is open, but for the process. A guest without a Setup then goes.
func (b *blank) close() {
	for _, f := range []*os.File{b.ids, b.born, b.theirs} {
		if f != nil {
			f.Close()
		}
	}
	if b.setup != nil {
		_ = b.setup.Close() // nothing is on its way
	}
}

// forget removes the note; from then on the record of a sandbox tells of the groups.
func (b *blank) forget() error {
	if b.note == "" {
		return nil
	}
	note := b.note
	b.note = ""
	if err := os.Remove(note); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// discard ends a guest that nobody will use, and removes what it had.
func (b *blank) discard(ctx context.Context) error {
	b.close()
	if b.process != nil {
		b.process.kill()
		err := b.process.wait(ctx)
		b.process.fd.Close()
		if err != nil {
			return fmt.Errorf("end a guest that was ready: %w", err)
		}
	}
	if b.group != nil {
		if err := errors.Join(b.group.Kill(ctx), b.group.Remove()); err != nil {
			return fmt.Errorf("remove the control groups of a guest that was ready: %w", err)
		}
	}
	return b.forget()
}

// newBlank makes one with everything it has.
func (e *Engine) newBlank(ctx context.Context) (_ *blank, err error) {
	// A dot is in the name of no sandbox.
	name := "blank." + rand.Text()
	b, err := e.reserve(name)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, b.discard(context.WithoutCancel(ctx)))
		}
	}()
	if b.group != nil {
		// Before there are control groups, as with a sandbox.
		text, err := json.Marshal(b.group.Paths())
		if err != nil {
			return nil, err
		}
		note := filepath.Join(e.blankDir(), name)
		if err := os.WriteFile(note, text, 0o600); err != nil {
			return nil, fmt.Errorf("write down a guest: %w", err)
		}
		b.note = note
	}
	if err := b.prepare(); err != nil {
		return nil, err
	}
	if b.group != nil {
		if err := b.group.CreateForCommands(b.owner()); err != nil {
			return nil, err
		}
	}
	return b, b.fork(ctx, false)
}

// blankDir has the notes of control groups that belong to no sandbox.
func (e *Engine) blankDir() string { return filepath.Join(e.dir, "blanks") }

// sweepBlanks removes the control groups of guests that waited when an executord before
// this one was killed; they ended with it.
func (e *Engine) sweepBlanks(ctx context.Context) error {
	notes, err := os.ReadDir(e.blankDir())
	if errors.Is(err, fs.ErrNotExist) {
		return os.Mkdir(e.blankDir(), 0o700)
	}
	if err != nil {
		return err
	}
	for _, n := range notes {
		b := &blank{engine: e, note: filepath.Join(e.blankDir(), n.Name())}
		text, err := os.ReadFile(b.note)
		if err != nil {
			return err
		}
		if e.groups != nil {
			var at cgroup.Paths
			_ = json.Unmarshal(text, &at) // one that was cut off has no groups, or those of its name
			b.group = e.groups.OpenAt(n.Name(), at)
		}
		if err := b.discard(ctx); err != nil {
			return err
		}
	}
	return nil
}
