package execution

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"sync"
	"syscall"

	"github.com/harvest-run/executord/internal/eventlog"
	"github.com/harvest-run/executord/internal/fault"
)

// What the records of an execution's log are, beside output.
const (
	// kindStarted opens the log; it has no data.
	kindStarted = eventlog.KindOutput + 1
	// kindResult ends it; its data is the Result as JSON.
	kindResult = eventlog.KindOutput + 2
)

// logs keeps the event logs that are in use open, each once, however many read it.
type logs struct {
	dir string

	mu     sync.Mutex
	opened map[string]*logHandle
}

// logHandle is an open log; the last to release it closes it.
type logHandle struct {
	*eventlog.Log
	id    string
	home  *logs
	users int
}

func newLogs(dir string) *logs { return &logs{dir: dir, opened: make(map[string]*logHandle)} }

// create makes the log of a new execution.
func (l *logs) create(id string, retained int64) (*logHandle, error) {
	log, err := eventlog.Create(eventlog.Config{Dir: logDir(l.dir, id), RetainedBytes: retained})
	if err != nil {
		return nil, err
	}
	return l.keep(id, log), nil
}

// open opens a log or shares the one that is open.
func (l *logs) open(id string) (*logHandle, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if h, ok := l.opened[id]; ok {
		h.users++
		return h, nil
	}
	log, err := eventlog.Open(eventlog.Config{Dir: logDir(l.dir, id)})
	if errors.Is(err, eventlog.ErrNoLog) || errors.Is(err, fs.ErrNotExist) {
		return nil, fault.New(fault.NotFound, "LOG_NOT_FOUND", "the output of execution %q is no longer kept", id)
	}
	if err != nil {
		return nil, fmt.Errorf("open the log of execution %s: %w", id, err)
	}
	h := &logHandle{Log: log, id: id, home: l, users: 1}
	l.opened[id] = h
	return h, nil
}

// openToWrite opens the log of an execution that goes on.
func (l *logs) openToWrite(id string, retained int64) (*logHandle, error) {
	log, err := eventlog.Open(eventlog.Config{Dir: logDir(l.dir, id), RetainedBytes: retained})
	if err != nil {
		return nil, err
	}
	return l.keep(id, log), nil
}

func (l *logs) keep(id string, log *eventlog.Log) *logHandle {
	h := &logHandle{Log: log, id: id, home: l, users: 1}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.opened[id] = h
	return h
}

// remove deletes a log. Those who read it read on as far as they have it open.
func (l *logs) remove(id string) error { return eventlog.Remove(logDir(l.dir, id)) }

// close closes every log; who waits for a record gets eventlog.ErrClosed.
func (l *logs) close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	var errs []error
	for id, h := range l.opened {
		errs = append(errs, h.Close())
		delete(l.opened, id)
	}
	return errors.Join(errs...)
}

// strays removes logs that belong to no execution: their creation was cut off.
func (l *logs) strays(known func(id string) (bool, error)) error {
	entries, err := os.ReadDir(l.dir)
	if err != nil {
		return fmt.Errorf("list event logs: %w", err)
	}
	for _, e := range entries {
		ok, err := known(e.Name())
		if err != nil {
			return err
		}
		if !ok {
			if err := l.remove(e.Name()); err != nil {
				return fmt.Errorf("remove stray event log %s: %w", e.Name(), err)
			}
		}
	}
	return nil
}

func (h *logHandle) release() {
	h.home.mu.Lock()
	defer h.home.mu.Unlock()
	h.users--
	if h.users == 0 && h.home.opened[h.id] == h {
		delete(h.home.opened, h.id)
		_ = h.Close() // nothing is buffered; what had to be durable is
	}
}

// discard removes the log of an execution that did not come to be.
func (h *logHandle) discard() error {
	h.release()
	return h.home.remove(h.id)
}

// position is the number of bytes of both streams that the log has, which is how
// the guest addresses output.
func (h *logHandle) position() int64 {
	stdout, stderr := h.Totals()
	return stdout.Size + stderr.Size
}

// result reads the end of a sealed log.
func (h *logHandle) result() (*Result, error) {
	r := h.NewReader(h.Sequence() - 1)
	defer r.Close()
	for {
		rec, ok, err := r.TryNext()
		if err != nil || !ok {
			return nil, fmt.Errorf("read the end of the log: %w", errors.Join(err, errNoResult))
		}
		if rec.Gap == nil && rec.Kind == kindResult {
			return decodeResult(rec.Data)
		}
	}
}

var errNoResult = errors.New("the log has no result")

func decodeResult(data []byte) (*Result, error) {
	r := new(Result)
	if err := json.Unmarshal(data, r); err != nil {
		return nil, fmt.Errorf("decode result: %w", err)
	}
	return r, nil
}

func isDiskFull(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)
}
