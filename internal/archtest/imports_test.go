package archtest

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"maps"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/harvest-run/executord"

// pkg is a package as `go list` tells it, without its tests.
type pkg struct {
	ImportPath string
	Imports    []string // directly
	Deps       []string // and indirectly
	Standard   bool
}

// rule says what packages may import, directly or indirectly. A pattern is an import
// path, or one with "/..." for everything from there on; a leading "./" stands for the
// module.
type rule struct {
	// of are the packages that the rule is about.
	of []string
	// never is what they must not import, but for what except names.
	never, except []string
	// ours, if not nil, are the only packages of this module beside their own.
	ours []string
	// modules, if not nil, are the only packages of other modules that they, or
	// packages of this module that they need, import. What those need is their affair.
	modules []string
	why     string
}

func rules() []rule {
	return []rule{
		{
			of:    []string{"./internal/execution/...", "./internal/session/..."},
			never: []string{"./gen/harvest/executor/...", "google.golang.org/grpc/...", "google.golang.org/genproto/...", "./internal/engine/local/...", "./internal/api/...", "./internal/store/..."},
			why:   "the domain does not know how it is called, what its sandboxes are made of, or where it is kept",
		},
		{
			of:   []string{"./internal/turn/..."},
			ours: []string{"./internal/admission", "./internal/agent", "./internal/caller", "./internal/fault", "./internal/idempotency", "./internal/journal", "./internal/eventlog"},
			why:  "turns know agents by their interface, and neither sessions nor sandboxes nor how they are called",
		},
		{
			of:   []string{"./internal/agent"},
			ours: []string{}, modules: []string{},
			why: "what an agent is is made of plain types",
		},
		{
			of:    []string{"./internal/api/..."},
			never: []string{"./internal/engine/local/...", "./internal/store/...", "./internal/daemon/...", "./internal/config/..."},
			why:   "the api translates between protos and the domain; it neither makes sandboxes nor keeps records",
		},
		{
			of:   []string{"./internal/cli/...", "./cmd/executorctl/..."},
			ours: []string{"./client/...", "./gen/harvest/executor/...", "./internal/cli/...", "./internal/version"},
			why:  "the command line does what any other client can: it speaks through client/ only",
		},
		{
			of:     []string{"./client/..."},
			never:  []string{"./internal/..."},
			except: []string{"./internal/version"}, // a text from the linker, without dependencies
			why:    "the client is for other programs too: it must not drag in executord",
		},
		{
			of:      []string{"./cmd/executor-guest/...", "./internal/guest/..."},
			ours:    []string{"./internal/guest/...", "./gen/harvest/guest/..."},
			modules: []string{"golang.org/x/sys/...", "google.golang.org/protobuf/...", "github.com/hashicorp/yamux"},
			why:     "the guest is in every sandbox: what it links costs start-up time and memory a thousand times over",
		},
		{
			of:   []string{"./internal/engine"},
			ours: []string{}, modules: []string{},
			why: "the waist is made of plain types",
		},
		{
			of:   []string{"./internal/fault", "./internal/version"},
			ours: []string{}, modules: []string{},
			why: "every package may need them, so they need none",
		},
		{
			of:   []string{"./internal/caller"},
			ours: []string{}, modules: []string{},
			why: "the domain knows callers by their name, and nothing of how they showed who they are",
		},
		{
			of:    []string{"./internal/auth"},
			ours:  []string{"./internal/caller", "./internal/fault"},
			never: []string{"google.golang.org/grpc/..."},
			why:   "who somebody is does not depend on how they call or what they want",
		},
		{
			of:   []string{"./internal/lifecycle"},
			ours: []string{}, modules: []string{"golang.org/x/sys/..."},
			why: "it owns the goroutines of any program, and knows nothing of what runs in it",
		},
		{
			of:   []string{"./internal/engine/local/..."},
			ours: []string{"./internal/engine", "./internal/fault", "./internal/guest/wire", "./internal/guest/forkserver", "./gen/harvest/guest/...", "./internal/ext4"},
			why:  "an engine makes a box and hands over a pipe: it knows nothing of commands, sessions or requests",
		},
		{
			of:   []string{"./internal/engine/modal"},
			ours: []string{"./internal/engine", "./internal/fault", "./internal/guest/wire", "./internal/guest/mux", "./gen/harvest/guest/..."},
			why:  "an engine makes a box and hands over a pipe: it knows nothing of commands, sessions or requests",
		},
		{
			of:   []string{"./internal/engine/modal/modaldoctor"},
			ours: []string{"./internal/engine"},
			why:  "it looks at what is at Modal, whether or not there is an engine",
		},
		{
			of:   []string{"./internal/engine/engines"},
			ours: []string{"./internal/engine", "./internal/fault"}, modules: []string{},
			why: "it chooses between engines by their names, whatever they are",
		},
		{
			of:   []string{"./internal/engine/modal/modaltest/..."},
			ours: []string{"./internal/engine/local/hostimage", "./internal/lifecycle"},
			why:  "the fake of Modal speaks Modal's wire: what it shared with the engine that it tests would be right or wrong in both",
		},
		{
			of:    []string{"./cmd/..."},
			never: []string{"./internal/engine/modal/modaltest/..."},
			why:   "no fake is in what is installed",
		},
		{
			of:   []string{"./internal/engine/enginetest/..."},
			ours: []string{"./internal/engine", "./internal/fault", "./internal/guestclient", "./internal/guest/wire", "./gen/harvest/guest/..."},
			why:  "the definition of the waist knows no engine",
		},
		{
			of:   []string{"./internal/guestclient/..."},
			ours: []string{"./internal/guest/wire", "./gen/harvest/guest/..."},
			why:  "it needs a pipe and nothing else",
		},
		{
			of:   []string{"./internal/admission"},
			ours: []string{"./internal/fault"}, modules: []string{},
			why: "it counts places, whatever takes them",
		},
		{
			of:   []string{"./internal/engine/pool"},
			ours: []string{"./internal/engine", "./internal/fault"},
			why:  "it keeps sandboxes ready over any engine, and knows nothing of what they are for",
		},
		{
			of:   []string{"./internal/egress/..."},
			ours: []string{"./internal/engine", "./internal/fault", "./internal/guestclient", "./internal/guest/wire", "./gen/harvest/guest/..."},
			why:  "it proxies connections, whoever made the sandbox that they come from",
		},
		{
			of:   []string{"./internal/secret"},
			ours: []string{"./internal/fault"}, modules: []string{},
			why: "what holds credentials is small enough to be read at once",
		},
		{
			of:   []string{"./internal/broker"},
			ours: []string{"./internal/egress/...", "./internal/secret", "./internal/engine", "./internal/fault", "./internal/guestclient", "./internal/guest/wire", "./gen/harvest/guest/..."},
			why:  "it adds credentials to requests, whatever session they are of",
		},
		{
			of:    []string{"./internal/workspace/..."},
			never: []string{"./internal/broker", "./internal/secret", "./internal/engine/...", "./internal/session/...", "./internal/execution/...", "./internal/store/...", "./gen/harvest/executor/...", "google.golang.org/grpc/..."},
			why:   "what runs inside a sandbox is given no credentials, so it must not be able to come by one",
		},
		{
			of:    []string{"./internal/image/..."},
			never: []string{"./gen/harvest/executor/...", "google.golang.org/grpc/...", "./internal/engine/local/...", "./internal/api/...", "./internal/store/...", "./internal/session/...", "./internal/execution/..."},
			why:   "an image is made on any engine, whoever needs it and however that is asked for",
		},
		{
			of:   []string{"./internal/guestfiles"},
			ours: []string{"./internal/guestclient", "./internal/guest/wire", "./gen/harvest/guest/..."},
			why:  "it needs a guest and nothing else",
		},
		{
			of:   []string{"./internal/agent/opencode/config"},
			ours: []string{"./internal/guestfiles", "./internal/guestclient", "./internal/guest/wire", "./gen/harvest/guest/..."},
			why:  "it makes files, wherever they go",
		},
		{
			of:    []string{"./internal/eventlog/..."},
			never: []string{"./internal/execution/...", "./internal/engine/...", "./internal/store/...", "google.golang.org/grpc/..."},
			why:   "the log keeps records, whatever they are of",
		},
		{
			of:   []string{"./internal/agent"},
			ours: []string{}, modules: []string{},
			why: "what an agent is does not depend on which one it is, or where it runs",
		},
		{
			of:   []string{"./internal/agent/opencode"},
			ours: []string{"./internal/agent"}, modules: []string{},
			why: "it drives a program by HTTP, wherever that runs: the place is given",
		},
		{
			of:   []string{"./internal/testmodel"},
			ours: []string{}, modules: []string{},
			why: "a provider of models knows nothing of who asks",
		},
		{
			of:   []string{"./internal/filter"},
			ours: []string{}, modules: []string{},
			why: "a filter is data, whatever is filtered and wherever that is kept",
		},
		{
			of:   []string{"./internal/idempotency/..."},
			ours: []string{"./internal/fault"}, modules: []string{},
			why: "whatever can be repeated, it is remembered in the same way",
		},
	}
}

