package eventlog

import (
	"encoding/binary"
	"errors"
)

// A record is a header and its data; integers are little-endian:
//
//	 0  crc32c of everything behind it, data included
//	 4  length of the data
//	 8  sequence
//	16  time, Unix nanoseconds
//	24  offset in the stream; 0 if the record is not output
//	32  kind
//	33  stream; 0 if the record is not output
//	34  flags
//	35  0
//
// The CRC comes first so that it covers the length too. Zeros, which a file system
// can leave at the end of a file after a power cut, are not a record.
const recordHeaderSize = 36

// flagLast marks the record that seals the log.
const flagLast = 1

// record is a decoded record; data is part of the buffer it was decoded from.
type record struct {
	sequence uint64
	time     int64
	offset   int64
	kind     Kind
	stream   Stream
	flags    uint8
	data     []byte
}

var (
	// errShort means that the bytes end before the record does.
	errShort = errors.New("record is cut off")
	// errDamaged means that the bytes are not what was written.
	errDamaged = errors.New("record is damaged")
)

// appendHeader adds r's header to b, with 0 for the CRC.
func appendHeader(b []byte, r *record) []byte {
	b = append(b, 0, 0, 0, 0)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(r.data)))
	b = binary.LittleEndian.AppendUint64(b, r.sequence)
	b = binary.LittleEndian.AppendUint64(b, uint64(r.time))
	b = binary.LittleEndian.AppendUint64(b, uint64(r.offset))
	return append(b, byte(r.kind), byte(r.stream), r.flags, 0)
}

// decodeRecord reads the record that b begins with and says how long it is. Its
// errors are errShort and errDamaged.
func decodeRecord(b []byte) (record, int, error) {
	if len(b) < recordHeaderSize {
		return record{}, 0, errShort
	}
	// The length is not to be trusted before the CRC was compared, but the CRC can
	// only be compared with a length. The bound keeps a wrong one from being waited for.
	length := binary.LittleEndian.Uint32(b[4:])
	if length > MaxData {
		return record{}, 0, errDamaged
	}
	size := recordHeaderSize + int(length)
	if len(b) < size {
		return record{}, 0, errShort
	}
	if checksum(0, b[4:size]) != binary.LittleEndian.Uint32(b) {
		return record{}, 0, errDamaged
	}
	r := record{
		sequence: binary.LittleEndian.Uint64(b[8:]),
		time:     int64(binary.LittleEndian.Uint64(b[16:])),
		offset:   int64(binary.LittleEndian.Uint64(b[24:])),
		kind:     Kind(b[32]),
		stream:   Stream(b[33]),
		flags:    b[34],
		data:     b[recordHeaderSize:size:size],
	}
	if r.kind == 0 || b[35] != 0 || r.flags&^flagLast != 0 {
		return record{}, 0, errDamaged
	}
	if r.kind == KindOutput {
		if !r.stream.valid() {
			return record{}, 0, errDamaged
		}
	} else if r.stream != 0 || r.offset != 0 {
		return record{}, 0, errDamaged
	}
	return r, size, nil
}

// setCRC completes a header with the CRC of what is behind the CRC.
func setCRC(header []byte, crc uint32) { binary.LittleEndian.PutUint32(header, crc) }

func (s Stream) valid() bool { return s == Stdout || s == Stderr }

// index is the place of s in pairs such as Gap.Resume.
func (s Stream) index() int { return int(s - Stdout) }
