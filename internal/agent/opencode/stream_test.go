package opencode

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"

	"github.com/harvest-run/executord/internal/agent"
)

func TestReadLine(t *testing.T) {
	long := strings.Repeat("x", 100_000)
	r := bufio.NewReaderSize(strings.NewReader("a\n"+long+"\n\nrest"), 64)
	for _, want := range []string{"a\n", long + "\n", "\n"} {
		if got, err := readLine(r); err != nil || string(got) != want {
			t.Fatalf("%.20q %v, want %.20q", got, err, want)
		}
	}
	if _, err := readLine(r); err != io.ErrUnexpectedEOF {
		t.Errorf("a line without its end: %v", err)
	}
	if _, err := readLine(bufio.NewReader(endless{})); err == nil || err == io.ErrUnexpectedEOF {
		t.Errorf("a line that is too long: %v", err)
	}
}

// endless is a line that has no end.
type endless struct{}

func (endless) Read(b []byte) (int, error) {
	for i := range b {
		b[i] = 'x'
	}
	return len(b), nil
}

func TestSubscription(t *testing.T) {
	h := newHub(nil)
	s := h.subscribe("ses_a")
	other := h.subscribe("ses_b")
	child := func(id, parent string) event {
		return event{Type: "session.created", SessionID: id, session: &session{ID: id, ParentID: parent}}
	}
	h.put(child("ses_a1", "ses_a"), 1)
	h.put(child("ses_a2", "ses_a1"), 1)
	h.put(event{Type: "session.idle", SessionID: "ses_a2"}, 1)
	h.put(event{Type: "session.idle", SessionID: "ses_c"}, 1)
	h.put(event{Type: "session.idle"}, 1)
	if events, lost := s.take(); len(events) != 3 || lost {
		t.Errorf("of the conversation: %+v %t", events, lost)
	}
	if events, _ := other.take(); len(events) != 0 {
		t.Errorf("of another: %+v", events)
	}
	// One who takes nothing loses, and nobody else.
	for range 3 {
		h.put(event{Type: "session.idle", SessionID: "ses_a"}, queueLimit/2+1)
	}
	h.put(event{Type: "session.idle", SessionID: "ses_b"}, 1)
	if events, lost := s.take(); len(events) > 1 || !lost {
		t.Errorf("too much: %d events, lost %t", len(events), lost)
	}
	if events, lost := other.take(); len(events) != 1 || lost {
		t.Errorf("of another: %+v %t", events, lost)
	}
	s.close()
	other.close()
	if len(h.bySession) != 0 {
		t.Errorf("left: %v", h.bySession)
	}
}

// scriptedPlace has, for OpenCode, a handler.
type scriptedPlace struct{ address string }

func (p scriptedPlace) Start(context.Context, Process) (Running, error) {
	return scriptedRunning{}, nil
}
func (p scriptedPlace) Run(context.Context, []string) ([]byte, error) { return nil, nil }
func (p scriptedPlace) Dial(ctx context.Context, _ uint16) (net.Conn, error) {
	return new(net.Dialer).DialContext(ctx, "tcp", p.address)
}

type scriptedRunning struct{}

func (scriptedRunning) Wait(ctx context.Context) (string, error) {
	<-ctx.Done()
	return "", context.Cause(ctx)
}
func (scriptedRunning) Stop(context.Context) error { return nil }

// A prompt that OpenCode stored and did not run, because it was not through with the turn
// before, is run by its name; it is not given twice.
func TestPromptIsStoredAndNotRun(t *testing.T) {
	var mu sync.Mutex
	var given []string
	ran := false
	mux := http.NewServeMux()
	answer := func(w http.ResponseWriter, v any) { _ = json.NewEncoder(w).Encode(v) }
	mux.HandleFunc("GET /global/health", func(w http.ResponseWriter, _ *http.Request) {
		answer(w, map[string]any{"healthy": true, "version": "1"})
	})
	mux.HandleFunc("GET /global/event", func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprint(w, "data: {\"payload\":{\"type\":\"server.connected\",\"properties\":{}}}\n\n")
		_ = http.NewResponseController(w).Flush()
		<-r.Context().Done()
	})
	mux.HandleFunc("POST /session", func(w http.ResponseWriter, _ *http.Request) { answer(w, map[string]any{"id": "ses_1"}) })
	mux.HandleFunc("GET /session/status", func(w http.ResponseWriter, _ *http.Request) { answer(w, map[string]any{}) })
	mux.HandleFunc("GET /mcp", func(w http.ResponseWriter, _ *http.Request) { answer(w, map[string]any{}) })
	mux.HandleFunc("GET /session/ses_1/diff", func(w http.ResponseWriter, _ *http.Request) { answer(w, []any{}) })
	mux.HandleFunc("GET /session/ses_1/message/msg_p", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNotFound) })
	old := map[string]any{"info": map[string]any{"id": "msg_old", "role": "assistant", "parentID": "msg_before", "finish": "stop"}}
	final := map[string]any{"info": map[string]any{"id": "msg_final", "role": "assistant", "parentID": "msg_p", "finish": "stop", "time": map[string]any{"created": 3, "completed": 4}},
		"parts": []any{map[string]any{"id": "prt_1", "type": "text", "text": "Hello.", "time": map[string]any{"end": 4}}}}
	mux.HandleFunc("GET /session/ses_1/message", func(w http.ResponseWriter, _ *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		list := []any{old, map[string]any{"info": map[string]any{"id": "msg_p", "role": "user", "time": map[string]any{"created": 2}}}}
		if ran {
			list = append(list, final)
		}
		answer(w, list)
	})
	mux.HandleFunc("POST /session/ses_1/message", func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		mu.Lock()
		defer mu.Unlock()
		given = append(given, string(body))
		if len(given) < 3 {
			answer(w, old)
			return
		}
		ran = true
		answer(w, final)
	})
	backend := httptest.NewServer(mux)
	t.Cleanup(backend.Close)
	server, err := Start(t.Context(), Config{Place: scriptedPlace{backend.Listener.Addr().String()}, Logger: slog.New(slog.DiscardHandler), Program: "opencode"})
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	c, err := server.NewConversation(t.Context(), ConversationConfig{Directory: "/workspace/app"})
	if err != nil {
		t.Fatal(err)
	}
	k := begin(t, c, agent.Prompt{ID: "p", Text: "hi"}).wait()
	k.ended(agent.Completed)
	k.compare("text part1 Hello.", "ended part1")
	if len(given) != 3 || !strings.Contains(given[0], `"text":"hi"`) || given[1] != `{"messageID":"msg_p","parts":[]}` || given[2] != given[1] {
		t.Errorf("given: %q", given)
	}
}