// together are packages that only these may import both of.
type together struct {
	pair [2]string
	may  []string
	why  string
}

func wiring() []together {
	return []together{
		{
			pair: [2]string{"./internal/engine/local", "./internal/store"},
			// The commands of executord come to daemon, and so have both.
			may: []string{"./internal/daemon", "./internal/daemon/...", "./cmd/executord", "./test/..."},
			why: "concrete types are put together in one place",
		},
		{
			pair: [2]string{"./internal/api", "./internal/engine/local"},
			may:  []string{"./internal/daemon", "./internal/daemon/...", "./cmd/executord", "./test/..."},
			why:  "concrete types are put together in one place",
		},
	}
}

// matches says whether a path is meant by one of the patterns.
func matches(path string, patterns []string) bool {
	return slices.ContainsFunc(patterns, func(p string) bool {
		if rest, ok := strings.CutPrefix(p, "./"); ok {
			p = module + "/" + rest
		}
		if tree, ok := strings.CutSuffix(p, "/..."); ok {
			return path == tree || strings.HasPrefix(path, tree+"/")
		}
		return path == p
	})
}

// check returns the imports that break a rule, each with the way to it.
func check(r rule, packages map[string]pkg) []string {
	var broken []string
	for _, p := range packages {
		if !matches(p.ImportPath, r.of) {
			continue
		}
		for _, dep := range p.Deps {
			if !r.allows(p, dep, packages) {
				broken = append(broken, strings.Join(way(p.ImportPath, dep, packages), " -> "))
			}
		}
	}
	slices.Sort(broken)
	return broken
}

