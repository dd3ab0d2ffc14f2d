package testmodel

import (
	"encoding/json"
	"strings"
)

// anthropic is the Messages API.
type anthropic struct{}

type object = map[string]any

// content is that of a message: a text or a list of blocks.
type content []struct {
	Type    string  `json:"type"`
	Text    string  `json:"text"`
	Name    string  `json:"name"`
	Content content `json:"content"`
}

func (c *content) UnmarshalJSON(data []byte) error {
	var text string
	if json.Unmarshal(data, &text) == nil {
		*c = content{{Type: "text", Text: text}}
		return nil
	}
	type plain content
	return json.Unmarshal(data, (*plain)(c))
}

func (c content) text() string {
	var b strings.Builder
	for _, block := range c {
		if block.Type == "text" {
			b.WriteString(block.Text)
		}
	}
	return b.String()
}

func (anthropic) parse(body []byte) (Request, error) {
	var in struct {
		Model    string
		System   content
		Tools    []struct{ Name string }
		Messages []struct {
			Role    string
			Content content
		}
	}
	if err := json.Unmarshal(body, &in); err != nil {
		return Request{}, err
	}
	r := Request{Model: in.Model, System: in.System.text()}
	for _, t := range in.Tools {
		r.Tools = append(r.Tools, t.Name)
	}
	for _, m := range in.Messages {
		message := Message{Role: m.Role, Text: m.Content.text()}
		for _, block := range m.Content {
			switch block.Type {
			case "tool_result":
				message.Results = append(message.Results, block.Content.text())
			case "tool_use":
				message.Calls = append(message.Calls, block.Name)
			}
		}
		r.Messages = append(r.Messages, message)
	}
	return r, nil
}

func anthropicError(status int) string {
	switch status {
	case 400:
		return "invalid_request_error"
	case 401:
		return "authentication_error"
	case 429:
		return "rate_limit_error"
	case 529:
		return "overloaded_error"
	}
	return "api_error"
}

func (anthropic) failed(status int, message string) any {
	return object{"type": "error", "error": object{"type": anthropicError(status), "message": message}}
}

func (anthropic) broken(message string) event {
	return event{name: "error", data: object{"type": "error", "error": object{"type": "overloaded_error", "message": message}}}
}

func named(data object) event { return event{name: data["type"].(string), data: data} }

func (anthropic) open(r Request, u Usage) []event {
	return []event{named(object{"type": "message_start", "message": object{
		"id": "msg_testmodel", "type": "message", "role": "assistant", "model": r.Model, "content": []any{},
		"usage": object{"input_tokens": u.Input, "output_tokens": 1, "cache_read_input_tokens": u.CacheRead, "cache_creation_input_tokens": u.CacheWrite},
	}})}
}

func (anthropic) part(index int, p Part, call string) []event {
	start := object{"type": "text", "text": ""}
	var deltas []event
	delta := func(d object, piece string) {
		e := named(object{"type": "content_block_delta", "index": index, "delta": d})
		e.piece = piece
		deltas = append(deltas, e)
	}
	switch {
	case p.Call != nil:
		start = object{"type": "tool_use", "id": call, "name": p.Call.Name, "input": object{}}
		input, _ := json.Marshal(p.Call.Input)
		half := len(input) / 2
		delta(object{"type": "input_json_delta", "partial_json": string(input[:half])}, "")
		delta(object{"type": "input_json_delta", "partial_json": string(input[half:])}, "")
	case p.Reasoning != "":
		start = object{"type": "thinking", "thinking": "", "signature": ""}
		for _, s := range pieces(p.Reasoning) {
			delta(object{"type": "thinking_delta", "thinking": s}, s)
		}
		delta(object{"type": "signature_delta", "signature": "c2lnbmVk"}, "")
	default:
		for _, s := range pieces(p.Text) {
			delta(object{"type": "text_delta", "text": s}, s)
		}
	}
	events := []event{named(object{"type": "content_block_start", "index": index, "content_block": start})}
	events = append(events, deltas...)
	return append(events, named(object{"type": "content_block_stop", "index": index}))
}

func (anthropic) close(stop string, u Usage) []event {
	return []event{
		named(object{"type": "message_delta", "delta": object{"stop_reason": stop, "stop_sequence": nil}, "usage": object{"output_tokens": u.Output}}),
		named(object{"type": "message_stop"}),
	}
}
