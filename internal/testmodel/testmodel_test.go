package testmodel

import (
	"bufio"
	"encoding/json"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"
)

// ask sends a conversation in one of the two protocols and returns the lines of the answer.
func ask(t *testing.T, s *Server, path, body string) (int, http.Header, []string, error) {
	t.Helper()
	request, err := http.NewRequestWithContext(t.Context(), http.MethodPost, s.URL()+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	request.Header.Set("Authorization", "Bearer k")
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	var lines []string
	r := bufio.NewReader(response.Body)
	for {
		line, err := r.ReadString('\n')
		if data, ok := strings.CutPrefix(line, "data: "); ok || response.StatusCode != http.StatusOK && line != "" {
			lines = append(lines, strings.TrimSpace(data))
		}
		if err == io.EOF {
			err = nil
		} else if err == nil {
			continue
		}
		return response.StatusCode, response.Header, lines, err
	}
}

const (
	first  = `{"model":"m","system":"be good","tools":[{"name":"bash"}],"messages":[{"role":"user","content":"[[script:s]]"}]}`
	second = `{"model":"m","tools":[{"name":"bash"}],"messages":[{"role":"user","content":[{"type":"text","text":"[[script:s]]"}]},
		{"role":"assistant","content":[{"type":"tool_use","id":"1","name":"bash","input":{}}]},
		{"role":"user","content":[{"type":"tool_result","tool_use_id":"1","content":"out"}]}]}`
	openaiFirst = `{"model":"m","tools":[{"function":{"name":"bash"}}],"messages":[{"role":"system","content":"be good"},{"role":"user","content":"[[script:s]]"}]}`
)

func TestAnthropic(t *testing.T) {
	s := Start(t)
	s.Script("s", Say("one two", Tool("bash", map[string]any{"command": "ls"})), Step{Parts: []Part{Reasoning("hm"), Text("end")}, Stop: "max_tokens", Usage: Usage{Input: 3, Output: 4}})
	status, _, lines, err := ask(t, s, "/messages", first)
	if err != nil || status != http.StatusOK {
		t.Fatal(status, err)
	}
	all := strings.Join(lines, "\n")
	for _, want := range []string{`"text":"one "`, `"text":"two"`, `"type":"tool_use"`, `{\"com`, `"stop_reason":"tool_use"`, `"type":"message_stop"`} {
		if !strings.Contains(all, want) {
			t.Errorf("no %s in\n%s", want, all)
		}
	}
	_, _, lines, _ = ask(t, s, "/messages", second)
	all = strings.Join(lines, "\n")
	for _, want := range []string{`"thinking":"hm"`, `"stop_reason":"max_tokens"`, `"output_tokens":4`} {
		if !strings.Contains(all, want) {
			t.Errorf("no %s in\n%s", want, all)
		}
	}
	requests := s.Requests("s")
	if len(requests) != 2 || requests[0].System != "be good" || requests[0].Tools[0] != "bash" || requests[0].Header.Get("Authorization") != "Bearer k" || requests[1].LastResult() != "out" || requests[1].Step != 1 {
		t.Errorf("requests %+v", requests)
	}
	if status, _, _, _ := ask(t, s, "/messages", strings.ReplaceAll(first, "script:s", "script:unknown")); status != http.StatusBadRequest {
		t.Errorf("an unknown script: %d", status)
	}
	if _, _, lines, _ := ask(t, s, "/messages", `{"system":"You make a title","messages":[{"role":"user","content":"[[script:s]]"}]}`); !strings.Contains(strings.Join(lines, ""), "A ") {
		t.Errorf("a title: %q", lines)
	}
	if len(s.Requests("s")) != 2 {
		t.Error("a title counts as a request of the script")
	}
}

func TestOpenAI(t *testing.T) {
	s := Start(t)
	s.Script("s", Step{Parts: []Part{Reasoning("hm"), Text("a b"), Tool("bash", map[string]any{"x": 1})}})
	_, _, lines, err := ask(t, s, "/chat/completions", openaiFirst)
	if err != nil || lines[len(lines)-1] != "[DONE]" {
		t.Fatalf("%v %q", err, lines)
	}
	all := strings.Join(lines, "\n")
	for _, want := range []string{`"reasoning_content":"hm"`, `"content":"a "`, `"name":"bash"`, `{\"x\":1}`, `"finish_reason":"tool_calls"`, `"prompt_tokens":105`} {
		if !strings.Contains(all, want) {
			t.Errorf("no %s in\n%s", want, all)
		}
	}
}

// Each attempt at a step gets the next failure, and then the answer.
func TestFailures(t *testing.T) {
	s := Start(t)
	s.Script("s", Step{Parts: []Part{Text("one two three")}, Failures: []Failure{
		{Status: 429, Message: "slow down", RetryAfter: 2 * time.Second}, {After: 1}, {After: 1, Event: true, Message: "overloaded"},
	}})
	status, header, lines, _ := ask(t, s, "/messages", first)
	var body struct {
		Error struct{ Type, Message string }
	}
	if err := json.Unmarshal([]byte(lines[0]), &body); err != nil {
		t.Fatal(err)
	}
	if status != 429 || header.Get("Retry-After") != "2" || body.Error.Type != "rate_limit_error" || body.Error.Message != "slow down" {
		t.Errorf("%d %v %+v", status, header, body)
	}
	if _, _, lines, err := ask(t, s, "/messages", first); err == nil || !strings.Contains(strings.Join(lines, ""), "one ") || strings.Contains(strings.Join(lines, ""), "two") {
		t.Errorf("a cut stream: %v %q", err, lines)
	}
	if _, _, lines, err := ask(t, s, "/messages", first); err != nil || !strings.Contains(lines[len(lines)-1], "overloaded") {
		t.Errorf("a stream with an error: %v %q", err, lines)
	}
	if _, _, lines, err := ask(t, s, "/messages", first); err != nil || !strings.Contains(lines[len(lines)-1], "message_stop") {
		t.Errorf("the fourth attempt: %v %q", err, lines)
	}
}
