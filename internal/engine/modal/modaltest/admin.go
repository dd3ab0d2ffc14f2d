package modaltest

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"
)

// Admin serves what Fake's methods do, for a fake that is a program of its own: a POST of
// JSON to a path each. Remote calls it.
func (f *Fake) Admin() http.Handler {
	mux := http.NewServeMux()
	route(mux, "/environment", func(struct{}) (map[string]string, error) { return f.Environment(), nil })
	route(mux, "/counts", func(struct{}) (map[string]int, error) { return f.Counts(), nil })
	route(mux, "/calls", func(struct{}) ([]string, error) { return f.Calls(), nil })
	route(mux, "/reset-counts", func(struct{}) (any, error) { f.ResetCounts(); return nil, nil })
	route(mux, "/sandboxes", func(struct{}) ([]Info, error) { return f.Sandboxes(), nil })
	route(mux, "/inject", func(fault Fault) (any, error) { f.Inject(fault); return nil, nil })
	route(mux, "/repair", func(struct{}) (any, error) { f.Repair(); return nil, nil })
	route(mux, "/advance", func(by time.Duration) (any, error) { f.Advance(by); return nil, nil })
	route(mux, "/expire-tokens", func(struct{}) (any, error) { f.ExpireTokens(); return nil, nil })
	route(mux, "/preempt", func(o preemption) (any, error) { return nil, f.Preempt(o.ID, o.How) })
	route(mux, "/kill-worker", func(o workerDeath) (any, error) { return nil, f.KillWorker(o.ID, o.RunsFor) })
	for path, set := range map[string]func(time.Duration){
		"/scheduling": f.SetScheduling, "/startup": f.SetStartup, "/result-lag": f.SetResultLag,
		"/round-trip": f.SetRoundTrip, "/delay-builds": f.DelayBuilds,
	} {
		route(mux, path, func(d time.Duration) (any, error) { set(d); return nil, nil })
	}
	route(mux, "/refuse-builds", func(message string) (any, error) { f.RefuseBuilds(message); return nil, nil })
	return mux
}

type preemption struct {
	ID  string
	How Gone
}

type workerDeath struct {
	ID      string
	RunsFor time.Duration
}

// route serves one method.
func route[In, Out any](mux *http.ServeMux, path string, do func(In) (Out, error)) {
	mux.HandleFunc("POST "+path, func(w http.ResponseWriter, r *http.Request) {
		var in In
		if err := json.NewDecoder(r.Body).Decode(&in); err != nil && !errors.Is(err, io.EOF) {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		out, err := do(in)
		if err != nil {
			http.Error(w, err.Error(), http.StatusConflict)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(out) // the client hears of it
	})
}

// Remote is a fake that is a program of its own, over its admin address. Its methods are
// those of Fake.
type Remote struct {
	// URL is of the admin address, such as "http://127.0.0.1:8090".
	URL string
}

// call calls one method. out may be nil.
func (r Remote) call(ctx context.Context, path string, in, out any) error {
	body, err := json.Marshal(in)
	if err != nil {
		return err
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, r.URL+path, bytes.NewReader(body))
	if err != nil {
		return err
	}
	request.Close = true // nothing is left open behind a test
	answer, err := http.DefaultClient.Do(request)
	if err != nil {
		return fmt.Errorf("call the fake of Modal: %w", err)
	}
	defer answer.Body.Close()
	text, err := io.ReadAll(answer.Body)
	if err != nil {
		return fmt.Errorf("call the fake of Modal: %s: %w", path, err)
	}
	if answer.StatusCode != http.StatusOK {
		return fmt.Errorf("call the fake of Modal: %s: %s", path, bytes.TrimSpace(text))
	}
	if out == nil {
		return nil
	}
	return unmarshal(text, out)
}

// Environment is what executord needs in its environment.
func (r Remote) Environment(ctx context.Context) (env map[string]string, err error) {
	return env, r.call(ctx, "/environment", nil, &env)
}

// Counts is how often each RPC was called.
func (r Remote) Counts(ctx context.Context) (counts map[string]int, err error) {
	return counts, r.call(ctx, "/counts", nil, &counts)
}

// Calls are the names of the calls in their order.
func (r Remote) Calls(ctx context.Context) (names []string, err error) {
	return names, r.call(ctx, "/calls", nil, &names)
}

// ResetCounts forgets all calls.
func (r Remote) ResetCounts(ctx context.Context) error { return r.call(ctx, "/reset-counts", nil, nil) }

// Sandboxes tells of all sandboxes.
func (r Remote) Sandboxes(ctx context.Context) (all []Info, err error) {
	return all, r.call(ctx, "/sandboxes", nil, &all)
}

// Inject orders a fault.
func (r Remote) Inject(ctx context.Context, f Fault) error { return r.call(ctx, "/inject", f, nil) }

// Repair takes back all faults.
func (r Remote) Repair(ctx context.Context) error { return r.call(ctx, "/repair", nil, nil) }

// Advance moves the clock.
func (r Remote) Advance(ctx context.Context, by time.Duration) error {
	return r.call(ctx, "/advance", by, nil)
}

// ExpireTokens makes all tokens for routers invalid.
func (r Remote) ExpireTokens(ctx context.Context) error {
	return r.call(ctx, "/expire-tokens", nil, nil)
}

// Preempt takes a sandbox away.
func (r Remote) Preempt(ctx context.Context, id string, how Gone) error {
	return r.call(ctx, "/preempt", preemption{ID: id, How: how}, nil)
}

// KillWorker takes a sandbox's worker away.
func (r Remote) KillWorker(ctx context.Context, id string, runsFor time.Duration) error {
	return r.call(ctx, "/kill-worker", workerDeath{ID: id, RunsFor: runsFor}, nil)
}

// SetRoundTrip makes everything take so long.
func (r Remote) SetRoundTrip(ctx context.Context, d time.Duration) error {
	return r.call(ctx, "/round-trip", d, nil)
}

// SetScheduling is how long creations take.
func (r Remote) SetScheduling(ctx context.Context, d time.Duration) error {
	return r.call(ctx, "/scheduling", d, nil)
}

// SetStartup is how long the router of a new sandbox is not there.
func (r Remote) SetStartup(ctx context.Context, d time.Duration) error {
	return r.call(ctx, "/startup", d, nil)
}
