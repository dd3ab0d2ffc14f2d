package guest

import (
	"fmt"
	"sync"
	"testing"
	"time"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
	"github.com/harvest-run/executord/internal/guestclient"
)

// TestReadBehindAStart sends a read right behind the start of its command: the guest
// must know the command by then, however busy it is.
func TestReadBehindAStart(t *testing.T) {
	overTrees(t, func(t *testing.T, g *guestProcess) {
		var all sync.WaitGroup
		for i := range 40 {
			all.Go(func() {
				id := fmt.Sprintf("x%d", i)
				r := g.sh(id, "echo "+id)
				_, early, err := g.StartRead(t.Context(), r, 1000, 20*time.Second)
				if err != nil {
					t.Errorf("start: %v", err)
					return
				}
				out, err := early.Output(t.Context())
				if err != nil {
					t.Errorf("read: %v", err)
					return
				}
				if len(out.Chunks) != 1 || string(out.Chunks[0].Data) != id+"\n" {
					t.Errorf("%s: %+v", id, out)
				}
				out.Release()
			})
		}
		all.Wait()
		for i := range 40 {
			id := fmt.Sprintf("x%d", i)
			g.readAll(id, &output{})
			g.release(id)
		}
	})
}

// TestReadBehindAStartThatFails is answered, with what is true then: there is no such
// command.
func TestReadBehindAStartThatFails(t *testing.T) {
	g := startDaemon(t, "proc")
	r := g.request("x", "/no/such/program")
	_, early, err := g.StartRead(t.Context(), r, 1000, 20*time.Second)
	if guestclient.KindOf(err) != guestv1.Error_KIND_NO_SUCH_PROGRAM || early != nil {
		t.Errorf("start: %v", err)
	}
	// The same id is free for another try.
	o := g.run(g.sh("x", "echo again"))
	if string(o.stdout) != "again\n" {
		t.Errorf("%q", o.stdout)
	}
}

// TestStartsOfOneID makes one command of all starts with its id that come at once.
func TestStartsOfOneID(t *testing.T) {
	g := startDaemon(t, "proc")
	r := g.sh("x", "echo once; sleep 0.2")
	pids := make([]int32, 20)
	var all sync.WaitGroup
	for i := range pids {
		all.Go(func() {
			same := &guestv1.StartRequest{
				Execution: r.GetExecution(), Args: r.GetArgs(), Env: r.GetEnv(), WorkingDirectory: r.GetWorkingDirectory(),
			}
			resp, err := g.Start(t.Context(), same)
			if err != nil {
				t.Error(err)
			}
			pids[i] = resp.GetPid()
		})
	}
	all.Wait()
	for _, pid := range pids {
		if pid != pids[0] {
			t.Fatalf("several were started: %v", pids)
		}
	}
	if o := g.readAll("x", &output{}); string(o.stdout) != "once\n" {
		t.Errorf("%q", o.stdout)
	}
	g.release("x")
}
