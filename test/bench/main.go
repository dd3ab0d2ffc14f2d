// Command bench measures executord beside what one would use instead, in one run on
// one machine, turn by turn, and prints ratios: crun exec and crun run for commands, a
// bare grpc-go stream from a pipe for output, os/exec for the floor. `make bench` runs
// it; docs/performance.md keeps what it said. It needs root and crun.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"syscall"
	"time"
)

func main() {
	if len(os.Args) > 1 && roles()[os.Args[1]] != nil {
		// A helper process of a measurement: see peers.go.
		if err := roles()[os.Args[1]](os.Args[2:]); err != nil {
			fmt.Fprintln(os.Stderr, "bench:", err)
			os.Exit(1)
		}
		return
	}
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// options of a run.
type options struct {
	n       int
	bytes   int64
	idle    int
	many    int
	bin     string
	results *results
}

func run() error {
	var o options
	flag.IntVar(&o.n, "n", 200, "turns of each comparison of latency")
	flag.Int64Var(&o.bytes, "bytes", 2_000_000_000, "bytes of each stream")
	flag.IntVar(&o.idle, "idle", 200, "idle sandboxes to weigh")
	flag.IntVar(&o.many, "many", 2000, "idle sandboxes beside which a command is executed")
	keep := flag.String("json", "", "file to keep the results in, for `bench plot`")
	only := flag.String("only", "", "run only the measurements whose name contains this")
	flag.StringVar(&o.bin, "bin", "bin", "directory of executord")
	flag.Parse()
	if os.Geteuid() != 0 {
		return errors.New("needs root: crun and control groups")
	}
	if _, err := exec.LookPath("crun"); err != nil {
		return errors.New("needs crun: apt-get install crun")
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	d, err := startDaemon(ctx, o.bin, 0)
	if err != nil {
		return err
	}
	defer d.stop()
	o.results = &results{}
	o.results.head()
	for _, m := range []struct {
		name    string
		measure func(context.Context, *daemon, options) error
	}{
		{"exec", measureExec}, {"oneshot", measureOneShot}, {"warm", measureWarm}, {"rate", measureRate}, {"kill", measureKill},
		{"stream", measureStream}, {"fanout", measureFanOut}, {"stuck", measureStuck}, {"watches", measureWatches},
		{"idle", measureIdle}, {"many", measureMany},
	} {
		if strings.Contains(m.name, *only) {
			if err := m.measure(ctx, d, o); err != nil {
				return fmt.Errorf("%s: %w", m.name, err)
			}
		}
	}
	if *keep == "" {
		return nil
	}
	return o.results.write(*keep)
}

// block is how often one side is measured before it is the other's turn: often enough
// that the caches are its own, as they are when it is used, and seldom enough that
// what else the machine does falls on all sides alike.
const block = 10

// turns measures the sides in turn, in blocks. The first of each block warms up and
// does not count.
func turns(ctx context.Context, n int, sides ...func() (time.Duration, error)) ([]sample, error) {
	samples := make([]sample, len(sides))
	for done := 0; done < n; done += block {
		for i := range sides {
			for turn := -1; turn < min(block, n-done); turn++ {
				if ctx.Err() != nil {
					return nil, context.Cause(ctx)
				}
				took, err := sides[i]()
				if err != nil {
					return nil, err
				}
				if turn >= 0 {
					samples[i] = append(samples[i], took)
				}
			}
		}
	}
	return samples, nil
}
