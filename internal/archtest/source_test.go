package archtest

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// exceptions are variables of packages that are allowed, each for a reason.
func exceptions() map[string]string {
	return map[string]string{
		"internal/version.version": "the linker sets it",
	}
}

// Rules of the source, and why.
const (
	whyGo   = "a goroutine is started by sync.WaitGroup.Go, errgroup or internal/lifecycle, so that somebody waits for it"
	whyInit = "what a program does at its start stands in its main, where it can fail and be tested"
	whyVar  = "state has an owner: a package has errors to compare with, compile-time checks and embedded files, and no other variables"
	whyMain = "main only hands over: what it did could not be tested"
)

// inspect returns what breaks a rule in one file, as "line: what, but why". path is
// relative to the module.
func inspect(path, source string) ([]string, error) {
	set := token.NewFileSet()
	file, err := parser.ParseFile(set, path, source, parser.ParseComments|parser.SkipObjectResolution)
	if err != nil {
		return nil, err
	}
	var broken []string
	report := func(at token.Pos, what, why string) {
		broken = append(broken, fmt.Sprintf("%s:%d: %s, but %s", path, set.Position(at).Line, what, why))
	}
	ast.Inspect(file, func(n ast.Node) bool {
		if g, ok := n.(*ast.GoStmt); ok {
			report(g.Pos(), "a go statement", whyGo)
		}
		return true
	})
	for _, d := range file.Decls {
		switch d := d.(type) {
		case *ast.FuncDecl:
			if d.Name.Name == "init" && d.Recv == nil {
				report(d.Pos(), "func init", whyInit)
			}
			lines := set.Position(d.End()).Line - set.Position(d.Pos()).Line - 1
			if d.Name.Name == "main" && d.Recv == nil && file.Name.Name == "main" && lines > 30 {
				report(d.Pos(), fmt.Sprintf("a main of %d lines", lines), whyMain)
			}
		case *ast.GenDecl:
			if d.Tok != token.VAR {
				continue
			}
			for _, s := range d.Specs {
				v := s.(*ast.ValueSpec)
				if allowedVariable(filepath.ToSlash(filepath.Dir(path)), d, v) {
					continue
				}
				report(v.Pos(), "var "+v.Names[0].Name, whyVar)
			}
		}
	}
	return broken, nil
}

// allowedVariable says whether a package may have this variable.
func allowedVariable(dir string, d *ast.GenDecl, v *ast.ValueSpec) bool {
	embedded := func(doc *ast.CommentGroup) bool {
		return doc != nil && slices.ContainsFunc(doc.List, func(c *ast.Comment) bool { return strings.HasPrefix(c.Text, "//go:embed ") })
	}
	if embedded(d.Doc) || embedded(v.Doc) {
		return true
	}
	if len(v.Names) != 1 {
		return false
	}
	name := v.Names[0].Name
	if _, ok := exceptions()[dir+"."+name]; ok {
		return true
	}
	switch {
	case name == "_" && v.Type != nil: // var _ Interface = (*T)(nil)
		return true
	case len(v.Values) != 1 || !strings.HasPrefix(strings.ToLower(name), "err"):
		return false
	}
	// errors.New("…"), an error made of constants, or one of a kind of this system's own.
	switch value := v.Values[0].(type) {
	case *ast.CallExpr:
		return selects(value.Fun, "errors", "New") || selects(value.Fun, "fmt", "Errorf") || selects(value.Fun, "fault", "New")
	case *ast.UnaryExpr:
		literal, ok := value.X.(*ast.CompositeLit)
		return ok && value.Op == token.AND && selects(literal.Type, "fault", "Error")
	}
	return false
}

// selects says whether an expression is pkg.name.
func selects(e ast.Expr, pkg, name string) bool {
	s, ok := e.(*ast.SelectorExpr)
	if !ok {
		return false
	}
	x, ok := s.X.(*ast.Ident)
	return ok && x.Name == pkg && s.Sel.Name == name
}

