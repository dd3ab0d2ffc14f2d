package api

import (
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/session"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/durationpb"
)

func TestCreateSession(t *testing.T) {
	for name, test := range map[string]struct {
		req  *executorv1.CreateSessionRequest
		want session.Request
	}{
		"least": {&executorv1.CreateSessionRequest{}, session.Request{}},
		"all": {
			&executorv1.CreateSessionRequest{
				Limits:   &executorv1.Limits{MemoryBytes: 1 << 30, CpuMillis: 10, Pids: 8, DiskBytes: 1 << 40, OpenFiles: 1 << 20},
				Lifetime: durationpb.New(30 * 24 * time.Hour), Labels: map[string]string{"a": "b"},
			},
			session.Request{
				Limits:   engine.Limits{MemoryBytes: 1 << 30, CPUMillis: 10, PIDs: 8, DiskBytes: 1 << 40, OpenFiles: 1 << 20},
				Lifetime: 30 * 24 * time.Hour, Labels: map[string]string{"a": "b"},
			},
		},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t)
			resp, err := b.session.CreateSession(t.Context(), test.req)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff([]session.Request{test.want}, b.sessions.requests); diff != "" {
				t.Errorf("request (-want +got):\n%s", diff)
			}
			got := resp.GetSession()
			if got.GetName() != "sessions/s1" || got.GetState() != executorv1.Session_STATE_STARTING || got.GetEndReason() != 0 {
				t.Errorf("answered %v", got)
			}
		})
	}
}

func TestGetSession(t *testing.T) {
	get := func(t *testing.T, b *bench, wait *durationpb.Duration) (*executorv1.Session, error) {
		t.Helper()
		resp, err := b.session.GetSession(t.Context(), &executorv1.GetSessionRequest{Name: "sessions/s1", Wait: wait})
		return resp.GetSession(), err
	}
	starting := session.Session{ID: "s1", State: session.Starting}
	t.Run("as it is", func(t *testing.T) {
		b := newBench(t)
		b.sessions.put(starting)
		for _, wait := range []*durationpb.Duration{nil, durationpb.New(0)} {
			if s, err := get(t, b, wait); err != nil || s.GetState() != executorv1.Session_STATE_STARTING {
				t.Errorf("%v, %v", s, err)
			}
		}
	})
	t.Run("starts", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			b := newBench(t)
			b.sessions.put(starting)
			var making sync.WaitGroup
			making.Go(func() {
				time.Sleep(9 * time.Second)
				b.sessions.put(session.Session{ID: "s1", State: session.Running})
				close(b.sessions.started)
			})
			start := time.Now()
			s, err := get(t, b, durationpb.New(10*time.Second))
			if err != nil || s.GetState() != executorv1.Session_STATE_RUNNING || time.Since(start) != 9*time.Second {
				t.Errorf("%v, %v after %v", s, err, time.Since(start))
			}
			making.Wait()
		})
	})
	t.Run("does not start", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			b := newBench(t)
			b.sessions.put(starting)
			start := time.Now()
			s, err := get(t, b, durationpb.New(10*time.Second))
			if err != nil || s.GetState() != executorv1.Session_STATE_STARTING || time.Since(start) != 10*time.Second {
				t.Errorf("%v, %v after %v", s, err, time.Since(start))
			}
		})
	})
	t.Run("not found", func(t *testing.T) {
		b := newBench(t)
		for _, wait := range []*durationpb.Duration{nil, durationpb.New(time.Second)} {
			_, err := get(t, b, wait)
			d := wantError(t, err, codes.NotFound, "SESSION_NOT_FOUND")
			if d.resource.GetResourceType() != "harvest.executor.v1.Session" || d.resource.GetResourceName() != "sessions/s1" {
				t.Errorf("%v", d.resource)
			}
		}
	})
}

func TestListSessions(t *testing.T) {
	b := newBench(t)
	for i := range 5 {
		s := session.Session{ID: fmt.Sprintf("s%d", i), State: session.Running}
		if i == 3 {
			s.State, s.Reason = session.Terminated, session.Expired
		}
		b.sessions.put(s)
	}
	list := func(req *executorv1.ListSessionsRequest) string {
		t.Helper()
		var names []string
		for {
			resp, err := b.session.ListSessions(t.Context(), req)
			if err != nil {
				t.Fatal(err)
			}
			for _, s := range resp.GetSessions() {
				names = append(names, strings.TrimPrefix(s.GetName(), "sessions/"))
			}
			names = append(names, "|")
			if req.PageToken = resp.GetNextPageToken(); req.PageToken == "" {
				return strings.Join(names, " ")
			}
		}
	}
	for _, test := range []struct {
		size int32
		all  bool
		want string
	}{
		{0, false, "s4 s2 s1 s0 |"},
		{0, true, "s4 s3 s2 s1 s0 |"},
		{2, false, "s4 s2 | s1 s0 |"},
		{2, true, "s4 s3 | s2 s1 | s0 |"},
	} {
		if got := list(&executorv1.ListSessionsRequest{PageSize: test.size, ShowTerminated: test.all}); got != test.want {
			t.Errorf("%d, %v: %q, want %q", test.size, test.all, got, test.want)
		}
	}
	first, err := b.session.ListSessions(t.Context(), &executorv1.ListSessionsRequest{PageSize: 1})
	if err != nil {
		t.Fatal(err)
	}
	_, err = b.session.ListSessions(t.Context(), &executorv1.ListSessionsRequest{
		PageToken: first.GetNextPageToken(), ShowTerminated: true,
	})
	wantError(t, err, codes.InvalidArgument, "INVALID_PAGE_TOKEN")
	// Nor is a token of the other service good here.
	_, err = b.executor.ListExecutions(t.Context(), &executorv1.ListExecutionsRequest{PageToken: first.GetNextPageToken()})
	wantError(t, err, codes.InvalidArgument, "INVALID_PAGE_TOKEN")
}

func TestTerminateSession(t *testing.T) {
	b := newBench(t)
	b.sessions.put(session.Session{ID: "s1", State: session.Running})
	resp, err := b.session.TerminateSession(t.Context(), &executorv1.TerminateSessionRequest{Name: "sessions/s1", Requester: "ann"})
	if err != nil {
		t.Fatal(err)
	}
	got := resp.GetSession()
	if got.GetState() != executorv1.Session_STATE_TERMINATED || got.GetEndReason() != executorv1.Session_END_REASON_REQUESTED || got.GetDetail() != "by ann (bufconn)" {
		t.Errorf("%v", got)
	}
	_, err = b.session.TerminateSession(t.Context(), &executorv1.TerminateSessionRequest{Name: "sessions/s2"})
	wantError(t, err, codes.NotFound, "SESSION_NOT_FOUND")
}
