package eventlog

import (
	"os"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// writeback has the disk begin with complete segments while the log grows, so that
// there is little left to be waited for when it is sealed. Append never waits for it.
type writeback struct {
	group sync.WaitGroup
	busy  atomic.Bool
}

// begin takes a complete segment's file over. If the disk is still busy with the one
// before, this one is left to the kernel and to Seal.
func (w *writeback) begin(file *os.File) {
	if !w.busy.CompareAndSwap(false, true) {
		_ = file.Close() // all writes have succeeded
		return
	}
	w.group.Go(func() {
		defer w.busy.Store(false)
		// This begins and does not wait for the end, nor takes an error away: the sync
		// that a promise is based on comes later and has it.
		_ = unix.SyncFileRange(int(file.Fd()), 0, 0, unix.SYNC_FILE_RANGE_WRITE)
		_ = file.Close()
	})
}

// willStay says whether what was appended lately is likely to be there when the log is
// sealed. When much was appended, retention may drop it before the kernel would have
// written it to the disk, and the disk is spared.
func (l *Log) willStay() bool { return l.retainedBytes == 0 || l.size <= l.retainedBytes/2 }
