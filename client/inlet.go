package client

import (
	"crypto/rand"
	"errors"
	"fmt"
	"sync"

	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
)

// inputWindow is how much input is kept until it is taken.
const inputWindow = 64 << 10

// ErrInputClosed is what Attachment.Write returns when no more input is taken: it was
// closed, the program has closed it, or the execution has ended.
var ErrInputClosed = errors.New("the input is closed")

// inlet keeps the input of an attached client until it is taken, and sends it again
// over another connection.
type inlet struct {
	// writer names this client.
	writer string
	// takeOver is for whoever receives.
	takeOver bool
	// done is closed when the Stream ends, cause says why.
	done  <-chan struct{}
	cause func() error

	// sending is held by whoever sends: what is sent keeps its order.
	sending sync.Mutex

	mu   sync.Mutex
	room chan struct{} // closed when something of the below changes
	// send sends over the present connection, the nth; nil without one that is ready.
	send  func(*executorv1.AttachExecutionRequest) error
	nth   int
	known bool   // base is: the server has told where the input is
	base  int64  // the position of the first byte kept
	kept  []byte // not known to be taken
	sent  int64  // how far what is kept was sent over this connection
	ended bool   // the input ends behind what is kept
	told  bool   // and that was sent over this connection
	shut  bool   // nothing more is taken
	size  *executorv1.TerminalSize
	sized bool // size was sent over this connection
}

func newInlet(done <-chan struct{}, cause func() error, takeOver bool) *inlet {
	return &inlet{writer: rand.Text(), takeOver: takeOver, done: done, cause: cause, room: make(chan struct{})}
}

// changed wakes those who wait. The caller holds mu.
func (in *inlet) changed() {
	close(in.room)
	in.room = make(chan struct{})
}

func (in *inlet) taken() int64 {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.base
}

// write keeps p, as there is room, and sends it.
func (in *inlet) write(p []byte) (n int, err error) {
	for len(p) > 0 {
		in.mu.Lock()
		if in.shut || in.ended {
			in.mu.Unlock()
			return n, ErrInputClosed
		}
		fits := min(inputWindow-len(in.kept), len(p))
		in.kept = append(in.kept, p[:fits]...)
		room := in.room
		in.mu.Unlock()
		p, n = p[fits:], n+fits
		if fits > 0 {
			in.flush()
			continue
		}
		select {
		case <-room:
		case <-in.done:
			return n, in.cause()
		}
	}
	return n, nil
}

func (in *inlet) close() {
	in.mu.Lock()
	in.ended = true
	in.mu.Unlock()
	in.flush()
}

func (in *inlet) resize(rows, columns int) {
	in.mu.Lock()
	in.size = &executorv1.TerminalSize{Rows: int32(rows), Columns: int32(columns)}
	in.sized = false
	in.mu.Unlock()
	in.flush()
}

// disconnect notes that there is no connection to send on.
func (in *inlet) disconnect() {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.send = nil
}

// advance notes what the server told: what is taken need not be kept. The first word
// over a connection is also the one after which it is sent on.
func (in *inlet) advance(state *executorv1.InputState, send func(*executorv1.AttachExecutionRequest) error) error {
	in.mu.Lock()
	at := state.GetCommittedOffset()
	if state.GetClosed() {
		// How far it came before that may not be known any more.
		in.shut, in.kept, at = true, nil, max(at, in.base)
		in.known, in.base = true, at
	}
	if !in.known {
		in.known, in.base = true, at
	}
	if at < in.base || at > in.base+int64(len(in.kept)) {
		defer in.mu.Unlock()
		return fmt.Errorf("%w: %d bytes of input were taken, where %d to %d can be: has another written too?", ErrProtocol, at, in.base, in.base+int64(len(in.kept)))
	}
	in.kept = in.kept[min(at-in.base, int64(len(in.kept))):]
	in.base = at
	if in.send == nil {
		in.send, in.sent, in.told, in.sized = send, at, false, false
		in.nth++
	}
	in.sent = max(in.sent, at)
	in.changed()
	in.mu.Unlock()
	in.flush()
	return nil
}

// flush sends what was not sent over this connection.
func (in *inlet) flush() {
	in.sending.Lock()
	defer in.sending.Unlock()
	for {
		m, send, nth := in.next()
		if m == nil {
			return
		}
		if send(m) != nil {
			in.lose(nth) // Recv says why
		}
	}
}

// lose notes that a connection is of no more use; there may be another by now.
func (in *inlet) lose(nth int) {
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.nth == nth {
		in.send = nil
	}
}

// next is the next message to send, how, and over which connection; nil if there is
// none.
func (in *inlet) next() (*executorv1.AttachExecutionRequest, func(*executorv1.AttachExecutionRequest) error, int) {
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.send == nil {
		return nil, nil, 0
	}
	if in.size != nil && !in.sized {
		in.sized = true
		return &executorv1.AttachExecutionRequest{Message: &executorv1.AttachExecutionRequest_Resize{Resize: in.size}}, in.send, in.nth
	}
	if in.shut {
		return nil, nil, 0
	}
	if rest := in.kept[in.sent-in.base:]; len(rest) > 0 {
		offset := in.sent
		piece := append([]byte(nil), rest[:min(len(rest), maxPiece)]...)
		in.sent += int64(len(piece))
		return &executorv1.AttachExecutionRequest{Message: &executorv1.AttachExecutionRequest_Input{
			Input: &executorv1.AttachInput{Offset: &offset, Data: piece},
		}}, in.send, in.nth
	}
	if in.ended && !in.told {
		offset := in.sent
		in.told = true
		return &executorv1.AttachExecutionRequest{Message: &executorv1.AttachExecutionRequest_CloseInput{
			CloseInput: &executorv1.AttachCloseInput{Offset: &offset},
		}}, in.send, in.nth
	}
	return nil, nil, 0
}
