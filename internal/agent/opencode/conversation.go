package opencode

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"iter"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/harvest-run/executord/internal/agent"
)

// messagePrefix is what OpenCode wants names of messages to begin with.
const messagePrefix = "msg_"

// ConversationConfig says what a conversation is like.
type ConversationConfig struct {
	// Directory is where the agent works: the top of a git repository, so that OpenCode can
	// tell what was changed. "" is the server's.
	Directory string
	// Title is for people; "" has OpenCode's model find one.
	Title string
	// Agent is OpenCode's agent that answers; "" is build.
	Agent string
	// System are instructions beside those of the configuration; "" is none.
	System string
	// Permissions go over those of the configuration.
	Permissions []Rule
}

// Rule is about what an agent may do.
type Rule struct {
	Permission string `json:"permission"`
	Pattern    string `json:"pattern"`
	// Action is allow, ask or deny.
	Action string `json:"action"`
}

// Conversation is one of OpenCode's sessions. It is an agent.Conversation.
type Conversation struct {
	server *Server
	api    api
	id     string
	cfg    ConversationConfig

	mu sync.Mutex
	// what follows is guarded by mu
	turn *turn // the one that is followed
}

// NewConversation begins one.
func (s *Server) NewConversation(ctx context.Context, cfg ConversationConfig) (*Conversation, error) {
	c := s.conversation(cfg)
	in := make(map[string]any)
	if cfg.Title != "" {
		in["title"] = cfg.Title
	}
	if len(cfg.Permissions) > 0 {
		in["permission"] = cfg.Permissions
	}
	made, err := c.api.create(ctx, in)
	if err != nil {
		return nil, fmt.Errorf("begin a conversation: %w", err)
	}
	c.id = made.ID
	s.wantTools(c.cfg.Directory)
	return c, nil
}

// Resume goes on with one that was begun before, also by a server before this one.
func (s *Server) Resume(ctx context.Context, id string, cfg ConversationConfig) (*Conversation, error) {
	c := s.conversation(cfg)
	if _, err := c.api.session(ctx, id); err != nil {
		return nil, fmt.Errorf("go on with conversation %s: %w", id, err)
	}
	c.id = id
	s.wantTools(c.cfg.Directory)
	return c, nil
}

func (s *Server) conversation(cfg ConversationConfig) *Conversation {
	if cfg.Directory == "" {
		cfg.Directory = s.cfg.Dir
	}
	return &Conversation{server: s, cfg: cfg, api: api{client: s.client, directory: cfg.Directory}}
}

// ID is OpenCode's name of it.
func (c *Conversation) ID() string { return c.id }

// Prompt gives the agent a prompt and follows it to its end. One that the agent has by this
// name already is followed, and not given twice.
func (c *Conversation) Prompt(ctx context.Context, p agent.Prompt, tell func(agent.Event) error) (agent.Outcome, error) {
	t, err := c.begin(p.ID, tell)
	if err != nil {
		return agent.Outcome{}, err
	}
	defer c.finish(t)
	switch err := c.api.has(ctx, c.id, t.message); {
	case err == nil:
		return t.follow(ctx, nil)
	case !isStatus(err, http.StatusNotFound):
		// It is not known whether it has it. The turn waits for a server that is on its way.
		if err := c.reachable(ctx, err); err != nil {
			return agent.Outcome{}, err
		}
	}
	busy, err := c.api.busy(ctx)
	if err != nil {
		return agent.Outcome{}, fmt.Errorf("prompt: %w", err)
	}
	if _, is := busy[c.id]; is {
		// It would be taken for a word on what the agent is doing.
		return agent.Outcome{}, agent.ErrBusy
	}
	return t.follow(ctx, c.body(p, t.message))
}

// reachable waits for a server that is being started; it returns err if that is not why.
func (c *Conversation) reachable(ctx context.Context, err error) error {
	if errors.As(err, new(*statusError)) {
		return fmt.Errorf("prompt: %w", err)
	}
	ctx, stop := context.WithTimeoutCause(ctx, startTime, err)
	defer stop()
	for {
		if now := c.server.now(); now.lost != nil {
			return now.lost
		}
		if _, err := c.server.Health(ctx); err == nil {
			return nil
		}
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
			return fmt.Errorf("prompt: %w", context.Cause(ctx))
		}
	}
}

// Join follows a prompt that was given before.
func (c *Conversation) Join(ctx context.Context, promptID string, before iter.Seq[agent.Event], tell func(agent.Event) error) (agent.Outcome, error) {
	t, err := c.begin(promptID, tell)
	if err != nil {
		return agent.Outcome{}, err
	}
	defer c.finish(t)
	if err := c.reachable(ctx, errors.New("the agent does not answer")); err != nil {
		return agent.Outcome{}, err
	}
	if err := c.api.has(ctx, c.id, t.message); err != nil {
		if isStatus(err, http.StatusNotFound) {
			return agent.Outcome{}, agent.ErrNoPrompt
		}
		return agent.Outcome{}, fmt.Errorf("join a prompt: %w", err)
	}
	for e := range before {
		t.translation.absorb(e)
	}
	return t.follow(ctx, nil)
}

