// Command fakemodal is the fake of Modal as a program of its own, which outlives those
// who use it. When it serves it says so with one line on standard output: the variables
// that a program needs in its environment, and where faults are ordered, as JSON. It ends
// in order, with all its sandboxes, at SIGTERM; killed, it takes them with it too.
package main

import (
	"context"
	"os"

	"github.com/harvest-run/executord/internal/engine/modal/modaltest"
	"github.com/harvest-run/executord/internal/lifecycle"
)

func main() {
	modaltest.MaybeRun()
	os.Exit(lifecycle.RunMain(context.Background(), "fakemodal", func(ctx context.Context, group *lifecycle.Group) error {
		return run(ctx, group, os.Args[1:], os.Stdout, os.Stderr)
	}))
}
