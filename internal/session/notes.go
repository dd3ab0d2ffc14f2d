package session

import (
	"time"
)

// noteDelay is how long what runs in a session may wait to be told of in its log: many
// short executions are then one write, and none of them waits for it.
const noteDelay = 100 * time.Millisecond

// notes are what runs in a session, and what of it is still to be told.
type notes struct {
	running map[string]struct{} // by kind and id
	// last is when something last began or ended.
	last time.Time
	wait []noted
}

type noted struct {
	at    time.Time
	event Event
}

// Began says that an execution runs in a session. It does not block.
func (s *Service) Began(sessionID, executionID string) {
	s.note(sessionID, "execution "+executionID, true, Event{Execution: &RunNote{ID: executionID}})
}

// Ended says that an execution of a session does not run any more.
func (s *Service) Ended(sessionID, executionID, reason string) {
	s.note(sessionID, "execution "+executionID, false, Event{Execution: &RunNote{ID: executionID, Ended: true, Reason: reason}})
}

// NoteTurn says that a turn of a session was queued, runs, or is over. It does not block.
func (s *Service) NoteTurn(sessionID string, n TurnNote) {
	s.note(sessionID, "turn "+n.ID, n.Outcome == "", Event{Turn: &n})
}

// NoteInteraction says that the agent of a session asks for something, or does so no
// longer. It does not block.
func (s *Service) NoteInteraction(sessionID string, n AskedNote) {
	s.note(sessionID, "interaction "+n.ID, n.Pending, Event{Asked: &n})
}

// note takes a note for the log, and whether what it is about runs.
func (s *Service) note(sessionID, what string, runs bool, e Event) {
	l, ok := s.find(sessionID)
	if !ok {
		return // it has ended, and its log, too
	}
	now := time.Now()
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.notes.running == nil {
		l.notes.running = make(map[string]struct{})
	}
	if delete(l.notes.running, what); runs {
		l.notes.running[what] = struct{}{}
	}
	l.notes.last = now
	l.notes.wait = append(l.notes.wait, noted{now, e})
	if len(l.notes.wait) == 1 {
		l.look()
	}
}

// tellNotes writes the notes that have waited long enough into the log, and returns how
// long the next has to.
func (l *live) tellNotes(now time.Time) time.Duration {
	l.mu.Lock()
	waiting := l.notes.wait
	if len(waiting) == 0 {
		l.mu.Unlock()
		return time.Hour
	}
	if left := noteDelay - now.Sub(waiting[0].at); left > 0 {
		l.mu.Unlock()
		return left
	}
	l.notes.wait = nil
	l.mu.Unlock()
	for _, n := range waiting {
		l.tellAt(n.at, n.event)
	}
	return time.Hour
}

// flushNotes writes all notes into the log.
func (l *live) flushNotes() { l.tellNotes(time.Now().Add(noteDelay)) }

// activity says whether anything runs in the session, and otherwise since when nothing
// has.
func (l *live) activity(now time.Time) (busy bool, last time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.notes.running) > 0 {
		return true, now
	}
	if l.notes.last.After(l.begun) {
		return false, l.notes.last
	}
	return false, l.begun
}
