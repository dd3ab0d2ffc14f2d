package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/harvest-run/executord/client"
	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
)

// together runs f n times at once, each with its number, and returns the first error.
func together(n int, f func(i int) error) error {
	var all sync.WaitGroup
	errs := make([]error, n)
	for i := range n {
		all.Go(func() { errs[i] = f(i) })
	}
	all.Wait()
	return errors.Join(errs...)
}

// start starts a command without following it.
func (d *daemon) start(ctx context.Context, parent string, args ...string) (string, error) {
	resp, err := d.client.Executor().StartExecution(ctx, &executorv1.StartExecutionRequest{
		Parent: parent, Command: &executorv1.Command{Args: args, Timeout: durationpb.New(10 * time.Minute)},
	})
	return resp.GetExecution().GetName(), err
}

// end ends a command, at once.
func (d *daemon) end(ctx context.Context, name string) error {
	_, err := d.client.Executor().CancelExecution(ctx, &executorv1.CancelExecutionRequest{Name: name, GracePeriod: durationpb.New(0)})
	return err
}

// resident is the memory of the daemon that is its own.
func (d *daemon) resident() (int64, error) {
	text, err := os.ReadFile("/proc/" + strconv.Itoa(d.process.Process.Pid) + "/status")
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(text)) {
		if rest, ok := strings.CutPrefix(line, "RssAnon:"); ok {
			kib, err := strconv.ParseInt(strings.Fields(rest)[0], 10, 64)
			return kib << 10, err
		}
	}
	return 0, errors.New("no RssAnon in /proc/PID/status")
}

// measureFanOut has ever more watchers follow one program, each over a connection of
// its own, as clients do.
func measureFanOut(ctx context.Context, d *daemon, o options) error {
	const size = 20 << 20
	var alone float64
	for _, watchers := range []int{1, 10, 100} {
		clients := make([]*client.Client, watchers)
		for i := range clients {
			c, err := client.Dial(client.Config{Address: d.address})
			if err != nil {
				return err
			}
			defer c.Close()
			clients[i] = c
		}
		// It waits until all are there.
		begun := time.Now().Add(time.Second + time.Duration(watchers)*10*time.Millisecond)
		name, err := d.start(ctx, "", "sh", "-c", fmt.Sprintf("sleep %.2f; exec head -c %d /dev/zero", time.Until(begun).Seconds(), size))
		if err != nil {
			return err
		}
		err = together(watchers, func(i int) error {
			s, err := clients[i].Watch(ctx, name, nil)
			if err != nil {
				return err
			}
			for {
				if _, err := s.Recv(); errors.Is(err, io.EOF) {
					break
				} else if err != nil {
					return err
				}
			}
			if !s.Whole() {
				return fmt.Errorf("watcher %d has not everything", i)
			}
			return nil
		})
		if err != nil {
			return err
		}
		rate := float64(watchers) * size / time.Since(begun).Seconds() / 1e6
		if watchers == 1 {
			alone = rate
		}
		memory, err := d.resident()
		if err != nil {
			return err
		}
		o.results.number(fmt.Sprintf("fan-out to %d watchers, all together", watchers), "MB/s", rate, rate/alone, "")
		o.results.point("fan-out", "watchers", "MB/s together", float64(watchers), rate)
		o.results.point("fan-out", "watchers", "daemon, MiB", float64(watchers), float64(memory)/(1<<20))
	}
	return nil
}

// measureStuck weighs clients that never read, each with a connection of its own.
func measureStuck(ctx context.Context, d *daemon, o options) error {
	const stuck = 200
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	// What the daemon holds of one fast program with one reader is not theirs.
	if _, err := d.stream(ctx, 200_000_000); err != nil {
		return err
	}
	name, err := d.start(ctx, "", "sh", "-c", "sleep 3; head -c 200000000 /dev/zero; exec sleep 600")
	if err != nil {
		return err
	}
	before, err := d.resident()
	if err != nil {
		return err
	}
	conns := make([]*grpc.ClientConn, stuck)
	defer func() {
		for _, c := range conns {
			if c != nil {
				c.Close()
			}
		}
	}()
	err = together(stuck, func(i int) error {
		conn, err := grpc.NewClient(d.address, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			return err
		}
		conns[i] = conn
		s, err := executorv1.NewExecutorServiceClient(conn).WatchExecution(ctx, &executorv1.WatchExecutionRequest{Name: name})
		if err != nil {
			return err
		}
		_, err = s.Recv() // started; from here on it does not read
		return err
	})
	if err != nil {
		return err
	}
	most := before
	for range 30 {
		time.Sleep(500 * time.Millisecond)
		now, err := d.resident()
		if err != nil {
			return err
		}
		most = max(most, now)
	}
	o.results.number(fmt.Sprintf("%d clients that never read: memory of the daemon, more by", stuck), "MiB", float64(most-before)/(1<<20), 0, "≤ 64 MiB")
	return d.end(ctx, name)
}

