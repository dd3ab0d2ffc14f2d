package cli

import (
	"context"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/fieldmaskpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/harvest-run/executord/client"
	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
)

// agentFlags are what a session is made with beside its sandbox.
type agentFlags struct {
	repos, secrets, secretEnv            []string
	depth                                int32
	agent, model, baseURL, author, image string
	interactions, instructions, auth     string
	idle                                 value[time.Duration]
	idlePause                            bool
	maxCost                              float64
	maxTurns                             int32
	turnTimeout                          value[time.Duration]
	env                                  map[string]string
}

func (f *agentFlags) bind(cmd *cobra.Command, env map[string]string) {
	f.env = env
	f.idle = value[time.Duration]{kind: "duration", parse: parseDuration}
	f.turnTimeout = value[time.Duration]{kind: "duration", parse: parseDuration}
	flags := cmd.Flags()
	flags.StringArrayVar(&f.repos, "repo", nil, "clone OWNER/NAME or a URL, with @BRANCH behind it or not; may be repeated")
	flags.Int32Var(&f.depth, "depth", 0, "how many commits of history to clone (default all)")
	flags.StringVar(&f.agent, "agent", "none", "the agent: opencode or none")
	flags.StringVar(&f.model, "model", "", "the model that answers, PROVIDER/MODEL (default the server's)")
	flags.StringVar(&f.baseURL, "model-url", "", "where the model's provider is reached")
	flags.StringVar(&f.author, "author", "", `who commits, "NAME <ADDRESS>" (default the server's)`)
	flags.StringArrayVar(&f.secrets, "secret", nil, "use a secret of the server's configuration, NAME or NAME=SECRET; may be repeated")
	flags.StringArrayVar(&f.secretEnv, "secret-env", nil, "give the value of an environment variable, such as GITHUB_TOKEN, as a credential; may be repeated")
	flags.StringVar(&f.auth, "opencode-auth", "", "give the log-ins in this auth.json of OpenCode's")
	flags.StringVar(&f.image, "image", "", "the image to start from (default the agent's)")
	flags.StringVar(&f.interactions, "permissions", "", "what the agent may do: allow, ask or deny (default allow)")
	flags.StringVar(&f.instructions, "instructions", "", "further instructions for the agent are in this file")
	flags.Var(&f.idle, "idle-timeout", "end it after so long without anything that runs (default never)")
	flags.BoolVar(&f.idlePause, "idle-pause", false, "pause it then instead")
	flags.Float64Var(&f.maxCost, "max-cost", 0, "the most that its turns may cost, in US dollars (default any)")
	flags.Int32Var(&f.maxTurns, "max-turns", 0, "the most turns (default any)")
	flags.Var(&f.turnTimeout, "turn-timeout", "how long a turn may take (default 1h)")
}

func (f *agentFlags) fill(r *executorv1.CreateSessionRequest) (err error) {
	for _, text := range f.repos {
		r.Repositories = append(r.Repositories, parseRepo(text, f.depth))
	}
	r.Image = f.image
	if f.author != "" {
		if r.Identity, err = parseAuthor(f.author); err != nil {
			return err
		}
	}
	if f.idle.given {
		r.IdleTimeout = durationpb.New(f.idle.v)
	}
	if f.idlePause {
		r.IdleAction = executorv1.IdleAction_IDLE_ACTION_PAUSE
	}
	if r.Credentials, err = f.credentials(); err != nil {
		return err
	}
	switch f.agent {
	case "none":
		if f.model != "" || f.interactions != "" || f.instructions != "" {
			return usagef("--model, --permissions and --instructions are of use with --agent opencode only")
		}
		return nil
	case "opencode":
	default:
		return usagef("--agent %q: must be opencode or none", f.agent)
	}
	r.Agent = &executorv1.AgentSpec{
		Kind:  executorv1.AgentSpec_KIND_OPENCODE,
		Limit: &executorv1.SpendLimit{CostMicros: int64(f.maxCost * 1e6), Turns: f.maxTurns},
	}
	if f.turnTimeout.given {
		r.Agent.Limit.TurnTimeout = durationpb.New(f.turnTimeout.v)
	}
	if r.Agent.Model, err = parseModel(f.model, f.baseURL); err != nil {
		return err
	}
	mode, ok := map[string]executorv1.InteractionPolicy_Mode{
		"": executorv1.InteractionPolicy_MODE_UNSPECIFIED, "allow": executorv1.InteractionPolicy_MODE_ALLOW,
		"ask": executorv1.InteractionPolicy_MODE_ASK, "deny": executorv1.InteractionPolicy_MODE_DENY,
	}[f.interactions]
	if !ok {
		return usagef("--permissions %q: must be allow, ask or deny", f.interactions)
	}
	r.Agent.Interactions = &executorv1.InteractionPolicy{Mode: mode}
	if f.instructions != "" {
		text, err := os.ReadFile(f.instructions)
		if err != nil {
			return fmt.Errorf("--instructions: %w", err)
		}
		r.Agent.Instructions = string(text)
	}
	return nil
}

