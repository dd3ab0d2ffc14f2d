package turn

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/harvest-run/executord/internal/agent"
	"github.com/harvest-run/executord/internal/fault"
	"github.com/harvest-run/executord/internal/idempotency"
)

// answerWait is how long an agent may take to be given an answer.
const answerWait = 15 * time.Second

// Who resolved what no person did.
const (
	byPolicy   = "policy"
	byDeadline = "deadline"
	byAgent    = "agent"
	byTurn     = "end of the turn"
)

// ask keeps what the agent asks, and answers where nobody is to be asked. What was asked
// before is asked again because the agent was reached again.
func (l *live) ask(ctx context.Context, subAgent string, asked agent.Asked) error {
	asked = boundedAsked(asked)
	if i := l.askedBefore(asked.ID); i != nil {
		l.offer(i)
		return nil
	}
	now := time.Now()
	l.mu.Lock()
	policy := l.profile.Policy
	l.mu.Unlock()
	i := Interaction{
		ID: newID(now), Session: l.lane.session, Turn: l.id, SubAgent: clip(subAgent, maxName), Asked: asked, State: Pending, CreateTime: now,
	}
	answer, decided := i.byPolicy(policy)
	if !decided {
		i.ExpireTime = now.Add(policy.timeout())
	}
	err := l.persist(ctx, "record an interaction", func() error { return l.service.cfg.Store.InsertInteraction(ctx, i) })
	if err != nil {
		return err
	}
	l.mu.Lock()
	l.asked = append(l.asked, &i)
	l.mu.Unlock()
	shown := i
	if err := l.keep(ctx, Event{Requested: &shown}); err != nil {
		return err
	}
	l.service.home().Note(l.lane.session, Note{Interaction: &shown})
	l.look() // there is a deadline
	if !decided {
		return nil
	}
	return l.persist(ctx, "record an answer", func() error {
		_, err := l.resolve(ctx, idempotency.Key{}, i.ID, func(i *Interaction) { i.State, i.ResolvedBy, i.Answer = Resolved, byPolicy, &answer })
		return err
	})
}

func (p Policy) timeout() time.Duration {
	if p.Timeout > 0 {
		return p.Timeout
	}
	return DefaultAnswerTime
}

// askedBefore finds an interaction by the agent's name of it.
func (l *live) askedBefore(agentID string) *Interaction {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, i := range l.asked {
		if i.Asked.ID == agentID {
			return i
		}
	}
	return nil
}

// offer has an answer that was given delivered to an agent that waits for it.
func (l *live) offer(i *Interaction) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if i.State != Pending && i.Answer != nil && !slices.Contains(l.undelivered, i) {
		l.undelivered = append(l.undelivered, i)
		l.look()
	}
}

// answered takes note that the agent does not wait for an answer any more. Of one that
// was answered here that is to be expected.
func (l *live) answered(ctx context.Context, agentID string) {
	i := l.askedBefore(agentID)
	if i == nil {
		return
	}
	_, err := l.resolve(ctx, idempotency.Key{}, i.ID, func(i *Interaction) { i.State, i.ResolvedBy = Void, byAgent })
	if err != nil && fault.KindOf(err) != fault.FailedPrecondition {
		l.service.log.WarnContext(ctx, "an interaction that nobody waits for stays open until its turn ends", "interaction", i.ID, "error", err)
	}
}

// resolve resolves an interaction, once: in the store, then in the journal; the agent is
// given the answer by the minder. A fault FailedPrecondition (INTERACTION_NOT_PENDING),
// with the interaction as it is, if it is resolved already.
func (l *live) resolve(ctx context.Context, key idempotency.Key, id string, change func(*Interaction)) (Interaction, error) {
	l.settling.Lock()
	defer l.settling.Unlock()
	l.mu.Lock()
	at := slices.IndexFunc(l.asked, func(i *Interaction) bool { return i.ID == id })
	if at < 0 {
		l.mu.Unlock()
		return Interaction{}, errNoInteraction(id)
	}
	one := l.asked[at]
	now := *one
	l.mu.Unlock()
	if now.State != Pending {
		return now, notPending(now)
	}
	change(&now)
	now.ResolveTime = time.Now()
	refused := l.service.cfg.Store.ResolveInteraction(ctx, key, now)
	if fault.ReasonOf(refused) == "INTERACTION_NOT_PENDING" {
		// An earlier attempt was written, though it was not known.
		stored, err := l.service.cfg.Store.GetInteraction(ctx, id)
		if err != nil {
			return now, err
		}
		now = stored
	} else if refused != nil {
		return now, refused
	}
	l.mu.Lock()
	*one = now
	if now.Answer != nil {
		l.undelivered = append(l.undelivered, one)
	}
	l.mu.Unlock()
	shown := now
	if err := l.append(Event{Resolved: &shown}); err != nil {
		l.service.log.WarnContext(ctx, "cannot write, trying again", "turn", l.id, "what", "that an interaction is resolved", "error", err)
	}
	l.service.home().Note(l.lane.session, Note{Interaction: &shown})
	l.look()
	if refused != nil {
		return now, notPending(now)
	}
	return now, nil
}

