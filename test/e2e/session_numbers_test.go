package e2e

import (
	"bufio"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
	"github.com/harvest-run/executord/internal/testmodel"
)

// TestSessionNumbers measures what docs/performance.md says of sessions, beside what OpenCode
// takes by itself. It asserts nothing about time; EXECUTORD_NUMBERS=1 runs it.
func TestSessionNumbers(t *testing.T) {
	if os.Getenv("EXECUTORD_NUMBERS") == "" {
		t.Skip("it measures; set EXECUTORD_NUMBERS=1 to run it")
	}
	h := newHouse(t)
	url := h.git.Repository("acme/sums", sums())
	h.terminate(h.session(h.request(url)).GetName()) // the image is made

	t.Run("start", func(t *testing.T) { h.in(t).starts(url) })
	t.Run("latency", func(t *testing.T) { h.in(t).latency(url) })
	t.Run("idle", func(t *testing.T) { h.in(t).idle(url) })
}

// starts compares a session's start with that of OpenCode alone.
func (h *house) starts(url string) {
	var bare, session []time.Duration
	for range 5 {
		bare = append(bare, bareStart(h.t))
		begin := time.Now()
		name := h.session(h.request(url)).GetName()
		session = append(session, time.Since(begin))
		h.terminate(name)
	}
	slices.Sort(bare)
	slices.Sort(session)
	h.t.Logf("OpenCode's bare start %v, a session to its agent %v: %.2f times", bare, session, float64(session[2])/float64(bare[2]))
}

// bareStart is how long OpenCode takes on the host, without MCP servers, until it answers.
func bareStart(t *testing.T) time.Duration {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := l.Addr().String()
	_ = l.Close()
	_, port, _ := net.SplitHostPort(address)
	home := t.TempDir()
	cmd := exec.Command(filepath.Join(cacheDir(), "base/node_modules/opencode-linux-x64/bin/opencode"), "serve", "--port", port, "--hostname", "127.0.0.1")
	cmd.Dir = home
	cmd.Env = []string{"PATH=/usr/bin:/bin", "HOME=" + home, "OPENCODE_SERVER_PASSWORD=x", "OPENCODE_DISABLE_MODELS_FETCH=1", "OPENCODE_DISABLE_AUTOUPDATE=1", "OPENCODE_DISABLE_DEFAULT_PLUGINS=1"}
	begin := time.Now()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }()
	client := http.Client{Timeout: 200 * time.Millisecond}
	for time.Since(begin) < time.Minute {
		r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+address+"/global/health", nil)
		if err != nil {
			t.Fatal(err)
		}
		r.SetBasicAuth("opencode", "x")
		if resp, err := client.Do(r); err == nil {
			resp.Body.Close()
			if resp.StatusCode == http.StatusOK {
				return time.Since(begin)
			}
		}
		time.Sleep(15 * time.Millisecond)
	}
	t.Fatal("OpenCode did not start")
	return 0
}

// reader tells, in the sandbox, when OpenCode's own stream of events has each piece of text.
const reader = `
import base64, json, time, urllib.request
password = open("/root/.opencode-server").read().split("\n")[1]
r = urllib.request.Request("http://127.0.0.1:8080/global/event", headers={"Authorization": "Basic " + base64.b64encode(("opencode:" + password).encode()).decode()})
for line in urllib.request.urlopen(r):
    if not line.startswith(b"data:"): continue
    now = time.time_ns()
    e = json.loads(line[5:])
    e = e.get("payload", e)
    if e["type"] == "message.part.delta":
        print(now, e["properties"]["delta"].strip(), flush=True)
`

