package enginetest

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"strconv"
	"strings"
	"testing"

	"github.com/harvest-run/executord/internal/engine"
)

// commandCases are about what commands find in a sandbox.
func commandCases() []testCase {
	return []testCase{
		{"a command gets its environment and no other", environmentIsExact},
		{"a command finds what programs expect", surroundings},
		{"a sandbox is called by its id", hostName},
		{"a command can become another user", otherUsers},
		{"output is byte-exact", outputIsExact},
		{"a big file lasts between commands and restarts", filesLast},
		{"a source file may be binary", binarySource},
		{"two sandboxes do not see each other", apart},
		{"the end of everything in a sandbox is not that of its guest", killEverything},
		{"what is idle is told from what works", idleness},
	}
}

func environmentIsExact(t *testing.T, h *house) {
	b := h.create("env", engine.Limits{})
	r := request("env", "/usr/bin/env", "-0")
	r.Env = append(r.Env, "EMPTY=", "SPACE=a b", "LINES=a\nb", "UTF8=ü", "BYTES=\x01\x7f", "EQUALS==a=b")
	if _, err := b.guest.Start(h.ctx(), r); err != nil {
		t.Fatal(err)
	}
	out := b.finish("env")
	if want := strings.Join(r.Env, "\x00") + "\x00"; !exited(out, 0) || string(out.stdout) != want {
		t.Errorf("env: %v, want %q", out, want)
	}
}

func surroundings(t *testing.T, h *house) {
	b := h.create("around", engine.Limits{})
	for name, c := range map[string]struct{ script, want string }{
		"working directory": {"pwd", "/workspace"},
		"user":              {"id -u; id -g; id -un", "0\n0\nroot"},
		"umask":             {"umask", "0022"},
		"standard input":    {"wc -c", "0"},
		"temporary files":   {"stat -c %a /tmp; f=$(mktemp); echo x > $f; cat $f", "1777\nx"},
		"home":              {"echo x > ~/file; cat /root/file", "x"},
		"shared memory":     {"echo x > /dev/shm/x; cat /dev/shm/x", "x"},
		"null":              {"echo x > /dev/null; wc -c < /dev/null", "0"},
		"zero and random":   {"head -c 100 /dev/zero | tr -d '\\0' | wc -c; head -c 100 /dev/urandom | wc -c", "0\n100"},
		"loopback":          {"python3 -c 'import socket; l = socket.create_server((\"127.0.0.1\", 0)); c = socket.create_connection(l.getsockname()); c.sendall(b\"x\"); print(l.accept()[0].recv(1))'", "b'x'"},
		"localhost":         {"python3 -c 'import socket; print(socket.gethostbyname(\"localhost\"))'", "127.0.0.1"},
		"standard error":    {"echo x > /dev/stderr; echo y > /dev/stdout; echo z", "y\nz"},
		"process 1":         {"[ -d /proc/1 ]; echo $?", "0"},
		"pseudo-terminals":  {"python3 -c 'import pty; m, s = pty.openpty(); import os; os.write(s, b\"x\"); print(os.read(m, 1))'", "b'x'"},
		"threads":           {"python3 -c 'import threading; t = threading.Thread(target=print, args=(\"x\",)); t.start(); t.join()'", "x"},
		"certificates":      {"python3 -c 'import ssl; ssl.create_default_context(); print(\"ok\")'", "ok"},
		"time":              {"[ $(date +%s) -gt 1700000000 ]; echo $?", "0"},
	} {
		t.Run(name, func(t *testing.T) {
			out := b.run("bash", "-ec", c.script)
			if got := strings.TrimSuffix(string(out.stdout), "\n"); !exited(out, 0) || got != c.want {
				t.Errorf("%s: %v, want %q", c.script, out, c.want)
			}
		})
	}
}

func hostName(t *testing.T, h *house) {
	if got := h.create("called", engine.Limits{}).sh("hostname"); got != "called" {
		t.Errorf("the host name is %q", got)
	}
}

func otherUsers(t *testing.T, h *house) {
	b := h.create("users", engine.Limits{})
	got := b.sh(`python3 -c 'import os
os.chown("/workspace", 1000, 1000); os.setgroups([]); os.setgid(1000); os.setuid(1000)
open("/workspace/theirs", "w"); open("/tmp/theirs", "w")
print(os.stat("/workspace/theirs").st_uid, len(os.listdir("/usr/bin")) > 0)
for path in "/etc/of-1000", "/root/of-1000":
    try: open(path, "w"); print("wrote", path)
    except PermissionError: pass
'`)
	if got != "1000 True" {
		t.Errorf("as another user: %q", got)
	}
}

