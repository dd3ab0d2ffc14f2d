package modaltest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// process is a program that runs in a sandbox, or ran.
type process struct {
	id             string
	stdout, stderr *spool

	ended        chan struct{} // closed when it has ended; its spools end soon after
	code, signal int           // valid then

	// turn has room for the one who writes to the standard input.
	turn    chan struct{}
	stdin   *os.File
	mu      sync.Mutex
	reading []*os.File // what fills the spools
	over    bool       // it has ended
	written int64      // bytes of standard input that the program has, or will have
	closed  bool       // there is no more standard input
	killed  *time.Timer
}

// program says what is to be started.
type program struct {
	id             string
	args, env      []string
	dir            string
	terminal       bool
	noStdout       bool
	noStderr       bool
	stderrAsStdout bool
	timeout        time.Duration // 0: none
}

// start starts a program in the box. One that cannot be started is one that has ended
// with 127 or 126 and says why, as a shell would.
func (b *box) start(pr program) (*process, error) {
	p := &process{id: pr.id, ended: make(chan struct{}), turn: make(chan struct{}, 1)}
	var err error
	if p.stdout, err = newSpool(b.dir); err != nil {
		return nil, err
	}
	if p.stderr, err = newSpool(b.dir); err != nil {
		return nil, err
	}
	o := order{Op: "start", ID: pr.id, Args: pr.args, Env: pr.env, Dir: pr.dir, Terminal: pr.terminal}
	var theirs []*os.File
	defer func() {
		for _, f := range theirs {
			f.Close()
		}
	}()
	if !pr.terminal {
		if theirs, err = p.pipes(pr); err != nil {
			return nil, err
		}
	}
	c := b.expect(pr.id)
	b.mu.Lock()
	if b.begun == nil {
		b.mu.Unlock()
		return nil, errBoxGone
	}
	b.begun[pr.id] = p
	b.mu.Unlock()
	if err := b.send(o, theirs...); err != nil {
		return nil, err
	}
	a, err := b.await(context.Background(), c) // the box ends, or answers
	if err != nil {
		return nil, err
	}
	for _, f := range theirs { // before the spools wait for their end
		f.Close()
	}
	theirs = nil
	if a.Kind == "failed" {
		fmt.Fprintln(p.stderr, a.Error)
	}
	if a.file != nil {
		p.mu.Lock()
		err := p.terminal(a.file)
		p.mu.Unlock()
		if err != nil {
			return nil, err
		}
	}
	b.follow(p, pr)
	if a.Kind == "failed" {
		b.heard(answer{news: news{Kind: "exited", ID: pr.id, Code: a.Code}})
	}
	return p, nil
}

// pipes makes the standard streams, and returns the program's ends.
func (p *process) pipes(pr program) (theirs []*os.File, err error) {
	pipe := func(write bool) (*os.File, error) { // our end
		r, w, err := os.Pipe()
		if err != nil {
			return nil, err
		}
		if write {
			theirs = append(theirs, r)
			return w, nil
		}
		theirs = append(theirs, w)
		return r, nil
	}
	if p.stdin, err = pipe(true); err != nil {
		return theirs, err
	}
	for i, none := range []bool{pr.noStdout, pr.noStderr} {
		switch {
		case none:
			null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
			if err != nil {
				return theirs, err
			}
			theirs, p.reading = append(theirs, null), append(p.reading, nil)
		case i == 1 && pr.stderrAsStdout:
			fd, err := unix.FcntlInt(theirs[1].Fd(), unix.F_DUPFD_CLOEXEC, 0)
			if err != nil {
				return theirs, err
			}
			theirs, p.reading = append(theirs, os.NewFile(uintptr(fd), "stderr")), append(p.reading, nil)
		default:
			f, err := pipe(false)
			if err != nil {
				return theirs, err
			}
			p.reading = append(p.reading, f)
		}
	}
	return theirs, nil
}

// terminal takes the controlling side of the program's terminal: input and output.
func (p *process) terminal(master *os.File) error {
	defer master.Close()
	fd := int(master.Fd())
	again := [2]*os.File{}
	if err := unix.SetNonblock(fd, true); err != nil { // deadlines want it
		return err
	}
	for i := range again {
		fd, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			return err
		}
		again[i] = os.NewFile(uintptr(fd), "terminal")
	}
	p.stdin, p.reading = again[0], []*os.File{again[1], nil}
	return nil
}

// follow fills the spools and watches over the time that the program has.
func (b *box) follow(p *process, pr program) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for i, s := range []*spool{p.stdout, p.stderr} {
		if i >= len(p.reading) || p.reading[i] == nil {
			s.finish(nil)
			continue
		}
		f := p.reading[i]
		if p.over {
			stop(f)
		}
		b.owner.Go(func() { s.fill(f) })
	}
	if pr.timeout > 0 && !p.over {
		p.killed = time.AfterFunc(pr.timeout, func() { b.signal(p.id, unix.SIGKILL) })
	}
}

// signal sends a signal to a program and its process group.
func (b *box) signal(id string, s unix.Signal) {
	_ = b.send(order{Op: "signal", ID: id, Signal: int(s)}) // the box has ended: nothing to do
}

// exited takes how the program ended.
func (p *process) exited(n news) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.code, p.signal, p.over = n.Code, n.Signal, true
	for _, f := range p.reading {
		if f != nil {
			stop(f)
		}
	}
	if p.killed != nil {
		p.killed.Stop()
	}
	close(p.ended)
}

// errInputClosed is the answer to input that nobody will read.
var errInputClosed = errors.New("the standard input is closed")

// write writes to the standard input what it has not of data, which is the input from an
// offset on. What was written before is not written again.
func (p *process) write(ctx context.Context, offset int64, data []byte, eof bool) error {
	select {
	case p.turn <- struct{}{}:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	defer func() { <-p.turn }()
	at, closed := p.input()
	switch {
	case offset > at:
		return fmt.Errorf("input from byte %d, but it has only %d", offset, at)
	case offset+int64(len(data)) <= at:
		data = nil
	default:
		data = data[at-offset:]
	}
	if closed && len(data) > 0 {
		return errInputClosed
	}
	// A program that does not read holds up the writer until it gives up.
	given := make(chan struct{})
	release := context.AfterFunc(ctx, func() {
		_ = p.stdin.SetWriteDeadline(time.Unix(1, 0))
		close(given)
	})
	n, err := p.stdin.Write(data)
	if !release() {
		<-given
		_ = p.stdin.SetWriteDeadline(time.Time{})
	}
	p.mu.Lock()
	p.written += int64(n)
	p.mu.Unlock()
	if err != nil && ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err != nil {
		return errInputClosed
	}
	if eof && !closed {
		p.closeInput()
	}
	return nil
}

// input is how far the standard input is.
func (p *process) input() (written int64, closed bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.written, p.closed
}

func (p *process) closeInput() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return
	}
	p.closed = true
	p.stdin.Close()
}

// discard gives up what the process held.
func (p *process) discard() {
	p.closeInput()
	p.stdout.file.Close()
	p.stderr.file.Close()
}

// lose makes readers of its output hear why they get no more.
func (p *process) lose(err error) {
	p.stdout.finish(err)
	p.stderr.finish(err)
}
