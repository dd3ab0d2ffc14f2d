package eventlog

import (
	"hash/crc32"
	"math/bits"
)

// checksum continues a CRC-32C.
func checksum(crc uint32, p []byte) uint32 {
	return crc32.Update(crc, crc32.MakeTable(crc32.Castagnoli), p)
}

// checksums continues the CRC of a record and that of its stream with the same data.
// When output comes fast, its records are full, and looking at all bytes twice costs
// a tenth of Append. So a full record's data is looked at once, and its CRC joined to
// both. The zero value is ready.
type checksums struct {
	// shift is what MaxData zero bytes make of each bit of a CRC; nil until needed,
	// for it costs as much as some 32 full records.
	shift *[32]uint32
}

func (c *checksums) update(record, stream uint32, data []byte) (newRecord, newStream uint32) {
	if len(data) != MaxData {
		return checksum(record, data), checksum(stream, data)
	}
	if c.shift == nil {
		zeros := make([]byte, MaxData)
		c.shift = new([32]uint32)
		for i := range c.shift {
			// A CRC is inverted before and after; the inversions are taken away here.
			c.shift[i] = ^checksum(^uint32(1<<i), zeros)
		}
	}
	crc := checksum(0, data)
	return c.join(record, crc), c.join(stream, crc)
}

// join returns the CRC of something followed by MaxData bytes. A CRC is linear: what
// its bits become is added up without carry.
func (c *checksums) join(first, second uint32) uint32 {
	for ; first != 0; first &= first - 1 {
		second ^= c.shift[bits.TrailingZeros32(first)]
	}
	return second
}
