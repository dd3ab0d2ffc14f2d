package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"

	"github.com/harvest-run/executord/internal/fault"
	"github.com/harvest-run/executord/internal/idempotency"
	"github.com/harvest-run/executord/internal/turn"
)

const (
	insertInteraction = `INSERT INTO interactions (id, session, turn, state, content) VALUES (?, ?, ?, ?, ?)`
	// The condition is what lets it be resolved once.
	resolveInteraction = `UPDATE interactions SET state = ?, content = ? WHERE id = ? AND state = 'PENDING'`

	getInteraction   = `SELECT content FROM interactions WHERE id = ?`
	interactionsOf   = `SELECT content FROM interactions WHERE turn = ? ORDER BY id`
	listInteractions = `SELECT content FROM interactions WHERE session = ? AND id < ? ORDER BY id DESC LIMIT ?`
	listPending      = `SELECT content FROM interactions WHERE session = ? AND id < ? AND state = 'PENDING' ORDER BY id DESC LIMIT ?`
)

// InsertInteraction implements turn.Store.
func (s *Store) InsertInteraction(ctx context.Context, i turn.Interaction) error {
	content, err := toJSON("content", i)
	if err != nil {
		return fmt.Errorf("insert interaction %q: %w", i.ID, err)
	}
	err = s.writeDurably(ctx, func(ctx context.Context) error {
		_, err := s.turns.insertInteraction.ExecContext(ctx, i.ID, i.Session, i.Turn, i.State, content)
		return err
	})
	if isDuplicate(err) {
		return nil // written before, though it was not known: nobody else makes this id
	}
	if err != nil {
		return fmt.Errorf("insert interaction %q: %w", i.ID, err)
	}
	return nil
}

// ResolveInteraction implements turn.Store.
func (s *Store) ResolveInteraction(ctx context.Context, key idempotency.Key, i turn.Interaction) error {
	content, err := toJSON("content", i)
	if err != nil {
		return fmt.Errorf("resolve interaction %q: %w", i.ID, err)
	}
	resolve := func(ctx context.Context, tx *sql.Tx) error {
		done, err := changed(tx.StmtContext(ctx, s.turns.resolveInteraction).ExecContext(ctx, i.State, content, i.ID))
		if done || err != nil {
			return err
		}
		var state string
		if err := tx.StmtContext(ctx, s.turns.interactionState).QueryRowContext(ctx, i.ID).Scan(&state); err != nil {
			return err
		}
		return fault.New(fault.FailedPrecondition, "INTERACTION_NOT_PENDING", "it is %s", state)
	}
	if key.ID == "" {
		err = s.inTransaction(ctx, resolve)
	} else {
		err = s.once(ctx, idempotency.NewRecord(key, i.ID), func(tx *sql.Tx) error { return resolve(context.WithoutCancel(ctx), tx) })
	}
	if err == nil {
		err = s.syncer.sync()
	}
	return interactionError("resolve", i.ID, err)
}

// GetInteraction implements turn.Store.
func (s *Store) GetInteraction(ctx context.Context, id string) (turn.Interaction, error) {
	i, err := scanInteraction(s.turns.getInteraction.QueryRowContext(ctx, id))
	return i, interactionError("read", id, err)
}

// ListInteractions implements turn.Store.
func (s *Store) ListInteractions(ctx context.Context, q turn.InteractionQuery) ([]turn.Interaction, error) {
	if q.Limit < 1 {
		return nil, fmt.Errorf("list interactions: limit %d is less than 1", q.Limit)
	}
	statement, before := s.turns.listInteractions, q.Before
	if q.Pending {
		statement = s.turns.listPending
	}
	if before == "" {
		before = afterAll
	}
	rows, err := statement.QueryContext(ctx, q.Session, before, q.Limit)
	page, err := collect(rows, err, scanInteraction)
	if err != nil {
		return nil, fmt.Errorf("list interactions: %w", err)
	}
	return page, nil
}

// InteractionsOf implements turn.Store.
func (s *Store) InteractionsOf(ctx context.Context, turnID string) ([]turn.Interaction, error) {
	rows, err := s.turns.interactionsOf.QueryContext(ctx, turnID)
	all, err := collect(rows, err, scanInteraction)
	if err != nil {
		return nil, fmt.Errorf("list the interactions of turn %q: %w", turnID, err)
	}
	return all, nil
}

// interactionError says what was being done, and that there is no such interaction.
func interactionError(action, id string, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, sql.ErrNoRows):
		return fault.New(fault.NotFound, "INTERACTION_NOT_FOUND", "there is no interaction %q", id)
	default:
		return fmt.Errorf("%s interaction %q: %w", action, id, err)
	}
}

func scanInteraction(r row) (turn.Interaction, error) {
	var i turn.Interaction
	var content sql.NullString
	if err := r.Scan(&content); err != nil {
		return i, err
	}
	return i, fromJSON("content", content, &i)
}
