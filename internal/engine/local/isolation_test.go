package local

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"maps"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/elastic/go-seccomp-bpf/arch"
	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/guestclient"
	"golang.org/x/sys/unix"
)

// surroundings are what the host has that no sandbox may reach.
type surroundings struct {
	canary   string // in names and contents of files, in the environment, in arguments
	stateDir string
	port     int
	abstract string
	addrs    []string
	hostPID  int
}

// pythonPrelude names the machine's system calls and the flags of namespaces.
func pythonPrelude(t *testing.T) string {
	t.Helper()
	info, err := arch.GetInfo("")
	if err != nil {
		t.Fatal(err)
	}
	numbers, err := json.Marshal(info.SyscallNames)
	if err != nil {
		t.Fatal(err)
	}
	flags := []int{unix.CLONE_NEWUSER, unix.CLONE_NEWNS, unix.CLONE_NEWNET, unix.CLONE_NEWPID, unix.CLONE_NEWIPC, unix.CLONE_NEWUTS, unix.CLONE_NEWCGROUP, unix.CLONE_NEWTIME}
	list, err := json.Marshal(flags)
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("NR = %s\nFLAGS = %s\n%s", numbers, list, prelude)
}

// plant puts the canary wherever a leak could take it from, before the engine starts.
func plant(t *testing.T, cfg Config) surroundings {
	t.Helper()
	s := surroundings{canary: fmt.Sprintf("canary%d", time.Now().UnixNano()), stateDir: cfg.StateDir, hostPID: os.Getpid()}
	s.abstract = s.canary + "-abstract"
	t.Setenv("EXECUTORD_TEST_CANARY", s.canary)
	secret := filepath.Join(cfg.StateDir, s.canary)
	if err := os.WriteFile(secret, []byte(s.canary), 0o644); err != nil {
		t.Fatal(err)
	}
	// A file that whoever started executord left open, and not to be closed on exec.
	fd, err := unix.Open(secret, unix.O_RDONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	for network, address := range map[string]string{"tcp": "127.0.0.1:0", "unix": "@" + s.abstract} {
		l, err := net.Listen(network, address)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		if tcp, ok := l.Addr().(*net.TCPAddr); ok {
			s.port = tcp.Port
		}
		// It is there for the host, so that what a sandbox sees says something.
		conn, err := net.Dial(network, l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		conn.Close()
	}
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range addrs {
		if ip, ok := a.(*net.IPNet); ok && ip.IP.IsGlobalUnicast() {
			s.addrs = append(s.addrs, ip.IP.String())
		}
	}
	return s
}

func (s surroundings) fill(t *testing.T, script string) string {
	t.Helper()
	addrs, err := json.Marshal(s.addrs)
	if err != nil {
		t.Fatal(err)
	}
	if s.addrs == nil {
		addrs = []byte("[]")
	}
	return strings.NewReplacer("{{canary}}", s.canary, "{{state}}", s.stateDir, "{{port}}", strconv.Itoa(s.port),
		"{{abstract}}", s.abstract, "{{pid}}", strconv.Itoa(s.hostPID), "{{addresses}}", string(addrs)).Replace(script)
}

// ran is how a script ended.
type ran struct {
	stdout, stderr string
	exit           *guestv1.Exit
}

// runPython runs a script in a sandbox. An error means that the sandbox did not live
// to tell.
func runPython(ctx context.Context, sb engine.Sandbox, id, script string) (ran, error) {
	guest := guestclient.New(sb)
	defer guest.Close()
	r := &guestv1.StartRequest{
		Execution: id, Args: []string{"python3", ""}, SourceName: "main.py", Source: []byte(script), SourceArgument: 1,
		Env:              []string{"PATH=/usr/local/bin:/usr/bin:/bin", "HOME=/root", "EXECUTOR_EXECUTION=" + id},
		WorkingDirectory: "/", TimeoutMs: 120_000,
	}
	if _, err := guest.Start(ctx, r); err != nil {
		return ran{}, err
	}
	var out ran
	for position := int64(0); ; {
		o, err := guest.Read(ctx, id, position, 1<<20, 10*time.Second)
		if err != nil {
			return out, err
		}
		for _, c := range o.Chunks {
			if c.Stream == guestv1.Stream_STREAM_STDOUT {
				out.stdout += string(c.Data)
			} else {
				out.stderr += string(c.Data)
			}
			position += int64(len(c.Data))
		}
		exit := o.Exit
		o.Release()
		if exit != nil {
			out.exit = exit
			return out, nil
		}
	}
}

// sandboxFor makes a sandbox that ends with the test.
func sandboxFor(t testing.TB, e *Engine, spec engine.Spec) engine.Sandbox {
	t.Helper()
	sb, err := e.Create(t.Context(), spec)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if _, err := sb.Terminate(ctx); err != nil {
			t.Errorf("terminate %s: %v", spec.ID, err)
		}
	})
	return sb
}

