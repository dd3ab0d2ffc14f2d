// The runtime would keep files of the host's control groups open; the guest says
// itself how many processors it uses.

//go:debug containermaxprocs=0

// Command executor-guest runs in every sandbox and owns the processes inside. It is
// not meant to be started by people: the engines do that.
package main

import (
	"errors"
	"fmt"
	"os"

	"github.com/harvest-run/executord/internal/guest"
	"github.com/harvest-run/executord/internal/guest/forkserver"
)

// setupSocket is where the local engine's Setup arrives.
const setupSocket = 3

// usage is for people, who are not meant to start it.
const usage = "usage: executor-guest init | fork | daemon HOSTNAME [inherit] | dial (started by executord)"

func main() {
	err := run(os.Args[1:])
	if errors.Is(err, errUsage) {
		fmt.Fprintln(os.Stderr, usage)
		os.Exit(2)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "executor-guest:", err)
		os.Exit(1)
	}
}

var errUsage = errors.New("wrong arguments")

func run(args []string) error {
	switch {
	case len(args) == 1 && args[0] == "init":
		return guest.RunInit(setupSocket)
	case len(args) == 1 && args[0] == "fork":
		return forkserver.Run()
	case len(args) == 1 && args[0] == "dial":
		return guest.Dial(os.Stdin, os.Stdout)
	case len(args) == 2 && args[0] == "daemon":
		return guest.RunDaemon(args[1], false)
	case len(args) == 3 && args[0] == "daemon" && args[2] == "inherit":
		return guest.RunDaemon(args[1], true)
	}
	return errUsage
}
