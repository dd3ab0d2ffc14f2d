package opencode

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"
)

// pluginVersion is that of @opencode-ai/plugin, which OpenCode would fetch into its
// configuration's directory if the lock file there did not have it.
const pluginVersion = "1.18.33"

// guard is loaded before OpenCode is. A repository's .opencode/plugin, and what its
// opencode.json calls plugins, would be imported into OpenCode's own process: one of its two
// loaders of configuration does not look at OPENCODE_DISABLE_PROJECT_CONFIG. OpenCode needs
// no module but those within its program, so no other is loaded. What it starts is not
// concerned, so the variable goes.
const guard = `delete process.env.BUN_INSPECT_PRELOAD
Bun.plugin({ name: "guard", setup(build) {
  build.onLoad({ filter: /^(?!\/\$bunfs\/)/ }, (args) => { throw new Error("executord: not loaded: " + args.path) })
} })
`

// script starts OpenCode. It leaves a note with the process's name and the password, for an
// executord after this one: both are of use in this sandbox only, to whoever may read what
// only root may. Then it makes OpenCode believe that its plugin is installed, so that it
// does not ask npm: a directory that cannot be written to has the same effect.
const script = `( umask 077 && printf '%s\n%s\n' "$1" "$OPENCODE_SERVER_PASSWORD" > "$2.new" && mv "$2.new" "$2" ) || exit 1
( d="$HOME/.config/opencode" && [ ! -e "$d/node_modules" ] && mkdir -p "$d/node_modules" &&
  printf '{"dependencies":{"@opencode-ai/plugin":"%s"}}\n' "$3" > "$d/package.json" &&
  printf '{"name":"opencode","lockfileVersion":3,"requires":true,"packages":{"":{"dependencies":{"@opencode-ai/plugin":"%s"}}}}\n' "$3" > "$d/package-lock.json" ) 2>/dev/null
printf '%s' "$4" > "$2.guard.js" || exit 1
shift 4
exec "$@"`

// note is where the name and the password of the server that runs are.
func (s *Server) note() string { return s.cfg.Home + "/.opencode-server" }

// process is how OpenCode is started.
func (s *Server) process(id, password string) Process {
	env := []string{
		"HOME=" + s.cfg.Home,
		"BUN_INSPECT_PRELOAD=" + s.note() + ".guard.js",
		"OPENCODE_SERVER_PASSWORD=" + password,
		"OPENCODE_DISABLE_MODELS_FETCH=1",
		"OPENCODE_DISABLE_AUTOUPDATE=1",
		"OPENCODE_DISABLE_DEFAULT_PLUGINS=1",
		"OPENCODE_DISABLE_LSP_DOWNLOAD=1",
		// A repository's own configuration could start programs.
		"OPENCODE_DISABLE_PROJECT_CONFIG=1",
	}
	if s.cfg.ConfigFile != "" {
		env = append(env, "OPENCODE_CONFIG="+s.cfg.ConfigFile)
	}
	if len(s.cfg.Content) > 0 {
		env = append(env, "OPENCODE_CONFIG_CONTENT="+string(s.cfg.Content))
	}
	if s.cfg.Auth != "" {
		env = append(env, "OPENCODE_AUTH_CONTENT="+s.cfg.Auth)
	}
	return Process{
		ID: id, Dir: s.cfg.Dir, Env: append(env, s.cfg.Env...),
		Args: []string{
			"/bin/sh", "-c", script, "sh", id, s.note(), pluginVersion, guard,
			s.cfg.Program, "serve", "--port", strconv.Itoa(int(s.cfg.Port)), "--hostname", "127.0.0.1", "--print-logs", "--log-level", "INFO",
		},
	}
}

// launch starts OpenCode and returns when it answers.
func (s *Server) launch(ctx context.Context) error {
	id, password := "opencode-"+strings.ToLower(rand.Text()[:10]), rand.Text()
	running, err := s.cfg.Place.Start(ctx, s.process(id, password))
	if err != nil {
		return fmt.Errorf("start opencode: %w", err)
	}
	version, err := s.await(ctx, running, password)
	if err != nil {
		clean, stop := context.WithTimeoutCause(context.WithoutCancel(ctx), 10*time.Second, errors.New("not ended within 10s"))
		defer stop()
		return errors.Join(fmt.Errorf("start opencode: %w", err), running.Stop(clean))
	}
	s.up(running, password, version)
	return nil
}

func (s *Server) up(running Running, password, version string) {
	s.mu.Lock()
	s.running, s.password = running, password
	s.generation++
	s.mu.Unlock()
	s.tell(func(st *Status) { st.State, st.Version, st.Detail = Ready, version, "" })
}

// await returns when a server that was started answers.
func (s *Server) await(ctx context.Context, running Running, password string) (string, error) {
	ctx, stop := context.WithTimeoutCause(ctx, startTime, fmt.Errorf("it does not answer within %v", startTime))
	defer stop()
	ended := make(chan error, 1)
	waiting, ready := context.WithCancelCause(ctx)
	s.owned.Go(func() {
		how, err := running.Wait(waiting)
		if err == nil {
			err = fmt.Errorf("it ended: %s", how)
		}
		ended <- err
	})
	defer ready(nil)
	probe := &client{http: s.client.http, password: func() string { return password }}
	tick := time.NewTicker(15 * time.Millisecond)
	defer tick.Stop()
	for patience := 200 * time.Millisecond; ; {
		// A request that comes while it begins to listen is never answered.
		try, enough := context.WithTimeoutCause(ctx, patience, fmt.Errorf("no answer within %v", patience))
		version, err := probe.health(try)
		if err == nil {
			enough()
			return version, nil
		}
		if try.Err() != nil {
			patience = min(2*patience, 5*time.Second)
		}
		enough()
		select {
		case err := <-ended:
			return "", err
		case <-ctx.Done():
			return "", errors.Join(context.Cause(ctx), err)
		case <-tick.C:
		}
	}
}

// join finds the server that an executord before this one started.
func (s *Server) join(ctx context.Context) (bool, error) {
	text, err := s.cfg.Place.Run(ctx, []string{"/bin/cat", s.note()})
	if ctx.Err() != nil {
		return false, context.Cause(ctx)
	}
	id, password, _ := strings.Cut(strings.TrimSpace(string(text)), "\n")
	if err != nil || password == "" {
		return false, nil
	}
	probe := &client{http: s.client.http, password: func() string { return password }}
	version, err := probe.health(ctx)
	if err != nil {
		// It died, or never was here. One that hangs holds the port, so that starting
		// another says what is wrong.
		return false, context.Cause(ctx)
	}
	running, err := s.cfg.Place.Start(ctx, s.process(id, password))
	if err != nil {
		return false, fmt.Errorf("find opencode: %w", err)
	}
	s.up(running, password, version)
	return true, nil
}
