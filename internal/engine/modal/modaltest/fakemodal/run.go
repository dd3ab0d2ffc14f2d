package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"time"

	"github.com/harvest-run/executord/internal/engine/modal/modaltest"
	"github.com/harvest-run/executord/internal/lifecycle"
)

// secretFlag collects -secret NAME:KEY=VALUE.
type secretFlag map[string]map[string]string

// String is for the flag package.
func (s secretFlag) String() string { return "" }

// Set takes one variable of a secret.
func (s secretFlag) Set(text string) error {
	name, variable, ok := strings.Cut(text, ":")
	key, value, ok2 := strings.Cut(variable, "=")
	if !ok || !ok2 || name == "" || key == "" {
		return errors.New("must be NAME:KEY=VALUE")
	}
	if s[name] == nil {
		s[name] = make(map[string]string)
	}
	s[name][key] = value
	return nil
}

// ready is what is said when it serves.
type ready struct {
	// Environment is what a program needs.
	Environment map[string]string
	// Admin is the URL for modaltest.Remote.
	Admin string
}

func run(ctx context.Context, group *lifecycle.Group, args []string, stdout, stderr io.Writer) error {
	flags := flag.NewFlagSet("fakemodal", flag.ContinueOnError)
	flags.SetOutput(stderr)
	secrets := secretFlag{}
	addr := flags.String("addr", "127.0.0.1:0", "`address` of the fake, on loopback")
	admin := flags.String("admin", "127.0.0.1:0", "`address` for faults and counts, on loopback")
	dir := flags.String("dir", "", "`directory` in which it keeps everything, until it ends")
	capacity := flags.Int("capacity", 0, "how many sandboxes may run; 0: any number")
	network := flags.Bool("host-network", false, "give sandboxes with an open network that of the host")
	flags.Var(secrets, "secret", "a variable of a named secret, `NAME:KEY=VALUE`; for tests: it is seen in the arguments")
	if err := flags.Parse(args); err != nil {
		return err
	}
	fake, err := modaltest.Start(modaltest.Config{
		Addr: *addr, Dir: *dir, Capacity: *capacity, HostNetwork: *network, Secrets: secrets,
		Logger: slog.New(slog.NewTextHandler(stderr, nil)),
	})
	if err != nil {
		return err
	}
	listener, err := net.Listen("tcp", *admin)
	if err != nil {
		return errors.Join(err, fake.Close())
	}
	server := &http.Server{Handler: fake.Admin(), ReadHeaderTimeout: time.Minute}
	group.Go(func(context.Context) error {
		if err := server.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
			return err
		}
		return nil
	})
	text, err := json.Marshal(ready{Environment: fake.Environment(), Admin: "http://" + listener.Addr().String()})
	if err == nil {
		_, err = fmt.Fprintln(stdout, string(text))
	}
	if err != nil {
		group.Stop(err)
	}
	<-ctx.Done()
	return errors.Join(err, server.Close(), fake.Close())
}
