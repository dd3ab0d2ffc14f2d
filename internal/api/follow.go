package api

import (
	"context"
	"errors"
	"io"
	"time"
)

// errSilent is the cause when a stream was silent for a heartbeat interval.
var errSilent = errors.New("nothing new for a heartbeat interval")

// source is what a stream of events is read from: an execution's log, a turn's, a
// session's. It is used by one goroutine.
type source[E any] interface {
	// Next waits for the next event. It returns io.EOF after the last, and the cause of
	// ctx when that ends; then it can be called again.
	Next(ctx context.Context) (E, error)
	// Close releases it.
	Close()
}

// following is how the events E of one log are told as messages P.
type following[E, P any] struct {
	source source[E]
	// interval is how long the stream may be silent.
	interval time.Duration
	// convert makes a new message: grpc-go may read one after send has returned.
	convert func(E) P
	// beat makes the heartbeat that is due now.
	beat func() P
	send func(P) error
}

// follow sends the events that a source tells until the last, and closes it.
func follow[E, P any](ctx context.Context, s *senders, f following[E, P]) error {
	return s.run(ctx, func(p *pace) error {
		defer f.source.Close()
		sender := &eventSender[E, P]{following: f, pace: p}
		return sender.run(ctx)
	})
}

// eventSender is the sending side of one stream of events.
type eventSender[E, P any] struct {
	following[E, P]
	pace *pace
	// last is when a message was last sent.
	last time.Time
}

// run sends one event after the other, and a heartbeat after each interval of silence.
func (s *eventSender[E, P]) run(ctx context.Context) error {
	s.last = time.Now()
	for {
		err := s.untilAwake(ctx, s.interval-time.Since(s.last))
		if errors.Is(err, io.EOF) {
			return nil
		}
		if !errors.Is(err, errSilent) {
			return err
		}
		if time.Since(s.last) < s.interval {
			// Something was sent since the clock was set.
			continue
		}
		if err := s.tell(s.beat()); err != nil {
			return err
		}
	}
}

// untilAwake sends events for the duration d and returns errSilent then. The clock is
// set once and not for each event: that costs a busy stream nothing, and whether it was
// silent run looks up when it fires.
func (s *eventSender[E, P]) untilAwake(ctx context.Context, d time.Duration) error {
	ctx, cancel := context.WithTimeoutCause(ctx, d, errSilent)
	defer cancel()
	for {
		event, err := s.source.Next(ctx)
		if err != nil {
			return err
		}
		if err := s.tell(s.convert(event)); err != nil {
			return err
		}
	}
}

func (s *eventSender[E, P]) tell(message P) error {
	s.pace.begin()
	err := s.send(message)
	s.last = s.pace.end()
	return err
}

// greeting is how a stream begins that has just made what it follows.
type greeting[E any] struct {
	// watch opens the log behind an event, or from its start if that is nil.
	watch func(behind *E) (source[E], error)
	// first says whether an event is the one that opens a log.
	first func(E) bool
	// made is that event as it is known without the log, in place of what the log has.
	made func(inPlaceOf E) E
}

// greet sends the first event, which is in the log already, also when the server
// began to stop meanwhile: to a caller who has no name for what was made,
// SERVER_DRAINING would say that there is none. The source that it returns tells what
// comes behind that.
func greet[E any](ctx context.Context, g greeting[E], send func(E) error) (source[E], error) {
	log, err := g.watch(nil)
	if err != nil {
		return nil, err
	}
	event, err := log.Next(context.WithoutCancel(ctx))
	if err == nil && !g.first(event) {
		// A repeat came so late that the log's beginning is no longer kept. What it began
		// with is known, and the name is what the caller needs first.
		log.Close()
		event = g.made(event)
		if log, err = g.watch(&event); err != nil {
			return nil, err
		}
	}
	if err == nil {
		err = send(event)
	}
	if err != nil {
		log.Close()
		return nil, err
	}
	return log, nil
}
