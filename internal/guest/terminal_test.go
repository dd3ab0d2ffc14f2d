package guest

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
	"github.com/harvest-run/executord/internal/guestclient"
)

// onTerminal is a request that runs a shell command on a terminal.
func (g *guestProcess) onTerminal(id, script string) *guestv1.StartRequest {
	r := g.sh(id, script)
	r.Terminal = &guestv1.TerminalSize{Rows: 24, Columns: 80}
	return r
}

func (g *guestProcess) resize(id string, rows, columns uint32) error {
	return g.Client.Resize(g.t.Context(), g.full(id), &guestv1.TerminalSize{Rows: rows, Columns: columns})
}

func TestTerminal(t *testing.T) {
	overTrees(t, func(t *testing.T, g *guestProcess) {
		o := g.run(g.onTerminal("x", "tty; stty size; [ -t 0 ] && [ -t 1 ] && [ -t 2 ] && echo all; ps -o tty=,sid= -p $$ | grep -c $$; echo to stderr >&2; : < /dev/tty && echo controlling; exit 7"))
		wantCode(t, o, 7)
		lines := strings.Split(string(o.stdout), "\r\n")
		if len(o.stderr) > 0 || len(lines) < 7 || !strings.HasPrefix(lines[0], "/dev/pts/") ||
			strings.Join(lines[1:], "|") != "24 80|all|1|to stderr|controlling|" {
			t.Errorf("stdout %q, stderr %q", o.stdout, o.stderr)
		}
	})
}

func TestTerminalKeys(t *testing.T) {
	g := startDaemon(t, "cgroup")
	t.Run("ctrl-c", func(t *testing.T) {
		g.start(g.onTerminal("c", "trap 'echo caught; exit 5' INT; echo ready; while :; do sleep 0.05; done"))
		o := &output{}
		g.readUntil("c", o, "ready")
		g.write("c", 0, "\x03", false)
		wantCode(t, g.readAll("c", o), 5)
		if !strings.Contains(string(o.stdout), "^Ccaught\r\n") {
			t.Errorf("stdout %q", o.stdout)
		}
	})
	t.Run("ctrl-c by default", func(t *testing.T) {
		r := g.request("cd", "/bin/sleep", "1000")
		r.Terminal = &guestv1.TerminalSize{Rows: 1, Columns: 65535}
		g.start(r)
		o := &output{}
		// The program may not have taken its terminal yet.
		for at := int64(0); o.exit == nil; at++ {
			if _, err := g.Write("cd", at, "\x03", false, time.Second); err != nil && guestclient.KindOf(err) != guestv1.Error_KIND_ENDED {
				t.Fatal(err)
			}
			g.read("cd", o)
		}
		wantSignal(t, o, syscall.SIGINT)
	})
	t.Run("ctrl-z and job control", func(t *testing.T) {
		g.start(g.onTerminal("z", "set -m; cat; echo stopped $?; fg > /dev/null; echo end"))
		o := &output{}
		g.write("z", 0, "one\n", false)
		g.readUntil("z", o, "one\r\none\r\n")
		g.write("z", 4, "\x1a", false)
		g.readUntil("z", o, "stopped 148")
		g.write("z", 5, "two\n", false)
		g.readUntil("z", o, "two\r\ntwo\r\n")
		g.write("z", 9, "\x04", false)
		wantCode(t, g.readAll("z", o), 0)
		if !strings.HasSuffix(string(o.stdout), "end\r\n") {
			t.Errorf("stdout %q", o.stdout)
		}
	})
	t.Run("the foreground's group", func(t *testing.T) {
		g.start(g.onTerminal("f", "set -m; trap 'echo leader' USR1; bash -c 'trap \"echo foreground; exit 6\" USR1; echo ready; while :; do sleep 0.02; done'; echo code $?"))
		o := &output{}
		g.readUntil("f", o, "ready")
		if err := g.Signal("f", syscall.SIGUSR1, guestv1.SignalRequest_SCOPE_GROUP); err != nil {
			t.Fatal(err)
		}
		g.readAll("f", o)
		if !strings.Contains(string(o.stdout), "foreground\r\ncode 6\r\n") || strings.Contains(string(o.stdout), "leader") {
			t.Errorf("stdout %q", o.stdout)
		}
	})
	for name, input := range map[string]string{"in a new line": "a line\n", "in an unended line": "a line\nand more", "at once": ""} {
		t.Run("the end "+name, func(t *testing.T) {
			g.start(g.onTerminal("d", "stty -echo; echo ready; wc -c"))
			o := &output{}
			g.readUntil("d", o, "ready")
			g.write("d", 0, input, true)
			wantCode(t, g.readAll("d", o), 0)
			if want := fmt.Sprintf("ready\r\n%d\r\n", len(input)); string(o.stdout) != want {
				t.Errorf("stdout %q, want %q", o.stdout, want)
			}
			g.release("d")
		})
	}
}

