package guest

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
	"github.com/harvest-run/executord/internal/guestclient"
	"golang.org/x/sys/unix"
)

func TestExitCodes(t *testing.T) {
	overTrees(t, func(t *testing.T, g *guestProcess) {
		for _, code := range []int32{0, 1, 126, 127, 255} {
			o := g.run(g.sh(fmt.Sprint("code-", code), fmt.Sprint("exit ", code)))
			wantCode(t, o, code)
			if e := o.exit; e.GetStopCause() != 0 || e.GetKilled() || e.GetReaped() != 0 || !e.GetTreeEmpty() || e.GetCoreDumped() || e.FirstOutputMicros != nil {
				t.Errorf("exit %d: %v", code, e)
			}
		}
	})
}

func TestSignals(t *testing.T) {
	overTrees(t, func(t *testing.T, g *guestProcess) {
		for _, sig := range []unix.Signal{unix.SIGTERM, unix.SIGKILL, unix.SIGHUP, unix.SIGPIPE, unix.SIGUSR1, unix.SIGABRT, unix.SIGSEGV, 64} {
			o := g.run(g.sh(fmt.Sprint("signal-", int(sig)), fmt.Sprintf("echo before; kill -%d $$; echo after", int(sig))))
			wantSignal(t, o, sig)
			if string(o.stdout) != "before\n" || o.exit.GetStopCause() != 0 || o.exit.GetKilled() || o.exit.GetCoreDumped() {
				t.Errorf("signal %d: stdout %q, %v", sig, o.stdout, o.exit)
			}
		}
	})
}

func TestCoreDump(t *testing.T) {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_CORE, &limit); err != nil || limit.Max == 0 {
		t.Skip("no core can be dumped here")
	}
	overTrees(t, func(t *testing.T, g *guestProcess) {
		o := g.run(g.sh("core", "ulimit -c unlimited; kill -SEGV $$"))
		wantSignal(t, o, unix.SIGSEGV)
		if !o.exit.GetCoreDumped() {
			t.Errorf("no core dump is told: %v", o.exit)
		}
	})
}

// TestFigures compares what is told of two commands: a busy one and an idle one.
func TestFigures(t *testing.T) {
	overTrees(t, func(t *testing.T, g *guestProcess) {
		busy := g.run(g.sh("busy", "for ((i = 0; i < 200000; i++)); do :; done; echo x; sleep 0.2"))
		idle := g.run(g.sh("idle", "echo x; sleep 0.2"))
		b, i := busy.exit, idle.exit
		if b.GetCpuUserMicros() < 5*i.GetCpuUserMicros() || b.GetCpuUserMicros() < 10_000 {
			t.Errorf("cpu of a busy command %d µs, of an idle one %d", b.GetCpuUserMicros(), i.GetCpuUserMicros())
		}
		if b.GetMaxRssBytes() < 512<<10 || b.GetMaxRssBytes() > 1<<32 {
			t.Errorf("max rss is %d bytes", b.GetMaxRssBytes())
		}
		for _, e := range []*guestv1.Exit{b, i} {
			if e.GetFirstOutputMicros() == 0 || e.GetFirstOutputMicros() >= e.GetRunMicros() || e.GetRunMicros() < 200_000 {
				t.Errorf("first output after %d µs of %d", e.GetFirstOutputMicros(), e.GetRunMicros())
			}
		}
	})
}

