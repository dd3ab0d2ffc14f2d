package client

import (
	"fmt"
	"hash/crc32"

	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
)

// verdict says what is to be done with an event.
type verdict int

const (
	// fresh: it is new and in its place.
	fresh verdict = iota
	// repeated: it was told before.
	repeated
	// beat: a heartbeat; not part of the log.
	beat
)

// ledger keeps the books of one log: which event comes next, and which byte of
// which stream. It knows nothing of connections.
type ledger struct {
	// epoch is "" until the first event names it.
	epoch string
	// sequence is that of the last event told or announced as missing.
	sequence uint64
	// loose is set by a gap that does not say where the log goes on.
	loose bool
	// renewed is set by a gap that announced another epoch without naming it.
	renewed bool
	outputs [2]output
	table   *crc32.Table
}

// output is how far one output stream has been told.
type output struct {
	// next is the position of the next byte; it means something if known.
	next  int64
	known bool
	// whole: every byte from 0 to next was told; sum is the CRC-32C of them.
	whole bool
	sum   uint32
}

// newLedger opens the books behind after; nil or sequence 0 is before the first event.
func newLedger(after *executorv1.Cursor) ledger {
	l := ledger{epoch: after.GetEpoch(), sequence: after.GetSequence(), table: crc32.MakeTable(crc32.Castagnoli)}
	if l.sequence == 0 {
		l.outputs = [2]output{{known: true, whole: true}, {known: true, whole: true}}
	}
	return l
}

// cursor is behind the last event.
func (l *ledger) cursor() *executorv1.Cursor {
	return &executorv1.Cursor{Epoch: l.epoch, Sequence: l.sequence}
}

// whole says whether every byte of both streams was told so far.
func (l *ledger) whole() bool { return l.outputs[0].whole && l.outputs[1].whole }

// admit checks an event against the books and enters it. The error is an ErrHole,
// ErrProtocol or, at the result, ErrIncomplete; the books are then of no more use.
func (l *ledger) admit(e *executorv1.Event) (verdict, error) {
	at := e.GetCursor()
	switch kind := e.GetKind().(type) {
	case *executorv1.Event_Heartbeat:
		// Its cursor is the last event told. If that is further than the books are,
		// something was not told to us.
		if at.GetEpoch() == l.epoch && at.GetSequence() > l.sequence && !l.loose {
			return 0, fmt.Errorf("%w: event %d does not come and the log is at %d", ErrHole, l.sequence+1, at.GetSequence())
		}
		return beat, nil
	case *executorv1.Event_Gap:
		if at == nil {
			return 0, fmt.Errorf("%w: a gap without a cursor", ErrProtocol)
		}
		return l.gap(at, kind.Gap)
	}

	if at.GetSequence() == 0 {
		return 0, fmt.Errorf("%w: an event without a sequence number", ErrProtocol)
	}
	if err := l.enter(at.GetEpoch()); err != nil {
		return 0, err
	}
	if at.GetSequence() <= l.sequence {
		return repeated, nil
	}
	if at.GetSequence() != l.sequence+1 && !l.loose {
		return 0, fmt.Errorf("%w: event %d follows on %d", ErrHole, at.GetSequence(), l.sequence)
	}
	l.sequence, l.loose = at.GetSequence(), false
	switch kind := e.GetKind().(type) {
	case *executorv1.Event_Output:
		return fresh, l.chunk(kind.Output)
	case *executorv1.Event_Result:
		return fresh, l.verify(kind.Result)
	}
	return fresh, nil
}

// enter checks the epoch of an event and goes over to it where that was announced.
func (l *ledger) enter(epoch string) error {
	switch {
	case epoch == l.epoch:
	case l.renewed:
		l.epoch, l.sequence = epoch, 0
	case l.epoch == "":
		l.epoch = epoch
	default:
		return fmt.Errorf("%w: the epoch changed from %q to %q", ErrHole, l.epoch, epoch)
	}
	l.renewed = false
	return nil
}

