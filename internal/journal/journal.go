// Package journal keeps the event logs of things that are not programs: of sessions,
// turns and builds. Their events are values of any size, encoded by whoever owns them,
// and numbered from 1 without holes, whereas a record of an eventlog is of bounded size:
// an entry that is larger takes several of them. As there, one writer appends, and any
// number of watchers follow at their own pace, during the life of what is told and
// after it; what Append returned for survives kill -9.
package journal

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/harvest-run/executord/internal/eventlog"
	"github.com/harvest-run/executord/internal/fault"
)

const (
	// kindEntry is a whole entry; the others are the pieces of one that is larger. Before
	// the data of each stands the number of the entry.
	kindEntry = eventlog.KindOutput + 1
	kindFirst = eventlog.KindOutput + 2
	kindNext  = eventlog.KindOutput + 3
	kindFinal = eventlog.KindOutput + 4

	headerSize = 8
	pieceSize  = eventlog.MaxData - headerSize

	// MaxEntry is the most bytes of an entry.
	MaxEntry = 8 << 20
	// defaultRetained bounds a journal that says nothing else.
	defaultRetained = 64 << 20
)

var (
	// ErrClosed means that the Set was closed.
	ErrClosed = errors.New("the journals are closed")
	// ErrEnded means that nothing can be appended behind an end.
	ErrEnded = errors.New("the journal has ended")
)

// Config of a Set.
type Config struct {
	// Dir is a directory of their own. It is made.
	Dir string
	// What names what they are about in errors, such as "turn".
	What string
	// RetainedBytes bounds each; the oldest is dropped then. 0 stands for 64 MiB.
	RetainedBytes int64
}

// Set is a directory of journals, each with an id.
type Set struct {
	cfg Config

	mu     sync.Mutex
	opened map[string]*shared
	closed bool
}

// shared is an open log; the last to let go of it closes it.
type shared struct {
	*eventlog.Log
	users int
	// entries is the number of the last whole entry. Only the writer changes it.
	entries uint64
	writing sync.Mutex
	// condemned is removed when nobody uses it any more.
	condemned bool
}

// NewSet makes the directory if there is none.
func NewSet(cfg Config) (*Set, error) {
	if cfg.RetainedBytes == 0 {
		cfg.RetainedBytes = defaultRetained
	}
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("make the directory of %s journals: %w", cfg.What, err)
	}
	return &Set{cfg: cfg, opened: make(map[string]*shared)}, nil
}

func (s *Set) config(id string) eventlog.Config {
	return eventlog.Config{Dir: filepath.Join(s.cfg.Dir, id), RetainedBytes: s.cfg.RetainedBytes}
}

// Create makes the journal of a new thing. Ids are made by executord: letters, digits
// and "-".
func (s *Set) Create(id string) (*Journal, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, ErrClosed
	}
	log, err := eventlog.Create(s.config(id))
	if err != nil {
		return nil, fmt.Errorf("make the journal of %s %s: %w", s.cfg.What, id, err)
	}
	sh := &shared{Log: log, users: 1}
	s.opened[id] = sh
	return &Journal{set: s, id: id, log: sh}, nil
}

// Open opens a journal, or shares the one that is open. A fault NotFound (LOG_NOT_FOUND)
// if there is none.
func (s *Set) Open(id string) (*Journal, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, ErrClosed
	}
	if sh, ok := s.opened[id]; ok {
		sh.users++
		return &Journal{set: s, id: id, log: sh}, nil
	}
	log, err := eventlog.Open(s.config(id))
	if errors.Is(err, eventlog.ErrNoLog) || errors.Is(err, fs.ErrNotExist) {
		return nil, fault.New(fault.NotFound, "LOG_NOT_FOUND", "the events of %s %q are no longer kept", s.cfg.What, id)
	}
	if err != nil {
		return nil, fmt.Errorf("open the journal of %s %s: %w", s.cfg.What, id, err)
	}
	entries, err := lastEntry(log)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open the journal of %s %s: %w", s.cfg.What, id, err), log.Close())
	}
	sh := &shared{Log: log, users: 1, entries: entries}
	s.opened[id] = sh
	return &Journal{set: s, id: id, log: sh}, nil
}

// lastEntry is the number of the last whole entry of a log.
func lastEntry(log *eventlog.Log) (uint64, error) {
	if log.Sequence() == 0 {
		return 0, nil
	}
	r := log.NewReader(log.Sequence() - 1)
	defer r.Close()
	record, ok, err := r.TryNext()
	if err != nil || !ok {
		return 0, fmt.Errorf("read its last entry: %w", err)
	}
	if record.Gap != nil || len(record.Data) < headerSize {
		// What cannot be read counts as entries: numbers may be left out, never given twice.
		return record.Sequence, nil
	}
	n := binary.BigEndian.Uint64(record.Data)
	if record.Kind == kindFirst || record.Kind == kindNext {
		n-- // cut off in the middle; the next one takes its number
	}
	return n, nil
}