// In raw mode a terminal is a pipe for all bytes that there are.
func TestTerminalBytes(t *testing.T) {
	g := startDaemon(t, "proc")
	data := randomBytes(9, 1<<20)
	g.start(g.onTerminal("x", "stty raw -echo; echo -n ready; head -c 1048576 | tee >(sha256sum >&2) > /dev/null; wait; echo -n end"))
	o := &output{}
	g.readUntil("x", o, "ready")
	g.start(g.onTerminal("y", "stty raw -echo; echo -n ready; exec head -c 1048576"))
	p := &output{}
	g.readUntil("y", p, "ready")
	var feeding sync.WaitGroup
	for _, id := range []string{"x", "y"} {
		feeding.Go(func() {
			for at := 0; at < len(data); {
				piece := data[at:min(at+30000, len(data))]
				got, err := g.Client.Write(t.Context(), g.full(id), int64(at), piece, false, 10*time.Second)
				if err != nil {
					t.Error(id, err)
					return
				}
				at = int(got.Committed)
			}
		})
	}
	g.readAll("y", p)
	g.readAll("x", o)
	feeding.Wait()
	if !bytes.Equal(p.stdout, append([]byte("ready"), data...)) {
		t.Errorf("%d bytes came back, want %d", len(p.stdout)-5, len(data))
	}
}

// What was written last is read before the end is told, however much it is.
func TestTerminalLosesNoLastWords(t *testing.T) {
	overTrees(t, func(t *testing.T, g *guestProcess) {
		for i := range 60 {
			size := i * i * 40
			o := g.run(g.onTerminal("x", fmt.Sprintf("stty -opost; head -c %d /dev/zero | tr '\\0' x; printf end", size)))
			if want := strings.Repeat("x", size) + "end"; string(o.stdout) != want {
				t.Fatalf("%d bytes came, want %d", len(o.stdout), len(want))
			}
			wantCode(t, o, 0)
		}
		o := g.run(g.onTerminal("x", "stty -opost; head -c 5000000 /dev/zero"))
		if len(o.stdout) != 5000000 {
			t.Errorf("%d bytes of 5000000", len(o.stdout))
		}
	})
}

func TestTerminalStrays(t *testing.T) {
	overTrees(t, func(t *testing.T, g *guestProcess) {
		begun := time.Now()
		o := g.run(g.onTerminal("x", "(trap '' HUP TERM; : > a; while :; do sleep 0.1; done) & setsid sh -c ': > b; exec sleep 1000' & until [ -e a -a -e b ]; do sleep 0.01; done; echo gone"))
		wantCode(t, o, 0)
		if string(o.stdout) != "gone\r\n" || !o.exit.GetTreeEmpty() || o.exit.GetReaped() < 2 {
			t.Errorf("stdout %q, exit %v", o.stdout, o.exit)
		}
		if took := time.Since(begun); took > 15*time.Second {
			t.Errorf("what held the terminal delayed the end by %v", took)
		}
		// A program that gives its terminal up and takes it again is not at its end.
		o = g.run(g.onTerminal("x", "echo one; t=$(tty); exec < /dev/null > /dev/null 2>&1; sleep 0.2; exec < $t > $t; echo two"))
		if string(o.stdout) != "one\r\ntwo\r\n" {
			t.Errorf("stdout %q", o.stdout)
		}
	})
}