// credentials are those that were given or named; nil if none were. Values come from
// the environment and files only: an argument is seen by everybody.
func (f *agentFlags) credentials() (*executorv1.Credentials, error) {
	c := &executorv1.Credentials{Values: make(map[string]string), Secrets: make(map[string]string)}
	for _, name := range f.secretEnv {
		text := f.env[name]
		if text == "" {
			return nil, usagef("--secret-env %s: there is no such variable in the environment", name)
		}
		c.Values[name] = text
	}
	for _, text := range f.secrets {
		name, secret, ok := strings.Cut(text, "=")
		if !ok {
			secret = name
		}
		c.Secrets[name] = secret
	}
	if f.auth != "" {
		text, err := os.ReadFile(f.auth)
		if err != nil {
			return nil, fmt.Errorf("--opencode-auth: %w", err)
		}
		c.OpencodeAuth = string(text)
	}
	if len(c.GetValues())+len(c.GetSecrets()) == 0 && c.GetOpencodeAuth() == "" {
		return nil, nil
	}
	return c, nil
}

// parseRepo reads OWNER/NAME or a URL, with @BRANCH behind it or not.
func parseRepo(text string, depth int32) *executorv1.Repository {
	r := &executorv1.Repository{Url: text, Depth: depth}
	// Where its path begins: the @ of a user stands before that.
	path := max(strings.Index(text, ":"), 0)
	if scheme := strings.Index(text, "://"); scheme >= 0 {
		path = scheme + 3 + max(strings.Index(text[scheme+3:], "/"), 0)
	}
	if at := strings.LastIndex(text[path:], "@"); at > 0 {
		r.Url, r.Branch = text[:path+at], text[path+at+1:]
	}
	return r
}

// parseAuthor reads NAME <ADDRESS>.
func parseAuthor(text string) (*executorv1.Identity, error) {
	name, rest, ok := strings.Cut(text, "<")
	address, after, closed := strings.Cut(rest, ">")
	if name = strings.TrimSpace(name); !ok || !closed || strings.TrimSpace(after) != "" || name == "" || address == "" {
		return nil, usagef("%q: must be NAME <ADDRESS>", text)
	}
	return &executorv1.Identity{Name: name, Email: address}, nil
}

// parseModel reads PROVIDER/MODEL; nil for none.
func parseModel(text, baseURL string) (*executorv1.Model, error) {
	if text == "" {
		if baseURL != "" {
			return nil, usagef("--model-url needs --model")
		}
		return nil, nil
	}
	provider, model, ok := strings.Cut(text, "/")
	if !ok || provider == "" || model == "" {
		return nil, usagef("--model %q: must be PROVIDER/MODEL, such as anthropic/claude-sonnet-4-5", text)
	}
	return &executorv1.Model{Provider: provider, Model: model, BaseUrl: baseURL}, nil
}

func (a *app) sessionPause() *cobra.Command {
	return a.changeSession("pause SESSION", "Keep what a session has, give its sandbox back, and wait until it rests",
		func(ctx context.Context, c *client.Client, name string) (*executorv1.Session, error) {
			return c.PauseSession(ctx, &executorv1.PauseSessionRequest{Name: name})
		})
}

