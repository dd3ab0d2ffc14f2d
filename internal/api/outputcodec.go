package api

import (
	"unicode/utf8"

	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"

	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
)

// Fields of the messages that encodeOutput writes.
const (
	fieldResponseEvent = 1
	fieldEventCursor   = 1
	fieldEventTime     = 2
	fieldEventOutput   = 4
	fieldCursorEpoch   = 1
	fieldCursorSeq     = 2
	fieldTimeSeconds   = 1
	fieldTimeNanos     = 2
	fieldChunkStream   = 1
	fieldChunkOffset   = 2
	fieldChunkData     = 3
)

// encodeOutput encodes a response whose event is output, and returns false for every
// other message. The bytes are those of proto.Marshal, but the data, which comes last, is
// not copied: nearly all that a busy stream sends is data, which never changes once it
// is in an event.
func encodeOutput(message any) (mem.BufferSlice, bool) {
	var e *executorv1.Event
	switch m := message.(type) {
	case *executorv1.ExecuteResponse:
		if m == nil || len(m.ProtoReflect().GetUnknown()) > 0 {
			return nil, false
		}
		e = m.GetEvent()
	case *executorv1.WatchExecutionResponse:
		if m == nil || len(m.ProtoReflect().GetUnknown()) > 0 {
			return nil, false
		}
		e = m.GetEvent()
	}
	chunk, data := e.GetOutput(), e.GetOutput().GetData()
	// Little data is copied sooner than it is kept track of.
	if mem.IsBelowBufferPoolingThreshold(len(data)) || !plain(e) {
		return nil, false
	}
	at, when := e.GetCursor(), e.GetEventTime()

	// A message is preceded by its size: so the sizes first, from the inside out.
	chunkSize := sizeVarint(fieldChunkStream, uint64(int64(chunk.GetStream()))) + sizeVarint(fieldChunkOffset, uint64(chunk.GetOffset())) +
		sizeMessage(fieldChunkData, len(data))
	cursorSize := sizeVarint(fieldCursorSeq, at.GetSequence())
	if at.GetEpoch() != "" {
		cursorSize += sizeMessage(fieldCursorEpoch, len(at.GetEpoch()))
	}
	timeSize := sizeVarint(fieldTimeSeconds, uint64(when.GetSeconds())) + sizeVarint(fieldTimeNanos, uint64(int64(when.GetNanos())))
	eventSize := sizeMessage(fieldEventOutput, chunkSize)
	if at != nil {
		eventSize += sizeMessage(fieldEventCursor, cursorSize)
	}
	if when != nil {
		eventSize += sizeMessage(fieldEventTime, timeSize)
	}

	b := make([]byte, 0, sizeMessage(fieldResponseEvent, eventSize)-len(data))
	b = appendSize(b, fieldResponseEvent, eventSize)
	if at != nil {
		b = appendSize(b, fieldEventCursor, cursorSize)
		if at.GetEpoch() != "" {
			b = append(appendSize(b, fieldCursorEpoch, len(at.GetEpoch())), at.GetEpoch()...)
		}
		b = appendVarint(b, fieldCursorSeq, at.GetSequence())
	}
	if when != nil {
		b = appendSize(b, fieldEventTime, timeSize)
		b = appendVarint(b, fieldTimeSeconds, uint64(when.GetSeconds()))
		b = appendVarint(b, fieldTimeNanos, uint64(int64(when.GetNanos())))
	}
	b = appendSize(b, fieldEventOutput, chunkSize)
	b = appendVarint(b, fieldChunkStream, uint64(int64(chunk.GetStream())))
	b = appendVarint(b, fieldChunkOffset, uint64(chunk.GetOffset()))
	b = appendSize(b, fieldChunkData, len(data))
	return mem.BufferSlice{mem.SliceBuffer(b), mem.SliceBuffer(data)}, true
}

// plain says that an event has nothing in it that encodeOutput does not know, and nothing
// that must be refused.
func plain(e *executorv1.Event) bool {
	return utf8.ValidString(e.GetCursor().GetEpoch()) &&
		len(e.ProtoReflect().GetUnknown()) == 0 && len(e.GetCursor().ProtoReflect().GetUnknown()) == 0 &&
		len(e.GetEventTime().ProtoReflect().GetUnknown()) == 0 && len(e.GetOutput().ProtoReflect().GetUnknown()) == 0
}

// sizeVarint is what appendVarint adds.
func sizeVarint(field protowire.Number, v uint64) int {
	if v == 0 {
		return 0
	}
	return protowire.SizeTag(field) + protowire.SizeVarint(v)
}

// sizeMessage is what a field with so many bytes takes.
func sizeMessage(field protowire.Number, size int) int {
	return protowire.SizeTag(field) + protowire.SizeBytes(size)
}

// appendVarint adds a number; 0 is left out, as everywhere in proto3.
func appendVarint(b []byte, field protowire.Number, v uint64) []byte {
	if v == 0 {
		return b
	}
	return protowire.AppendVarint(protowire.AppendTag(b, field, protowire.VarintType), v)
}

// appendSize adds what stands before so many bytes of a field.
func appendSize(b []byte, field protowire.Number, size int) []byte {
	return protowire.AppendVarint(protowire.AppendTag(b, field, protowire.BytesType), uint64(size))
}