// TestSurroundings looks at what a command is born with.
func TestSurroundings(t *testing.T) {
	g := startDaemon(t, "proc")
	t.Run("environment", func(t *testing.T) {
		r := g.request("env", "/usr/bin/env")
		r.Env = append(r.Env, "LINES=a\nb", "EMPTY=")
		o := g.run(r)
		if want := strings.Join(r.GetEnv(), "\n") + "\n"; string(o.stdout) != want {
			t.Errorf("environment %q, want %q", o.stdout, want)
		}
	})
	t.Run("standard input is empty", func(t *testing.T) {
		o := g.run(g.request("cat", "/bin/cat"))
		wantCode(t, o, 0)
	})
	t.Run("no other descriptors", func(t *testing.T) {
		o := g.run(g.request("ls", "/bin/ls", "/proc/self/fd"))
		if string(o.stdout) != "0\n1\n2\n3\n" { // 3 is the directory that ls reads
			t.Errorf("descriptors %q", o.stdout)
		}
	})
	t.Run("a session of its own", func(t *testing.T) {
		o := g.run(g.sh("sid", "read -r _ _ _ _ pgrp session _ < /proc/$$/stat; echo $(($$ - pgrp)) $(($$ - session))"))
		if string(o.stdout) != "0 0\n" {
			t.Errorf("pid minus group and session: %q", o.stdout)
		}
	})
	t.Run("default signals", func(t *testing.T) {
		o := g.run(g.request("grep", "/bin/grep", "-E", "^Sig(Blk|Ign)", "/proc/self/status"))
		var blocked, ignored uint64
		if _, err := fmt.Sscanf(string(o.stdout), "SigBlk: %x\nSigIgn: %x\n", &blocked, &ignored); err != nil {
			t.Fatalf("signals %q: %v", o.stdout, err)
		}
		// 32 and 33 belong to the C library, which programs cannot use them beside; Go
		// leaves them as whoever started the tests had them.
		const reserved = 1<<31 | 1<<32
		if blocked&^reserved != 0 || ignored&^reserved != 0 {
			t.Errorf("signals %q", o.stdout)
		}
	})
	t.Run("working directory", func(t *testing.T) {
		o := g.run(g.request("pwd", "/bin/pwd"))
		if string(o.stdout) != g.dir+"\n" {
			t.Errorf("works in %q, want %s", o.stdout, g.dir)
		}
	})
	t.Run("arguments as they are", func(t *testing.T) {
		o := g.run(g.request("args", "/usr/bin/printf", "<%s>", "", "a b", "*", "-n", "\n", "ü"))
		if want := "<><a b><*><-n><\n><ü>"; string(o.stdout) != want {
			t.Errorf("arguments %q, want %q", o.stdout, want)
		}
	})
}

