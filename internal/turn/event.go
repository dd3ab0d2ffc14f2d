package turn

import (
	"bytes"
	"encoding/json"
	"fmt"
	"time"

	"github.com/harvest-run/executord/internal/agent"
	"github.com/harvest-run/executord/internal/journal"
)

// Event is one entry of a turn's journal or a Gap. One of its fields beside Cursor and
// Time is set; none for an entry that a later executord wrote, of which only the place is
// known.
type Event struct {
	Cursor journal.Cursor `json:"-"`
	Time   time.Time      `json:"-"`
	Gap    *journal.Gap   `json:"-"`

	Started *Started `json:"started,omitempty"`
	Running *Began   `json:"running,omitempty"`
	// Agent is what the agent told, but for what it asked.
	Agent *agent.Event `json:"agent,omitempty"`
	// Requested and Resolved tell of an interaction, as it was then.
	Requested *Interaction `json:"requested,omitempty"`
	Resolved  *Interaction `json:"resolved,omitempty"`
	// Result is the last.
	Result *Result `json:"result,omitempty"`
}

// Started opens every journal.
type Started struct {
	Session string `json:"session"`
	Turn    string `json:"turn"`
	// Before is how many turns ran before it.
	Before int `json:"before,omitempty"`
}

// Began says that the agent was given the prompt.
type Began struct {
	Model agent.Model `json:"model,omitzero"`
}

// encode makes the entry of a journal. Of a result that is too large even so, because
// JSON takes up to six bytes for one, what is largest is left out.
func encode(e Event) ([]byte, error) {
	var data bytes.Buffer
	encoder := json.NewEncoder(&data)
	encoder.SetEscapeHTML(false)
	if err := encoder.Encode(e); err != nil {
		return nil, fmt.Errorf("encode an event: %w", err)
	}
	if data.Len() > journal.MaxEntry && e.Result != nil && e.Result.Diffs != nil {
		small := *e.Result
		small.Text, small.Diffs = clip(small.Text, maxNote), nil
		return encode(Event{Result: &small})
	}
	return data.Bytes(), nil
}

// decode reads an entry of a journal. One that makes no sense is an event of a later
// executord: an Event of which only the place is known.
func decode(entry journal.Event) Event {
	var e Event
	if entry.Gap == nil && json.Unmarshal(entry.Data, &e) != nil {
		e = Event{}
	}
	e.Cursor, e.Time, e.Gap = entry.Cursor, entry.Time, entry.Gap
	return e
}
