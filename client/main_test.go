package client_test

import (
	"fmt"
	"os"
	"testing"

	"go.uber.org/goleak"
)

// TestMain is also the server process that TestKill kills: see serveForever.
func TestMain(m *testing.M) {
	if address := os.Getenv(serverEnv); address != "" {
		if err := serveForever(address); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	goleak.VerifyTestMain(m)
}