func TestStartRefused(t *testing.T) {
	g := startDaemon(t, "proc")
	file := func(name, text string, mode os.FileMode) string {
		path := filepath.Join(g.dir, name)
		if err := os.WriteFile(path, []byte(text), mode); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		return path
	}
	for name, c := range map[string]struct {
		change func(r *guestv1.StartRequest)
		kind   guestv1.Error_Kind
		text   string
	}{
		"nothing in PATH":          {func(r *guestv1.StartRequest) { r.Args = []string{"nosuch"} }, guestv1.Error_KIND_NO_SUCH_PROGRAM, "no such program in PATH"},
		"no such file":             {func(r *guestv1.StartRequest) { r.Args = []string{"/no/such"} }, guestv1.Error_KIND_NO_SUCH_PROGRAM, `"/no/such": no such file`},
		"under a file":             {func(r *guestv1.StartRequest) { r.Args = []string{"/etc/passwd/x"} }, guestv1.Error_KIND_NO_SUCH_PROGRAM, "no such file"},
		"empty name":               {func(r *guestv1.StartRequest) { r.Args = []string{""} }, guestv1.Error_KIND_NO_SUCH_PROGRAM, "empty"},
		"not executable":           {func(r *guestv1.StartRequest) { r.Args = []string{file("plain", "x", 0o644)} }, guestv1.Error_KIND_NOT_EXECUTABLE, "is not executable (mode -rw-r--r--)"},
		"directory":                {func(r *guestv1.StartRequest) { r.Args = []string{g.dir} }, guestv1.Error_KIND_NOT_EXECUTABLE, "is a directory"},
		"bad ELF":                  {func(r *guestv1.StartRequest) { r.Args = []string{file("elf", "\x7fELF garbage", 0o755)} }, guestv1.Error_KIND_NOT_EXECUTABLE, "not a program of this machine"},
		"script without #!":        {func(r *guestv1.StartRequest) { r.Args = []string{file("script", "echo hi\n", 0o755)} }, guestv1.Error_KIND_NOT_EXECUTABLE, "without a #! line"},
		"empty file":               {func(r *guestv1.StartRequest) { r.Args = []string{file("empty", "", 0o755)} }, guestv1.Error_KIND_NOT_EXECUTABLE, "without a #! line"},
		"interpreter missing":      {func(r *guestv1.StartRequest) { r.Args = []string{file("lost", "#!/no/python -u\n", 0o755)} }, guestv1.Error_KIND_NO_SUCH_PROGRAM, `interpreter "/no/python"`},
		"interpreter with CR":      {func(r *guestv1.StartRequest) { r.Args = []string{file("dos", "#!/bin/sh\r\necho\r\n", 0o755)} }, guestv1.Error_KIND_NO_SUCH_PROGRAM, `interpreter "/bin/sh\r"`},
		"interpreter no program":   {func(r *guestv1.StartRequest) { r.Args = []string{file("odd", "#!/etc/passwd\n", 0o755)} }, guestv1.Error_KIND_NOT_EXECUTABLE, "permission denied"},
		"loops":                    {func(r *guestv1.StartRequest) { os.Symlink("loop", g.dir+"/loop"); r.Args = []string{g.dir + "/loop"} }, guestv1.Error_KIND_NOT_EXECUTABLE, "too many levels"},
		"a named pipe":             {func(r *guestv1.StartRequest) { unix.Mkfifo(g.dir+"/pipe", 0o777); r.Args = []string{g.dir + "/pipe"} }, guestv1.Error_KIND_NOT_EXECUTABLE, "permission denied"},
		"open for writing":         {func(r *guestv1.StartRequest) { r.Args = []string{busyFile(t, g.dir)} }, guestv1.Error_KIND_NOT_EXECUTABLE, "busy"},
		"too many arguments":       {func(r *guestv1.StartRequest) { r.Args = []string{"/bin/true", strings.Repeat("x", 1<<20)} }, guestv1.Error_KIND_NOT_EXECUTABLE, "too long"},
		"no program":               {func(r *guestv1.StartRequest) { r.Args = nil }, guestv1.Error_KIND_INVALID, "no program"},
		"NUL in an argument":       {func(r *guestv1.StartRequest) { r.Args = []string{"/bin/true", "a\x00b"} }, guestv1.Error_KIND_INVALID, "argument 1 has a NUL byte"},
		"NUL in the environment":   {func(r *guestv1.StartRequest) { r.Env = []string{"A=secret\x00"} }, guestv1.Error_KIND_INVALID, "variable 0 has a NUL byte"},
		"missing directory":        {func(r *guestv1.StartRequest) { r.WorkingDirectory = "/no/such" }, guestv1.Error_KIND_NO_WORKING_DIRECTORY, `working directory "/no/such": no such file or directory`},
		"directory is a file":      {func(r *guestv1.StartRequest) { r.WorkingDirectory = "/etc/passwd" }, guestv1.Error_KIND_NO_WORKING_DIRECTORY, `working directory "/etc/passwd": not a directory`},
		"directory cannot be made": {func(r *guestv1.StartRequest) { r.WorkingDirectory, r.CreateWorkingDirectory = "/proc/x/y", true }, guestv1.Error_KIND_NO_WORKING_DIRECTORY, `working directory "/proc/x/y"`},
		"relative directory":       {func(r *guestv1.StartRequest) { r.WorkingDirectory = "work" }, guestv1.Error_KIND_INVALID, "not an absolute"},
		"bad id":                   {func(r *guestv1.StartRequest) { r.Execution = "../x" }, guestv1.Error_KIND_INVALID, "execution id"},
		"empty id":                 {func(r *guestv1.StartRequest) { r.Execution = "" }, guestv1.Error_KIND_INVALID, "execution id"},
		"long id":                  {func(r *guestv1.StartRequest) { r.Execution = strings.Repeat("x", 64) }, guestv1.Error_KIND_INVALID, "execution id"},
		"source outside":           {func(r *guestv1.StartRequest) { r.SourceName = "../x" }, guestv1.Error_KIND_INVALID, "source argument"},
		"source is the directory":  {func(r *guestv1.StartRequest) { r.SourceName = ".." }, guestv1.Error_KIND_INVALID, "source argument"},
		"source for no argument":   {func(r *guestv1.StartRequest) { r.SourceName, r.SourceArgument = "x", 1 }, guestv1.Error_KIND_INVALID, "source argument 1 of 1"},
	} {
		t.Run(name, func(t *testing.T) {
			r := g.request("refused", "/bin/true")
			c.change(r)
			_, err := g.Start(t.Context(), r)
			if guestclient.KindOf(err) != c.kind || !strings.Contains(fmt.Sprint(err), c.text) {
				t.Errorf("%v (%v), want %v with %q", err, guestclient.KindOf(err), c.kind, c.text)
			}
			if strings.Contains(fmt.Sprint(err), "secret") {
				t.Errorf("the error tells a secret: %v", err)
			}
			if n := len(fmt.Sprint(err)); n > 4096 {
				t.Errorf("the error has %d bytes", n)
			}
		})
	}
	info, err := g.Info(t.Context())
	if err != nil || len(info.GetExecutions()) != 0 {
		t.Errorf("held after refused starts: %v, %v", info, err)
	}
	if left, _ := os.ReadDir(g.runtime); len(left) > 0 {
		t.Errorf("left of refused starts: %v", left)
	}
	// The id of a start that failed is free.
	wantCode(t, g.run(g.request("refused", "/bin/true")), 0)
}