// sources are the files of this module that people write and that are no tests.
func sources(t *testing.T) []string {
	t.Helper()
	root := filepath.Join("..", "..")
	var files []string
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		if d.IsDir() {
			name := d.Name()
			if rel == "gen" || rel == "third_party" || rel == "tools" || name == "testdata" || (rel != "." && strings.HasPrefix(name, ".")) {
				return fs.SkipDir
			}
			return nil
		}
		if strings.HasSuffix(rel, ".go") && !strings.HasSuffix(rel, "_test.go") {
			files = append(files, rel)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}

func TestSource(t *testing.T) {
	files := sources(t)
	if len(files) < 50 {
		t.Errorf("only %d files were found: %q", len(files), files)
	}
	for _, path := range files {
		text := readSource(t, path)
		broken, err := inspect(filepath.ToSlash(path), text)
		if err != nil {
			t.Error(err)
		}
		for _, b := range broken {
			t.Error(b)
		}
	}
	for name := range exceptions() {
		dir, variable := filepath.Dir(name)+"/"+strings.SplitN(filepath.Base(name), ".", 2)[0], strings.SplitN(filepath.Base(name), ".", 2)[1]
		if !slices.ContainsFunc(files, func(path string) bool {
			return filepath.ToSlash(filepath.Dir(path)) == dir && strings.Contains(readSource(t, path), "var "+variable)
		}) {
			t.Errorf("exception %s: there is no such variable", name)
		}
	}
}

func TestChecksOfSource(t *testing.T) {
	for name, c := range map[string]struct {
		path, source string
		want         []string
	}{
		"clean": {"internal/a/a.go", `package a
import ("errors"; "io")
// ErrX is known.
var ErrX = errors.New("x")
var errY error = &fault.Error{Kind: 1}
var errZ = fault.New(1, "Z", "z")
var errLate = fmt.Errorf("not within %v", time.Second)
var _ io.Reader = (*T)(nil)
//go:embed bin
var files embed.FS
type T struct{ init func() }
func (T) init2() {}
func f() { var local = 1; _ = local; wg.Go(f) }
const c = 1
`, nil},
		"a group":            {"internal/a/a.go", "package a\nvar (\n\tErrA = errors.New(\"a\")\n\t//go:embed x\n\ttext string\n)\n", nil},
		"go":                 {"internal/a/a.go", "package a\nfunc f() {\n\tgo f()\n}\n", []string{"internal/a/a.go:3: a go statement, but " + whyGo}},
		"go in a closure":    {"internal/a/a.go", "package a\nfunc f() {\n\tdefer func() { go func() {}() }()\n}\n", []string{"internal/a/a.go:3: a go statement, but " + whyGo}},
		"init":               {"internal/a/a.go", "package a\nfunc init() {}\n", []string{"internal/a/a.go:2: func init, but " + whyInit}},
		"a method init":      {"internal/a/a.go", "package a\nfunc (T) init() {}\n", nil},
		"a map":              {"internal/a/a.go", "package a\nvar names = map[string]int{}\n", []string{"internal/a/a.go:2: var names, but " + whyVar}},
		"a mutex":            {"internal/a/a.go", "package a\nvar mu sync.Mutex\n", []string{"internal/a/a.go:2: var mu, but " + whyVar}},
		"a pattern":          {"internal/a/a.go", "package a\nvar re = regexp.MustCompile(`x`)\n", []string{"internal/a/a.go:2: var re, but " + whyVar}},
		"two at once":        {"internal/a/a.go", "package a\nvar errA, errB = errors.New(\"a\"), errors.New(\"b\")\n", []string{"internal/a/a.go:2: var errA, but " + whyVar}},
		"an error's name":    {"internal/a/a.go", "package a\nvar errCount = 3\n", []string{"internal/a/a.go:2: var errCount, but " + whyVar}},
		"an error, computed": {"internal/a/a.go", "package a\nvar errX = load()\n", []string{"internal/a/a.go:2: var errX, but " + whyVar}},
		"something run":      {"internal/a/a.go", "package a\nvar _ = register()\n", []string{"internal/a/a.go:2: var _, but " + whyVar}},
		"an exception":       {"internal/version/v.go", "package version\nvar version string\n", nil},
		"not an exception":   {"internal/other/v.go", "package version\nvar version string\n", []string{"internal/other/v.go:2: var version, but " + whyVar}},
		"a short main":       {"cmd/a/main.go", "package main\nfunc main() {" + strings.Repeat("\n", 31) + "}\n", nil},
		"a long main":        {"cmd/a/main.go", "package main\nfunc main() {" + strings.Repeat("\n", 40) + "}\n", []string{"cmd/a/main.go:2: a main of 39 lines, but " + whyMain}},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := inspect(c.path, c.source)
			if err != nil {
				t.Fatal(err)
			}
			if !slices.Equal(got, c.want) {
				t.Errorf("%q, want %q", got, c.want)
			}
		})
	}
	if _, err := inspect("a.go", "not go"); err == nil {
		t.Error("what is not Go was accepted")
	}
}

func readSource(t *testing.T, path string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("..", "..", path))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}
