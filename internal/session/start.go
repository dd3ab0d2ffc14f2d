package session

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"time"

	"github.com/harvest-run/executord/internal/engine"
)

const (
	// imageTime bounds the finding of an image, which may have to be built.
	imageTime = 45 * time.Minute
	// prepareTime bounds the cloning of a session's repositories, and each of the other steps.
	prepareTime = 15 * time.Minute
)

// sandboxID names a sandbox of a session after it and its generation.
func sandboxID(sessionID string, generation int) string {
	if generation <= 1 {
		return "s-" + sessionID
	}
	return "s-" + sessionID + "-" + strconv.Itoa(generation)
}

// make makes the sandbox of a session that starts or goes on from a snapshot, and all that
// it needs.
func (l *live) make(ctx context.Context) bool {
	working, done, going := l.interruptible(ctx)
	defer done()
	if !going {
		return true
	}
	before := l.snapshot()
	sandbox, details, err := l.prepare(working, before)
	if ctx.Err() != nil {
		return false
	}
	if err != nil && before.State == Resuming {
		return l.resumeFailed(ctx, sandbox, err)
	}
	if err != nil {
		l.end(StartFailed, err.Error())
		l.publish(sandbox) // so that finish ends it
		return true
	}
	// Recorded before anybody can use it: what runs in it must be found again.
	if !l.enter(ctx, Running, sandbox, func(r *Session) {
		r.Limits = sandbox.Limits()
		r.Details.Checkouts, r.Details.Base, r.Details.Prepared = details.Checkouts, details.Base, len(details.Repositories) > 0
		r.Details.Conversation, r.Details.Snapshot = details.Conversation, ""
		r.Details.SandboxDeadline = sandbox.Deadline()
	}) {
		return false
	}
	if before.State == Resuming {
		l.tell(Event{Replaced: &Replaced{Sandbox: before.Sandbox, Generation: before.Details.Generation}})
	}
	if before.State == Starting {
		close(l.started)
	}
	l.attach()
	l.dropImage(ctx, before.Details.Snapshot, before.Details.Borrowed)
	return true
}

// prepare makes a sandbox and what is to be in it. What it returns with an error is to
// be ended.
func (l *live) prepare(ctx context.Context, record Session) (sandbox engine.Sandbox, d Details, err error) {
	d = record.Details
	if d.Agent != nil || d.Image != "" {
		if err := l.findImage(ctx, &d); err != nil {
			return nil, d, err
		}
	}
	if err := l.do(StepSandbox, record.Sandbox, func() error {
		sandbox, err = l.makeSandbox(ctx, record, d)
		return err
	}); err != nil {
		return sandbox, d, err
	}
	if len(d.Repositories) > 0 || d.Agent != nil {
		if err := l.furnish(ctx, sandbox, &d); err != nil {
			return sandbox, d, err
		}
	}
	return sandbox, d, nil
}

func (l *live) findImage(ctx context.Context, d *Details) error {
	if d.Snapshot != "" {
		return nil // it has everything
	}
	return l.do(StepImage, d.Image, func() (err error) {
		ctx, stop := context.WithTimeoutCause(ctx, imageTime, fmt.Errorf("no image within %v", imageTime))
		defer stop()
		d.Base, err = l.service.cfg.Parts.Images.Resolve(ctx, l.snapshot().Engine, d.Image, func(text string) { l.step(StepImage, StepProgress, d.Image, text) })
		return err
	})
}

func (l *live) makeSandbox(ctx context.Context, record Session, d Details) (engine.Sandbox, error) {
	ctx, stop := context.WithTimeoutCause(ctx, sandboxTime, fmt.Errorf("no sandbox within %v", sandboxTime))
	defer stop()
	on, err := l.engine()
	if err != nil {
		return nil, err
	}
	spec := engine.Spec{
		ID: record.Sandbox, Limits: record.Limits, Network: record.Network.Mode,
		Image: d.Base, Lifetime: time.Until(record.ExpireTime()), Labels: record.Labels, Placement: d.Placement,
	}
	if d.Snapshot != "" {
		spec.Image = d.Snapshot
	}
	if d.Agent != nil && len(d.Repositories) > 0 {
		name := l.service.cfg.Parts.Workspace.MemoryVolume(d.Repositories[0])
		if err := on.Volumes().Ensure(ctx, name); err != nil {
			return nil, fmt.Errorf("make the volume of the memory: %w", err)
		}
		spec.Volumes = []engine.VolumeMount{{Name: name, Path: memoryPath}}
	}
	sandbox := l.claimed
	if sandbox == nil {
		made, err := on.Create(ctx, spec)
		if err != nil {
			return nil, err
		}
		sandbox = made
	}
	l.claimed = nil
	_, err = l.service.cfg.Network.Open(ctx, sandbox, record.Network)
	return sandbox, err
}

