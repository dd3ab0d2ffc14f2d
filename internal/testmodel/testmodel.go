// Package testmodel is a model provider for tests: a server that speaks Anthropic's
// Messages and OpenAI's chat completions, both streamed, and answers by scripts.
//
// A prompt picks its script by "[[script:NAME]]" in its text. Which step of the script
// answers a request follows from the conversation that the request has: the number of
// answers since that prompt. So a script works the same however often a client asks
// again, restarts, or has several conversations at once.
package testmodel

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// Step is one answer.
type Step struct {
	// Parts are its content, in order.
	Parts []Part
	// Stop is why it ends, in Anthropic's words; "" is tool_use if there are tool calls and
	// end_turn otherwise. "max_tokens" is a cut-off answer.
	Stop string
	// Usage that is told; some of its own if it is zero.
	Usage Usage
	// Pace is the time between two pieces; 0 sends them as fast as it goes.
	Pace time.Duration
	// Failures are what the first attempts at this step get instead, one each.
	Failures []Failure
	// Make, if set, makes the step from the request.
	Make func(Request) Step
	// Gate, if set, is waited for before the first piece; a client that gives up ends it.
	Gate <-chan struct{}
}

// Usage is what an answer cost, in tokens.
type Usage struct {
	Input, Output, CacheRead, CacheWrite int
}

// Failure is an answer that fails. The zero value, but for Status, is an HTTP error.
type Failure struct {
	// Status is that of the answer; 0 is a stream that breaks.
	Status int
	// Message says what went wrong.
	Message string
	// RetryAfter is told in seconds; 0 tells none.
	RetryAfter time.Duration
	// After is how many pieces come before the stream breaks.
	After int
	// Event makes the stream end with an error event rather than a cut connection.
	Event bool
	// Stall holds the stream at that place until the client goes.
	Stall bool
}

// Part is a piece of content: text, reasoning or a tool call.
type Part struct {
	Text, Reasoning string
	Call            *Call
}

// Call is the use of a tool.
type Call struct {
	Name  string
	Input any
}

// Text is a part that the model says.
func Text(s string) Part { return Part{Text: s} }

// Reasoning is a part that it thinks.
func Reasoning(s string) Part { return Part{Reasoning: s} }

// Tool is the use of a tool, with what becomes its JSON input.
func Tool(name string, input any) Part {
	return Part{Call: &Call{Name: name, Input: input}}
}

// Say is a step that says something, with what it uses after it.
func Say(text string, parts ...Part) Step {
	return Step{Parts: append([]Part{Text(text)}, parts...)}
}

// Request is one that came in.
type Request struct {
	// Path is that of the URL; Header has the credentials that were shown.
	Path   string
	Header http.Header
	Model  string
	// System is the system prompt, Tools are the names of the tools that were offered.
	System string
	Tools  []string
	// Messages are the conversation, the oldest first.
	Messages []Message
	// Script and Step say what answered it; Attempt counts from 1. Title says that it asked
	// for the title of a conversation, Summary for a shorter history.
	Script  string
	Step    int
	Attempt int
	Title   bool
	Summary bool
	Time    time.Time
	// Body is the whole request.
	Body json.RawMessage
}

// Message is one of a conversation.
type Message struct {
	// Role is user, assistant or tool.
	Role string
	Text string
	// Results are those of tools.
	Results []string
	Calls   []string
}

// LastResult is the newest result of a tool; "" if there is none.
func (r Request) LastResult() string {
	for _, m := range slices.Backward(r.Messages) {
		if n := len(m.Results); n > 0 {
			return m.Results[n-1]
		}
	}
	return ""
}

// Server is a model provider.
type Server struct {
	// Sent, if set before the first request, is called before each piece of text or
	// reasoning is sent.
	Sent func(script, piece string)

	server *httptest.Server
	mu     sync.Mutex
	// what follows is guarded by mu
	scripts  map[string][]Step
	requests []Request
	attempts map[string]map[int]int
	calls    int
}

// Start makes one that listens on loopback until the test ends.
func Start(t testing.TB) *Server {
	s := New()
	t.Cleanup(s.Close)
	return s
}

