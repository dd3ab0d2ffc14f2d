package testmodel

import "encoding/json"

// openai is OpenAI's chat completions, as the many compatible providers speak it.
type openai struct{}

func (openai) parse(body []byte) (Request, error) {
	var in struct {
		Model string
		Tools []struct {
			Function struct{ Name string }
		}
		Messages []struct {
			Role      string
			Content   content
			ToolCalls []struct {
				Function struct{ Name string }
			} `json:"tool_calls"`
		}
	}
	if err := json.Unmarshal(body, &in); err != nil {
		return Request{}, err
	}
	r := Request{Model: in.Model}
	for _, t := range in.Tools {
		r.Tools = append(r.Tools, t.Function.Name)
	}
	for _, m := range in.Messages {
		message := Message{Role: m.Role, Text: m.Content.text()}
		switch m.Role {
		case "system", "developer":
			r.System += message.Text
			continue
		case "tool":
			message.Results, message.Text = []string{message.Text}, ""
		}
		for _, c := range m.ToolCalls {
			message.Calls = append(message.Calls, c.Function.Name)
		}
		r.Messages = append(r.Messages, message)
	}
	return r, nil
}

func (openai) failed(status int, message string) any {
	return object{"error": object{"message": message, "type": anthropicError(status), "code": status}}
}

func (openai) broken(message string) event {
	return event{data: object{"error": object{"message": message, "type": "server_error"}}}
}

func chunk(delta object, finish any) object {
	return object{
		"id": "chatcmpl-testmodel", "object": "chat.completion.chunk", "created": 1, "model": "testmodel",
		"choices": []any{object{"index": 0, "delta": delta, "finish_reason": finish}},
	}
}

func (openai) open(Request, Usage) []event {
	return []event{{data: chunk(object{"role": "assistant", "content": ""}, nil)}}
}

func (openai) part(index int, p Part, call string) []event {
	if p.Call != nil {
		input, _ := json.Marshal(p.Call.Input)
		return []event{
			{data: chunk(object{"tool_calls": []any{object{"index": index, "id": call, "type": "function", "function": object{"name": p.Call.Name, "arguments": ""}}}}, nil)},
			{data: chunk(object{"tool_calls": []any{object{"index": index, "function": object{"arguments": string(input)}}}}, nil)},
		}
	}
	key, text := "content", p.Text
	if p.Reasoning != "" {
		key, text = "reasoning_content", p.Reasoning
	}
	var events []event
	for _, s := range pieces(text) {
		events = append(events, event{data: chunk(object{key: s}, nil), piece: s})
	}
	return events
}

func (openai) close(stop string, u Usage) []event {
	finish := map[string]string{"end_turn": "stop", "tool_use": "tool_calls", "max_tokens": "length"}[stop]
	usage := chunk(object{}, nil)
	usage["choices"] = []any{}
	usage["usage"] = object{
		"prompt_tokens": u.Input + u.CacheRead, "completion_tokens": u.Output, "total_tokens": u.Input + u.CacheRead + u.Output,
		"prompt_tokens_details": object{"cached_tokens": u.CacheRead},
	}
	return []event{{data: chunk(object{}, finish)}, {data: usage}, {data: "[DONE]"}}
}