func errNoInteraction(id string) error {
	return fault.New(fault.NotFound, "INTERACTION_NOT_FOUND", "there is no interaction %q", id)
}

// expire gives the default answers that are due. What cannot be written is tried again.
func (l *live) expire(ctx context.Context) {
	now := time.Now()
	for _, i := range l.pending() {
		if !i.ExpireTime.IsZero() && !now.Before(i.ExpireTime) {
			if err := l.expireOne(ctx, i.ID); err != nil && fault.KindOf(err) != fault.FailedPrecondition {
				l.service.log.WarnContext(ctx, "a default answer cannot be recorded, trying again", "interaction", i.ID, "error", err)
				pause(ctx, askAgain)
			}
		}
	}
}

func (l *live) expireOne(ctx context.Context, id string) error {
	l.mu.Lock()
	policy := l.profile.Policy
	l.mu.Unlock()
	_, err := l.resolve(ctx, idempotency.Key{}, id, func(i *Interaction) {
		answer := i.byDefault(policy)
		i.State, i.ResolvedBy, i.Answer = Expired, byDeadline, &answer
	})
	return err
}

// void resolves what is still open when the turn ends; false when ctx ended first.
func (l *live) void(ctx context.Context) bool {
	for _, i := range l.pending() {
		err := l.persist(ctx, "record that an interaction is void", func() error {
			_, err := l.resolve(ctx, idempotency.Key{}, i.ID, func(i *Interaction) { i.State, i.ResolvedBy = Void, byTurn })
			return err
		})
		if err != nil && !errors.Is(err, errFinal) {
			return false
		}
	}
	return true
}

// pending are copies of the interactions that wait.
func (l *live) pending() []Interaction {
	l.mu.Lock()
	defer l.mu.Unlock()
	var open []Interaction
	for _, i := range l.asked {
		if i.State == Pending {
			open = append(open, *i)
		}
	}
	return open
}

// deliver gives the agent the answers that it has not got, and says whether it is to be
// tried again. An answer is not lost by that: what an agent still waits for it asks again.
func (l *live) deliver(ctx context.Context, c agent.Conversation) (again bool) {
	l.mu.Lock()
	all := slices.Clone(l.undelivered)
	l.mu.Unlock()
	for _, i := range all {
		bounded, stop := context.WithTimeoutCause(ctx, answerWait, fmt.Errorf("not taken within %v", answerWait))
		err := c.Answer(bounded, i.Asked.ID, *i.Answer)
		stop()
		if err != nil && !errors.Is(err, agent.ErrNotAsked) {
			l.service.log.WarnContext(ctx, "an agent does not take an answer, trying again", "interaction", i.ID, "error", err)
			again = true
			continue
		}
		l.mu.Lock()
		l.undelivered = slices.DeleteFunc(l.undelivered, func(other *Interaction) bool { return other == i })
		l.mu.Unlock()
	}
	return again
}

// GetInteraction reads an interaction. A fault NotFound if there is none of this name that
// the caller sees.
func (s *Service) GetInteraction(ctx context.Context, ref Ref) (Interaction, error) {
	if err := s.home().Visible(ctx, ref.Session, ref.Caller); err != nil {
		return Interaction{}, err
	}
	i, err := s.cfg.Store.GetInteraction(ctx, ref.ID)
	if err == nil && i.Session != ref.Session {
		return Interaction{}, errNoInteraction(ref.ID)
	}
	return i, err
}

// ListInteractions reads a page of interactions.
func (s *Service) ListInteractions(ctx context.Context, q InteractionQuery) ([]Interaction, error) {
	if err := s.home().Visible(ctx, q.Session, q.Caller); err != nil {
		return nil, err
	}
	return s.cfg.Store.ListInteractions(ctx, q)
}

// Resolve answers an interaction for somebody. The repeat of an earlier request returns
// that one's interaction. Faults besides those of an answer that does not fit: NotFound,
// FailedPrecondition (INTERACTION_NOT_PENDING), AlreadyExists (REQUEST_ID_REUSED).
func (s *Service) Resolve(ctx context.Context, ref Ref, answer agent.Answer, by string, key idempotency.Key) (Interaction, error) {
	earlier, done, err := s.requests.Begin(ctx, key)
	if err != nil {
		return Interaction{}, err
	}
	defer done()
	i, err := s.GetInteraction(ctx, ref)
	if err != nil || earlier != "" {
		return i, err
	}
	if i.State != Pending {
		return i, notPending(i)
	}
	if err := i.check(answer); err != nil {
		return i, err
	}
	l := s.find(i.Session, i.Turn)
	if l == nil {
		if i, err = s.GetInteraction(ctx, ref); err == nil && i.State != Pending {
			err = notPending(i) // its turn has ended meanwhile
		} else if err == nil {
			err = ErrClosed // nobody leads it any more
		}
		return i, err
	}
	if !i.ExpireTime.IsZero() && !time.Now().Before(i.ExpireTime) {
		// Its deadline has come, and the agent was away.
		if err := l.expireOne(ctx, i.ID); err != nil {
			return i, err
		}
	}
	return l.resolve(ctx, key, i.ID, func(i *Interaction) { i.State, i.ResolvedBy, i.Answer = Resolved, clip(by, maxName), &answer })
}
