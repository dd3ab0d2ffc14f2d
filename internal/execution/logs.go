package execution

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"github.com/oklog/ulid/v2"
	"golang.org/x/sys/unix"

	"github.com/harvest-run/executord/internal/eventlog"
	"github.com/harvest-run/executord/internal/fault"
)

// What the records of an execution's log are, beside output.
const (
	// kindStarted opens the log; it has no data.
	kindStarted = eventlog.KindOutput + 1
	// kindResult ends it; its data is the Result as JSON.
	kindResult = eventlog.KindOutput + 2
	// kindWarning tells of a deadline; its data is the Warning as JSON.
	kindWarning = eventlog.KindOutput + 3
)

// logs keeps the event logs that are in use open, each once, however many read it.
type logs struct {
	dir string

	mu     sync.Mutex
	opened map[string]*logHandle
	closed bool
	// spares were made ahead of their need; made numbers them, making counts those that
	// are being made.
	spares []*eventlog.Log
	made   int
	making int
}

const (
	// spareLogs is how many logs are kept ready. Making one costs the file system more
	// than all else that a start waits for; a few are enough for starts one after
	// another, and a burst makes its own.
	spareLogs = 4
	// spareSuffix is added to the directory of logs for that of the spare ones.
	spareSuffix = "-spare"
)

// logHandle is an open log; the last to release it closes it.
type logHandle struct {
	*eventlog.Log
	id    string
	home  *logs
	users int
	// condemned: it is removed when nobody uses it any more.
	condemned bool
}

func newLogs(dir string) *logs { return &logs{dir: dir, opened: make(map[string]*logHandle)} }

// path is where the log of an execution lies.
func (l *logs) path(id string) string { return filepath.Join(l.dir, id) }

// create makes the log of a new execution.
func (l *logs) create(e Execution) (*logHandle, error) {
	id, cfg := e.ID, l.config(e)
	if log := l.takeSpare(); log != nil {
		if log.Move(cfg) == nil {
			return l.keep(id, log), nil
		}
		_ = log.Close() // whatever is wrong with it, a fresh one tells it or has it not
	}
	log, err := eventlog.Create(cfg)
	if err != nil {
		if !errors.Is(err, fs.ErrExist) {
			// What was made of it; if that cannot be removed either, the next start will.
			_ = eventlog.Remove(l.path(id))
		}
		return nil, err
	}
	return l.keep(id, log), nil
}

func (l *logs) takeSpare() *eventlog.Log {
	// On a full disk a spare still has room for its first record, and would let a start
	// through whose output has none: there a log has to be made.
	var disk unix.Statfs_t
	if err := unix.Statfs(l.dir, &disk); err != nil || disk.Bavail == 0 {
		return nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.spares) == 0 {
		return nil
	}
	last := len(l.spares) - 1
	log := l.spares[last]
	l.spares = l.spares[:last]
	return log
}

// stock makes a spare log if there are too few. It is called when nobody waits. What
// goes wrong here is found out again, and told, when a log is needed.
func (l *logs) stock() {
	l.mu.Lock()
	if l.closed || len(l.spares)+l.making >= spareLogs {
		l.mu.Unlock()
		return
	}
	l.making++
	l.made++
	dir := filepath.Join(l.dir+spareSuffix, strconv.Itoa(l.made))
	l.mu.Unlock()
	log, err := eventlog.Create(eventlog.Config{Dir: dir})
	l.mu.Lock()
	defer l.mu.Unlock()
	l.making--
	if err != nil {
		_ = eventlog.Remove(dir)
		return
	}
	if l.closed {
		_ = errors.Join(log.Close(), eventlog.Remove(dir))
		return
	}
	l.spares = append(l.spares, log)
}

// discardSpares removes those that were not needed, also of executords before this one.
func (l *logs) discardSpares() error { return os.RemoveAll(l.dir + spareSuffix) }

// open opens a log or shares the one that is open.
func (l *logs) open(id string) (*logHandle, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return nil, ErrClosed
	}
	if h, ok := l.opened[id]; ok {
		h.users++
		return h, nil
	}
	log, err := eventlog.Open(eventlog.Config{Dir: l.path(id)})
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
func (l *logs) openToWrite(e Execution) (*logHandle, error) {
	log, err := eventlog.Open(l.config(e))
	if err != nil {
		return nil, err
	}
	return l.keep(e.ID, log), nil
}

// config is how an execution's log is written. Only where the oldest output may be
// dropped at any time does the log do that by itself.
func (l *logs) config(e Execution) eventlog.Config {
	return eventlog.Config{
		Dir: l.path(e.ID), RetainedBytes: e.RetainedBytes,
		DropNothing: e.Policies.OnLimit == Block || e.Policies.OnLimit == Kill,
	}
}

// inUse says whether somebody has a log open.
func (l *logs) inUse(id string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	_, ok := l.opened[id]
	return ok
}

func (l *logs) keep(id string, log *eventlog.Log) *logHandle {
	h := &logHandle{Log: log, id: id, home: l, users: 1}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.opened[id] = h
	return h
}

// remove deletes a log, once those who have it open are through with it.
func (l *logs) remove(id string) error {
	l.mu.Lock()
	if h, ok := l.opened[id]; ok {
		h.condemned = true
		l.mu.Unlock()
		return nil
	}
	l.mu.Unlock()
	return eventlog.Remove(l.path(id))
}

// close closes every log; who waits for a record gets eventlog.ErrClosed.
func (l *logs) close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closed = true
	var errs []error
	for id, h := range l.opened {
		delete(l.opened, id)
		errs = append(errs, h.shut())
	}
	for _, log := range l.spares {
		errs = append(errs, log.Close())
	}
	l.spares = nil
	errs = append(errs, l.discardSpares())
	return errors.Join(errs...)
}

// strays removes logs that belong to no execution: their creation was cut off, or
// their removal. Whatever else lies there is not touched.
func (l *logs) strays(known func(id string) (bool, error)) error {
	entries, err := os.ReadDir(l.dir)
	if err != nil {
		return fmt.Errorf("list event logs: %w", err)
	}
	for _, e := range entries {
		if _, err := ulid.ParseStrict(strings.ToUpper(e.Name())); err != nil || !e.IsDir() {
			continue
		}
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
		// Nothing is buffered, and what had to be durable is; a removal that fails is
		// made up for at the next start.
		_ = h.shut()
	}
}

// shut closes the log and removes a condemned one. The caller holds home.mu.
func (h *logHandle) shut() error {
	err := h.Close()
	if h.condemned {
		err = errors.Join(err, eventlog.Remove(h.home.path(h.id)))
	}
	return err
}

// condemn has the log removed when its last user releases it.
func (h *logHandle) condemn() {
	h.home.mu.Lock()
	defer h.home.mu.Unlock()
	h.condemned = true
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

// resultEntry is the record that ends a log.
func resultEntry(r *Result) (eventlog.Entry, error) {
	data, err := json.Marshal(r)
	if err != nil {
		return eventlog.Entry{}, fmt.Errorf("encode result: %w", err)
	}
	return eventlog.Entry{Kind: kindResult, Data: data}, nil
}

func decodeResult(data []byte) (*Result, error) {
	r := new(Result)
	if err := json.Unmarshal(data, r); err != nil {
		return nil, fmt.Errorf("decode result: %w", err)
	}
	return r, nil
}

// diskFault says that the disk is full in a way a caller can act on.
func diskFault(err error) error {
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return &fault.Error{
			Kind: fault.Exhausted, Reason: "DISK_FULL", Err: err, RetryAfter: diskRetry,
			Message: "the disk under executord's state directory is full",
		}
	}
	return err
}