func (c *Conversation) begin(promptID string, tell func(agent.Event) error) (*turn, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.turn != nil {
		return nil, agent.ErrBusy
	}
	message := messagePrefix + promptID
	c.turn = &turn{
		c: c, message: message, over: make(chan struct{}),
		translation: newTranslation(c.id, message, c.cfg.Directory, tell),
	}
	return c.turn, nil
}

func (c *Conversation) finish(t *turn) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.turn = nil
	close(t.over)
}

// body is what the prompt is to OpenCode.
func (c *Conversation) body(p agent.Prompt, message string) map[string]any {
	var parts []map[string]any
	if p.Text != "" {
		parts = append(parts, map[string]any{"type": "text", "text": p.Text})
	}
	for _, a := range p.Attachments {
		parts = append(parts, map[string]any{
			"type": "file", "mime": a.MediaType, "filename": a.Filename,
			"url": "data:" + a.MediaType + ";base64," + base64.StdEncoding.EncodeToString(a.Data),
		})
	}
	in := map[string]any{"messageID": message, "parts": parts}
	if p.Model.Model != "" {
		in["model"] = map[string]string{"providerID": p.Model.Provider, "modelID": p.Model.Model}
	}
	if c.cfg.Agent != "" {
		in["agent"] = c.cfg.Agent
	}
	if c.cfg.System != "" {
		in["system"] = c.cfg.System
	}
	return in
}

// Abort ends what the agent does, its sub-agents too, and returns when OpenCode says that
// nothing of it is busy and the prompt, if one is followed, is over.
func (c *Conversation) Abort(ctx context.Context) error {
	c.mu.Lock()
	t := c.turn
	c.mu.Unlock()
	for {
		ids := []string{c.id}
		if t != nil {
			t.aborted.Store(true)
			ids = t.conversations()
		}
		busy, err := c.api.busy(ctx)
		if err == nil {
			for _, id := range ids {
				if _, is := busy[id]; !is && id != c.id {
					continue
				}
				if err = c.api.abort(ctx, id); err != nil {
					break
				}
			}
		}
		if err == nil {
			busy, err = c.api.busy(ctx)
		}
		if c.server.now().lost != nil {
			return nil
		}
		if ctx.Err() != nil {
			return fmt.Errorf("abort: %w", errors.Join(context.Cause(ctx), err))
		}
		still := err != nil
		for _, id := range ids {
			if _, is := busy[id]; is {
				still = true
			}
		}
		if !still && t == nil {
			return nil
		}
		var over <-chan struct{}
		if t != nil {
			over = t.over
		}
		select {
		case <-over:
			// The turn's own end says that OpenCode is through with it.
			if !still {
				return nil
			}
			t = nil
		case <-time.After(100 * time.Millisecond):
		case <-ctx.Done():
		}
	}
}

// Answer answers a permission request or a question.
func (c *Conversation) Answer(ctx context.Context, id string, a agent.Answer) error {
	var err error
	switch {
	case strings.HasPrefix(id, "per"):
		reply, ok := map[agent.Decision]string{agent.AllowOnce: "once", agent.AllowAlways: "always", agent.Reject: "reject"}[a.Decision]
		if !ok {
			return fmt.Errorf("answer %s: there is no decision %q", id, a.Decision)
		}
		err = c.api.replyPermission(ctx, id, reply, a.Message)
	case strings.HasPrefix(id, "que") && a.Decision == agent.Reject:
		err = c.api.rejectQuestion(ctx, id)
	case strings.HasPrefix(id, "que"):
		answers := a.Labels
		if answers == nil {
			answers = [][]string{}
		}
		err = c.api.replyQuestion(ctx, id, answers)
	default:
		return agent.ErrNotAsked
	}
	if isStatus(err, http.StatusNotFound) {
		return agent.ErrNotAsked
	}
	if err != nil {
		return fmt.Errorf("answer %s: %w", id, err)
	}
	return nil
}

// Messages are what was said so far.
func (c *Conversation) Messages(ctx context.Context) ([]agent.Message, error) {
	list, err := c.api.messages(ctx, c.id, 0)
	if err != nil {
		return nil, fmt.Errorf("messages: %w", err)
	}
	out := make([]agent.Message, len(list))
	for i, m := range list {
		out[i] = said(m)
	}
	return out, nil
}

func said(m stored) agent.Message {
	out := agent.Message{
		ID: m.Info.ID, FromUser: m.Info.Role == "user", Prompt: strings.TrimPrefix(m.Info.ParentID, messagePrefix),
		Time: instant(m.Info.Time.Created), Usage: usage(m.Info.Tokens, m.Info.Cost),
	}
	if out.FromUser {
		out.ID = strings.TrimPrefix(m.Info.ID, messagePrefix)
		out.Prompt = out.ID
	}
	var text []string
	for _, p := range m.Parts {
		switch p.Type {
		case "text":
			text = append(text, p.Text)
		case "tool":
			out.Tools = append(out.Tools, ended(p, p.State.facts()))
		}
	}
	out.Text = strings.Join(text, "")
	return out
}
