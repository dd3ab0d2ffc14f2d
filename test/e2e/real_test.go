package e2e

import (
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/harvest-run/executord/client"
	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
)

// show streams an execution, with `make demo` onto the terminal as it comes.
func show(t *testing.T, c *client.Client, parent string, command *executorv1.Command) (result *executorv1.Result, stdout, stderr []byte) {
	t.Helper()
	command.Timeout = durationpb.New(10 * time.Minute)
	s, err := c.Execute(t.Context(), &executorv1.ExecuteRequest{Parent: parent, Command: command})
	if err != nil {
		t.Fatal(err)
	}
	var out, errs bytes.Buffer
	events := 0
	for {
		e, err := s.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		events++
		w := &out
		if e.GetOutput().GetStream() == executorv1.Stream_STREAM_STDERR {
			w = &errs
		}
		w.Write(e.GetOutput().GetData())
		if os.Getenv("EXECUTORD_DEMO") != "" && len(e.GetOutput().GetData()) < 2000 {
			os.Stderr.Write(e.GetOutput().GetData())
		}
	}
	if !s.Whole() {
		t.Error("the output is not whole")
	}
	r := s.Result()
	t.Logf("%d events, %d + %d bytes; cpu %v, peak memory %d MiB", events, out.Len(), errs.Len(),
		r.GetUsage().GetCpuUser().AsDuration()+r.GetUsage().GetCpuSystem().AsDuration(), r.GetUsage().GetPeakMemoryBytes()>>20)
	return r, out.Bytes(), errs.Bytes()
}

func mustExit(t *testing.T, r *executorv1.Result, code int32, output ...[]byte) {
	t.Helper()
	if r.GetReason() != executorv1.Reason_REASON_EXITED || r.ExitCode == nil || r.GetExitCode() != code {
		t.Errorf("%v\n%s", r, tail(bytes.Join(output, []byte("\n--\n")), 6000))
	}
}

func startSession(t *testing.T, c *client.Client) string {
	t.Helper()
	created, err := c.Sessions().CreateSession(t.Context(), &executorv1.CreateSessionRequest{})
	if err != nil {
		t.Fatal(err)
	}
	name := created.GetSession().GetName()
	got, err := c.Sessions().GetSession(t.Context(), &executorv1.GetSessionRequest{Name: name, Wait: durationpb.New(time.Minute)})
	if err != nil || got.GetSession().GetState() != executorv1.Session_STATE_RUNNING {
		t.Fatalf("%v, %v", got, err)
	}
	return name
}

