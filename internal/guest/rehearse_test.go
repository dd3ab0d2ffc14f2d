package guest

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
	"github.com/harvest-run/executord/internal/guest/wire"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
)

// A rehearsal of what never comes would only cost time.
func TestRehearsedMessagesArePassable(t *testing.T) {
	kinds := make(map[string]bool)
	for _, m := range rehearsed() {
		var frame bytes.Buffer
		if err := wire.Write(&frame, m); err != nil {
			t.Errorf("%T: %v", m, err)
		}
		got := m.ProtoReflect().New().Interface()
		if _, err := (&wire.Reader{R: &frame}).Read(got); err != nil || !proto.Equal(got, m) {
			t.Errorf("%v became %v, %v", m, got, err)
		}
		kinds[string(m.ProtoReflect().Descriptor().Name())] = true
	}
	for _, m := range []proto.Message{(*guestv1.Setup)(nil), (*guestv1.SetupResult)(nil), (*guestv1.Request)(nil), (*guestv1.Response)(nil)} {
		if name := string(m.ProtoReflect().Descriptor().Name()); !kinds[name] {
			t.Errorf("no %s is rehearsed", name)
		}
	}
}

func TestRehearsalStopsWhenSomebodyWaits(t *testing.T) {
	asked := 0
	rehearse(func() bool { asked++; return false })
	if want := 1 + len(rehearsed()); asked != want {
		t.Errorf("asked %d times, want %d", asked, want)
	}
	asked = 0
	rehearse(func() bool { asked++; return true })
	if asked != 2 {
		t.Errorf("asked %d times by a rehearsal that is not wanted", asked)
	}
}

func TestAwaited(t *testing.T) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pair[0])
	if awaited(pair[0]) {
		t.Error("a silent socket")
	}
	if _, err := unix.Write(pair[1], []byte("x")); err != nil {
		t.Fatal(err)
	}
	if !awaited(pair[0]) {
		t.Error("a socket with a byte")
	}
	if _, err := unix.Read(pair[0], make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	unix.Close(pair[1])
	if !awaited(pair[0]) {
		t.Error("a socket whose other end is gone")
	}
	if awaited(-1) {
		t.Error("no socket")
	}
}

func TestProgramPages(t *testing.T) {
	for line, want := range map[string]bool{
		"00400000-005e0000 r-xp 00000000 00:01 1027 /memfd:executor-guest (deleted)\n":      true,
		"005e0000-0079b000 r--p 001e0000 00:01 1027 /memfd:executor-guest (deleted)\n":      true,
		"0079b000-007c8000 rw-p 0039b000 00:01 1027 /memfd:executor-guest (deleted)\n":      false,
		"007c8000-00800000 rw-p 00000000 00:00 0 \n":                                        false,
		"7ffe1d3f2000-7ffe1d3f4000 r-xp 00000000 00:00 0                          [vdso]\n": false,
		"005e0000-00400000 r-xp 00000000 00:01 1027 /x\n":                                   false,
		"00400000 r-xp 00000000 00:01 1027 /x\n":                                            false,
		"zz-5e0000 r-xp 00000000 00:01 1027 /x\n":                                           false,
		"": false,
	} {
		from, to, ok := programPages(line)
		if ok != want || ok && from >= to {
			t.Errorf("%q: %x to %x, %v, want %v", line, from, to, ok, want)
		}
	}
	// Of the program that runs here some are found; where none are, nothing happens.
	text, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		t.Fatal(err)
	}
	found := 0
	for line := range bytes.Lines(text) {
		if _, _, ok := programPages(string(line)); ok {
			found++
		}
	}
	if found == 0 {
		t.Errorf("none in\n%s", text)
	}
	mapProgram("/proc/self/maps")
	mapProgram(filepath.Join(t.TempDir(), "missing"))
}
