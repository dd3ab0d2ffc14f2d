package memory

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// server is the real memory MCP server.
type server struct {
	t   *testing.T
	in  io.WriteCloser
	out *bufio.Reader
	ids int
}

func startServer(t *testing.T, file string) *server {
	t.Helper()
	cache := os.Getenv("EXECUTORD_TEST_CACHE")
	if cache == "" {
		cache = "/var/cache/executord-test"
	}
	program := filepath.Join(cache, "base/node_modules/@modelcontextprotocol/server-memory/dist/index.js")
	if _, err := os.Stat(program); err != nil {
		t.Fatalf("the memory server is not installed: run scripts/test-tools: %v", err)
	}
	cmd := exec.CommandContext(t.Context(), "node", program)
	cmd.Env = append(os.Environ(), "MEMORY_FILE_PATH="+file)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.Close()
		_ = cmd.Wait() // it may have been killed
	})
	s := &server{t: t, in: in, out: bufio.NewReader(out)}
	s.ask("initialize", `{"protocolVersion":"2025-06-18","capabilities":{},"clientInfo":{"name":"test","version":"1"}}`)
	fmt.Fprintln(in, `{"jsonrpc":"2.0","method":"notifications/initialized"}`)
	return s
}

// ask does a request and returns its answer.
func (s *server) ask(method, params string) string {
	s.t.Helper()
	s.ids++
	fmt.Fprintf(s.in, `{"jsonrpc":"2.0","id":%d,"method":%q,"params":%s}`+"\n", s.ids, method, params)
	for {
		line, err := s.out.ReadBytes('\n')
		if err != nil {
			s.t.Fatal(err)
		}
		var answer struct {
			ID     int
			Result json.RawMessage
			Error  json.RawMessage
		}
		if json.Unmarshal(line, &answer) != nil || answer.ID != s.ids {
			continue
		}
		if answer.Error != nil {
			s.t.Fatalf("%s: %s", method, answer.Error)
		}
		return string(answer.Result)
	}
}

func (s *server) learn(entity, observation string) {
	s.t.Helper()
	s.ask("tools/call", fmt.Sprintf(`{"name":"create_entities","arguments":{"entities":[{"name":%q,"entityType":"k","observations":[%q]}]}}`, entity, observation))
}

// Two real servers at a time learn, forget and commit; a third reads what is left.
func TestRealServers(t *testing.T) {
	b := newBox(t)
	one, two := b.open("one"), b.open("two")
	first, second := startServer(t, file(one)), startServer(t, file(two))
	first.learn("a", "1")
	second.learn("b", "2")
	b.commit(one, true)
	b.commit(two, true)
	first.learn("c", "3")
	second.ask("tools/call", `{"name":"delete_entities","arguments":{"entityNames":["seed"]}}`)
	b.commit(two, true)
	b.commit(one, true)
	if got := b.shared(); got != "a=1 b=2 c=3" {
		t.Error(got)
	}
	third := startServer(t, file(b.open("three")))
	var found struct {
		StructuredContent struct{ Entities []struct{ Name string } }
	}
	if err := json.Unmarshal([]byte(third.ask("tools/call", `{"name":"read_graph","arguments":{}}`)), &found); err != nil {
		t.Fatal(err)
	}
	if got := fmt.Sprint(found.StructuredContent.Entities); got != "[{a} {b} {c}]" {
		t.Error(got)
	}
}
