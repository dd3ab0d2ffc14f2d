package cli

import (
	"encoding/json"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/harvest-run/executord/client"
)

// contextFlag is the flag with the name of a context.
const contextFlag = "context"

// serverFlags are the flags that a context stands for.
func serverFlags() []string {
	return []string{"address", "tls", "tls-ca", "tls-cert", "tls-key", "tls-server-name", keyFileFlag}
}

// useContext takes from the context in use what is given neither as a flag nor in the
// environment. An address that is given stands for itself: to it nothing of a context
// is sent unless that is named too. key is the API key to show, "" if there is none.
func (a *app) useContext(cmd *cobra.Command) (key string, err error) {
	given := func(flag string) bool { return cmd.Flags().Changed(flag) || a.env[variable(flag)] != "" }
	key = a.env[KeyVar]
	if a.context == "" && given("address") {
		return key, nil
	}
	file, err := a.readContexts()
	if err != nil {
		return "", err
	}
	name := a.context
	if name == "" {
		name = file.Current
	}
	if name == "" {
		return key, nil
	}
	c := file.find(name)
	if c == nil {
		return "", usagef("there is no context %q; executorctl context list shows what there is", name)
	}
	for _, flag := range serverFlags() {
		value := c.get(flag)
		if value == "" || given(flag) {
			continue
		}
		if err := cmd.Root().PersistentFlags().Lookup(flag).Value.Set(value); err != nil {
			return "", usagef("context %q: %s: %s", name, flag, err)
		}
	}
	if key == "" && !given(keyFileFlag) {
		key = c.APIKey
	}
	return key, nil
}

// variable is the name of a flag in the environment.
func variable(flag string) string {
	return "EXECUTOR_" + strings.ToUpper(strings.ReplaceAll(flag, "-", "_"))
}

func (a *app) contextCommand() *cobra.Command {
	return group("context", "Name servers, and choose the one that commands are for", []string{"contexts"},
		a.contextSet(), a.contextUse(), a.contextList(), a.contextDelete())
}

func (a *app) contextSet() *cobra.Command {
	var keyFromStdin bool
	cmd := &cobra.Command{
		Use:   "set NAME [--address ADDRESS] [--tls-ca FILE] [--api-key-file FILE] ...",
		Short: "Name a server, or change what a name stands for",
		Long: `Name a server: the flags with which it is reached are kept under a name, in
$XDG_CONFIG_HOME/executor/config.yaml, which only you can read. What is not given stays
as it was. The first one is used at once.`,
		Args: exactly("NAME"),
	}
	cmd.Flags().BoolVar(&keyFromStdin, "api-key-stdin", false, "keep the API key that stands on standard input, instead of a file with one")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		name := args[0]
		if !isContextName(name) {
			return usagef("%q: a name has 1 to 63 of A-Z a-z 0-9 . _ -", name)
		}
		file, err := a.readContexts()
		if err != nil {
			return err
		}
		c := file.find(name)
		if c == nil {
			c = &namedContext{Name: name}
		}
		for _, flag := range serverFlags() {
			if !cmd.Flags().Changed(flag) {
				continue
			}
			value := cmd.Flags().Lookup(flag).Value.String()
			switch flag {
			case "tls-ca", "tls-cert", "tls-key", keyFileFlag:
				if value != "" {
					if value, err = filepath.Abs(value); err != nil {
						return fmt.Errorf("find %s: %w", flag, err)
					}
				}
			}
			c.set(flag, value)
		}
		if cmd.Flags().Changed(keyFileFlag) {
			c.APIKey = ""
		}
		if keyFromStdin {
			content, err := io.ReadAll(io.LimitReader(a.stdin, maxKeyFile))
			if err != nil {
				return fmt.Errorf("read the API key: %w", err)
			}
			if c.APIKey = strings.TrimSpace(string(content)); c.APIKey == "" {
				return usagef("there is no API key on standard input")
			}
			c.APIKeyFile = ""
		}
		if c.Address == "" {
			return usagef("--address is needed: a context is a server")
		}
		// What cannot be used is not kept.
		if err := c.check(); err != nil {
			return usagef("%s", err)
		}
		file.put(*c)
		if file.Current == "" {
			file.Current = name
			a.say("context %s is in use", name)
		}
		return a.writeContexts(file)
	}
	return cmd
}

