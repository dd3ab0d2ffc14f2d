// Command executor-guest runs in every sandbox and owns the processes inside. It is
// not meant to be started by people: the engines do that.
package main

import (
	"fmt"
	"os"

	"github.com/harvest-run/executord/internal/guest"
)

// setupSocket is where the local engine's Setup arrives.
const setupSocket = 3

func main() {
	if len(os.Args) != 2 || os.Args[1] != "init" {
		fmt.Fprintln(os.Stderr, "usage: executor-guest init (started by executord)")
		os.Exit(2)
	}
	if err := guest.RunInit(setupSocket); err != nil {
		fmt.Fprintln(os.Stderr, "executor-guest:", err)
		os.Exit(1)
	}
}
