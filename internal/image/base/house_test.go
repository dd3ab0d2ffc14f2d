package base_test

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/harvest-run/executord/internal/egress"
	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/engine/local"
	"github.com/harvest-run/executord/internal/guestbinary/guestbuild"
	"github.com/harvest-run/executord/internal/guestclient"
	"github.com/harvest-run/executord/internal/image"
	"github.com/harvest-run/executord/internal/image/base"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// house is what sandboxes are made with.
type house struct {
	engine  engine.Engine
	network *egress.Gateway
}

// newHouse makes a local engine whose sandboxes also see directories of the host.
func newHouse(t *testing.T, extra ...string) house {
	t.Helper()
	guest, err := guestbuild.Build(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	e, err := local.New(t.Context(), local.Config{StateDir: t.TempDir(), Guest: guest, UIDBase: 1879048192, UIDCount: 64, ExtraPaths: extra})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := e.Close(); err != nil {
			t.Error(err)
		}
	})
	network, err := egress.New(egress.Config{Max: engine.NetworkEgress, Capable: map[string][]engine.Network{"local": {engine.NetworkEgress}}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { network.Close() })
	return house{e, network}
}

// cache is where scripts/test-tools has put what base installs.
func cache(t *testing.T) string {
	t.Helper()
	dir := os.Getenv("EXECUTORD_TEST_CACHE")
	if dir == "" {
		dir = "/var/cache/executord-test"
	}
	dir = filepath.Join(dir, "base")
	want, err := os.ReadFile("package-lock.json")
	if err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(filepath.Join(dir, "package-lock.json"))
	if err != nil || !bytes.Equal(got, want) {
		t.Fatalf("the tools that this test needs are not in %s (%v): run scripts/test-tools", dir, err)
	}
	return dir
}

// start makes a sandbox of the linked image. Its proxy lets nothing through.
func (h house) start(t *testing.T) (engine.Sandbox, *guestclient.Client, *egress.Proxy) {
	t.Helper()
	recipe, err := base.Linked(cache(t), "")
	if err != nil {
		t.Fatal(err)
	}
	var log strings.Builder
	ref, size, err := image.Builder{Engine: h.engine, Network: h.network}.Build(t.Context(), recipe, "b-base", func(e image.Event) error {
		if e.Output != nil {
			log.Write(e.Output.Data)
		}
		return nil
	})
	if err != nil {
		t.Fatalf("%v\n%s", err, log.String())
	}
	if size < 1000 || size > 10<<20 {
		t.Errorf("what was written is said to have %d bytes", size)
	}
	sb, err := h.engine.Create(t.Context(), engine.Spec{ID: "s-base", Image: ref, Network: engine.NetworkEgress})
	if err != nil {
		t.Fatal(err)
	}
	proxy, err := h.network.Open(t.Context(), sb, egress.Policy{Mode: engine.NetworkEgress, Rules: []egress.Rule{{Host: "nowhere.invalid"}}})
	if err != nil {
		t.Fatal(err)
	}
	client := guestclient.New(sb)
	t.Cleanup(func() {
		client.Close()
		if _, err := sb.Terminate(context.WithoutCancel(t.Context())); err != nil {
			t.Error(err)
		}
	})
	return sb, client, proxy
}

// run runs a script, which must succeed, and returns what it wrote.
func run(t *testing.T, c *guestclient.Client, script string, args ...string) string {
	t.Helper()
	out, err := c.Run(t.Context(), guestclient.Command{
		Args: append([]string{"/bin/bash", "-eu", "-o", "pipefail", "-c", script, "test"}, args...), Timeout: time.Minute,
	})
	if err != nil || out.Code() != 0 {
		t.Fatalf("%s: %v, exit %d\n%s\n%s", script, err, out.Code(), out.Stdout, out.Stderr)
	}
	return string(out.Stdout)
}

// milliseconds since start, for a log.
func since(start time.Time) string { return fmt.Sprint(time.Since(start).Round(time.Millisecond)) }
