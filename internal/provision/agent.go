package provision

import (
	"context"
	"fmt"

	"github.com/harvest-run/executord/internal/agent"
	"github.com/harvest-run/executord/internal/agent/opencode"
	"github.com/harvest-run/executord/internal/agent/opencode/config"
	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/fault"
	"github.com/harvest-run/executord/internal/session"
	"github.com/harvest-run/executord/internal/workspace"
)

// Start implements session.Agents.
func (p *Provisioner) Start(ctx context.Context, sb engine.Sandbox, start session.AgentStart) (session.AgentServer, error) {
	if start.Spec.Kind != "opencode" {
		return nil, fault.InvalidField("AGENT_KIND", "agent.kind", "%q is not an agent that is known", start.Spec.Kind)
	}
	guest, b := p.guest(sb), p.bag(start.Way)
	made, err := p.provider(start.Spec.Model)
	if err != nil {
		return nil, err
	}
	if err := writeKeys(ctx, guest, b); err != nil {
		return nil, err
	}
	chosen := options(made, b)
	chosen.Permission = permissions(start.Spec.Interactions)
	settings, err := chosen.JSON()
	if err != nil {
		return nil, err
	}
	missing := withoutKey(b)
	program := p.cfg.Program
	if program == "" {
		program = config.OpenCode
	}
	server, err := opencode.Start(ctx, opencode.Config{
		Place:   place{sb, guest, p.cfg.Network.Of(sb.ID()).Environment},
		Logger:  p.log.With("sandbox", sb.ID()),
		Program: program, Dir: workspace.Root, ConfigFile: config.Dir + "/opencode.json", Content: settings,
		Auth: start.Way.Auth, Join: true, Env: []string{placeholder + "=none"},
		Tell: func(s opencode.Status) { start.Tell(statusOf(s, missing)) },
	})
	if err != nil {
		return nil, err
	}
	conversation, err := p.conversation(ctx, server, start)
	if err != nil {
		server.Close()
		return nil, err
	}
	return &agentServer{server, conversation}, nil
}

// conversation goes on with the one of the session, or begins it.
func (p *Provisioner) conversation(ctx context.Context, server *opencode.Server, start session.AgentStart) (*opencode.Conversation, error) {
	cfg := opencode.ConversationConfig{Directory: workspace.Root, System: start.Spec.Instructions}
	if r := start.Way.Repositories; len(r) > 0 {
		cfg.Directory = workspace.Root + "/" + r[0].Directory
	}
	if start.Conversation != "" {
		c, err := server.Resume(ctx, start.Conversation, cfg)
		if err != nil {
			return nil, fmt.Errorf("go on with conversation %s: %w", start.Conversation, err)
		}
		return c, nil
	}
	c, err := server.NewConversation(ctx, cfg)
	if err != nil {
		return nil, fmt.Errorf("begin a conversation: %w", err)
	}
	return c, nil
}

// permissions are what OpenCode asks for, of sub-agents too; nil leaves all allowed and
// questions impossible. What becomes of what is asked is the turns' affair.
func permissions(p session.InteractionPolicy) map[string]string {
	if p.Mode == "" || p.Mode == "ALLOW" {
		return nil
	}
	question := "deny"
	if p.Mode == "ASK" {
		question = "allow"
	}
	return map[string]string{
		"*": "allow", "question": question,
		"bash": "ask", "edit": "ask", "external_directory": "ask", "webfetch": "ask", "doom_loop": "ask",
	}
}

// statusOf translates how an agent is; missing are the MCP servers that have no key.
func statusOf(s opencode.Status, missing []string) session.AgentStatus {
	out := session.AgentStatus{State: session.AgentState(s.State), Version: "opencode " + s.Version, Detail: s.Detail}
	if s.Version == "" {
		out.Version = ""
	}
	for _, m := range s.MCP {
		out.MCP = append(out.MCP, session.MCPServer{Name: m.Name, State: mcpState(m.State), Detail: m.Detail})
	}
	if len(s.MCP) > 0 {
		for _, name := range missing {
			out.MCP = append(out.MCP, session.MCPServer{Name: name, State: "NO_KEY"})
		}
	}
	return out
}

// mcpState is the API's name of a state of OpenCode's.
func mcpState(state string) string {
	return map[string]string{
		"connected": "CONNECTED", "disabled": "DISABLED", "failed": "FAILED",
		"needs_auth": "NEEDS_AUTHENTICATION", "needs_client_registration": "NEEDS_AUTHENTICATION",
	}[state]
}

// agentServer is an OpenCode with its conversation.
type agentServer struct {
	*opencode.Server
	conversation *opencode.Conversation
}

// Conversation implements session.AgentServer.
func (a *agentServer) Conversation() agent.Conversation { return a.conversation }
