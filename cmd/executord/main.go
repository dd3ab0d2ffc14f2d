// Command executord runs code in isolated sandboxes and streams what it says.
package main

import (
	"context"
	"os"

	"github.com/harvest-run/executord/internal/daemon"
)

func main() {
	os.Exit(daemon.Main(context.Background(), os.Args[1:], os.Environ(), os.Stdin, os.Stdout, os.Stderr))
}
