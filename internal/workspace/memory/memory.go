// Package memory keeps what sessions have learned about a repository: the knowledge
// graph of the memory MCP server, on a volume that outlives them. The server rewrites
// its file whole with each change and locks nothing, so sessions do not share one: each
// works on a copy of its own, on the volume, and what it changed since is merged into the shared file now and
// then and at its end. See docs/decisions/0019.
package memory

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"path"
	"regexp"
	"strings"
	"time"

	"github.com/harvest-run/executord/internal/fault"
	"github.com/harvest-run/executord/internal/guestclient"
	"github.com/harvest-run/executord/internal/workspace"
)

// Where things are in a sandbox.
const (
	// Mount is where the volume is mounted.
	Mount = "/root/.mcp-memory"
	// Link leads to the directory of the session's own copy. It is the directory that is
	// linked and not the file, which the server replaces with each change.
	Link = "/root/.harvest/memory"
	// File is what the memory MCP server is given as MEMORY_FILE_PATH.
	File = Link + "/memory.jsonl"
	// SeedFile is what an empty memory begins with, in the image.
	SeedFile = "/app/memory-seed.json"
)

const (
	// maxFile bounds a memory, in bytes: one that is larger is not merged.
	maxFile = 16 << 20
	// stepTime bounds each command, lockTime the wait for another session's.
	stepTime = 2 * time.Minute
	// tries is how often a merge is begun again because another session came first.
	tries = 20
	// otherAge, in minutes, is how long the copy of another session has not been written
	// to when its changes are merged on its behalf.
	otherAge = 10
)

// Exit codes of scripts.
const (
	changed = 76
	missing = 77
)

// Config says whose memory it is.
type Config struct {
	Runner workspace.Runner
	// Session is the name of its copy: 1 to 63 characters a-z, 0-9 and hyphen.
	Session string
	// Mount, Link and Seed are Mount, Link and SeedFile if they are "".
	Mount, Link, Seed string
}

// Memory is a session's. Its methods must not be called at the same time.
type Memory struct{ cfg Config }

