package client

import (
	"errors"
	"testing"

	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
)

// FuzzLedger feeds the books with any sequence of events. Whatever they are, what is
// admitted as fresh goes up without holes but those that a gap announced, and its
// bytes follow on one another but for the same.
func FuzzLedger(f *testing.F) {
	f.Add([]byte("\x00\x01\x10\x02\x11\x03\x12\x04\x43\x05"), uint8(0))
	f.Add([]byte("\x00\x01\x10\x02\x10\x02\x24\x00\x10\x05"), uint8(2))
	f.Add([]byte("\x30\x01\x00\x01\x20\x03\x12\x04\x43\x09"), uint8(1))
	f.Add([]byte("\x00\x01\x51\x00\x00\x01\x10\x02"), uint8(0))
	f.Fuzz(func(t *testing.T, script []byte, from uint8) {
		books := newLedger(&executorv1.Cursor{Epoch: "a", Sequence: uint64(from)})
		last, announced := uint64(from), false
		var next [2]int64
		known := [2]bool{from == 0, from == 0}
		for ; len(script) >= 2; script = script[2:] {
			e, arg := &executorv1.Event{Cursor: &executorv1.Cursor{Epoch: "a", Sequence: uint64(script[1])}}, int64(script[0]&0xf)
			switch script[0] >> 4 {
			case 0:
				e.Kind = &executorv1.Event_Started{Started: &executorv1.Started{Execution: "executions/x"}}
			case 1:
				e.Kind = &executorv1.Event_Output{Output: &executorv1.OutputChunk{
					Stream: executorv1.Stream(arg%2 + 1), Offset: books.outputs[arg%2].next + arg/8, Data: make([]byte, arg),
				}}
			case 2:
				e.Kind = &executorv1.Event_Gap{Gap: &executorv1.Gap{
					Reason: executorv1.Gap_REASON_RETENTION, MissingEvents: uint64(arg),
					Resume: []*executorv1.StreamPosition{{Stream: executorv1.Stream_STREAM_STDOUT, Offset: arg * 8}},
				}}
			case 3:
				e.Kind = &executorv1.Event_Heartbeat{Heartbeat: &executorv1.Heartbeat{}}
			case 4:
				e.Kind = &executorv1.Event_Result{Result: &executorv1.Result{}}
			case 5:
				e.Kind = &executorv1.Event_Gap{Gap: &executorv1.Gap{Reason: executorv1.Gap_REASON_EPOCH_CHANGED}}
				e.Cursor.Epoch = []string{"a", "b"}[arg%2]
			case 6:
				e.Cursor = nil
			}
			what, err := books.admit(e)
			if err != nil {
				if !errors.Is(err, ErrHole) && !errors.Is(err, ErrProtocol) && !errors.Is(err, ErrIncomplete) {
					t.Fatalf("an error of no kind: %v", err)
				}
				return
			}
			if what != fresh {
				continue
			}
			if e.GetGap() != nil {
				announced, known = true, [2]bool{}
				continue
			}
			at := e.GetCursor().GetSequence()
			if at != last+1 && !announced {
				t.Fatalf("event %d follows on %d unannounced", at, last)
			}
			if at <= last && !announced {
				t.Fatalf("event %d was told again after %d", at, last)
			}
			last, announced = at, false
			if c := e.GetOutput(); c != nil {
				i := index(c.GetStream())
				if known[i] && c.GetOffset() != next[i] {
					t.Fatalf("byte %d follows on %d", c.GetOffset(), next[i])
				}
				next[i], known[i] = c.GetOffset()+int64(len(c.GetData())), true
			}
		}
	})
}

