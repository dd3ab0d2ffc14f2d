package cli

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/harvest-run/executord/client"
	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
)

func (a *app) authCommand() *cobra.Command {
	return group("auth", "See who you are to the server, and keep API keys", nil,
		a.authWhoami(), group("keys", "Make, list and revoke API keys", []string{"key"}, a.keysCreate(), a.keysList(), a.keysRevoke()))
}

func (a *app) authWhoami() *cobra.Command {
	cmd := formats(&cobra.Command{
		Use:   "whoami",
		Short: "Show who you are to the server, and what you may do",
		Args:  none,
	}, "table", "json", "yaml", "name")
	cmd.RunE = a.call(func(ctx context.Context, c *client.Client, _ []string) error {
		who, err := c.Auth().GetCaller(ctx, &executorv1.GetCallerRequest{})
		if err != nil {
			return fmt.Errorf("ask who the caller is: %w", err)
		}
		switch a.format {
		case "name":
			return a.line([]byte(printable(who.GetPrincipal())))
		case "table":
			return a.table([][]string{{"principal", who.GetPrincipal()}, {"role", roleName(who.GetRole())}})
		}
		text, err := protoJSON(who)
		if err != nil {
			return err
		}
		return a.document(text)
	})
	return cmd
}

func roleName(r executorv1.Role) string { return strings.ToLower(enumName(r, "ROLE")) }

// keyColumns is the table of API keys.
func keyColumns() columns[*executorv1.ApiKey] {
	return columns[*executorv1.ApiKey]{
		header: []string{"NAME", "OWNER", "ROLE", "CREATED", "EXPIRES", "LAST USED", "REVOKED"},
		row: func(k *executorv1.ApiKey) []string {
			return []string{
				k.GetName(), k.GetDisplayName(), roleName(k.GetRole()), formatTime(k.GetCreateTime()),
				formatTime(k.GetExpireTime()), formatTime(k.GetLastUseTime()), formatTime(k.GetRevokeTime()),
			}
		},
	}
}

func (a *app) keysCreate() *cobra.Command {
	var owner, role string
	lifetime := value[time.Duration]{kind: "duration", parse: parseDuration}
	cmd := formats(&cobra.Command{
		Use:   "create",
		Short: "Make an API key and print it, this one time",
		Long: `Make an API key and print it. The server keeps a hash, so it cannot be shown again.
Keys of one owner are one caller: to replace a key, make another one of the same owner
and revoke the first.`,
		Args: none,
	}, "key", "json", "yaml")
	cmd.Flags().StringVar(&owner, "owner", "", "whose key it is; required")
	cmd.Flags().StringVar(&role, "role", "user", "what its owner may do: user, operator or admin")
	cmd.Flags().Var(&lifetime, "lifetime", "how long it is good (default for good)")
	cmd.RunE = a.call(func(ctx context.Context, c *client.Client, _ []string) error {
		number, ok := executorv1.Role_value["ROLE_"+strings.ToUpper(role)]
		if !ok || number == 0 || role != strings.ToLower(role) {
			return usagef("--role %q: must be user, operator or admin", role)
		}
		if owner == "" {
			return usagef("--owner is needed: whose key it is")
		}
		request := &executorv1.CreateApiKeyRequest{DisplayName: owner, Role: executorv1.Role(number)}
		if lifetime.given {
			request.Lifetime = durationpb.New(lifetime.v)
		}
		made, err := c.Auth().CreateApiKey(ctx, request)
		if err != nil {
			return fmt.Errorf("make an API key: %w", err)
		}
		if a.format == "key" {
			a.say("%s of %s, role %s; it is not shown again", made.GetApiKey().GetName(), made.GetApiKey().GetPrincipal(), role)
			return a.line([]byte(printable(made.GetKey())))
		}
		text, err := protoJSON(made)
		if err != nil {
			return err
		}
		return a.document(text)
	})
	return cmd
}

func (a *app) keysList() *cobra.Command {
	var all bool
	var limit int
	cmd := formats(&cobra.Command{
		Use:     "list",
		Aliases: []string{"ls"},
		Short:   "List API keys, the newest first",
		Args:    none,
	}, "table", "json", "yaml", "jsonl", "name")
	cmd.Flags().BoolVar(&all, "all", false, "also those that are revoked or have expired")
	cmd.Flags().IntVar(&limit, "limit", 100, "the most to list; 0 for all")
	cmd.RunE = a.call(func(ctx context.Context, c *client.Client, _ []string) error {
		keys, more, err := pages(limit, func(size int32, token string) ([]*executorv1.ApiKey, string, error) {
			answer, err := c.Auth().ListApiKeys(ctx, &executorv1.ListApiKeysRequest{PageSize: size, PageToken: token, ShowEnded: all})
			return answer.GetApiKeys(), answer.GetNextPageToken(), err
		})
		if err != nil {
			return fmt.Errorf("list API keys: %w", err)
		}
		if more && !cmd.Flags().Changed("limit") {
			defer a.say("older ones are left out; --limit 0 lists all")
		}
		return printAll(a, keys, keyColumns())
	})
	return cmd
}

func (a *app) keysRevoke() *cobra.Command {
	cmd := formats(&cobra.Command{
		Use:   "revoke KEY",
		Short: "Revoke an API key, at once and for good; what its owner runs goes on",
		Long: `Revoke an API key, at once and for good; what its owner runs goes on. KEY is its name
or id as list shows them, never the key itself.`,
		Args: exactly("KEY"),
	}, "table", "json", "yaml", "jsonl", "name")
	cmd.RunE = a.call(func(ctx context.Context, c *client.Client, args []string) error {
		if strings.HasPrefix(args[0], "exk_") {
			return usagef("this is the key itself: name it by its id, and revoke this one, since command lines can be read")
		}
		name := "apiKeys/" + strings.TrimPrefix(args[0], "apiKeys/")
		answer, err := c.Auth().RevokeApiKey(ctx, &executorv1.RevokeApiKeyRequest{Name: name})
		if err != nil {
			return fmt.Errorf("revoke %s: %w", name, err)
		}
		return printOne(a, answer.GetApiKey(), keyColumns())
	})
	return cmd
}