func (r rule) allows(p pkg, dep string, packages map[string]pkg) bool {
	switch {
	case matches(dep, r.of) || matches(dep, r.except) || standard(dep, packages):
		return true
	case matches(dep, r.never):
		return false
	case strings.HasPrefix(dep, module+"/"):
		return r.ours == nil || matches(dep, r.ours)
	case r.modules == nil || matches(dep, r.modules):
		return true
	}
	// Another module's: allowed if nobody of this module asked for it.
	return !slices.ContainsFunc(append([]string{p.ImportPath}, p.Deps...), func(q string) bool {
		return strings.HasPrefix(q, module+"/") && slices.Contains(packages[q].Imports, dep)
	})
}

// standard says whether a package is of the standard library.
func standard(path string, packages map[string]pkg) bool {
	if p, ok := packages[path]; ok {
		return p.Standard
	}
	first, _, _ := strings.Cut(path, "/")
	return !strings.Contains(first, ".")
}

// way is a shortest chain of imports from one package to another.
func way(from, to string, packages map[string]pkg) []string {
	before := map[string]string{from: ""}
	for queue := []string{from}; len(queue) > 0; queue = queue[1:] {
		at := queue[0]
		if at == to {
			var chain []string
			for ; at != ""; at = before[at] {
				chain = append(chain, strings.TrimPrefix(at, module+"/"))
			}
			slices.Reverse(chain)
			return chain
		}
		for _, next := range packages[at].Imports {
			if _, seen := before[next]; !seen {
				before[next] = at
				queue = append(queue, next)
			}
		}
	}
	return []string{from, "…", to}
}

// checkTogether returns the packages that import both of a pair and may not.
func checkTogether(w together, packages map[string]pkg) []string {
	var broken []string
	for _, p := range packages {
		if matches(p.ImportPath, w.may) {
			continue
		}
		has := func(pattern string) bool {
			return matches(p.ImportPath, []string{pattern}) || slices.ContainsFunc(p.Deps, func(d string) bool { return matches(d, []string{pattern}) })
		}
		if has(w.pair[0]) && has(w.pair[1]) {
			broken = append(broken, p.ImportPath)
		}
	}
	slices.Sort(broken)
	return broken
}

// load asks go for the packages of this module and all that they import.
func load(t *testing.T) map[string]pkg {
	t.Helper()
	cmd := exec.Command("go", "list", "-e", "-deps", "-json=ImportPath,Imports,Deps,Standard", "./...")
	cmd.Dir = filepath.Join("..", "..")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v\n%s", err, &stderr)
	}
	packages := make(map[string]pkg)
	for d := json.NewDecoder(bytes.NewReader(out)); ; {
		var p pkg
		if err := d.Decode(&p); errors.Is(err, io.EOF) {
			return packages
		} else if err != nil {
			t.Fatal(err)
		}
		packages[p.ImportPath] = p
	}
}

func TestImports(t *testing.T) {
	packages := load(t)
	for _, r := range rules() {
		t.Run(strings.Join(r.of, " "), func(t *testing.T) {
			if !slices.ContainsFunc(slices.Collect(maps.Keys(packages)), func(path string) bool { return matches(path, r.of) }) {
				t.Error("the rule is about nothing: no package has this path")
			}
			for _, b := range check(r, packages) {
				t.Errorf("%s\n\tbut %s", b, r.why)
			}
		})
	}
	for _, w := range wiring() {
		t.Run(strings.Join(w.pair[:], " with "), func(t *testing.T) {
			for _, half := range w.pair {
				if _, ok := packages[module+strings.TrimPrefix(half, ".")]; !ok {
					t.Errorf("the rule is about nothing: there is no %s", half)
				}
			}
			for _, b := range checkTogether(w, packages) {
				t.Errorf("%s imports both, but %s", b, w.why)
			}
		})
	}
}