// Remove deletes a journal, once those who have it open are through with it. One that is
// not there is removed.
func (s *Set) Remove(id string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if sh, ok := s.opened[id]; ok {
		sh.condemned = true
		return nil
	}
	return eventlog.Remove(filepath.Join(s.cfg.Dir, id))
}

// Strays removes the journals that belong to nothing that is known: their making was cut
// off, or their removal. Call it before any is open.
func (s *Set) Strays(known func(id string) (bool, error)) error {
	entries, err := os.ReadDir(s.cfg.Dir)
	if err != nil {
		return fmt.Errorf("list the journals of %ss: %w", s.cfg.What, err)
	}
	for _, e := range entries {
		ok, err := known(e.Name())
		if err != nil {
			return err
		}
		if !ok {
			if err := s.Remove(e.Name()); err != nil {
				return fmt.Errorf("remove the journal of %s %s, which is not known: %w", s.cfg.What, e.Name(), err)
			}
		}
	}
	return nil
}

// Close closes all journals; who waits for an event gets ErrClosed.
func (s *Set) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	var errs []error
	for id, sh := range s.opened {
		errs = append(errs, s.shut(id, sh))
	}
	return errors.Join(errs...)
}

// shut closes a log and removes a condemned one. The caller holds mu.
func (s *Set) shut(id string, sh *shared) error {
	delete(s.opened, id)
	err := sh.Log.Close()
	if sh.condemned {
		err = errors.Join(err, eventlog.Remove(filepath.Join(s.cfg.Dir, id)))
	}
	return err
}

// Journal is the log of one thing. It is safe for use by several goroutines.
type Journal struct {
	set  *Set
	id   string
	log  *shared
	once sync.Once
}

// Append adds an entry of at most MaxEntry bytes and returns its place. When it returns
// an error nothing was added.
func (j *Journal) Append(now time.Time, data []byte) (Cursor, error) {
	return j.append(now, data, false)
}

// End adds the last entry. When it returns nil the whole journal is on the disk, and
// watchers end behind that entry.
func (j *Journal) End(now time.Time, data []byte) (Cursor, error) { return j.append(now, data, true) }

func (j *Journal) append(now time.Time, data []byte, last bool) (Cursor, error) {
	if len(data) > MaxEntry {
		return Cursor{}, fmt.Errorf("append to the journal of %s %s: an entry of %d bytes; %d are the most", j.set.cfg.What, j.id, len(data), MaxEntry)
	}
	sh := j.log
	sh.writing.Lock()
	defer sh.writing.Unlock()
	number := sh.entries + 1
	entries := pieces(number, data)
	var err error
	if last {
		if before := entries[:len(entries)-1]; len(before) > 0 {
			err = sh.Log.Append(now, before...)
		}
		if err == nil {
			err = sh.Log.Seal(now, entries[len(entries)-1])
		}
	} else {
		err = sh.Log.Append(now, entries...)
	}
	switch {
	case errors.Is(err, eventlog.ErrSealed):
		return Cursor{}, ErrEnded
	case errors.Is(err, eventlog.ErrClosed):
		return Cursor{}, ErrClosed
	case err != nil:
		return Cursor{}, err
	}
	sh.entries = number
	return Cursor{Epoch: sh.Epoch(), Sequence: number}, nil
}

// pieces are the records that an entry takes.
func pieces(number uint64, data []byte) []eventlog.Entry {
	record := func(kind eventlog.Kind, data []byte) eventlog.Entry {
		header := binary.BigEndian.AppendUint64(make([]byte, 0, headerSize+len(data)), number)
		return eventlog.Entry{Kind: kind, Data: append(header, data...)}
	}
	if len(data) <= pieceSize {
		return []eventlog.Entry{record(kindEntry, data)}
	}
	all := []eventlog.Entry{record(kindFirst, data[:pieceSize])}
	for data = data[pieceSize:]; len(data) > pieceSize; data = data[pieceSize:] {
		all = append(all, record(kindNext, data[:pieceSize]))
	}
	return append(all, record(kindFinal, data))
}

// Cursor is the place of the last entry.
func (j *Journal) Cursor() Cursor {
	j.log.writing.Lock()
	defer j.log.writing.Unlock()
	return Cursor{Epoch: j.log.Epoch(), Sequence: j.log.entries}
}

// Ended says whether it has its last entry.
func (j *Journal) Ended() bool { return j.log.Sealed() }

// LastTime is when something was last added.
func (j *Journal) LastTime() time.Time { return j.log.LastTime() }

// Close lets go of the journal. It may be called again.
func (j *Journal) Close() {
	j.once.Do(func() {
		j.set.mu.Lock()
		defer j.set.mu.Unlock()
		j.log.users--
		if j.log.users == 0 && j.set.opened[j.id] == j.log {
			// Nothing is buffered; a removal that fails is made up for by Strays.
			_ = j.set.shut(j.id, j.log)
		}
	})
}