// busyFile is a program that somebody is writing.
func busyFile(t *testing.T, dir string) string {
	f, err := os.OpenFile(filepath.Join(dir, "busy"), os.O_CREATE|os.O_WRONLY, 0o755)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	f.WriteString("#!/bin/sh\n")
	return f.Name()
}

func TestLongErrorFitsIntoAnAnswer(t *testing.T) {
	g := startDaemon(t, "proc")
	r := g.request("x", "nosuch")
	r.Env = []string{"PATH=" + strings.Repeat("/ü", 600<<10)}
	_, err := g.Start(t.Context(), r)
	if guestclient.KindOf(err) != guestv1.Error_KIND_NO_SUCH_PROGRAM || len(err.Error()) > 4096 {
		t.Errorf("%.200v", err)
	}
}

func TestWorkingDirectoryIsMade(t *testing.T) {
	g := startDaemon(t, "proc")
	r := g.request("x", "/bin/pwd")
	r.WorkingDirectory, r.CreateWorkingDirectory = filepath.Join(g.dir, "a", "b"), true
	if o := g.run(r); string(o.stdout) != r.WorkingDirectory+"\n" {
		t.Errorf("works in %q", o.stdout)
	}
	if info, err := os.Stat(r.WorkingDirectory); err != nil || info.Mode().Perm() != 0o755 {
		t.Errorf("made with %v, %v", info.Mode(), err)
	}
}

func TestSource(t *testing.T) {
	overTrees(t, func(t *testing.T, g *guestProcess) {
		source := append([]byte("stat -c '%a %n' $0 ${0%/*}; cat $0; exit 7\n# "), randomBytes(1, 200<<10)...)
		r := g.request("src", "/bin/bash", "", "arg")
		r.SourceName, r.Source, r.SourceArgument = "main.sh", source, 1
		path := filepath.Join(g.runtime, g.full("src"), "main.sh")
		// Something lies where the source is to go: it must not be written through.
		victim := filepath.Join(g.dir, "victim")
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(victim, path); err != nil {
			t.Fatal(err)
		}
		for range 2 { // the second time its id was used before
			o := g.run(r)
			wantCode(t, o, 7)
			head := fmt.Sprintf("600 %s\n700 %s\n", path, filepath.Dir(path))
			if want := append([]byte(head), source...); !bytes.Equal(o.stdout, want) {
				t.Errorf("source file: %.200q, want %.200q", o.stdout, want)
			}
			if _, err := os.Stat(filepath.Dir(path)); !os.IsNotExist(err) {
				t.Errorf("the source is left: %v", err)
			}
		}
		if _, err := os.Stat(victim); !os.IsNotExist(err) {
			t.Errorf("the source was written through a link: %v", err)
		}
	})
}