func TestTerminalSize(t *testing.T) {
	g := startDaemon(t, "cgroup")
	g.start(g.onTerminal("x", "trap 'stty size' WINCH; echo ready; while read -r line; do echo $line; done; exit 0"))
	o := &output{}
	g.readUntil("x", o, "ready")
	if err := g.resize("x", 50, 132); err != nil {
		t.Fatal(err)
	}
	// bash runs the trap when read is through.
	g.write("x", 0, "on\n", false)
	g.readUntil("x", o, "50 132")
	// A storm: as fast as it goes, the last counts and input comes through.
	at := int64(3)
	for i := range 3000 {
		if err := g.resize("x", uint32(i%200+1), uint32(i%300+1)); err != nil {
			t.Fatal(err)
		}
		if i%500 == 0 {
			line := fmt.Sprintf("line%d\n", i)
			g.write("x", at, line, false)
			at += int64(len(line))
		}
	}
	if err := g.resize("x", 65535, 1); err != nil {
		t.Fatal(err)
	}
	g.write("x", at, "last\n", false)
	g.readUntil("x", o, "65535 1")
	g.readUntil("x", o, "line2500")
	for _, bad := range [][2]uint32{{0, 80}, {80, 0}, {65536, 1}, {1, 1 << 20}} {
		wantRefused(t, g.resize("x", bad[0], bad[1]), guestv1.Error_KIND_INVALID, -1)
		r := g.onTerminal("bad", "true")
		r.Terminal = &guestv1.TerminalSize{Rows: bad[0], Columns: bad[1]}
		_, err := g.Start(t.Context(), r)
		wantRefused(t, err, guestv1.Error_KIND_INVALID, -1)
	}
	g.stop("x", 0)
	g.readAll("x", o)
	wantRefused(t, g.resize("x", 1, 1), guestv1.Error_KIND_ENDED, -1)
	g.start(g.sh("y", "sleep 1000"))
	wantRefused(t, g.resize("y", 1, 1), guestv1.Error_KIND_INVALID, -1)
	g.stop("y", 0)
	g.readAll("y", &output{})
}

// A terminal whose program does not read takes what the kernel keeps, and its keys
// still reach the program.
func TestTerminalThatNobodyReads(t *testing.T) {
	g := startDaemon(t, "proc")
	g.start(g.onTerminal("x", "stty raw -echo; echo -n ready; exec sleep 1000"))
	o := &output{}
	g.readUntil("x", o, "ready")
	full := int64(0)
	for {
		got, err := g.Write("x", full, strings.Repeat("x", 10000), false, 100*time.Millisecond)
		if err != nil {
			t.Fatal(err)
		}
		if got.Committed == full {
			break
		}
		full = got.Committed
	}
	if full > 1<<20 {
		t.Errorf("%d bytes were taken", full)
	}
	if got, err := g.Write("x", full, "", true, 50*time.Millisecond); err != nil || got.Closed {
		t.Errorf("an end without room: %+v, %v", got, err)
	}
	g.stop("x", 0)
	g.readAll("x", o)
}

// Starts, writes, resizes and signals at once, of commands that end: whatever is
// answered is one of the kinds, and the guest lives.
func TestInteractionAtTheEnd(t *testing.T) {
	overTrees(t, func(t *testing.T, g *guestProcess) {
		var all sync.WaitGroup
		for i := range 4 {
			all.Go(func() {
				for n := range 15 {
					id := fmt.Sprintf("x%d-%d", i, n)
					r := g.onTerminal(id, fmt.Sprintf("sleep 0.0%d", n%5))
					if n%3 == 0 {
						r.Terminal, r.Stdin = nil, true
					}
					g.start(r)
					var hands sync.WaitGroup
					for h := range 3 {
						hands.Go(func() {
							for range 50 {
								var err error
								switch (h + rand.IntN(2)) % 3 {
								case 0:
									_, err = g.Write(id, 0, "x", false, 0)
								case 1:
									if r.Terminal == nil {
										continue
									}
									err = g.resize(id, 10, 10)
								case 2:
									err = g.Signal(id, syscall.SIGWINCH, guestv1.SignalRequest_SCOPE_TREE)
								}
								if kind := guestclient.KindOf(err); err != nil && kind != guestv1.Error_KIND_ENDED && kind != guestv1.Error_KIND_CLOSED {
									t.Errorf("%v", err)
								}
							}
						})
					}
					wantCode(t, g.readAll(id, &output{}), 0)
					hands.Wait()
					g.release(id)
				}
			})
		}
		all.Wait()
	})
}