// Programs that people really run, not one-liners.
func TestRealPrograms(t *testing.T) {
	d := start(t)
	c := d.dial()

	t.Run("CPython's own test suite", func(t *testing.T) {
		tests := []string{"test_json", "test_re", "test_subprocess", "test_threading", "test_os", "test_fork1", "test_tempfile", "test_pty", "test_pathlib"}
		if os.Getenv("EXECUTORD_DEMO") != "" { // these take minutes
			tests = append(tests, "test_signal", "test_io", "test_selectors", "test_asyncio.test_subprocess", "test_zipfile")
		}
		r, out, errs := show(t, c, "", argv(append([]string{"python3", "-u", "-m", "test"}, tests...)...))
		mustExit(t, r, 0, out, errs)
		if want := fmt.Sprintf("All %d tests OK.", len(tests)); !bytes.Contains(out, []byte(want)) {
			t.Errorf("it does not say %q:\n%s", want, tail(out, 3000))
		}
	})

	t.Run("a C program from its source", func(t *testing.T) {
		archive := luaSource(t)
		session := startSession(t, c)
		unpack := python("import base64, io, tarfile\ntarfile.open(fileobj=io.BytesIO(base64.b64decode('" +
			base64.StdEncoding.EncodeToString(archive) + "'))).extractall('/workspace')\n")
		r, out, errs := show(t, c, session, unpack)
		mustExit(t, r, 0, out, errs)
		r, out, errs = show(t, c, session, bash("set -e; cd lua-*; make -j2 linux; ./src/lua -v"))
		mustExit(t, r, 0, out, errs)
		if !bytes.Contains(out, []byte("gcc -std=gnu99")) || !bytes.Contains(out, []byte("Copyright")) {
			t.Errorf("make said:\n%s", tail(out, 3000))
		}
		r, out, errs = show(t, c, session, bash(`cd lua-*; ./src/lua -e 'local s = 0; for i = 1, 10000000 do s = s + i end; print(s)'`))
		mustExit(t, r, 0, out, errs)
		if string(out) != "50000005000000\n" {
			t.Errorf("the program that was built says %q", out)
		}
		if _, err := c.Sessions().TerminateSession(t.Context(), &executorv1.TerminateSessionRequest{Name: session}); err != nil {
			t.Error(err)
		}
	})

	t.Run("200 MB from Node", func(t *testing.T) {
		r, out, _ := show(t, c, "", &executorv1.Command{Code: &executorv1.Code{Language: executorv1.Language_LANGUAGE_NODE, Source: `
const line = Buffer.alloc(1000, 'node ').fill('\n', 999);
const block = Buffer.concat(Array(1000).fill(line));
let left = 200;
(function write() { while (left-- > 0) if (!process.stdout.write(block)) return process.stdout.once('drain', write); })();
`}})
		mustExit(t, r, 0)
		line := append(bytes.Repeat([]byte("node "), 200)[:999], '\n')
		if want := bytes.Repeat(line, 200_000); !bytes.Equal(out, want) {
			t.Errorf("%d bytes that are not the %d that were written", len(out), len(want))
		}
	})

	t.Run("both outputs at full speed", func(t *testing.T) {
		const n = 40_000
		r, out, errs := show(t, c, "", python(fmt.Sprintf(`
import os, threading
def write(fd, text):
    for i in range(%d): os.write(fd, b"%%s %%07d\n" %% (text, i))
threads = [threading.Thread(target=write, args=a) for a in ((1, b"out"), (2, b"err"))]
[t.start() for t in threads]; [t.join() for t in threads]
`, n)))
		mustExit(t, r, 0)
		for stream, got := range map[string][]byte{"out": out, "err": errs} {
			var want bytes.Buffer
			for i := range n {
				fmt.Fprintf(&want, "%s %07d\n", stream, i)
			}
			if crc32.ChecksumIEEE(got) != crc32.ChecksumIEEE(want.Bytes()) {
				t.Errorf("std%s: %d bytes that are not the %d that were written", stream, len(got), want.Len())
			}
		}
	})
}

// luaSource gets the source of Debian's lua5.4 through apt, and nothing else of apt's
// configuration is touched.
func luaSource(t *testing.T) []byte {
	t.Helper()
	dir := t.TempDir()
	mirror := debianMirror(t)
	list := filepath.Join(dir, "sources.list")
	if err := os.WriteFile(list, []byte("deb-src "+mirror+" main\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(dir, "lists/partial"), 0o755); err != nil {
		t.Fatal(err)
	}
	options := []string{"-q", "-o", "Dir::Etc::sourcelist=" + list, "-o", "Dir::Etc::sourceparts=-", "-o", "Dir::State::lists=" + dir + "/lists", "-o", "APT::Sandbox::User=root"}
	for _, args := range [][]string{{"update"}, {"source", "--download-only", "lua5.4"}} {
		cmd := exec.Command("apt-get", append(options, args...)...)
		cmd.Dir = dir
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("apt-get %s: %v\n%s", args[0], err, out)
		}
	}
	found, _ := filepath.Glob(filepath.Join(dir, "lua5.4_*.orig.tar.gz"))
	if len(found) != 1 {
		t.Fatalf("apt-get source brought %v", found)
	}
	archive, err := os.ReadFile(found[0])
	if err != nil {
		t.Fatal(err)
	}
	return archive
}

// debianMirror is what the host gets its packages from, as "[signed-by=…] URI suite".
func debianMirror(t *testing.T) string {
	t.Helper()
	release, err := os.ReadFile("/etc/os-release")
	if err != nil || !bytes.Contains(release, []byte("ID=debian")) {
		t.Skip("the source package is Debian's, and this host is not Debian")
	}
	var codename string
	for line := range strings.Lines(string(release)) {
		if v, ok := strings.CutPrefix(strings.TrimSpace(line), "VERSION_CODENAME="); ok {
			codename = strings.Trim(v, `"`)
		}
	}
	out, err := exec.Command("apt-get", "indextargets", "--format", "$(SITE)", "Codename: "+codename, "Created-By: Packages").Output()
	site := strings.TrimSpace(strings.SplitN(string(out), "\n", 2)[0])
	if err != nil || site == "" {
		site = "http://deb.debian.org/debian"
	}
	return "[signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] " + site + " " + codename
}
