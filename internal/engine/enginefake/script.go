package enginefake

import (
	"math"
	"time"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
	"google.golang.org/protobuf/proto"
)

// Script is what a command does.
type Script struct {
	// Refuse, if it is set, answers the start; nothing runs.
	Refuse *guestv1.Error
	// StartMicros is what the start's answer tells of how long it took; StartDelay if 0.
	StartMicros uint64
	// StartDelay passes before a start is answered.
	StartDelay time.Duration
	// Steps are done one after the other.
	Steps []Step
	// Exit is how the command ends after the last step; nil does not end by itself.
	// What a guest measures is filled in, unless Lie is set.
	Exit *guestv1.Exit
	// Lie tells Exit as it stands.
	Lie bool
	// TermDelay passes between TERM and the end that it brings.
	TermDelay time.Duration
	// IgnoreTerm: only KILL ends it.
	IgnoreTerm bool
	// Immortal: not even that.
	Immortal bool
	// Deaf to signals that are sent to it, but for KILL.
	Deaf bool
}

// Step is a piece of output, or something done with the input.
type Step struct {
	// After the step before.
	After  time.Duration
	Stream guestv1.Stream
	Data   []byte
	// Read reads so many bytes of input, fewer at its end, and writes them to Stream.
	Read int
	// Shut closes the input.
	Shut bool
}

// Echo is a step that writes so many bytes of input to stdout; fewer at its end.
func Echo(n int) Step { return Step{Stream: guestv1.Stream_STREAM_STDOUT, Read: n} }

// Cat is a step that writes all input to stdout, to its end.
func Cat() Step { return Echo(math.MaxInt) }

// Shut is a step that closes the input.
func Shut(after time.Duration) Step { return Step{After: after, Shut: true} }

// Stdout is a step.
func Stdout(after time.Duration, text string) Step {
	return Step{After: after, Stream: guestv1.Stream_STREAM_STDOUT, Data: []byte(text)}
}

// Stderr is a step.
func Stderr(after time.Duration, text string) Step {
	return Step{After: after, Stream: guestv1.Stream_STREAM_STDERR, Data: []byte(text)}
}

// Pause is a step without output.
func Pause(d time.Duration) Step { return Step{After: d} }

// Exit is the end of a program that exits.
func Exit(code int32) *guestv1.Exit {
	return &guestv1.Exit{Status: &guestv1.Exit_Code{Code: code}, TreeEmpty: true}
}

// Signal is the end of a program that a signal ended.
func Signal(number int32) *guestv1.Exit {
	return &guestv1.Exit{Status: &guestv1.Exit_Signal{Signal: number}, TreeEmpty: true}
}

// Refusal is an answer to a start.
func Refusal(kind guestv1.Error_Kind, message string) *guestv1.Error {
	return &guestv1.Error{Kind: kind, Message: message}
}

// CutEvery is an Answer hook that cuts the pipe at every n-th answer.
func CutEvery(n int) func(sandbox string, q *guestv1.Request, a *Answer) {
	count := make(chan int, 1)
	count <- 0
	return func(_ string, _ *guestv1.Request, a *Answer) {
		sent := <-count + 1
		count <- sent
		a.Cut = sent%n == 0
	}
}

// stop asks for the end of a command.
type stop struct {
	cause guestv1.StopCause
	grace time.Duration
}

const (
	term = 15
	kill = 9
)

// run does the script until its end or that of the sandbox.
func (c *command) run(dead <-chan struct{}, timeout, idle, grace time.Duration) {
	s := c.script
	var (
		timedOut, killed, heeded <-chan time.Time
		killAt                   time.Time
		cause                    guestv1.StopCause
		unwritten                []byte
		step                     int
		reading                  int // what is left of the present step
		next                     <-chan time.Time
	)
	if timeout > 0 {
		timer := time.NewTimer(timeout)
		defer timer.Stop()
		timedOut = timer.C
	}
	var idling <-chan time.Time
	if idle > 0 {
		idling = time.After(idle)
	}
	stopping := func(o stop) {
		if cause == guestv1.StopCause_STOP_CAUSE_UNSPECIFIED {
			cause = o.cause
			if !s.IgnoreTerm && !s.Immortal {
				heeded = time.After(s.TermDelay)
			}
		}
		if at := time.Now().Add(o.grace); killAt.IsZero() || at.Before(killAt) {
			killAt, killed = at, time.After(o.grace)
		}
	}
	for {
		var room, input <-chan struct{}
		if len(unwritten) == 0 && reading > 0 {
			var end bool
			if unwritten, end, input = c.input.read(reading); end {
				reading = 0
				step++
				continue
			}
			reading -= len(unwritten)
		}
		switch {
		case input != nil:
		case len(unwritten) > 0:
			unwritten, room = c.write(s.Steps[step].Stream, unwritten)
			if len(unwritten) == 0 {
				if reading == 0 {
					step++
				}
				continue
			}
		case next != nil:
		case step < len(s.Steps):
			next = time.After(s.Steps[step].After)
		case s.Exit != nil:
			c.finish(s.Exit, cause, false)
			return
		}
		select {
		case <-dead:
			return
		case <-room:
		case <-input:
		case <-next:
			next, unwritten, reading = nil, s.Steps[step].Data, s.Steps[step].Read
			if s.Steps[step].Shut {
				c.input.shut()
			}
			if len(unwritten) == 0 && reading == 0 {
				step++
			}
		case number := <-c.signals:
			if number == kill || !s.Deaf {
				c.finish(Signal(number), cause, false)
				return
			}
		case <-timedOut:
			stopping(stop{guestv1.StopCause_STOP_CAUSE_TIMEOUT, grace})
		case <-idling:
			if left := idle - c.idleFor(); left > 0 {
				idling = time.After(left)
				continue
			}
			stopping(stop{guestv1.StopCause_STOP_CAUSE_IDLE, grace})
		case o := <-c.stops:
			stopping(o)
		case <-heeded:
			c.finish(Signal(term), cause, false)
			return
		case <-killed:
			if !s.Immortal {
				c.finish(Signal(kill), cause, true)
				return
			}
		}
	}
}

// finish leaves the exit to be read.
func (c *command) finish(how *guestv1.Exit, cause guestv1.StopCause, killed bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	exit := proto.CloneOf(how)
	if !c.script.Lie {
		exit.StopCause, exit.Killed = cause, killed
		exit.DiscardedBytes = c.discarded
		exit.RunMicros = uint64(time.Since(c.began).Microseconds())
		if c.end > 0 {
			micros := uint64(c.first.Sub(c.began).Microseconds())
			exit.FirstOutputMicros = &micros
		}
	}
	c.exit = exit
	if c.input != nil {
		c.input.finish()
	}
	close(c.ended)
	c.changed()
}
