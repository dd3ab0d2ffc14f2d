package e2e

import (
	"fmt"
	"strings"
	"testing"
	"time"

	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
	"github.com/harvest-run/executord/internal/testmodel"
)

func ready(e *executorv1.SessionEvent) bool {
	return e.GetChanged().GetState() == executorv1.Session_STATE_RUNNING || e.GetEnded() != nil
}

func TestSessionProbe(t *testing.T) {
	h := newHouse(t)
	url := h.git.Repository("acme/sums", map[string]string{"README": "hi\n"})
	began := time.Now()
	s, err := h.c.CreateSession(t.Context(), h.request(url))
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range h.watchSession(s.GetName(), ready) {
		fmt.Printf("%v %.400v\n", e.GetEventTime().AsTime().Sub(began), e)
	}
	h.model.Script("one", testmodel.Say("Hello. ", shell("pwd; git remote -v; env; ls -la; git log")), testmodel.Say("Done."))
	f := h.prompt(s.GetName(), say("one"))
	r := f.result()
	fmt.Println(strings.ReplaceAll(f.story(), "\\n", "\n"), r)
	fmt.Println(h.get(s.GetName(), 0))
	fmt.Println(h.terminate(s.GetName()))
	_ = time.Now
}