func (a *app) sessionResume() *cobra.Command {
	f := agentFlags{env: a.env}
	cmd := a.changeSession("resume SESSION", "Have a paused session go on in another sandbox, and wait until it is ready",
		func(ctx context.Context, c *client.Client, name string) (*executorv1.Session, error) {
			credentials, err := f.credentials()
			if err != nil {
				return nil, err
			}
			s, err := c.ResumeSession(ctx, &executorv1.ResumeSessionRequest{Name: name, Credentials: credentials})
			if err != nil {
				return nil, err
			}
			return a.ready(ctx, c, s)
		})
	cmd.Flags().StringArrayVar(&f.secretEnv, "secret-env", nil, "give the value of an environment variable as a credential; may be repeated")
	return cmd
}

func (a *app) sessionFork() *cobra.Command {
	var labels []string
	f := agentFlags{env: a.env}
	lifetime := value[time.Duration]{kind: "duration", parse: parseDuration}
	cmd := a.changeSession("fork SESSION", "Make a session that goes on from where another one is, and wait until it is ready",
		func(ctx context.Context, c *client.Client, name string) (*executorv1.Session, error) {
			r := &executorv1.ForkSessionRequest{Name: name}
			var err error
			if r.Labels, err = parseLabels(labels); err != nil {
				return nil, err
			}
			if r.Credentials, err = f.credentials(); err != nil {
				return nil, err
			}
			if lifetime.given {
				r.Lifetime = durationpb.New(lifetime.v)
			}
			s, err := c.ForkSession(ctx, r)
			if err != nil {
				return nil, err
			}
			return a.ready(ctx, c, s)
		})
	cmd.Flags().Var(&lifetime, "lifetime", "how long it may live (default 1h)")
	cmd.Flags().StringArrayVar(&labels, "label", nil, "label it, NAME=VALUE; may be repeated")
	cmd.Flags().StringArrayVar(&f.secretEnv, "secret-env", nil, "give the value of an environment variable as a credential; may be repeated")
	return cmd
}

func (a *app) sessionExtend() *cobra.Command {
	by := value[time.Duration]{kind: "duration", parse: parseDuration}
	cmd := a.changeSession("extend SESSION", "Let a session live longer, from now on",
		func(ctx context.Context, c *client.Client, name string) (*executorv1.Session, error) {
			if !by.given {
				return nil, usagef("--by is needed: how long it may live from now on")
			}
			return c.UpdateSession(ctx, &executorv1.UpdateSessionRequest{
				Session:    &executorv1.Session{Name: name, ExpireTime: timestamppb.New(time.Now().Add(by.v))},
				UpdateMask: &fieldmaskpb.FieldMask{Paths: []string{"expire_time"}},
			})
		})
	cmd.Flags().Var(&by, "by", "how long it may live from now on")
	return cmd
}

// changeSession is a command that changes a session and shows it.
func (a *app) changeSession(use, short string, do func(ctx context.Context, c *client.Client, name string) (*executorv1.Session, error)) *cobra.Command {
	cmd := formats(&cobra.Command{Use: use, Short: short, Args: exactly("SESSION")}, "table", "json", "yaml", "jsonl", "name")
	cmd.RunE = a.onSession(func(ctx context.Context, c *client.Client, name string) error {
		s, err := do(ctx, c, name)
		if err != nil {
			return err
		}
		return printOne(a, s, sessionColumns())
	})
	return cmd
}

func (a *app) sessionDiff() *cobra.Command {
	cmd := formats(&cobra.Command{
		Use:   "diff SESSION",
		Short: "Show what was changed in the repositories of a session",
		Args:  exactly("SESSION"),
	}, "raw", "json")
	cmd.RunE = a.onSession(func(ctx context.Context, c *client.Client, name string) error {
		answer, err := c.Sessions().GetDiff(ctx, &executorv1.GetDiffRequest{Name: name})
		if err != nil {
			return fmt.Errorf("compare %s: %w", name, err)
		}
		if a.format == "json" {
			text, err := protoJSON(answer)
			if err != nil {
				return err
			}
			return a.document(text)
		}
		for _, r := range answer.GetRepositories() {
			for _, f := range r.GetFiles() {
				if _, err := fmt.Fprintln(a.stdout, strings.TrimSuffix(f.GetPatch(), "\n")); err != nil {
					return err
				}
			}
			if r.GetTruncated() {
				a.say("%s has more changes than are shown", r.GetPath())
			}
		}
		return nil
	})
	return cmd
}
