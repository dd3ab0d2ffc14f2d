package guest

import (
	"bytes"
	"os"
	"strconv"
	"strings"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
	"github.com/harvest-run/executord/internal/guest/wire"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
)

// awaited says whether somebody has sent something to a socket, or has gone.
func awaited(socket int) bool {
	poll := []unix.PollFd{{Fd: int32(socket), Events: unix.POLLIN}}
	n, err := unix.Poll(poll, 0)
	return err == nil && n > 0
}

// rehearse does, while nobody waits for the guest, what would otherwise be done when
// somebody does: the program's pages are mapped, and the tables are built by which
// messages are encoded and decoded. It stops when awaited says so, and changes nothing
// but how long things take.
func rehearse(awaited func() bool) {
	if !awaited() {
		mapProgram("/proc/self/maps")
	}
	var frame bytes.Buffer
	for _, m := range rehearsed() {
		if awaited() {
			return
		}
		frame.Reset()
		if wire.Write(&frame, m) == nil {
			_, _ = (&wire.Reader{R: &frame}).Read(m.ProtoReflect().New().Interface())
		}
	}
}

// rehearsed are messages with every part that the making of a sandbox and the first
// command in it come with.
func rehearsed() []proto.Message {
	fd := uint32(1)
	layer := &guestv1.Layer{Source: &guestv1.Layer_MountFd{MountFd: fd}}
	return []proto.Message{
		&guestv1.Setup{
			Hostname: "x", Seccomp: []byte{1}, Capabilities: []uint32{1}, TaskFds: []uint32{1}, CgroupFd: &fd,
			Overlays: []*guestv1.Overlay{{Target: "/", Lower: []*guestv1.Layer{layer}, Writable: layer}},
		},
		&guestv1.SetupResult{},
		&guestv1.Request{Call: &guestv1.Request_Start{Start: &guestv1.StartRequest{Args: []string{"x"}, Env: []string{"x"}}}},
		&guestv1.Request{Call: &guestv1.Request_Read{Read: &guestv1.ReadRequest{Execution: "x"}}},
		&guestv1.Response{Answer: &guestv1.Response_Start{Start: &guestv1.StartResponse{Pid: 1}}},
		&guestv1.Response{Answer: &guestv1.Response_Read{Read: &guestv1.ReadResponse{
			Chunks: []*guestv1.Chunk{{Size: 1}}, Exit: &guestv1.Exit{Status: &guestv1.Exit_Code{Code: 1}},
		}}},
	}
}

// mapProgram maps the pages of the program that are in memory and never written: all
// guests share them, and each would take a fault for every few.
func mapProgram(maps string) {
	text, err := os.ReadFile(maps)
	if err != nil {
		return // then they are mapped one after another
	}
	for line := range strings.Lines(string(text)) {
		from, to, ok := programPages(line)
		if ok {
			_, _, _ = unix.RawSyscall(unix.SYS_MADVISE, from, to-from, unix.MADV_POPULATE_READ)
		}
	}
}

// programPages reads a line of /proc/PID/maps; false if it is not one of a file that is
// mapped to be read or executed only.
func programPages(line string) (from, to uintptr, ok bool) {
	fields := strings.Fields(line)
	if len(fields) < 6 || !strings.HasPrefix(fields[1], "r-") || fields[5][0] != '/' {
		return 0, 0, false
	}
	first, last, _ := strings.Cut(fields[0], "-")
	a, err1 := strconv.ParseUint(first, 16, 64)
	z, err2 := strconv.ParseUint(last, 16, 64)
	return uintptr(a), uintptr(z), err1 == nil && err2 == nil && a < z
}
