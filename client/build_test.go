package client_test

import (
	"errors"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/harvest-run/executord/client"
	"github.com/harvest-run/executord/client/clienttest"
	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
)

// TestBuildImage tells every event once, also over a stream that breaks.
func TestBuildImage(t *testing.T) {
	s := clienttest.Start(t)
	outages := 0
	c, err := client.Dial(client.Config{Address: s.Address(), OnOutage: func(client.Outage) { outages++ }})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for name, state := range map[string]executorv1.Build_State{
		"images/base": executorv1.Build_STATE_READY, "images/cut": executorv1.Build_STATE_READY, "images/bad": executorv1.Build_STATE_FAILED,
	} {
		var seen []uint64
		build, err := c.BuildImage(t.Context(), &executorv1.BuildImageRequest{Name: name}, func(e *executorv1.BuildEvent) error {
			seen = append(seen, e.GetCursor().GetSequence())
			return nil
		})
		if err != nil || build.GetState() != state || build.GetName() != name+"/builds/b1" {
			t.Errorf("%s: %v, %v", name, build, err)
		}
		for i, n := range seen {
			if n != uint64(i+1) || len(seen) != 6 {
				t.Errorf("%s: events %v", name, seen)
				break
			}
		}
	}
	if outages != 1 {
		t.Errorf("%d outages were told", outages)
	}
	enough := errors.New("enough")
	if _, err := c.BuildImage(t.Context(), &executorv1.BuildImageRequest{Name: "images/base"}, func(*executorv1.BuildEvent) error { return enough }); !errors.Is(err, enough) {
		t.Errorf("%v", err)
	}
	if _, err := c.BuildImage(t.Context(), &executorv1.BuildImageRequest{Name: "images/none"}, nil); status.Code(err) != codes.NotFound {
		t.Errorf("%v", err)
	}
	// From a cursor.
	count := 0
	if _, err := c.WatchBuild(t.Context(), &executorv1.WatchBuildRequest{
		Name: "images/base/builds/b1", After: &executorv1.Cursor{Epoch: clienttest.Epoch, Sequence: 4},
	}, func(*executorv1.BuildEvent) error { count++; return nil }); err != nil || count != 2 {
		t.Errorf("%d events, %v", count, err)
	}
	if err := c.DeleteImage(t.Context(), &executorv1.DeleteImageRequest{Name: "images/base"}); err != nil {
		t.Error(err)
	}
}