// furnish makes the ways out, repositories, memory and agent.
func (l *live) furnish(ctx context.Context, sandbox engine.Sandbox, d *Details) error {
	parts := l.service.cfg.Parts
	timed := func(f func(ctx context.Context) error) func() error {
		return func() error {
			ctx, stop := context.WithTimeoutCause(ctx, prepareTime, fmt.Errorf("not done within %v", prepareTime))
			defer stop()
			return f(ctx)
		}
	}
	if err := l.do(StepCredentials, "", timed(func(ctx context.Context) error {
		return parts.Credentials.Open(ctx, sandbox, l.way(*d))
	})); err != nil {
		return err
	}
	if err := l.do(StepIdentity, "", timed(func(ctx context.Context) error {
		return parts.Workspace.Configure(ctx, sandbox, d.Identity, d.Repositories)
	})); err != nil {
		return err
	}
	if !d.Prepared {
		d.Checkouts = nil
		for _, r := range d.Repositories {
			if err := l.do(StepClone, r.Directory, timed(func(ctx context.Context) error {
				checkout, err := parts.Workspace.Clone(ctx, sandbox, r, func(p Progress) { l.cloneProgress(r, p) })
				d.Checkouts = append(d.Checkouts, checkout)
				return err
			})); err != nil {
				return err
			}
		}
	}
	if d.Agent == nil {
		return nil
	}
	if len(d.Repositories) > 0 {
		// An agent without its memory is of use; that it has none is told.
		if err := l.do(StepMemory, "", timed(func(ctx context.Context) error { return parts.Workspace.OpenMemory(ctx, sandbox) })); err != nil && ctx.Err() != nil {
			return err
		}
	}
	return l.do(StepAgent, d.Agent.Kind, timed(func(ctx context.Context) error { return l.startAgent(ctx, sandbox, d) }))
}

func (l *live) cloneProgress(r Repository, p Progress) {
	step := &Step{Kind: StepClone, State: StepProgress, Subject: r.Directory, Text: clip(p.Text)}
	if p.Percent >= 0 {
		step.Percent = &p.Percent
	}
	l.tell(Event{Step: step})
}

// way is what the sandbox reaches with credentials.
func (l *live) way(d Details) Way {
	l.mu.Lock()
	defer l.mu.Unlock()
	w := Way{Values: l.values, Secrets: d.Secrets, Inline: d.Inline, Repositories: d.Repositories, Auth: l.auth}
	if d.Agent != nil {
		w.Model = &d.Agent.Model
	}
	return w
}

// startAgent starts the agent of a sandbox or joins the one that runs in it.
func (l *live) startAgent(ctx context.Context, sandbox engine.Sandbox, d *Details) error {
	server, err := l.service.cfg.Parts.Agents.Start(ctx, sandbox, AgentStart{
		Spec: *d.Agent, Way: l.way(*d), Conversation: d.Conversation, Tell: l.agentTold,
	})
	if err != nil {
		return err
	}
	l.agent = server
	d.Conversation = server.Conversation().ID()
	return nil
}

// agentTold notes a state of the agent. It is not worth a write of its own: the record has
// it with the next.
func (l *live) agentTold(status AgentStatus) {
	l.mu.Lock()
	l.record.Details.Status = status
	l.record.Details.Status.MCP = slices.Clone(status.MCP)
	model := Model{}
	if a := l.record.Details.Agent; a != nil {
		model = a.Model
	}
	l.notify()
	l.mu.Unlock()
	l.tell(Event{Agent: &AgentNote{Status: status, Model: model}})
}

// attach hands the agent over to the turns.
func (l *live) attach() {
	if l.agent != nil {
		l.service.cfg.Parts.Turns.Attach(l.id, l.agent.Conversation())
	}
}

// rejoin takes up the ways out and the agent of a sandbox that an executord before this
// one made. What does not work is told; the sandbox is there all the same.
func (l *live) rejoin(ctx context.Context) bool {
	record := l.snapshot()
	d := record.Details
	if len(d.Repositories) == 0 && d.Agent == nil {
		return true
	}
	working, done, going := l.interruptible(ctx)
	defer done()
	if !going {
		return true
	}
	working, stop := context.WithTimeoutCause(working, prepareTime, fmt.Errorf("not done within %v", prepareTime))
	defer stop()
	if err := l.do(StepCredentials, "", func() error { return l.service.cfg.Parts.Credentials.Open(working, l.sandbox, l.way(d)) }); err != nil && ctx.Err() != nil {
		return false
	}
	if d.Agent == nil {
		return true
	}
	if err := l.do(StepAgent, d.Agent.Kind, func() error { return l.startAgent(working, l.sandbox, &d) }); err != nil {
		if ctx.Err() != nil {
			return false
		}
		l.agentTold(AgentStatus{State: AgentFailed, Version: d.Status.Version, Detail: clip(err.Error())})
		return true
	}
	if d.Conversation != record.Details.Conversation {
		if _, ok := l.write(ctx, l.sandbox, func(r *Session) { r.Details.Conversation = d.Conversation }); !ok {
			return false
		}
	}
	l.attach()
	return true
}

// resumeFailed takes a session whose sandbox could not be made from its snapshot back to
// rest.
func (l *live) resumeFailed(ctx context.Context, sandbox engine.Sandbox, why error) bool {
	l.closeAgent()
	l.publish(sandbox)
	if !l.terminate(ctx) {
		return false
	}
	if !l.enter(ctx, Paused, nil, func(*Session) {}) {
		return false
	}
	l.fail(fmt.Errorf("resume session %s: %w", l.id, why))
	l.slot.Release()
	return true
}

func (l *live) closeAgent() {
	if l.agent != nil {
		l.agent.Close()
		l.agent = nil
	}
}

// fail tells those who wait for a pause or a resume that there is none.
func (l *live) fail(why error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.failed = why
	l.notify()
}
