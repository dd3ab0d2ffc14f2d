// Executorctl runs code in sandboxes of an executord, from a terminal.
package main

import (
	"context"
	"os"
	"os/signal"
	"os/user"

	"github.com/harvest-run/executord/internal/cli"
)

func main() {
	env := os.Environ()
	if host, err := os.Hostname(); err == nil {
		env = append(env, cli.HostVar+"="+host)
	}
	if u, err := user.Current(); err == nil {
		env = append(env, cli.UserVar+"="+u.Username)
	}
	os.Exit(cli.Main(context.Background(), os.Args[1:], env, os.Stdin, os.Stdout, os.Stderr, subscribe))
}

// subscribe subscribes to signals; before that and afterwards they act as ever.
func subscribe(wanted ...os.Signal) (<-chan os.Signal, func()) {
	c := make(chan os.Signal, 2)
	signal.Notify(c, wanted...)
	return c, func() { signal.Stop(c) }
}