// The rules can be broken, and then it is said where.
func TestChecksOfImports(t *testing.T) {
	world := func(edges map[string][]string) map[string]pkg {
		packages := make(map[string]pkg)
		full := func(p string) string {
			if rest, ok := strings.CutPrefix(p, "./"); ok {
				return module + "/" + rest
			}
			return p
		}
		for from, to := range edges {
			p := pkg{ImportPath: full(from)}
			for _, d := range to {
				p.Imports = append(p.Imports, full(d))
			}
			packages[p.ImportPath] = p
		}
		for path, p := range packages {
			seen := map[string]bool{}
			var walk func(string)
			walk = func(at string) {
				for _, d := range packages[at].Imports {
					if !seen[d] {
						seen[d] = true
						walk(d)
					}
				}
			}
			walk(path)
			for d := range seen {
				p.Deps = append(p.Deps, d)
			}
			packages[path] = p
		}
		return packages
	}
	r := rule{of: []string{"./internal/a/..."}, never: []string{"./internal/b/...", "example.com/bad/..."}}
	small := rule{of: []string{"./internal/a"}, ours: []string{"./internal/c"}, modules: []string{"example.com/good/..."}}
	client := rule{of: []string{"./internal/a"}, ours: []string{"./client"}}
	most := rule{of: []string{"./internal/a"}, never: []string{"./internal/..."}, except: []string{"./internal/v"}}
	for name, c := range map[string]struct {
		rule  rule
		edges map[string][]string
		want  []string
	}{
		"nothing":            {r, map[string][]string{"./internal/a": {"fmt"}}, nil},
		"directly":           {r, map[string][]string{"./internal/a": {"./internal/b"}}, []string{"internal/a -> internal/b"}},
		"indirectly":         {r, map[string][]string{"./internal/a/x": {"./internal/c"}, "./internal/c": {"./internal/b/y"}}, []string{"internal/a/x -> internal/c -> internal/b/y"}},
		"a module":           {r, map[string][]string{"./internal/a": {"example.com/bad/z"}}, []string{"internal/a -> example.com/bad/z"}},
		"a like name":        {r, map[string][]string{"./internal/a": {"./internal/bb", "example.com/badly"}}, nil},
		"another package":    {r, map[string][]string{"./internal/c": {"./internal/b"}}, nil},
		"allowed":            {small, map[string][]string{"./internal/a": {"./internal/c", "example.com/good/x", "os"}}, nil},
		"what those need":    {small, map[string][]string{"./internal/a": {"example.com/good/x"}, "example.com/good/x": {"example.com/other"}}, nil},
		"not allowed":        {small, map[string][]string{"./internal/a": {"./internal/d"}}, []string{"internal/a -> internal/d"}},
		"a module not named": {small, map[string][]string{"./internal/a": {"example.com/other"}}, []string{"internal/a -> example.com/other"}},
		"ours behind ours":   {small, map[string][]string{"./internal/a": {"./internal/c"}, "./internal/c": {"./internal/d"}}, []string{"internal/a -> internal/c -> internal/d"}},
		"a module by ours":   {small, map[string][]string{"./internal/a": {"./internal/c"}, "./internal/c": {"example.com/other"}}, []string{"internal/a -> internal/c -> example.com/other"}},
		"but for one":        {most, map[string][]string{"./internal/a": {"./internal/v", "./internal/w"}}, []string{"internal/a -> internal/w"}},
		"own choice":         {client, map[string][]string{"./internal/a": {"example.com/cobra", "./client"}}, nil},
		"own choice, ours":   {client, map[string][]string{"./internal/a": {"./internal/engine"}}, []string{"internal/a -> internal/engine"}},
	} {
		t.Run(name, func(t *testing.T) {
			if got := check(c.rule, world(c.edges)); !slices.Equal(got, c.want) {
				t.Errorf("%q, want %q", got, c.want)
			}
		})
	}
	w := together{pair: [2]string{"./internal/x", "./internal/y"}, may: []string{"./internal/daemon"}}
	got := checkTogether(w, world(map[string][]string{
		"./internal/daemon": {"./internal/x", "./internal/y"}, "./internal/one": {"./internal/x"}, "./internal/both": {"./internal/one", "./internal/y"}, "./internal/x": {}, "./internal/y": {},
	}))
	if want := []string{module + "/internal/both"}; !slices.Equal(got, want) {
		t.Errorf("together: %q, want %q", got, want)
	}
}