func outputIsExact(t *testing.T, h *house) {
	b := h.create("bytes", engine.Limits{})
	every := make([]byte, 256)
	for i := range every {
		every[i] = byte(i)
	}
	out := b.run("python3", "-c", `import os
every = bytes(range(256))
os.write(1, every); os.write(2, every[::-1])`)
	backwards := bytes.Clone(every)
	for i := range every {
		backwards[255-i] = every[i]
	}
	if !exited(out, 0) || !bytes.Equal(out.stdout, every) || !bytes.Equal(out.stderr, backwards) {
		t.Errorf("every byte: %v", out)
	}

	const size = 16 << 20
	out = b.run("python3", "-c", `import hashlib, random, sys
data = random.Random(1).randbytes(`+strconv.Itoa(size)+`)
sys.stderr.write(hashlib.sha256(data).hexdigest())
sys.stderr.flush()
sys.stdout.buffer.write(data)`)
	sum := sha256.Sum256(out.stdout)
	if !exited(out, 0) || len(out.stdout) != size || hex.EncodeToString(sum[:]) != string(out.stderr) {
		t.Errorf("%d bytes came out as %d with sum %x, want %s; %v", size, len(out.stdout), sum, out.stderr, out.exit)
	}
	if out := b.run("true"); !exited(out, 0) || len(out.stdout)+len(out.stderr) > 0 {
		t.Errorf("no output: %v", out)
	}
	// Without a newline, and written just before the end.
	if out := b.run("bash", "-c", "printf last; exec true"); string(out.stdout) != "last" {
		t.Errorf("last words: %v", out)
	}
}

func filesLast(t *testing.T, h *house) {
	b := h.create("files", engine.Limits{})
	b.sh("head -c 100000000 /dev/urandom > /workspace/big; echo x > /etc/made; echo y > /root/made")
	sum := b.sh("sha256sum /workspace/big")
	if again := b.sh("sha256sum big"); strings.Fields(again)[0] != strings.Fields(sum)[0] {
		t.Errorf("the file changed between commands: %q, then %q", sum, again)
	}
	h.reopen()
	b = h.open("files")
	if again := b.sh("sha256sum /workspace/big"); again != sum {
		t.Errorf("the file changed over a restart: %q, then %q", sum, again)
	}
	if got := b.sh("cat /etc/made /root/made; ls /workspace"); got != "x\ny\nbig" {
		t.Errorf("after the restart: %q", got)
	}
}

func binarySource(t *testing.T, h *house) {
	b := h.create("source", engine.Limits{})
	source := make([]byte, 1<<20)
	for i := range source {
		source[i] = byte(i * 7)
	}
	r := request("sum", "sha256sum", "")
	r.SourceName, r.Source, r.SourceArgument = "program", source, 1
	if _, err := b.guest.Start(h.ctx(), r); err != nil {
		t.Fatal(err)
	}
	out := b.finish("sum")
	sum := sha256.Sum256(source)
	if got := strings.Fields(string(out.stdout)); len(got) != 2 || got[0] != hex.EncodeToString(sum[:]) || !strings.HasSuffix(got[1], "/program") {
		t.Errorf("the source arrived as %q, want sum %x", got, sum)
	}
}

func apart(t *testing.T, h *house) {
	a, b := h.create("a", engine.Limits{}), h.create("b", engine.Limits{})
	a.sh("for d in /workspace /tmp /root /dev/shm /etc /var/tmp /run; do echo secret > $d/of-a; done")
	a.begin("listen", "python3", "-c", `import socket, sys, time
s = [socket.socket(socket.AF_INET), socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)]
s[0].bind(("127.0.0.1", 7777)); s[1].bind("\0of-a"); s[2].bind("/tmp/of-a.sock")
for x in s: x.listen()
print("ready", flush=True)
time.sleep(1000)`)
	a.wrote("listen", "ready\n")

	if got := b.sh("find / -xdev -name of-a 2>/dev/null; ls -A /workspace /tmp /dev/shm | grep of-a || true"); got != "" {
		t.Errorf("b sees files of a: %q", got)
	}
	if got := b.sh("cat /proc/[0-9]*/cmdline | tr '\\0' ' '"); strings.Contains(got, "of-a") {
		t.Errorf("b sees processes of a: %q", got)
	}
	if got := b.sh("cat /proc/net/unix /proc/net/tcp"); strings.Contains(got, "of-a") || strings.Contains(got, ":1E61") {
		t.Errorf("b sees sockets of a: %q", got)
	}
	out := b.run("python3", "-c", `import socket
for family, address in (socket.AF_INET, ("127.0.0.1", 7777)), (socket.AF_UNIX, "\0of-a"):
    try: socket.socket(family).connect(address); print("connected to", address)
    except OSError: pass`)
	if !exited(out, 0) || len(out.stdout) > 0 {
		t.Errorf("b reaches a: %v", out)
	}
	b.answers()
}

func killEverything(t *testing.T, h *house) {
	a, b := h.create("a", engine.Limits{}), h.create("b", engine.Limits{})
	a.begin("listen", "sleep", "1000")
	// The number of the other's process means nothing here.
	if out := b.run("bash", "-c", "kill -KILL -1"); out.exit.GetStatus() == nil {
		t.Errorf("kill everything in b: %v", out)
	}
	info, err := a.guest.Info(h.ctx())
	if err != nil || len(info.GetExecutions()) == 0 {
		t.Errorf("a after kill -1 in b: %v, %v", info, err)
	}
	still, err := a.guest.Read(h.ctx(), "listen", 0, 1024, 0)
	if err != nil || still.Exit != nil {
		t.Errorf("a's command after kill -1 in b: %v, %v", still, err)
	}
	if out := b.run("echo", "still here"); !exited(out, 0) {
		t.Errorf("b after kill -1: %v", out)
	}
}