func TestIsolation(t *testing.T) {
	cfg := testConfig(t)
	around := plant(t, cfg)
	e := engineOver(t, cfg)
	intro := pythonPrelude(t)
	root := os.Geteuid() == 0
	// A sandbox for each row: what one leaves must not be what the next finds.
	for i, c := range isolationTable() {
		t.Run(c.name, func(t *testing.T) {
			if !root && c.ordinary == "-" {
				t.Skip("an ordinary user's sandbox has one user id")
			}
			sb := sandboxFor(t, e, engine.Spec{ID: "row-" + strconv.Itoa(i)})
			if err := makeWorkspace(t.Context(), sb); err != nil {
				t.Fatal(err)
			}
			out, err := runPython(t.Context(), sb, "row", intro+around.fill(t, c.script))
			if err != nil {
				t.Fatalf("the sandbox did not live to tell: %v", err)
			}
			if got, want := strings.TrimSpace(out.stdout), c.expand(root); got != want || out.stderr != "" || out.exit.GetCode() != 0 {
				t.Errorf("got\n%s\nwant\n%s\nstandard error %q, %v", got, want, out.stderr, out.exit)
			}
		})
	}
}

// makeWorkspace makes sure that /workspace is there, as executord does.
func makeWorkspace(ctx context.Context, sb engine.Sandbox) error {
	_, err := runPython(ctx, sb, "workspace", "import os; os.makedirs('/workspace', exist_ok=True)")
	return err
}

