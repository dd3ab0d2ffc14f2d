package enginetest

import (
	"crypto/sha256"
	"encoding/hex"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/guestclient"
)

// interactiveCases are about input, terminals and signals.
func interactiveCases() []testCase {
	return []testCase{
		{"input is byte-exact, also over restarts", inputIsExact},
		{"a command has a terminal of its own", ownTerminal},
		{"signals reach whom they are for", signalsReach},
	}
}

// write writes all of data from an offset on, and with end the end.
func (b *box) write(execution string, offset int64, data []byte, end bool) {
	b.h.t.Helper()
	for at := offset; ; {
		piece := data[at-offset:]
		last := len(piece) <= guestclient.MaxWrite
		piece = piece[:min(len(piece), guestclient.MaxWrite)]
		got, err := b.guest.Write(b.h.ctx(), execution, at, piece, end && last, 5*time.Second)
		if err != nil {
			b.h.t.Fatalf("write to %s in %s at %d: %v", execution, b.ID(), at, err)
		}
		if at = got.Committed; at == offset+int64(len(data)) && got.Closed == end {
			return
		}
	}
}

func inputIsExact(t *testing.T, h *house) {
	b := h.create("input", engine.Limits{})
	r := request("sum", "sha256sum")
	r.Stdin = true
	if _, err := b.guest.Start(h.ctx(), r); err != nil {
		t.Fatal(err)
	}
	data := make([]byte, 4<<20)
	_, _ = rand.NewChaCha8([32]byte{3}).Read(data)
	b.write("sum", 0, data[:1<<20], false)
	h.reopen()
	b = h.open("input")
	if got, err := b.guest.Input(h.ctx(), "sum"); err != nil || got.Committed != 1<<20 || got.Closed {
		t.Errorf("after a restart: %+v, %v", got, err)
	}
	// The last of it again: nobody knows what an engine's user has been told.
	b.write("sum", 1<<20-1000, data[1<<20-1000:], true)
	out := b.finish("sum")
	sum := sha256.Sum256(data)
	if !exited(out, 0) || !strings.HasPrefix(string(out.stdout), hex.EncodeToString(sum[:])) {
		t.Errorf("want sum %x: %v", sum, out)
	}
}

func ownTerminal(t *testing.T, h *house) {
	b := h.create("terminal", engine.Limits{})
	r := request("tty", "bash", "-c", "tty; stty size; trap 'stty size' WINCH; stty -echo; echo ready; while read -r line; do echo got $line; done; echo end")
	r.Terminal = &guestv1.TerminalSize{Rows: 24, Columns: 80}
	if _, err := b.guest.Start(h.ctx(), r); err != nil {
		t.Fatal(err)
	}
	b.wrote("tty", "/dev/pts/0\r\n24 80\r\nready\r\n")
	if err := b.guest.Resize(h.ctx(), "tty", &guestv1.TerminalSize{Rows: 50, Columns: 132}); err != nil {
		t.Fatal(err)
	}
	b.write("tty", 0, []byte("a line\n"), false)
	b.wrote("tty", "50 132")
	b.wrote("tty", "got a line")
	// Two at a time are two, and neither reaches the other.
	if got := b.sh("ls /dev/pts | sort | tr '\\n' ' '"); got != "0 ptmx " {
		t.Errorf("terminals in the sandbox: %q", got)
	}
	b.write("tty", 7, nil, true)
	if out := b.finish("tty"); !exited(out, 0) || !strings.HasSuffix(string(out.stdout), "end\r\n") {
		t.Errorf("%v", out)
	}
	r = request("key", "sleep", "1000")
	r.Terminal = &guestv1.TerminalSize{Rows: 1, Columns: 1}
	if _, err := b.guest.Start(h.ctx(), r); err != nil {
		t.Fatal(err)
	}
	b.write("key", 0, []byte("\x03"), false)
	if out := b.finish("key"); !signalled(out, 2) {
		t.Errorf("after ctrl-c: %v", out)
	}
}

func signalsReach(t *testing.T, h *house) {
	b := h.create("signals", engine.Limits{})
	const wait = `trap "echo $0 got it; exit 7" USR1; echo $0 ready; while :; do sleep 0.02; done`
	for name, c := range map[string]struct {
		scope guestv1.SignalRequest_Scope
		want  []string
	}{
		"process": {guestv1.SignalRequest_SCOPE_PROCESS, []string{"leader"}},
		"group":   {guestv1.SignalRequest_SCOPE_GROUP, []string{"leader", "member"}},
		"tree":    {guestv1.SignalRequest_SCOPE_TREE, []string{"leader", "member", "stranger"}},
	} {
		b.begin(name, "bash", "-c", "bash -c '"+wait+"' member & setsid bash -c '"+wait+"' stranger & exec bash -c '"+wait+"' leader")
		for _, who := range []string{"leader", "member", "stranger"} {
			b.wrote(name, who+" ready\n")
		}
		if err := b.guest.Signal(h.ctx(), name, 10, c.scope); err != nil {
			t.Fatal(err)
		}
		out := b.finish(name)
		if n := strings.Count(string(out.stdout), "got it"); !exited(out, 7) || n < 1 || n > len(c.want) {
			t.Errorf("%s: %v, want only %q to get it", name, out, c.want)
		}
	}
	if err := b.guest.Signal(h.ctx(), "tree", 10, guestv1.SignalRequest_SCOPE_TREE); guestclient.KindOf(err) != guestv1.Error_KIND_ENDED {
		t.Errorf("a signal to one that has ended: %v", err)
	}
}