// latency compares when a client has a piece of text with when OpenCode's own stream has it.
func (h *house) latency(url string) {
	name := h.session(h.request(url)).GetName()
	const pieces = 300
	words := make([]string, pieces)
	for i := range words {
		words[i] = fmt.Sprintf("w%d", i)
	}
	h.model.Script("words", testmodel.Step{Parts: []testmodel.Part{testmodel.Text(strings.Join(words, " "))}, Pace: 20 * time.Millisecond})
	h.model.Script("warm", testmodel.Say("warm"))
	h.prompt(name, say("warm")).completed()
	stream, err := h.c.Execute(h.t.Context(), &executorv1.ExecuteRequest{Parent: name, Command: python(reader)})
	if err != nil {
		h.t.Fatal(err)
	}
	own := make(map[string]time.Time)
	var mu sync.Mutex
	var reading sync.WaitGroup
	reading.Go(func() {
		for {
			e, err := stream.Recv()
			if err != nil {
				return
			}
			lines := bufio.NewScanner(strings.NewReader(string(e.GetOutput().GetData())))
			for lines.Scan() {
				var at int64
				var word string
				if _, err := fmt.Sscan(lines.Text(), &at, &word); err == nil {
					mu.Lock()
					own[word] = time.Unix(0, at)
					mu.Unlock()
				}
			}
		}
	})
	time.Sleep(time.Second) // for the reader to be there
	prompt, err := h.c.Sessions().SendPrompt(h.t.Context(), &executorv1.SendPromptRequest{Parent: name, Prompt: say("words")})
	if err != nil {
		h.t.Fatal(err)
	}
	seen := make(map[string]time.Time)
	for {
		answer, err := prompt.Recv()
		if err != nil {
			break
		}
		for _, word := range strings.Fields(answer.GetEvent().GetText().GetText()) {
			seen[word] = time.Now()
		}
	}
	time.Sleep(500 * time.Millisecond)
	stream.Close()
	reading.Wait()
	var beyond []time.Duration
	for word, at := range seen {
		if first, ok := own[word]; ok {
			beyond = append(beyond, at.Sub(first))
		}
	}
	h.terminate(name)
	slices.Sort(beyond)
	if len(beyond) < pieces/2 {
		h.t.Fatalf("%d pieces of %d were seen by both (%d, %d)", len(beyond), pieces, len(seen), len(own))
	}
	h.t.Logf("a piece of text is at the client after OpenCode's own stream has it: p50 %v, p99 %v, of %d", beyond[len(beyond)/2], beyond[len(beyond)*99/100], len(beyond))
}

// idle makes sessions that do nothing, and measures what they take.
func (h *house) idle(url string) {
	const sessions = 20
	var names []string
	h.model.Script("warm", testmodel.Say("warm"))
	begin := time.Now()
	for range sessions {
		s, err := h.c.CreateSession(h.t.Context(), h.request(url))
		if err != nil {
			h.t.Fatal(err)
		}
		names = append(names, s.GetName())
	}
	for _, name := range names {
		h.running(name)
	}
	h.t.Logf("%d sessions at a time are ready after %v", sessions, time.Since(begin))
	time.Sleep(20 * time.Second) // for their MCP servers
	free := func() string {
		text, _ := os.ReadFile("/proc/meminfo")
		for line := range strings.Lines(string(text)) {
			if strings.HasPrefix(line, "MemAvailable") {
				return strings.Join(strings.Fields(line)[1:], " ")
			}
		}
		return ""
	}
	with := free()
	used := func() int64 {
		var ticks int64
		text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", h.process.Process.Pid))
		var utime, stime int64
		if fields := strings.Fields(string(text)); len(fields) > 15 {
			_, _ = fmt.Sscan(fields[13], &utime)
			_, _ = fmt.Sscan(fields[14], &stime)
		}
		ticks = utime + stime
		return ticks
	}
	before := used()
	time.Sleep(10 * time.Second)
	cpu := used() - before
	f := h.prompt(names[0], say("warm"))
	begin = time.Now()
	f.completed()
	h.t.Logf("with %d idle: executord takes %d MiB and %.1f %% of a core; a turn took %v", sessions, rss(h.t, h.process.Process.Pid)>>20, float64(cpu)/10, time.Since(begin))
	for _, name := range names {
		h.terminate(name)
	}
	h.t.Logf("memory available: %s with them, %s without", with, free())
}