// gap enters what a gap says is missing.
func (l *ledger) gap(at *executorv1.Cursor, g *executorv1.Gap) (verdict, error) {
	if g.GetReason() == executorv1.Gap_REASON_EPOCH_CHANGED {
		if l.renewed {
			return repeated, nil
		}
		// The gap's cursor is either before the new log already or still in the old.
		l.renewed = at.GetEpoch() == l.epoch
		if !l.renewed {
			l.epoch, l.sequence = at.GetEpoch(), at.GetSequence()
		}
		l.loose = false
		l.outputs = [2]output{}
		for _, r := range g.GetResume() {
			if o := l.output(r.GetStream()); o != nil {
				o.next, o.known = r.GetOffset(), true
			}
		}
		return fresh, nil
	}

	if err := l.enter(at.GetEpoch()); err != nil {
		return 0, err
	}
	switch {
	case at.GetSequence() < l.sequence, at.GetSequence() == l.sequence && l.loose:
		return repeated, nil
	case at.GetSequence() > l.sequence:
		// It stands on the last event that is missing.
		l.sequence, l.loose = at.GetSequence(), false
	case g.GetMissingEvents() > 0:
		l.sequence += g.GetMissingEvents()
	default:
		l.loose = true
	}
	var resume [2]*executorv1.StreamPosition
	for _, r := range g.GetResume() {
		if i := index(r.GetStream()); i >= 0 {
			resume[i] = r
		}
	}
	for i, r := range resume {
		o := &l.outputs[i]
		switch {
		case r == nil:
			*o = output{}
		case o.known && r.GetOffset() == o.next:
			// Nothing of this stream is among what is missing.
		case o.known && r.GetOffset() < o.next:
			return 0, fmt.Errorf("%w: a gap goes back in %s from byte %d to %d", ErrProtocol, streamName(i), o.next, r.GetOffset())
		default:
			*o = output{next: r.GetOffset(), known: true}
		}
	}
	return fresh, nil
}

// chunk enters a piece of output.
func (l *ledger) chunk(c *executorv1.OutputChunk) error {
	o := l.output(c.GetStream())
	if o == nil {
		return nil // a stream that this version does not know
	}
	if o.known && c.GetOffset() != o.next {
		return fmt.Errorf("%w: byte %d of %s follows on %d", ErrHole, c.GetOffset(), streamName(index(c.GetStream())), o.next)
	}
	o.next, o.known = c.GetOffset()+int64(len(c.GetData())), true
	if o.whole {
		o.sum = crc32.Update(o.sum, l.table, c.GetData())
	}
	return nil
}

// verify compares the books with what the result says the program wrote.
func (l *ledger) verify(r *executorv1.Result) error {
	var totals [2]*executorv1.StreamTotal
	for _, t := range r.GetTotals() {
		if i := index(t.GetStream()); i >= 0 {
			totals[i] = t
		}
	}
	for i, t := range totals {
		o := l.outputs[i]
		switch {
		case !o.known:
			// Read from the middle, and this stream said nothing since.
		case t.GetSize() != o.next:
			return fmt.Errorf("%w: %s has %d bytes and ended for us at %d", ErrIncomplete, streamName(i), t.GetSize(), o.next)
		case o.whole && t.GetCrc32C() != o.sum:
			return fmt.Errorf("%w: %s has CRC-32C %08x and what came %08x", ErrIncomplete, streamName(i), t.GetCrc32C(), o.sum)
		}
	}
	return nil
}

// output is the entry of a stream; nil for one that this version does not know.
func (l *ledger) output(s executorv1.Stream) *output {
	if i := index(s); i >= 0 {
		return &l.outputs[i]
	}
	return nil
}

// index is a stream's place in the books; -1 for one that this version does not know.
func index(s executorv1.Stream) int {
	switch s {
	case executorv1.Stream_STREAM_STDOUT:
		return 0
	case executorv1.Stream_STREAM_STDERR:
		return 1
	default:
		return -1
	}
}

func streamName(i int) string {
	if i == 0 {
		return "stdout"
	}
	return "stderr"
}
