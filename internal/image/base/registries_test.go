//go:build registries

package base_test

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/harvest-run/executord/internal/egress"
	"github.com/harvest-run/executord/internal/image"
	"github.com/harvest-run/executord/internal/image/base"
)

// TestFromRegistries builds the image as it is built for people: from Debian and npm. Not
// part of `make test`, because it downloads some 400 MB; `make test-registries` runs it.
func TestFromRegistries(t *testing.T) {
	status, err := os.ReadFile("/var/lib/dpkg/status")
	if err != nil {
		t.Fatal(err)
	}
	cfg := base.Config{DpkgStatus: status}
	// Where the registries are mirrors with private addresses, those have to be named.
	for _, host := range []string{"deb.debian.org", "registry.npmjs.org"} {
		ips, err := (&net.Resolver{}).LookupNetIP(t.Context(), "ip", host)
		if err != nil {
			t.Fatal(err)
		}
		for _, ip := range ips {
			if ip = ip.Unmap(); ip.IsPrivate() || netip.MustParsePrefix("203.0.113.0/24").Contains(ip) {
				cfg.Allow = append(cfg.Allow, egress.Rule{Host: ip.String()})
			}
		}
	}
	recipe, err := base.Recipe(cfg)
	if err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	h := newHouse(t)
	b := image.Builder{Engine: h.engine, Network: h.network}
	ref, size, err := b.Build(t.Context(), recipe, "b-registries", func(e image.Event) error {
		switch {
		case e.Step != nil:
			fmt.Printf("== %s (%v)\n", e.Step.Name, time.Since(start).Round(time.Millisecond))
		case e.Output != nil:
			os.Stdout.Write(e.Output.Data)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%s: %d MiB in %v", ref, size>>20, time.Since(start))
}
