package local

import (
	"os"
	"slices"
	"testing"

	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/fault"
)

func TestUIDRanges(t *testing.T) {
	for name, c := range map[string]struct {
		base, count uint32
		ok          bool
	}{
		"one": {65536, 1, true}, "the default": {0x70000000, 4094, true}, "the last": {0xfffe0000, 1, true},
		"the host's own": {0, 1, false}, "none": {65536, 0, false}, "not aligned": {100000, 1, false}, "the host's users": {1000, 1, false},
		"past the end": {0xfffe0000, 2, false}, "one that has no user": {0xffff0000, 1, false}, "around": {65536, 65536, false},
		"as many as there are": {65536, 65534, true}, "one more": {65536, 65535, false},
	} {
		if _, err := newUIDRanges(c.base, c.count); (err == nil) != c.ok {
			t.Errorf("%s: %v", name, err)
		}
	}
	// Ranges that are claimed by another executord, or by this one, are passed over.
	const base = 0x5fff0000 - 8*idsPerSandbox
	ours, err := newUIDRanges(base, 4)
	if err != nil {
		t.Fatal(err)
	}
	theirs, err := newUIDRanges(base, 4)
	if err != nil {
		t.Fatal(err)
	}
	var held []*os.File
	defer func() {
		for _, f := range held {
			f.Close()
		}
	}()
	seen := make(map[uint32]bool)
	for i := range 4 {
		r := []*uidRanges{ours, theirs}[i%2]
		first, f, err := r.claim()
		if err != nil {
			t.Fatal(err)
		}
		held = append(held, f)
		if seen[first] || first < base || first >= base+4*idsPerSandbox || first%idsPerSandbox != 0 {
			t.Errorf("claim %d: %d, after %v", i, first, seen)
		}
		seen[first] = true
	}
	if _, _, err := ours.claim(); fault.KindOf(err) != fault.Exhausted || fault.ReasonOf(err) != "NO_FREE_USER_IDS" {
		t.Errorf("a fifth of four: %v", err)
	}
	held[2].Close()
	if first, f, err := theirs.claim(); err != nil || !seen[first] {
		t.Errorf("after one was given back: %d, %v", first, err)
	} else {
		f.Close()
	}
}

func TestNoFreeIDsLeavesNothing(t *testing.T) {
	needRoot(t)
	cfg := testConfig(t)
	cfg.UIDBase, cfg.UIDCount = 0x5ffe0000, 1
	e := engineOver(t, cfg)
	sandboxFor(t, e, engine.Spec{ID: "only"})
	_, err := e.Create(t.Context(), engine.Spec{ID: "second"})
	if fault.KindOf(err) != fault.Exhausted {
		t.Errorf("%v, want a fault of kind Exhausted", err)
	}
	if ids, err := e.List(t.Context()); err != nil || !slices.Equal(ids, []string{"only"}) {
		t.Errorf("listed: %q, %v", ids, err)
	}
}
