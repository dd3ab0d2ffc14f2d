// The runtime would keep files of the host's control groups open; the guest says
// itself how many processors it uses.

//go:debug containermaxprocs=0

// Command executor-guest runs in every sandbox and owns the processes inside. It is
// not meant to be started by people: the engines do that.
package main

import (
	"fmt"
	"os"

	"github.com/harvest-run/executord/internal/guest"
	"github.com/harvest-run/executord/internal/guest/forkserver"
)

// setupSocket is where the local engine's Setup arrives.
const setupSocket = 3

func main() {
	run := map[string]func() error{
		"init": func() error { return guest.RunInit(setupSocket) },
		"fork": forkserver.Run,
	}
	if len(os.Args) != 2 || run[os.Args[1]] == nil {
		fmt.Fprintln(os.Stderr, "usage: executor-guest init | fork (started by executord)")
		os.Exit(2)
	}
	if err := run[os.Args[1]](); err != nil {
		fmt.Fprintln(os.Stderr, "executor-guest:", err)
		os.Exit(1)
	}
}