// What a sandbox writes to the host's part of its root stays its own.
func TestWritesStayInTheirLayer(t *testing.T) {
	cfg := testConfig(t)
	e := engineOver(t, cfg)
	img, err := e.images.Prepare()
	if err != nil {
		t.Fatal(err)
	}
	host := func() map[string]string {
		sums := make(map[string]string)
		for _, path := range []string{"/usr/bin/bash", "/usr/bin/env", "/usr/lib/os-release", filepath.Join(img.Skeleton, "etc/passwd"), filepath.Join(img.Skeleton, "etc/hosts"), "/etc/passwd", "/etc/hosts"} {
			text, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			info, err := os.Stat(path)
			if err != nil {
				t.Fatal(err)
			}
			sums[path] = fmt.Sprintf("%x %v %v %v", sha256.Sum256(text), info.Mode(), info.ModTime(), info.Sys())
		}
		for _, dir := range []string{"/usr", "/usr/bin", img.Skeleton, filepath.Join(img.Skeleton, "etc"), filepath.Join(img.Skeleton, "tmp")} {
			sums[dir] = listing(t, dir)
		}
		return sums
	}
	before := host()
	const spoil = `
import glob, os, shutil
def attempt(what, f, *args, **kw):
    try: f(*args, **kw); print(what, "done")
    except OSError as e: print(what, e.strerror)
def append(path):
    with open(path, "a") as f: f.write("mine\n")
def replace(path):
    with open(path + ".new", "w") as f: f.write("mine")
    os.rename(path + ".new", path)
attempt("append /etc/passwd", append, "/etc/passwd")
attempt("append /usr/lib/os-release", append, "/usr/lib/os-release")
attempt("replace env", replace, "/usr/bin/env")
attempt("remove hosts", os.remove, "/etc/hosts")
attempt("chmod bash", os.chmod, "/usr/bin/bash", 0o600)
attempt("touch bash", os.utime, "/usr/bin/bash", (1, 1))
attempt("link bash", os.link, "/usr/bin/bash", "/usr/bin/linked")
attempt("make a file", append, "/usr/bin/made")
attempt("make a directory", os.mkdir, "/usr/made")
attempt("remove a tree", shutil.rmtree, "/usr/share/doc")
attempt("xattr", os.setxattr, "/usr/lib/os-release", "user.mine", b"x")
attempt("tmp", append, "/tmp/made")
`
	a := sandboxFor(t, e, engine.Spec{ID: "a"})
	out, err := runPython(t.Context(), a, "spoil", spoil)
	if err != nil || out.exit.GetCode() != 0 {
		t.Fatalf("%v, %v", out, err)
	}
	t.Log(out.stdout)
	if !strings.Contains(out.stdout, "append /etc/passwd done") {
		t.Error("nothing could be written, so nothing was shown")
	}
	if os.Geteuid() == 0 {
		if n := strings.Count(out.stdout, " done\n"); n < 11 {
			t.Errorf("only %d of the writes were done: root in a sandbox should be able to", n)
		}
	}
	if after := host(); !maps.Equal(before, after) {
		for path := range before {
			if before[path] != after[path] {
				t.Errorf("%s on the host changed:\n%s\n%s", path, before[path], after[path])
			}
		}
	}
	b := sandboxFor(t, e, engine.Spec{ID: "b"})
	out, err = runPython(t.Context(), b, "look", `
import glob, os
print([p for p in ("/usr/bin/made", "/usr/made", "/usr/bin/linked", "/tmp/made") if os.path.exists(p)], os.path.exists("/etc/hosts"), os.path.exists("/usr/share/doc"),
      "mine" in open("/etc/passwd").read() + open("/usr/lib/os-release").read(), open("/usr/bin/env", "rb").read(4), oct(os.stat("/usr/bin/bash").st_mode))`)
	if want := `[] True True False b'\x7fELF' 0o100755` + "\n"; err != nil || out.stdout != want {
		t.Errorf("the second sandbox sees %v, %v, want %q", out, err, want)
	}
}

// listing is the names and modes of a directory.
func listing(t *testing.T, dir string) string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	for _, e := range entries {
		if info, err := e.Info(); err == nil {
			fmt.Fprintln(&b, e.Name(), info.Mode(), info.Size())
		}
	}
	return b.String()
}