// New makes one that listens on loopback until Close.
func New() *Server {
	s := &Server{scripts: make(map[string][]Step), attempts: make(map[string]map[int]int)}
	mux := http.NewServeMux()
	mux.HandleFunc("POST /v1/messages", func(w http.ResponseWriter, r *http.Request) { s.serve(w, r, anthropic{}) })
	mux.HandleFunc("POST /v1/chat/completions", func(w http.ResponseWriter, r *http.Request) { s.serve(w, r, openai{}) })
	s.server = httptest.NewServer(mux)
	return s
}

// Close ends it, and the requests that it still answers.
func (s *Server) Close() {
	s.server.CloseClientConnections()
	s.server.Close()
}

// URL is the base of the address, with /v1: what clients of both protocols are given.
func (s *Server) URL() string { return s.server.URL + "/v1" }

// Script says how prompts with [[script:name]] are answered: each request after another
// step. It takes the place of an earlier one of that name.
func (s *Server) Script(name string, steps ...Step) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.scripts[name] = steps
	delete(s.attempts, name)
}

// Requests are those that a script has had so far; "" stands for all of them.
func (s *Server) Requests(script string) []Request {
	s.mu.Lock()
	defer s.mu.Unlock()
	var found []Request
	for _, r := range s.requests {
		if script == "" || r.Script == script && !r.Title && !r.Summary {
			found = append(found, r)
		}
	}
	return found
}

// marks are the names of scripts in a text, as prompts have them.
func marks(text string) []string {
	var names []string
	for {
		_, rest, ok := strings.Cut(text, "[[script:")
		if !ok {
			return names
		}
		name, behind, ok := strings.Cut(rest, "]]")
		if !ok {
			return names
		}
		names, text = append(names, name), behind
	}
}

// place finds the script of a conversation and how far it is.
func place(messages []Message) (script string, step int) {
	for _, m := range slices.Backward(messages) {
		if m.Role == "assistant" {
			step++
		}
		if m.Role != "user" {
			continue
		}
		if found := marks(m.Text); found != nil {
			return found[len(found)-1], step
		}
	}
	// Of a history that was made shorter only the summary is left.
	step = 0
	for _, m := range slices.Backward(messages) {
		if found := marks(m.Text); found != nil {
			return found[0], step
		}
		if m.Role == "assistant" {
			step++
		}
	}
	return "", step
}

// take records a request and finds what answers it.
func (s *Server) take(r *Request) (step Step, failure *Failure, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	r.Script, r.Step = place(r.Messages)
	// OpenCode asks for a title with a system prompt that says so, and without tools.
	r.Title = len(r.Tools) == 0 && strings.Contains(strings.ToLower(r.System), "title")
	defer func() { s.requests = append(s.requests, *r) }()
	if r.Title {
		return Say("A title"), nil, true
	}
	if r.Summary = summarises(*r); r.Summary {
		return Say("A summary. [[script:" + r.Script + Continued + "]]"), nil, true
	}
	if steps := s.scripts[r.Script]; r.Step < len(steps) {
		step, ok = steps[r.Step], true
	}
	if !ok {
		return Step{}, nil, false
	}
	if s.attempts[r.Script] == nil {
		s.attempts[r.Script] = make(map[int]int)
	}
	s.attempts[r.Script][r.Step]++
	r.Attempt = s.attempts[r.Script][r.Step]
	if step.Make != nil {
		step = step.Make(*r)
	}
	if r.Attempt <= len(step.Failures) {
		failure = &step.Failures[r.Attempt-1]
	}
	return step, failure, true
}

// Continued goes behind the name of a script for what comes after its history was made
// shorter: that goes on with a script of its own.
const Continued = "-continued"

// summarises says whether a request asks for a summary of the conversation: OpenCode puts
// that into one message.
func summarises(r Request) bool {
	return len(r.Tools) == 0 && strings.Contains(strings.ToLower(r.System), "summar")
}

// callID is a name for a tool call that no other has.
func (s *Server) callID() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.calls++
	return s.calls
}