// TestSourceDirectoryFull leaves more beside the source than it found.
func TestSourceDirectoryFull(t *testing.T) {
	g := startDaemon(t, "proc")
	r := g.request("src", "/bin/bash", "")
	r.SourceName, r.Source, r.SourceArgument = "main.sh", []byte("mkdir ${0%/*}/a{1..300} && chmod 0 ${0%/*}/a1; rm $0; mkdir $0"), 1
	wantCode(t, g.run(r), 0)
	if left, _ := os.ReadDir(g.runtime); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

func TestRepeatedStart(t *testing.T) {
	overTrees(t, func(t *testing.T, g *guestProcess) {
		r := g.sh("once", "echo $$ >> count; echo ran; sleep 0.1")
		const n = 50
		pids := make([]int32, n)
		var all sync.WaitGroup
		for i := range n {
			all.Go(func() {
				c := guestclient.New(g)
				defer c.Close()
				resp, err := c.Start(t.Context(), r)
				if err != nil {
					t.Errorf("start %d: %v", i, err)
				}
				pids[i] = resp.GetPid()
			})
		}
		all.Wait()
		o := g.readAll("once", &output{})
		resp, err := g.Start(t.Context(), r) // after its end it is still the same
		if err != nil {
			t.Fatal(err)
		}
		for _, pid := range append(pids, resp.GetPid()) {
			if pid != pids[0] {
				t.Errorf("pids differ: %v", pids)
			}
		}
		count, err := os.ReadFile(filepath.Join(g.dir, "count"))
		if want := fmt.Sprintf("%d\n", pids[0]); err != nil || string(count) != want || string(o.stdout) != "ran\n" {
			t.Errorf("ran as %q (%v), stdout %q, want once as %q", count, err, o.stdout, want)
		}
		g.release("once")
	})
}

func TestReleaseAndInfo(t *testing.T) {
	overTrees(t, func(t *testing.T, g *guestProcess) {
		ids := func() string {
			info, err := g.Info(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if info.GetCommandCgroups() != (g.cgroup != "") {
				t.Errorf("command cgroups: %v", info.GetCommandCgroups())
			}
			return strings.Join(info.GetExecutions(), " ")
		}
		g.release("unknown")
		g.start(g.sh("b", "echo b; sleep 60"))
		g.start(g.sh("a", "echo a"))
		if got := ids(); got != g.full("a")+" "+g.full("b") {
			t.Errorf("holds %q", got)
		}
		if err := g.Release(t.Context(), "b"); guestclient.KindOf(err) != guestv1.Error_KIND_INVALID {
			t.Errorf("release of a running command: %v", err)
		}
		g.readAll("a", &output{})
		g.readAll("a", &output{size: 2}) // the end can be read again
		g.release("a")
		g.release("a")
		if got := ids(); got != g.full("b") {
			t.Errorf("holds %q after the release of a", got)
		}
		if _, err := g.Read(t.Context(), "a", 0, 100, time.Second); guestclient.KindOf(err) != guestv1.Error_KIND_NOT_FOUND {
			t.Errorf("read of a released command: %v", err)
		}
		if err := g.Stop(t.Context(), "a", 0); guestclient.KindOf(err) != guestv1.Error_KIND_NOT_FOUND {
			t.Errorf("stop of a released command: %v", err)
		}
		if o := g.run(g.sh("a", "echo again")); string(o.stdout) != "again\n" {
			t.Errorf("a released id runs again: %q", o.stdout)
		}
		g.stop("b", 0)
		g.readAll("b", &output{})
		g.release("b")
		if g.cgroup != "" {
			if left, err := filepath.Glob(g.cgroup + "/x-*"); err != nil || len(left) > 0 {
				t.Errorf("cgroups left: %v", left)
			}
		}
	})
}

// TestManyShortCommands starts commands that end at once, some at the same time, and
// looks for what they leave in the guest.
func TestManyShortCommands(t *testing.T) {
	overTrees(t, func(t *testing.T, g *guestProcess) {
		wantCode(t, g.run(g.request("first", "/bin/true")), 0)
		before := descriptors(t, g.pid)
		var all sync.WaitGroup
		for w := range 4 {
			all.Go(func() {
				for i := range 40 {
					id := fmt.Sprintf("w%d-%d", w, i)
					var o *output
					if i%4 == 3 {
						if _, err := g.Start(t.Context(), g.request(id, "/bin/nosuch")); err == nil {
							t.Error("a program that is not there was started")
						}
						continue
					}
					o = g.run(g.request(id, "/bin/echo", id))
					wantCode(t, o, 0)
					if string(o.stdout) != id+"\n" {
						t.Errorf("%s wrote %q", id, o.stdout)
					}
				}
			})
		}
		all.Wait()
		eventually(t, "as many descriptors as before", func() bool { return descriptors(t, g.pid) <= before })
		if all, _ := g.children(); len(all) > 0 {
			t.Errorf("children left: %v", all)
		}
	})
}

func descriptors(t *testing.T, pid int) int {
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}
