package opencode

import (
	"encoding/json"
	"fmt"
	"time"
)

// What OpenCode 1.18 sends, as far as it is used here. Everything else is skipped: what a
// later version adds must not be an error, and nothing is required to be there.

// frame is one line of the event stream.
type frame struct {
	Payload struct {
		ID         string          `json:"id"`
		Type       string          `json:"type"`
		Properties json.RawMessage `json:"properties"`
	} `json:"payload"`
}

// event is one of OpenCode's events with the properties of all kinds that are used.
type event struct {
	Type string `json:"-"`
	// SessionID is the conversation that it is about.
	SessionID string `json:"sessionID"`
	// Info is a session or a message, by the kind.
	Info      json.RawMessage `json:"info"`
	Part      *part           `json:"part"`
	MessageID string          `json:"messageID"`
	PartID    string          `json:"partID"`
	Field     string          `json:"field"`
	Delta     string          `json:"delta"`
	Status    *status         `json:"status"`
	Error     *failure        `json:"error"`
	Todos     []todo          `json:"todos"`
	RequestID string          `json:"requestID"`
	request
	// session and message are Info, decoded.
	session *session
	message *message
}

// decodeEvent reads a line's data. An event that is not known has its Type and perhaps
// nothing else.
func decodeEvent(data []byte) (event, error) {
	var f frame
	if err := json.Unmarshal(data, &f); err != nil {
		return event{}, fmt.Errorf("event: %w", err)
	}
	e := event{Type: f.Payload.Type}
	if len(f.Payload.Properties) == 0 || !known(e.Type) {
		return e, nil
	}
	if err := json.Unmarshal(f.Payload.Properties, &e); err != nil {
		return event{}, fmt.Errorf("event %q: %w", e.Type, err)
	}
	var err error
	switch {
	case len(e.Info) == 0:
	case e.Type == "session.created":
		err = json.Unmarshal(e.Info, &e.session)
	case e.Type == "message.updated":
		err = json.Unmarshal(e.Info, &e.message)
	}
	if err != nil {
		return event{}, fmt.Errorf("event %q: %w", e.Type, err)
	}
	e.Info = nil
	return e, nil
}

// known says whether an event is used here.
func known(kind string) bool {
	switch kind {
	case "session.created", "session.status", "session.idle", "session.error", "session.compacted",
		"message.updated", "message.part.updated", "message.part.delta", "todo.updated",
		"permission.asked", "permission.replied", "question.asked", "question.replied", "question.rejected":
		return true
	}
	return false
}

// request is a permission request or a question.
type request struct {
	ID         string          `json:"id"`
	Permission string          `json:"permission"`
	Patterns   []string        `json:"patterns"`
	Metadata   json.RawMessage `json:"metadata"`
	Questions  []struct {
		Question string `json:"question"`
		Header   string `json:"header"`
		Options  []struct {
			Label       string `json:"label"`
			Description string `json:"description"`
		} `json:"options"`
		Multiple bool  `json:"multiple"`
		Custom   *bool `json:"custom"`
	} `json:"questions"`
	Tool struct {
		MessageID string `json:"messageID"`
		CallID    string `json:"callID"`
	} `json:"tool"`
}

// pending is a request that waits, as it is listed.
type pending struct {
	SessionID string `json:"sessionID"`
	request
}

type session struct {
	ID       string `json:"id"`
	ParentID string `json:"parentID"`
	Title    string `json:"title"`
}

type status struct {
	Type    string  `json:"type"`
	Attempt float64 `json:"attempt"`
	Message string  `json:"message"`
	Next    float64 `json:"next"`
}

type failure struct {
	Name string `json:"name"`
	Data struct {
		Message     string  `json:"message"`
		StatusCode  float64 `json:"statusCode"`
		IsRetryable bool    `json:"isRetryable"`
	} `json:"data"`
}

type todo struct {
	Content  string `json:"content"`
	Status   string `json:"status"`
	Priority string `json:"priority"`
}

type tokens struct {
	Input     float64 `json:"input"`
	Output    float64 `json:"output"`
	Reasoning float64 `json:"reasoning"`
	Cache     struct {
		Read  float64 `json:"read"`
		Write float64 `json:"write"`
	} `json:"cache"`
}

// message is one's head.
type message struct {
	ID        string   `json:"id"`
	SessionID string   `json:"sessionID"`
	Role      string   `json:"role"`
	ParentID  string   `json:"parentID"`
	Finish    string   `json:"finish"`
	Error     *failure `json:"error"`
	Tokens    tokens   `json:"tokens"`
	Cost      float64  `json:"cost"`
	Path      struct {
		Root string `json:"root"`
	} `json:"path"`
	Time struct {
		Created   float64 `json:"created"`
		Completed float64 `json:"completed"`
	} `json:"time"`
	// Summary is true for the assistant's summary of a history, and for a prompt what it
	// changed.
	Summary summary `json:"summary"`
}

type summary struct {
	Is    bool
	Diffs []diff
}

func (s *summary) UnmarshalJSON(data []byte) error {
	if json.Unmarshal(data, &s.Is) == nil {
		return nil
	}
	var of struct {
		Diffs []diff `json:"diffs"`
	}
	err := json.Unmarshal(data, &of)
	s.Diffs = of.Diffs
	return err
}

type diff struct {
	File      string  `json:"file"`
	Patch     string  `json:"patch"`
	Additions float64 `json:"additions"`
	Deletions float64 `json:"deletions"`
	Status    string  `json:"status"`
}

// part is a piece of a message.
type part struct {
	ID        string  `json:"id"`
	MessageID string  `json:"messageID"`
	Type      string  `json:"type"`
	Text      string  `json:"text"`
	Synthetic bool    `json:"synthetic"`
	CallID    string  `json:"callID"`
	Tool      string  `json:"tool"`
	Auto      bool    `json:"auto"`
	Cost      float64 `json:"cost"`
	Tokens    tokens  `json:"tokens"`
	Time      struct {
		End float64 `json:"end"`
	} `json:"time"`
	State state `json:"state"`
}

// state is that of a tool call.
type state struct {
	Status   string          `json:"status"`
	Input    json.RawMessage `json:"input"`
	Output   string          `json:"output"`
	Error    string          `json:"error"`
	Title    string          `json:"title"`
	Metadata json.RawMessage `json:"metadata"`
}

// facts are what tools tell in their metadata.
type facts struct {
	Output    string   `json:"output"`
	Exit      *float64 `json:"exit"`
	SessionID string   `json:"sessionId"`
	Filepath  string   `json:"filepath"`
	Exists    bool     `json:"exists"`
	FileDiff  *diff    `json:"filediff"`
	Files     []struct {
		FilePath  string  `json:"filePath"`
		Type      string  `json:"type"`
		Patch     string  `json:"patch"`
		Diff      string  `json:"diff"`
		Additions float64 `json:"additions"`
		Deletions float64 `json:"deletions"`
	} `json:"files"`
}

// facts of a tool call; none if they are of another form.
func (s state) facts() facts {
	var f facts
	if len(s.Metadata) > 0 && json.Unmarshal(s.Metadata, &f) != nil {
		return facts{}
	}
	return f
}

// stored is a message with its parts.
type stored struct {
	Info  message `json:"info"`
	Parts []part  `json:"parts"`
}

func instant(milliseconds float64) time.Time {
	if milliseconds <= 0 {
		return time.Time{}
	}
	return time.UnixMilli(int64(milliseconds)).UTC()
}
