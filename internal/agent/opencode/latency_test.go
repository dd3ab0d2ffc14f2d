package opencode

import (
	"bufio"
	"context"
	"fmt"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/harvest-run/executord/internal/agent"
	"github.com/harvest-run/executord/internal/testmodel"
)

// A second reader of OpenCode's events stands beside ours. What a piece takes from the
// model to us is measured against what it takes to that reader, in one run.
func TestLatencyBeyondOpenCodesOwn(t *testing.T) {
	st := sharedStage(t)
	response, err := st.server.client.open(t.Context(), http.MethodGet, "/global/event", "", nil)
	if err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	bare, ours := make(map[string]time.Time), make(map[string]time.Time)
	var reader sync.WaitGroup
	reader.Go(func() {
		lines := bufio.NewReader(response.Body)
		for {
			line, err := readLine(lines)
			if err != nil {
				return
			}
			now := time.Now()
			if _, word, ok := strings.Cut(string(line), `"delta":"lat`); ok {
				word, _, _ = strings.Cut(word, " ")
				mu.Lock()
				bare["lat"+word] = now
				mu.Unlock()
			}
		}
	})
	var text strings.Builder
	const n = 150
	for i := range n {
		fmt.Fprintf(&text, "lat%d ", i)
	}
	st.model.Script("latency", testmodel.Step{Parts: []testmodel.Part{testmodel.Text(text.String())}, Pace: 10 * time.Millisecond})
	c := st.conversation(t, ConversationConfig{})
	beginWith(t, c, func(ctx context.Context, tell func(agent.Event) error) (agent.Outcome, error) {
		return c.Prompt(ctx, prompt("latency"), func(e agent.Event) error {
			now := time.Now()
			if e.Text != nil {
				for word := range strings.FieldsSeq(e.Text.Text) {
					mu.Lock()
					ours[word] = now
					mu.Unlock()
				}
			}
			return tell(e)
		})
	}).wait().ended(agent.Completed)
	response.Body.Close()
	reader.Wait()
	var beyond []time.Duration
	for word, at := range ours {
		if was, ok := bare[word]; ok {
			beyond = append(beyond, at.Sub(was))
		}
	}
	slices.Sort(beyond)
	if len(beyond) < n/2 {
		t.Fatalf("only %d pieces were seen by both", len(beyond))
	}
	t.Logf("beyond OpenCode's own stream: p50 %v, p99 %v, of %d", beyond[len(beyond)/2], beyond[len(beyond)*99/100], len(beyond))
}

// TestStartTime compares our start with OpenCode's own, which begins to listen. It tells
// the ratio; the machine is shared, so that it holds only what is far beyond.
func TestStartTime(t *testing.T) {
	if os.Getenv("EXECUTORD_MEASURE") == "" {
		t.Skip("set EXECUTORD_MEASURE to measure: it starts OpenCode six times")
	}
	var bare, ours []time.Duration
	for range 3 {
		began := time.Now()
		st := ownStage(t, nil)
		st.conversation(t, ConversationConfig{})
		ours = append(ours, time.Since(began))
		if err := st.server.Stop(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := os.Mkdir(st.root+"/other", 0o700); err != nil {
			t.Fatal(err)
		}
		began = time.Now()
		// A home of its own, as ours had: the first start makes the database.
		env := append(slices.Clone(st.place.last.Env), "HOME="+st.root+"/other")
		r, err := st.place.Start(t.Context(), Process{ID: "bare", Dir: st.dir, Env: env, Args: st.place.last.Args[7:]})
		if err != nil {
			t.Fatal(err)
		}
		for patience := 200 * time.Millisecond; ; time.Sleep(5 * time.Millisecond) {
			ctx, stop := context.WithTimeout(t.Context(), patience)
			_, err := st.server.client.health(ctx)
			stop()
			if err == nil {
				break
			}
		}
		if _, err := st.server.NewConversation(t.Context(), ConversationConfig{}); err != nil {
			t.Fatal(err)
		}
		bare = append(bare, time.Since(began))
		if err := r.Stop(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	slices.Sort(bare)
	slices.Sort(ours)
	t.Logf("to a conversation: bare %v, ours %v: %.2f times", bare[1], ours[1], float64(ours[1])/float64(bare[1]))
}
