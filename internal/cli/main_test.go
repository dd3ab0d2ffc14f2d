package cli

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
	"go.uber.org/goleak"
)

// TestMain is also executorctl itself, for the scripts.
func TestMain(m *testing.M) {
	testscript.Main(leakFree{m}, map[string]func(){
		"executorctl": func() {
			os.Exit(Main(context.Background(), os.Args[1:], os.Environ(), os.Stdin, os.Stdout, os.Stderr, func(wanted ...os.Signal) (<-chan os.Signal, func()) {
				c := make(chan os.Signal, 2)
				signal.Notify(c, wanted...)
				return c, func() { signal.Stop(c) }
			}))
		},
	})
}

// leakFree runs the tests and fails if they leave goroutines behind.
type leakFree struct{ *testing.M }

func (m leakFree) Run() int {
	code := m.M.Run()
	if err := goleak.Find(); code == 0 && err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return code
}
