package modaltest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"syscall"
	"time"
)

// spool keeps everything that a program wrote, in a file, for readers at any offset.
type spool struct {
	file *os.File

	mu   sync.Mutex
	size int64
	over bool
	err  error         // why nobody gets more, if it is not just the end
	news chan struct{} // closed and replaced at every change
}

// newSpool makes a spool whose file has no name, so that it is gone when it is closed.
func newSpool(dir string) (*spool, error) {
	f, err := os.CreateTemp(dir, "spool-")
	if err != nil {
		return nil, err
	}
	if err := os.Remove(f.Name()); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return &spool{file: f, news: make(chan struct{})}, nil
}

func (s *spool) changed() {
	close(s.news)
	s.news = make(chan struct{})
}

// Write appends.
func (s *spool) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.over {
		return len(p), nil // read, so that the writer is not held up, and nobody's
	}
	n, err := s.file.WriteAt(p, s.size)
	s.size += int64(n)
	s.changed()
	return n, err
}

// finish says that nothing more comes. With an error, readers get that at once.
func (s *spool) finish(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err == nil {
		s.err = err
	}
	s.over = true
	s.changed()
}

// read waits for something at an offset; io.EOF when nothing more comes there.
func (s *spool) read(ctx context.Context, offset int64, p []byte) (int, error) {
	for {
		s.mu.Lock()
		size, over, err, changed := s.size, s.over, s.err, s.news
		s.mu.Unlock()
		switch {
		case err != nil:
			return 0, err
		case offset < size:
			n, err := s.file.ReadAt(p[:min(int64(len(p)), size-offset)], offset)
			if n > 0 {
				return n, nil
			}
			return 0, fmt.Errorf("read the spool: %w", err)
		case over:
			return 0, io.EOF
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return 0, context.Cause(ctx)
		}
	}
}

// length is how much was written so far.
func (s *spool) length() int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.size
}

// fill copies what comes out of a pipe. When stop is called, what is in the pipe by then
// is still copied and the spool is finished; what background processes write later is
// read and dropped, so that they are not held up. It returns when all writers are gone.
func (s *spool) fill(from *os.File) {
	defer from.Close()
	_, err := io.Copy(s, plain{from})
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		s.finish(nil) // all writers are gone, or it is a terminal without a program
		return
	}
	_ = from.SetReadDeadline(time.Time{}) // pipes and terminals have deadlines
	drain(from, s)
	s.finish(nil)
	_, _ = io.Copy(io.Discard, plain{from})
}

// stop makes fill finish the spool.
func stop(from *os.File) { _ = from.SetReadDeadline(time.Unix(1, 0)) }

// plain hides what a file can do beside being read: copying in the kernel knows nothing
// of spools.
type plain struct{ io.Reader }

// drain copies what is there now.
func drain(from *os.File, to io.Writer) {
	raw, err := from.SyscallConn()
	if err != nil {
		return
	}
	buf := make([]byte, 64<<10)
	for n := 1; n > 0; {
		_ = raw.Read(func(fd uintptr) bool {
			n, err = syscall.Read(int(fd), buf)
			return true
		})
		if err != nil {
			return // empty, or over
		}
		_, _ = to.Write(buf[:n]) // a full disk shows in what a test reads
	}
}
