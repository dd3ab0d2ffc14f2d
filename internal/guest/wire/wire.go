// Package wire is the framing between executord and the guest: what both ends of
// the byte pipe agree on beside the messages themselves. It is linked into the
// guest, so it imports nothing but protobuf and the standard library.
package wire

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"

	"google.golang.org/protobuf/proto"
)

// Limits on one frame. A frame that goes over is refused before anything is
// allocated for it: either end may be hostile.
const (
	// MaxMessage bounds the encoded message. A start carries up to 1 MiB of source.
	MaxMessage = 2 << 20
	// MaxPayload bounds the payload, and so what one read can be answered with.
	MaxPayload = 1 << 20
	// MaxAnswer bounds the encoded message of a Response. It is less than MaxMessage
	// because one small field of a message becomes an object when it is decoded: what
	// a hostile guest can make executord allocate is many times what it sends.
	MaxAnswer = 128 << 10
	// MaxChunks bounds the chunks of one ReadResponse.
	MaxChunks = 1024
)

// Protocol is the version that this package speaks.
const Protocol = 1

const headerSize = 8

// ErrUnsendable is in the chain of Write's error if the message itself is what
// cannot be sent. Nothing was written then, and the pipe is as good as before.
var ErrUnsendable = errors.New("message cannot be sent")

// Write writes one frame. The pieces of payload are written from where they lie;
// on a socket message and payload go out in one system call.
func Write(w io.Writer, m proto.Message, payload ...[]byte) error {
	size := proto.Size(m)
	total := 0
	for _, p := range payload {
		total += len(p)
	}
	if size > MaxMessage || total > MaxPayload {
		return fmt.Errorf("%w: frame of %d+%d bytes is over the limit of %d+%d", ErrUnsendable, size, total, MaxMessage, MaxPayload)
	}
	head := make([]byte, headerSize, headerSize+size)
	binary.BigEndian.PutUint32(head[0:], uint32(size))
	binary.BigEndian.PutUint32(head[4:], uint32(total))
	head, err := proto.MarshalOptions{UseCachedSize: true}.MarshalAppend(head, m)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrUnsendable, err)
	}
	buffers := make(net.Buffers, 1, 1+len(payload))
	buffers[0] = head
	buffers = append(buffers, payload...)
	_, err = buffers.WriteTo(w)
	return err
}

// Reader reads frames. The zero value with R set is ready; it is for one goroutine.
type Reader struct {
	// R is where the frames come from; best a buffered reader.
	R io.Reader
	// Limit bounds the encoded message; 0 is MaxMessage.
	Limit uint32

	head    [headerSize]byte
	message []byte
}

// Read reads the next frame's message into m and returns the size of its payload,
// which the caller must read from R before the next Read. io.EOF means that the
// pipe ended between frames.
func (r *Reader) Read(m proto.Message) (payload int, err error) {
	if _, err := io.ReadFull(r.R, r.head[:]); err != nil {
		return 0, err
	}
	size := binary.BigEndian.Uint32(r.head[0:])
	total := binary.BigEndian.Uint32(r.head[4:])
	limit := r.Limit
	if limit == 0 {
		limit = MaxMessage
	}
	if size > limit || total > MaxPayload {
		return 0, fmt.Errorf("frame of %d+%d bytes is over the limit of %d+%d", size, total, limit, MaxPayload)
	}
	if uint32(cap(r.message)) < size {
		r.message = make([]byte, size)
	}
	if _, err := io.ReadFull(r.R, r.message[:size]); err != nil {
		return 0, noEOF(err)
	}
	if err := proto.Unmarshal(r.message[:size], m); err != nil {
		return 0, fmt.Errorf("decode frame: %w", err)
	}
	if cap(r.message) > 64<<10 {
		r.message = nil // one large start must not be held for the life of the pipe
	}
	return int(total), nil
}

// noEOF turns an end in the middle of a frame into an error of its own.
func noEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}