// check tries what a client would say about it.
func (n *namedContext) check() error {
	cfg := client.Config{Address: n.Address, APIKey: n.APIKey}
	s := security{tls: n.TLS, ca: n.TLSCA, cert: n.TLSCert, key: n.TLSKey, server: n.TLSServerName, keyFile: n.APIKeyFile}
	if err := s.apply(&cfg, n.APIKey == "", n.APIKey); err != nil {
		return err
	}
	c, err := client.Dial(cfg)
	if err != nil {
		return err
	}
	return c.Close()
}

func isContextName(name string) bool {
	return len(name) >= 1 && len(name) <= 63 && !strings.ContainsFunc(name, func(r rune) bool {
		return (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && !strings.ContainsRune("._-", r)
	})
}

func (a *app) contextUse() *cobra.Command {
	return &cobra.Command{
		Use:   "use NAME",
		Short: "Choose the server that commands are for from now on",
		Args:  exactly("NAME"),
		RunE: func(_ *cobra.Command, args []string) error {
			file, err := a.readContexts()
			if err != nil {
				return err
			}
			if file.find(args[0]) == nil {
				return usagef("there is no context %q; executorctl context list shows what there is", args[0])
			}
			file.Current = args[0]
			return a.writeContexts(file)
		},
	}
}

func (a *app) contextDelete() *cobra.Command {
	return &cobra.Command{
		Use:   "delete NAME",
		Short: "Forget the name of a server, and the key that is kept with it",
		Args:  exactly("NAME"),
		RunE: func(_ *cobra.Command, args []string) error {
			file, err := a.readContexts()
			if err != nil {
				return err
			}
			if file.find(args[0]) == nil {
				return usagef("there is no context %q; executorctl context list shows what there is", args[0])
			}
			file.Contexts = slices.DeleteFunc(file.Contexts, func(c namedContext) bool { return c.Name == args[0] })
			if file.Current == args[0] {
				file.Current = ""
			}
			return a.writeContexts(file)
		},
	}
}

func (a *app) contextList() *cobra.Command {
	cmd := formats(&cobra.Command{
		Use:     "list",
		Aliases: []string{"ls"},
		Short:   "List the servers that have names; * is the one in use",
		Args:    none,
	}, "table", "json", "yaml", "name")
	cmd.RunE = func(*cobra.Command, []string) error {
		file, err := a.readContexts()
		if err != nil {
			return err
		}
		type shown struct {
			Name    string `json:"name"`
			Current bool   `json:"current"`
			Address string `json:"address"`
			TLS     bool   `json:"tls"`
			Key     string `json:"key"`
		}
		rows, all := [][]string{{" ", "NAME", "ADDRESS", "TLS", "KEY"}}, []shown{}
		for _, c := range file.Contexts {
			one := shown{c.Name, c.Name == file.Current, c.Address, c.encrypted(), "none"}
			switch {
			case c.APIKey != "":
				one.Key = "kept"
			case c.APIKeyFile != "":
				one.Key = "in " + c.APIKeyFile
			}
			mark := " "
			if one.Current {
				mark = "*"
			}
			rows, all = append(rows, []string{mark, one.Name, one.Address, strconv.FormatBool(one.TLS), one.Key}), append(all, one)
			if a.format == "name" {
				if err := a.line([]byte(c.Name)); err != nil {
					return err
				}
			}
		}
		switch a.format {
		case "name":
			return nil
		case "table":
			return a.table(rows)
		}
		text, err := json.Marshal(all)
		if err != nil {
			return fmt.Errorf("write JSON: %w", err)
		}
		return a.document(text)
	}
	return cmd
}