// What code can do to process 1 of its own sandbox ends that sandbox at most.
func TestAttacksOnTheGuestStayInTheSandbox(t *testing.T) {
	cfg := testConfig(t)
	e := engineOver(t, cfg)
	witness := sandboxFor(t, e, engine.Spec{ID: "witness"})
	intro := pythonPrelude(t)
	for name, script := range map[string]string{
		"kill -KILL":       `os.kill(1, signal.SIGKILL)`,
		"kill -SEGV":       `os.kill(1, signal.SIGSEGV)`,
		"kill -ABRT":       `os.kill(1, signal.SIGABRT)`,
		"kill -BUS":        `os.kill(1, signal.SIGBUS)`,
		"kill -FPE":        `os.kill(1, signal.SIGFPE)`,
		"kill -ILL":        `os.kill(1, signal.SIGILL)`,
		"queued SEGV":      `print(call("rt_sigqueueinfo", 1, 11, struct.pack("<iii", 11, 0, -1) + bytes(116)))`,
		"real-time signal": `[os.kill(1, s) for s in range(34, 65)]`,
		"thread signal":    `[call("tgkill", 1, int(t), 15) for t in os.listdir("/proc/1/task")]`,
		"no descriptors":   `print(call("prlimit64", 1, 7, struct.pack("<QQ", 0, 0), 0))`,
		"no memory":        `print(call("prlimit64", 1, 9, struct.pack("<QQ", 1, 1), 0))`,
		"no processor":     `print(call("prlimit64", 1, 0, struct.pack("<QQ", 1, 1), 0), call("sched_setaffinity", 1, 8, bytes(8)))`,
		"last in line":     `print(attempt(os.sched_setscheduler, 1, os.SCHED_IDLE, os.sched_param(0)), attempt(os.setpriority, os.PRIO_PROCESS, 1, 19))`,
		"first to go":      `print(write("/proc/1/oom_score_adj", "1000"))`,
		"all at once":      `os.kill(-1, signal.SIGKILL)`,
		"disk":             `open("/run/executor/x", "wb").write(bytes(1 << 20)); import shutil; shutil.rmtree("/run/executor")`,
	} {
		t.Run(name, func(t *testing.T) {
			id := "victim-" + regexp.MustCompile(`[^a-z]`).ReplaceAllString(strings.ToLower(name), "-")
			sb := sandboxFor(t, e, engine.Spec{ID: id})
			// What becomes of the victim is only told; how long it is waited for decides nothing.
			ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
			defer cancel()
			out, err := runPython(ctx, sb, "attack", intro+script)
			again, second := runPython(ctx, sb, "after", `print("alive")`)
			select {
			case <-sb.Done():
				t.Logf("ended its own sandbox")
			default:
				if second == nil && again.stdout == "alive\n" {
					t.Logf("nothing happened: %q %q", out.stdout, out.stderr)
				} else {
					t.Logf("its own sandbox is of no more use: %v; %v", err, second)
				}
			}
			if _, err := sb.Terminate(t.Context()); err != nil {
				t.Errorf("terminate after the attack: %v", err)
			}
			if out, err := runPython(t.Context(), witness, "alive-"+id, `print("alive")`); err != nil || out.stdout != "alive\n" {
				t.Errorf("another sandbox after the attack: %v, %v", out, err)
			}
		})
	}
	fresh := sandboxFor(t, e, engine.Spec{ID: "fresh"})
	if out, err := runPython(t.Context(), fresh, "alive", `print("alive")`); err != nil || out.stdout != "alive\n" {
		t.Errorf("a new sandbox after all attacks: %v, %v", out, err)
	}
}

// A sandbox has ids of the host that nothing else has.
func TestIDsAreApart(t *testing.T) {
	needRoot(t)
	e := newEngine(t)
	seen := make(map[string]string)
	for _, id := range []string{"a", "b", "c"} {
		sb := sandboxFor(t, e, engine.Spec{ID: id})
		pid := sb.(*sandbox).process.pid
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/uid_map", pid))
		if err != nil {
			t.Fatal(err)
		}
		fields := strings.Fields(string(text))
		if len(fields) != 3 || fields[0] != "0" || fields[2] != "65536" || fields[1] == "0" || seen[fields[1]] != "" {
			t.Errorf("%s: uid map %q; before %v", id, text, seen)
		}
		seen[fields[1]] = id
		gids, err := os.ReadFile(fmt.Sprintf("/proc/%d/gid_map", pid))
		if err != nil || string(gids) != string(text) {
			t.Errorf("%s: gid map %q, %v, uid map %q", id, gids, err, text)
		}
		// What it writes belongs, on the host, to the ids on disk and not to the range.
		if _, err := runPython(t.Context(), sb, "write", `open("/tmp/file", "w"); import os; os.chown("/tmp/file", 7, 8)`); err != nil {
			t.Fatal(err)
		}
		info, err := os.Stat(filepath.Join(e.sandboxDir(id), layerName, "root/upper/tmp/file"))
		if err != nil {
			t.Fatal(err)
		}
		if st := info.Sys().(*syscall.Stat_t); st.Uid != 7 || st.Gid != 8 {
			t.Errorf("%s: the file belongs to %d:%d on the host, want 7:8", id, st.Uid, st.Gid)
		}
	}
}
