package cgroup

import (
	"context"
	"fmt"
	"path/filepath"
	"time"
)

// Freeze stops all commands of the sandbox where they are, and returns when they stand
// still; those that are started meanwhile wait. The guest goes on. Whatever it returns,
// Thaw must follow.
func (g *Group) Freeze(ctx context.Context) error {
	if g.v2 == "" {
		return fmt.Errorf("freeze processes: there is no version 2 of control groups")
	}
	dir := filepath.Join(g.v2, commandGroup)
	if err := write(filepath.Join(dir, "cgroup.freeze"), "1"); err != nil {
		return fmt.Errorf("freeze processes: %w", err)
	}
	for pause := 50 * time.Microsecond; ; pause = min(2*pause, 10*time.Millisecond) {
		frozen, err := readField(filepath.Join(dir, "cgroup.events"), "frozen")
		if err != nil {
			return fmt.Errorf("see whether processes are frozen: %w", err)
		}
		if frozen == 1 {
			return nil
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return fmt.Errorf("freeze processes: they do not stand still: %w", context.Cause(ctx))
		}
	}
}

// Thaw has the commands of the sandbox go on, if they were frozen; nil if there are none.
func (g *Group) Thaw() error {
	if g.v2 == "" {
		return nil
	}
	err := write(filepath.Join(g.v2, commandGroup, "cgroup.freeze"), "0")
	if err != nil && !gone(err) {
		return fmt.Errorf("let processes go on: %w", err)
	}
	return nil
}