// Open seeds the memory if it is new, merges what sessions that are gone have left, and
// gives the session its copy; one that has it already keeps it. Faults: FailedPrecondition with
// MEMORY_SEED.
func Open(ctx context.Context, cfg Config) (*Memory, error) {
	for field, value := range map[*string]string{&cfg.Mount: Mount, &cfg.Link: Link, &cfg.Seed: SeedFile} {
		if *field == "" {
			*field = value
		}
	}
	if !regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,62}$`).MatchString(cfg.Session) {
		return nil, fmt.Errorf("open a memory: %q is not the name of a session", cfg.Session)
	}
	m := &Memory{cfg}
	if err := m.seed(ctx); err != nil {
		return nil, fmt.Errorf("seed the memory: %w", err)
	}
	if err := m.mergeOthers(ctx); err != nil {
		return nil, fmt.Errorf("merge what earlier sessions left: %w", err)
	}
	// The base first: a copy without one would look as if all of it were new, which is
	// harmless; a base without a copy as if all of it had been deleted. The copy appears whole.
	// A directory in the link's place, as an image may have, gives way.
	_, err := m.script(ctx, nil, `set -e; mkdir -p -- "$2" "$(dirname -- "$3")"; if [ ! -e "$2/memory.jsonl" ]; then cp -- "$1/memory.jsonl" "$2/base.new"; cp -- "$2/base.new" "$2/memory.new"; `+
		`mv -f -- "$2/base.new" "$2/base.jsonl"; mv -f -- "$2/memory.new" "$2/memory.jsonl"; fi; `+
		`if [ -d "$3" ] && [ ! -L "$3" ]; then rmdir -- "$3" 2>/dev/null || mv -T -- "$3" "$3.before-$(date +%s)"; fi; ln -sfnT -- "$2" "$3"`, cfg.Mount, m.dir(cfg.Session), cfg.Link)
	if err != nil {
		return nil, fmt.Errorf("give the session its copy of the memory: %w", err)
	}
	return m, nil
}

func (m *Memory) shared() string { return path.Join(m.cfg.Mount, "memory.jsonl") }

func (m *Memory) dir(session string) string { return path.Join(m.cfg.Mount, "sessions", session) }

// script runs one in the sandbox. An exit code above 75 is the script's own answer.
func (m *Memory) script(ctx context.Context, input []byte, text string, args ...string) (guestclient.Outcome, error) {
	out, err := m.cfg.Runner.Run(ctx, guestclient.Command{
		Args: append([]string{"sh", "-c", text, "sh"}, args...), Input: input, Timeout: stepTime, Limit: maxFile + 1,
		Env: map[string]string{"PATH": "/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"},
	})
	if err != nil {
		return out, err
	}
	if code := out.Code(); code != 0 && code != changed && code != missing {
		return out, fault.New(fault.FailedPrecondition, "MEMORY_FAILED", "it ended with code %d: %s", code, strings.TrimSpace(string(out.Stderr)))
	}
	return out, nil
}

// seed makes the shared file if there is none. A hard link is made or not: of several
// sessions at once one seeds, and what is there is never written over.
func (m *Memory) seed(ctx context.Context) error {
	out, err := m.script(ctx, nil, `[ ! -e "$1" ] || exit 0; if [ -e "$2" ]; then cat -- "$2" || exit 1; fi; exit 77`, m.shared(), m.cfg.Seed)
	if err != nil || out.Code() == 0 {
		return err
	}
	g, err := seedGraph(out.Stdout)
	if err != nil {
		return fault.New(fault.FailedPrecondition, "MEMORY_SEED", "%s: %v", m.cfg.Seed, err)
	}
	data, err := g.encode()
	if err != nil {
		return err
	}
	// Where there are no hard links the lock has to do.
	_, err = m.script(ctx, withInput(data), `set -e; mkdir -p -- "$1"; t="$1/.seed-$2"; cat >"$t"; sync -- "$t"; ln -T -- "$t" "$1/memory.jsonl" 2>/dev/null || { exec 9>>"$1/.lock"; flock -w 60 9; [ -e "$1/memory.jsonl" ] || cp -- "$t" "$t.2" && mv -n -- "$t.2" "$1/memory.jsonl" 2>/dev/null || true; }; rm -f -- "$t" "$t.2"; [ -e "$1/memory.jsonl" ]`,
		m.cfg.Mount, m.cfg.Session)
	return err
}

// withInput makes empty input one that is there.
func withInput(data []byte) []byte {
	if len(data) == 0 {
		return []byte("\n")
	}
	return data
}

// read reads a file; missing ones are nil. steady waits until nobody is writing it: a
// server that does not rename truncates it first.
func (m *Memory) read(ctx context.Context, file string, steady bool) ([]byte, error) {
	text := `[ -e "$1" ] || exit 77; cat -- "$1"`
	if steady {
		text = `[ -e "$1" ] || exit 77; n=0; t=$(mktemp) || exit 1; trap 'rm -f "$t"' EXIT; while :; do cp -- "$1" "$t" || exit 1; sleep 0.1; cmp -s -- "$1" "$t" && break; n=$((n+1)); [ $n -lt 50 ] || exit 1; done; cat -- "$t"`
	}
	out, err := m.script(ctx, nil, text, file)
	switch {
	case err != nil:
		return nil, fmt.Errorf("read %s: %w", file, err)
	case out.Code() == missing:
		return nil, nil
	case out.Truncated || len(out.Stdout) > maxFile:
		return nil, fault.New(fault.FailedPrecondition, "MEMORY_TOO_LARGE", "%s has more than %d bytes", file, maxFile)
	}
	return append([]byte{}, out.Stdout...), nil
}

// Commit merges what the session has learned since the last one into the shared memory.
// It is on the volume then; making the volume durable is the engine's. It reports whether
// something changed.
func (m *Memory) Commit(ctx context.Context) (bool, error) {
	did, err := m.commit(ctx, m.cfg.Session)
	if err != nil {
		return false, fmt.Errorf("commit the memory: %w", err)
	}
	return did, nil
}

func (m *Memory) commit(ctx context.Context, session string) (bool, error) {
	dir := m.dir(session)
	for range tries {
		mine, err := m.read(ctx, path.Join(dir, "memory.jsonl"), true)
		if err != nil || mine == nil {
			return false, err
		}
		before, err := m.read(ctx, path.Join(dir, "base.jsonl"), false)
		if err != nil {
			return false, err
		}
		theirs, err := m.read(ctx, m.shared(), false)
		if err != nil {
			return false, err
		}
		merged, damaged, err := mergeFiles(before, mine, theirs)
		if err != nil {
			return false, err
		}
		if merged != nil {
			done, err := m.replace(ctx, session, theirs, merged, damaged)
			if err != nil {
				return false, err
			}
			if !done {
				continue
			}
		}
		// What was merged is the base of the next time. A crash before this merges the
		// same again, which changes nothing.
		_, err = m.script(ctx, withInput(mine), `cat >"$1/base.new" && sync -- "$1/base.new" && mv -f -- "$1/base.new" "$1/base.jsonl"`, dir)
		return merged != nil, err
	}
	return false, fault.New(fault.Unavailable, "MEMORY_BUSY", "other sessions changed the memory %d times meanwhile", tries)
}

// mergeFiles merges files; nil if theirs is as it should be. damaged says that lines of
// theirs could not be read and are left out.
func mergeFiles(before, mine, theirs []byte) (merged []byte, damaged bool, err error) {
	base, _ := parse(before)
	ours, broken := parse(mine)
	shared, lost := parse(theirs)
	if broken > 0 {
		// Cut off in the middle of a write: what is not there was not deleted.
		ours = merge(graph{}, base, ours)
	}
	result := merge(base, ours, shared)
	if merged, err = result.encode(); err != nil {
		return nil, false, err
	}
	same, err := shared.encode()
	if err != nil || lost == 0 && string(same) == string(merged) {
		return nil, false, err
	}
	return merged, lost > 0, nil
}

// replace writes the shared file if it is still what it was.
func (m *Memory) replace(ctx context.Context, session string, was, is []byte, damaged bool) (bool, error) {
	expected := "none"
	if was != nil {
		sum := sha256.Sum256(was)
		expected = hex.EncodeToString(sum[:])
	}
	keep := ""
	if damaged {
		keep = path.Join(m.cfg.Mount, "damaged-"+session+".jsonl")
	}
	out, err := m.script(ctx, withInput(is), `exec 9>>"$1/.lock" && flock -w 60 9 || exit 1; f="$1/memory.jsonl"; c=none; [ ! -e "$f" ] || c=$(sha256sum <"$f" | cut -d' ' -f1); [ "$c" = "$2" ] || exit 76; `+
		`[ -z "$3" ] || cp -- "$f" "$3" || exit 1; cat >"$f.new" && sync -- "$f.new" && mv -f -- "$f.new" "$f"`, m.cfg.Mount, expected, keep)
	return err == nil && out.Code() == 0, err
}

// mergeOthers merges what sessions changed that have written nothing for a while: they
// ended without a Close, or are paused, which does them no harm, since their base moves
// along. What has not been written to for a month is removed then.
func (m *Memory) mergeOthers(ctx context.Context) error {
	out, err := m.script(ctx, nil, `cd -- "$1/sessions" 2>/dev/null || exit 0; find . -mindepth 2 -maxdepth 2 -name memory.jsonl -type f -mmin +"$2" -printf '%h %T@\n' | sed 's,^\./,,'`,
		m.cfg.Mount, fmt.Sprint(otherAge))
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(out.Stdout)) {
		session, _, _ := strings.Cut(strings.TrimSpace(line), " ")
		if session == m.cfg.Session || !regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,62}$`).MatchString(session) {
			continue
		}
		if _, err := m.commit(ctx, session); err != nil && fault.ReasonOf(err) != "MEMORY_TOO_LARGE" {
			return err
		}
	}
	_, err = m.script(ctx, nil, `cd -- "$1/sessions" 2>/dev/null || exit 0; find . -mindepth 2 -maxdepth 2 -name memory.jsonl -type f -mtime +30 -printf '%h\0' | xargs -0 -r rm -rf --`, m.cfg.Mount)
	return err
}

// Close commits and gives the copy up.
func (m *Memory) Close(ctx context.Context) error {
	if _, err := m.Commit(ctx); err != nil {
		return err
	}
	if _, err := m.script(ctx, nil, `rm -rf -- "$1"; rm -f -- "$2"`, m.dir(m.cfg.Session), m.cfg.Link); err != nil {
		return fmt.Errorf("give up the copy of the memory: %w", err)
	}
	return nil
}

// Keep commits every so often until ctx ends, and has durable make the volume so when
// something changed: engine.Sandbox.CommitVolumes. Errors go to report; the next time is tried all the same.
func (m *Memory) Keep(ctx context.Context, every time.Duration, durable func(context.Context) error, report func(error)) {
	ticker := time.NewTicker(every)
	defer ticker.Stop()
	pending := false
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		did, err := m.Commit(ctx)
		pending = pending || did
		if err == nil && pending {
			if err = durable(ctx); err == nil {
				pending = false
			}
		}
		if err != nil && ctx.Err() == nil {
			report(err)
		}
	}
}