func TestLedgerGoesBackInNoGap(t *testing.T) {
	books := newLedger(nil)
	events := []*executorv1.Event{
		{Cursor: &executorv1.Cursor{Epoch: "a", Sequence: 1}, Kind: &executorv1.Event_Started{}},
		{Cursor: &executorv1.Cursor{Epoch: "a", Sequence: 2}, Kind: &executorv1.Event_Output{
			Output: &executorv1.OutputChunk{Stream: executorv1.Stream_STREAM_STDERR, Data: []byte("twelve bytes")},
		}},
	}
	for _, e := range events {
		if what, err := books.admit(e); what != fresh || err != nil {
			t.Fatalf("verdict %v, error %v", what, err)
		}
	}
	_, err := books.admit(&executorv1.Event{Cursor: &executorv1.Cursor{Epoch: "a", Sequence: 4}, Kind: &executorv1.Event_Gap{Gap: &executorv1.Gap{
		Reason: executorv1.Gap_REASON_DAMAGED, MissingEvents: 2,
		Resume: []*executorv1.StreamPosition{{Stream: executorv1.Stream_STREAM_STDERR, Offset: 5}},
	}}})
	if !errors.Is(err, ErrProtocol) {
		t.Errorf("error %v: bytes would be told twice", err)
	}
}

func TestLedgerToldGapsAgain(t *testing.T) {
	gap := func(epoch string, sequence, missing uint64, reason executorv1.Gap_Reason) *executorv1.Event {
		return &executorv1.Event{Cursor: &executorv1.Cursor{Epoch: epoch, Sequence: sequence}, Kind: &executorv1.Event_Gap{
			Gap: &executorv1.Gap{Reason: reason, MissingEvents: missing},
		}}
	}
	tests := map[string][2]*executorv1.Event{
		"of a number, from before":         {gap("a", 3, 2, executorv1.Gap_REASON_RETENTION), gap("a", 3, 2, executorv1.Gap_REASON_RETENTION)},
		"of an unknown number":             {gap("a", 3, 0, executorv1.Gap_REASON_DAMAGED), gap("a", 3, 0, executorv1.Gap_REASON_DAMAGED)},
		"of an epoch, told in the old one": {gap("a", 3, 0, executorv1.Gap_REASON_EPOCH_CHANGED), gap("a", 3, 0, executorv1.Gap_REASON_EPOCH_CHANGED)},
		"older":                            {gap("a", 9, 6, executorv1.Gap_REASON_RETENTION), gap("a", 5, 2, executorv1.Gap_REASON_RETENTION)},
	}
	for name, pair := range tests {
		t.Run(name, func(t *testing.T) {
			books := newLedger(&executorv1.Cursor{Epoch: "a", Sequence: 3})
			if what, err := books.admit(pair[0]); what != fresh || err != nil {
				t.Fatalf("verdict %v, error %v", what, err)
			}
			if what, err := books.admit(pair[1]); what != repeated || err != nil {
				t.Errorf("again: verdict %v, error %v", what, err)
			}
		})
	}
	books := newLedger(&executorv1.Cursor{Epoch: "a", Sequence: 3})
	if _, err := books.admit(gap("b", 9, 2, executorv1.Gap_REASON_RETENTION)); !errors.Is(err, ErrHole) {
		t.Errorf("a gap of another epoch: %v", err)
	}
	if _, err := books.admit(&executorv1.Event{Kind: gap("", 0, 0, 0).GetKind()}); !errors.Is(err, ErrProtocol) {
		t.Errorf("a gap without a cursor: %v", err)
	}
}

func TestLedgerSkipsStreamsOfALaterVersion(t *testing.T) {
	books := newLedger(nil)
	for i, offset := range []int64{7, 3} {
		what, err := books.admit(&executorv1.Event{Cursor: &executorv1.Cursor{Epoch: "a", Sequence: uint64(i + 1)}, Kind: &executorv1.Event_Output{
			Output: &executorv1.OutputChunk{Stream: 9, Offset: offset, Data: []byte("x")},
		}})
		if what != fresh || err != nil {
			t.Errorf("verdict %v, error %v", what, err)
		}
	}
	if !books.whole() {
		t.Error("not whole")
	}
}
