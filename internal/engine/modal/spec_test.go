package modal

import (
	"slices"
	"testing"
	"time"

	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/engine/modal/modaltest"
	"github.com/harvest-run/executord/internal/fault"
)

// TestWhatIsAskedFor looks at what arrives at the provider.
func TestWhatIsAskedFor(t *testing.T) {
	h := newHouse(t, modaltest.Config{Secrets: map[string]map[string]string{"api-key": {"KEY": "k"}}}, func(c *Config) {
		c.OpenNetwork, c.OutboundCIDRs, c.Regions = true, []string{"10.0.0.0/8"}, []string{"eu"}
		c.Headers = []Header{{Domain: "api.example.com", Secret: "api-key", Headers: map[string]string{"X-Key": "$KEY"}}}
	})
	if err := h.engine.Volumes().Ensure(h.ctx(), "memory"); err != nil {
		t.Fatal(err)
	}
	make := func(s engine.Spec) modaltest.Info {
		t.Helper()
		sb, err := h.engine.Create(h.ctx(), s)
		if err != nil {
			t.Fatal(err)
		}
		all := h.fake.Sandboxes()
		i := slices.IndexFunc(all, func(i modaltest.Info) bool { return i.ID == sb.(*sandbox).modalID })
		return all[i]
	}
	got := make(engine.Spec{ID: "plain"})
	if got.Network != "BLOCKED" || got.Tags[tagOwner] != "test" || got.Tags[tagID] != "plain" || !slices.Equal(got.Regions, []string{"eu"}) || len(got.Headers) > 0 || got.GPU != "" {
		t.Errorf("plain: %+v", got)
	}
	if d := got.Deadline.Sub(got.Created); d != maxLifetime {
		t.Errorf("it lives for %v", d)
	}
	if got.MilliCPULimit != 2000 || got.MilliCPU != 500 || got.MemoryLimitMiB != 1024 || got.MemoryMiB != 256 || got.IdleTimeout != time.Hour {
		t.Errorf("plain: %+v", got)
	}
	if got := make(engine.Spec{ID: "egress", Network: engine.NetworkEgress}); got.Network != "BLOCKED" {
		t.Errorf("egress: %+v, but what gets out goes through the guest", got)
	}
	got = make(engine.Spec{
		ID: "all", Network: engine.NetworkHost, Limits: engine.Limits{CPUMillis: 100, MemoryBytes: 100<<20 + 1}, Lifetime: 90*time.Second + 1,
		Labels: map[string]string{"team": "x"}, Placement: engine.Placement{Regions: []string{"us-east"}, Runtime: "vm"},
		Secrets: []string{"api-key"}, Volumes: []engine.VolumeMount{{Name: "memory", Path: "/memory"}},
	})
	if got.Network != "ALLOWLIST" || !slices.Equal(got.CIDRs, []string{"10.0.0.0/8"}) || got.Headers["api.example.com"] != "api-key" {
		t.Errorf("its network: %+v", got)
	}
	if got.MilliCPULimit != 100 || got.MilliCPU != 100 || got.MemoryLimitMiB != 101 || got.MemoryMiB != 101 {
		t.Errorf("its limits: %+v", got)
	}
	if got.Tags["team"] != "x" || got.Runtime != "vm" || !slices.Equal(got.Regions, []string{"us-east"}) || got.Volumes["/memory"] != "memory" {
		t.Errorf("where it is: %+v", got)
	}
	if d := got.Deadline.Sub(got.Created); d != 91*time.Second {
		t.Errorf("it lives for %v", d)
	}
	if got := make(engine.Spec{ID: "gpu", Placement: engine.Placement{GPU: "T4"}}); got.GPU != "T4" {
		t.Errorf("with a GPU: %+v", got)
	}
}

func TestSpecsThatAreRefused(t *testing.T) {
	cfg := testConfig(t)
	if err := cfg.complete(); err != nil {
		t.Fatal(err)
	}
	e := &Engine{cfg: cfg}
	for name, c := range map[string]struct {
		spec   engine.Spec
		reason string
		kind   fault.Kind
	}{
		"processes":        {engine.Spec{Limits: engine.Limits{PIDs: 1}}, "LIMIT_NOT_ENFORCEABLE", fault.FailedPrecondition},
		"disk":             {engine.Spec{Limits: engine.Limits{DiskBytes: 1}}, "LIMIT_NOT_ENFORCEABLE", fault.FailedPrecondition},
		"open network":     {engine.Spec{Network: engine.NetworkHost}, "NETWORK_NOT_AVAILABLE", fault.FailedPrecondition},
		"unknown network":  {engine.Spec{Network: "moon"}, "NETWORK_UNKNOWN", fault.Invalid},
		"gpu":              {engine.Spec{Placement: engine.Placement{GPU: "A100; rm"}}, "PLACEMENT_NOT_AVAILABLE", fault.FailedPrecondition},
		"runtime":          {engine.Spec{Placement: engine.Placement{Runtime: "docker"}}, "PLACEMENT_NOT_AVAILABLE", fault.FailedPrecondition},
		"region":           {engine.Spec{Placement: engine.Placement{Regions: []string{""}}}, "PLACEMENT_NOT_AVAILABLE", fault.FailedPrecondition},
		"label":            {engine.Spec{Labels: map[string]string{tagOwner: "me"}}, "LABEL_RESERVED", fault.Invalid},
		"secret":           {engine.Spec{Secrets: []string{"a b"}}, "SECRET_NAME", fault.Invalid},
		"image":            {engine.Spec{Image: "../x"}, "IMAGE_NOT_FOUND", fault.NotFound},
		"volume's path":    {engine.Spec{Volumes: []engine.VolumeMount{{Name: "a", Path: "/a:b"}}}, "VOLUMES", fault.Invalid},
		"lifetime":         {engine.Spec{Lifetime: -1}, "LIFETIME_NEGATIVE", fault.Invalid},
		"limit below zero": {engine.Spec{Limits: engine.Limits{CPUMillis: -1}}, "LIMIT_NEGATIVE", fault.Invalid},
	} {
		if err := e.CheckSpec(c.spec); fault.ReasonOf(err) != c.reason || fault.KindOf(err) != c.kind {
			t.Errorf("%s: %v (%s), want %s", name, err, fault.ReasonOf(err), c.reason)
		}
	}
}

func TestConfigurationsThatAreRefused(t *testing.T) {
	for name, change := range map[string]func(*Config){
		"no owner": func(c *Config) { c.Owner = "" }, "an owner that is none": func(c *Config) { c.Owner = "A" }, "no guest": func(c *Config) { c.Guest = nil },
		"app": func(c *Config) { c.App = "a b" }, "lifetime": func(c *Config) { c.Lifetime = 25 * time.Hour }, "volumes": func(c *Config) { c.VolumeVersion = 3 },
		"runtime": func(c *Config) { c.Runtime = "x" }, "CIDRs of a closed network": func(c *Config) { c.OutboundCIDRs = []string{"10.0.0.0/8"} },
		"a CIDR that is none": func(c *Config) { c.OpenNetwork, c.OutboundCIDRs = true, []string{"::/0"} }, "ceiling": func(c *Config) { c.MaxSandboxes = -1 },
	} {
		c := testConfig(t)
		change(&c)
		if err := c.complete(); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
}