// measureWatches weighs open watches of a program that says nothing.
func measureWatches(ctx context.Context, d *daemon, o options) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	name, err := d.start(ctx, "", "sleep", "600")
	if err != nil {
		return err
	}
	before, err := d.resident()
	if err != nil {
		return err
	}
	const each, conns = 100, 10
	err = together(conns, func(int) error {
		c, err := client.Dial(client.Config{Address: d.address})
		if err != nil {
			return err
		}
		context.AfterFunc(ctx, func() { c.Close() })
		for range each {
			s, err := c.Executor().WatchExecution(ctx, &executorv1.WatchExecutionRequest{Name: name})
			if err != nil {
				return err
			}
			if _, err := s.Recv(); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	after, err := d.resident()
	if err != nil {
		return err
	}
	o.results.number(fmt.Sprintf("%d open watches: memory of the daemon, more by", each*conns), "MiB", float64(after-before)/(1<<20), 0, "")
	return d.end(ctx, name)
}

// inFlight is how many sandboxes are made at a time when their rate is measured.
const inFlight = 8

// measureRate makes sandboxes as fast as both can, in turn, for a few seconds each.
func measureRate(ctx context.Context, d *daemon, o options) error {
	crun, err := startCrun(ctx)
	if err != nil {
		return err
	}
	defer crun.stop()
	var ours, theirs sample
	for range 5 {
		begun := time.Now()
		err := together(inFlight, func(int) error {
			for range rateTurns {
				if _, _, err := d.firstByte(ctx, "", "/bin/echo", "hi"); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
		ours = append(ours, time.Since(begun))
		var took time.Duration
		if err := crun.ask("many", &took); err != nil {
			return err
		}
		theirs = append(theirs, took)
	}
	rate := func(s sample) float64 { return inFlight * rateTurns / s.quantile(.5).Seconds() }
	o.results.rates(fmt.Sprintf("sandboxes per second at %d in flight, a command in each, gone afterwards", inFlight),
		"/s", rate(ours), "crun run", rate(theirs), "≥ 3")
	return nil
}

// rateTurns is how many sandboxes each of those in flight makes in a round.
const rateTurns = 12

// measureKill ends sandboxes with many processes in them.
func measureKill(ctx context.Context, d *daemon, o options) error {
	const processes = 100
	crun, err := startCrun(ctx)
	if err != nil {
		return err
	}
	defer crun.stop()
	samples, err := turns(ctx, min(o.n, 40),
		func() (time.Duration, error) {
			session, err := d.session(ctx)
			if err != nil {
				return 0, err
			}
			s, err := d.client.Execute(ctx, &executorv1.ExecuteRequest{
				Parent: session, Command: &executorv1.Command{Args: []string{"sh", "-c", crowd(processes)}},
			})
			if err != nil {
				return 0, err
			}
			for {
				if e, err := s.Recv(); err != nil {
					return 0, err
				} else if e.GetOutput() != nil {
					break
				}
			}
			begun := time.Now()
			if err := d.terminate(ctx, session); err != nil {
				return 0, err
			}
			took := time.Since(begun)
			for { // how it ended must be known too
				if _, err := s.Recv(); errors.Is(err, io.EOF) {
					return took, nil
				} else if err != nil {
					return 0, err
				}
			}
		},
		func() (took time.Duration, err error) { return took, crun.ask("kill", &took) })
	if err != nil {
		return err
	}
	o.results.compare(fmt.Sprintf("end of a sandbox with %d processes, until nothing is left", processes), samples[0], "crun kill KILL", samples[1], "p99 ≤ 250 ms")
	return nil
}

// crowd is a script that says so when so many processes of it sleep.
func crowd(n int) string {
	return fmt.Sprintf("i=1; while [ $i -lt %d ]; do sleep 600 & i=$((i+1)); done; echo ready; wait", n)
}

// measureMany makes ever more idle sandboxes and executes in one of them.
func measureMany(ctx context.Context, d *daemon, o options) error {
	var sessions []string
	defer func() {
		_ = together(inFlight, func(i int) error {
			for ; i < len(sessions); i += inFlight {
				if err := d.terminate(ctx, sessions[i]); err != nil {
					return err
				}
			}
			return nil
		})
	}()
	var alone sample
	for _, want := range []int{1, o.many / 4, o.many / 2, o.many} {
		for len(sessions) < want {
			s, err := d.session(ctx)
			if err != nil {
				return err
			}
			sessions = append(sessions, s)
		}
		samples, err := turns(ctx, 100, func() (time.Duration, error) {
			t, _, err := d.firstByte(ctx, sessions[len(sessions)/2], "/bin/echo", "hi")
			return t, err
		})
		if err != nil {
			return err
		}
		if alone == nil {
			alone = samples[0]
		}
		p50 := samples[0].quantile(.5)
		o.results.point("idle sandboxes", "idle sandboxes", "exec to first byte, ms", float64(want), float64(p50.Microseconds())/1000)
		if want == o.many {
			o.results.compare(fmt.Sprintf("exec beside %d idle sandboxes", want), samples[0], "beside none", alone, "≤ 2.0")
		}
	}
	return nil
}
