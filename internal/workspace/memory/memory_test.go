package memory

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/harvest-run/executord/internal/fault"
	"github.com/harvest-run/executord/internal/workspace"
	"github.com/harvest-run/executord/internal/workspace/workspacetest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestVolumeName(t *testing.T) {
	for _, c := range [][2]string{
		{"https://github.com/owner/repo", "harvest-memory-owner-repo"},
		{"https://github.com/Owner/Repo.git", "harvest-memory-owner-repo"},
		{"https://github.com/harvest-run/a.b_c-d", "harvest-memory-harvest--run-a.b_c-d"},
	} {
		r, err := workspace.ParseURL(c[0], false)
		if got := VolumeName(r); err != nil || got != c[1] {
			t.Errorf("%s: %s, %v", c[0], got, err)
		}
	}
	// Another name for each, and each one that engines take.
	seen := map[string]workspace.Remote{}
	parts := []string{"a", "b", "a-b", "a--b", "-b", "b-", "a.b", "a_b", "A", "x/y", "x-y", strings.Repeat("l", 60), strings.Repeat("l", 61), "b-0123456789abcdef", "é", "~"}
	for _, host := range []string{"github.com", "gitlab.com", "127.0.0.1:80"} {
		for _, owner := range parts {
			for _, name := range parts {
				r := workspace.Remote{Host: host, Owner: owner, Name: name}
				got := VolumeName(r)
				if other, ok := seen[got]; ok && !(host == "github.com" && strings.EqualFold(other.Owner, owner) && strings.EqualFold(other.Name, name) && other.Host == host) {
					t.Errorf("%+v and %+v are both %s", r, other, got)
				}
				seen[got] = r
				if !strings.HasPrefix(got, "harvest-memory-") || len(got) > 63 || strings.Trim(got, "abcdefghijklmnopqrstuvwxyz0123456789._-") != "" {
					t.Errorf("%+v is %q", r, got)
				}
			}
		}
	}
}

func of(t *testing.T, lines ...string) graph {
	t.Helper()
	g, damaged := parse([]byte(strings.Join(lines, "\n")))
	if damaged > 0 {
		t.Fatalf("%q", lines)
	}
	return g
}

func e(name string, observations ...string) string {
	return fmt.Sprintf(`{"type":"entity","name":%q,"entityType":"k","observations":[%s]}`, name, strings.Join(quoted(observations), ","))
}

func quoted(texts []string) (all []string) {
	for _, text := range texts {
		all = append(all, fmt.Sprintf("%q", text))
	}
	return all
}

func rel(from, to string) string {
	return fmt.Sprintf(`{"type":"relation","from":%q,"to":%q,"relationType":"r"}`, from, to)
}

func TestMerge(t *testing.T) {
	for name, c := range map[string]struct{ base, ours, theirs, want []string }{
		"nothing":                      {nil, nil, nil, nil},
		"ours is new":                  {nil, []string{e("a", "1")}, nil, []string{e("a", "1")}},
		"both are new":                 {nil, []string{e("a", "1")}, []string{e("b", "2")}, []string{e("b", "2"), e("a", "1")}},
		"one entity":                   {[]string{e("a", "1")}, []string{e("a", "1", "2")}, []string{e("a", "1", "3")}, []string{e("a", "1", "3", "2")}},
		"the same twice":               {nil, []string{e("a", "1")}, []string{e("a", "1")}, []string{e("a", "1")}},
		"deleted observation":          {[]string{e("a", "1", "2")}, []string{e("a", "1")}, []string{e("a", "1", "2", "3")}, []string{e("a", "1", "3")}},
		"deleted by us":                {[]string{e("a", "1"), e("b", "1"), rel("a", "b")}, []string{e("b", "1")}, []string{e("a", "1"), e("b", "1"), rel("a", "b")}, []string{e("b", "1")}},
		"deleted by them":              {[]string{e("a", "1")}, []string{e("a", "1")}, nil, nil},
		"deleted, and learned":         {[]string{e("a", "1")}, nil, []string{e("a", "1", "2")}, []string{e("a", "2")}},
		"deleted by them, and learned": {[]string{e("a", "1")}, []string{e("a", "1", "2")}, nil, []string{e("a", "2")}},
		"relations":                    {[]string{rel("a", "b")}, []string{rel("a", "c")}, []string{rel("a", "b"), rel("x", "y")}, []string{rel("x", "y"), rel("a", "c")}},
		"to what is gone":              {[]string{e("a", "1")}, nil, []string{e("a", "1"), e("c"), rel("c", "a")}, []string{e("c")}},
		"an empty entity":              {nil, []string{e("a")}, []string{e("b")}, []string{e("b"), e("a")}},
		"unknown kinds":                {nil, []string{`{"type":"x","y":1}`}, []string{`{"z":2}`}, []string{`{"z":2}`, `{"type":"x","y":1}`}},
		"unknown fields": {nil, []string{`{"type":"entity","name":"a","entityType":"k","observations":[],"new":1}`}, []string{e("a", "1")},
			[]string{`{"entityType":"k","name":"a","new":1,"observations":["1"],"type":"entity"}`}},
	} {
		t.Run(name, func(t *testing.T) {
			base, ours, theirs := of(t, c.base...), of(t, c.ours...), of(t, c.theirs...)
			got := merge(base, ours, theirs)
			want := of(t, c.want...)
			a, _ := got.encode()
			b, _ := want.encode()
			if string(a) != string(b) {
				t.Errorf("\n%s, want\n%s", a, b)
			}
			again := merge(base, ours, got) // a crash before the base was written
			if c, _ := again.encode(); string(c) != string(a) && name != "deleted by them, and learned" {
				t.Errorf("twice:\n%s, once\n%s", c, a)
			}
		})
	}
}

// Whatever two sessions do and however their commits interleave, what one of them learned and nobody
// deleted is there in the end.
func TestMergeKeepsWhatWasLearned(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	for range 500 {
		shared := graph{}
		copies, bases := make([]graph, 3), make([]graph, 3)
		learned, deleted := map[[2]string]bool{}, map[[2]string]bool{}
		for range 40 {
			i := r.IntN(3)
			switch r.IntN(4) {
			case 0, 1:
				fact := [2]string{fmt.Sprint("e", r.IntN(4)), fmt.Sprint("o", r.IntN(1000))}
				copies[i] = copyOf(t, copies[i])
				copies[i].add(entity{name: fact[0], observations: []string{fact[1]}})
				learned[fact] = true
			case 2:
				copies[i] = copyOf(t, copies[i])
				if n := len(copies[i].entities); n > 0 && r.IntN(3) == 0 {
					k := r.IntN(n)
					for _, o := range copies[i].entities[k].observations {
						deleted[[2]string{copies[i].entities[k].name, o}] = true
					}
					copies[i].entities = slices.Delete(copies[i].entities, k, k+1)
				}
			case 3:
				shared = merge(bases[i], copies[i], shared)
				bases[i] = copies[i]
			}
		}
		for i := range copies {
			shared = merge(bases[i], copies[i], shared)
		}
		for fact := range learned {
			there := slices.Contains(shared.byName()[fact[0]].observations, fact[1])
			if !there && !deleted[fact] {
				t.Fatalf("%v is lost", fact)
			}
		}
		for name, e := range shared.byName() {
			for _, o := range e.observations {
				if !learned[[2]string{name, o}] {
					t.Fatalf("%s %s was made up", name, o)
				}
			}
		}
	}
}

func copyOf(t *testing.T, g graph) graph {
	t.Helper()
	data, err := g.encode()
	if err != nil {
		t.Fatal(err)
	}
	copied, _ := parse(data)
	return copied
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(e("a", "1") + "\n" + rel("a", "b") + "\n{\"x\":1}\nbroken"))
	f.Fuzz(func(t *testing.T, data []byte) {
		g, _ := parse(data)
		once, err := g.encode()
		if err != nil {
			t.Fatal(err)
		}
		again, damaged := parse(once)
		twice, err := again.encode()
		if err != nil || damaged > 0 || string(once) != string(twice) {
			t.Errorf("%q became %q, %d damaged, %v", once, twice, damaged, err)
		}
	})
}

type box struct {
	t    *testing.T
	host workspacetest.Host
	dir  string
	seed string
}

func newBox(t *testing.T) box {
	t.Helper()
	b := box{t, workspacetest.NewHost(t), t.TempDir(), ""}
	b.seed = filepath.Join(b.dir, "seed.json")
	b.put(b.seed, `{"entities":[{"name":"seed","entityType":"k","observations":["s"]}],"relations":[{"from":"seed","to":"seed","relationType":"r"}]}`)
	return b
}

func (b box) put(path, text string) {
	b.t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		b.t.Fatal(err)
	}
}

func (b box) config(session string) Config {
	return Config{Runner: b.host, Session: session, Mount: filepath.Join(b.dir, "volume"), Link: filepath.Join(b.dir, "home", session), Seed: b.seed}
}

func (b box) open(session string) *Memory {
	b.t.Helper()
	m, err := Open(b.t.Context(), b.config(session))
	if err != nil {
		b.t.Fatal(err)
	}
	return m
}

// learn does what the server does: reads all, writes all.
func (b box) learn(m *Memory, name, observation string) {
	b.t.Helper()
	data, err := os.ReadFile(file(m))
	if err != nil {
		b.t.Fatal(err)
	}
	g, _ := parse(data)
	g.add(entity{name: name, kind: "k", observations: []string{observation}})
	data, err = g.encode()
	if err != nil {
		b.t.Fatal(err)
	}
	b.replace(m, strings.TrimSpace(string(data)))
}

// file is what the server is told.
func file(m *Memory) string { return filepath.Join(m.cfg.Link, "memory.jsonl") }

// replace writes the file as the server does: beside it, and renamed.
func (b box) replace(m *Memory, text string) {
	b.t.Helper()
	b.put(file(m)+".tmp", text)
	if err := os.Rename(file(m)+".tmp", file(m)); err != nil {
		b.t.Fatal(err)
	}
}

func (b box) commit(m *Memory, want bool) {
	b.t.Helper()
	if did, err := m.Commit(b.t.Context()); err != nil || did != want {
		b.t.Errorf("%v, %v", did, err)
	}
}

// shared are the names and observations that are there for the next session.
func (b box) shared() string {
	b.t.Helper()
	data, err := os.ReadFile(filepath.Join(b.dir, "volume", "memory.jsonl"))
	if err != nil {
		b.t.Fatal(err)
	}
	g, damaged := parse(data)
	if damaged > 0 {
		b.t.Errorf("it is damaged: %s", data)
	}
	all := g.byName()
	var text []string
	for _, name := range slices.Sorted(maps.Keys(all)) {
		text = append(text, name+"="+strings.Join(slices.Sorted(slices.Values(all[name].observations)), ","))
	}
	return strings.Join(text, " ")
}

func TestMemory(t *testing.T) {
	b := newBox(t)
	if err := os.MkdirAll(filepath.Join(b.dir, "home", "one", "of-the-image"), 0o755); err != nil {
		t.Fatal(err)
	}
	one := b.open("one")
	if got := b.shared(); got != "seed=s" {
		t.Error(got)
	}
	b.commit(one, false)
	b.learn(one, "a", "1")
	two := b.open("two")
	b.learn(two, "b", "2")
	b.commit(one, true)
	b.commit(two, true)
	b.commit(two, false)
	if got := b.shared(); got != "a=1 b=2 seed=s" {
		t.Error(got)
	}
	b.learn(one, "a", "3")
	one = b.open("one") // executord was restarted
	if err := errors.Join(one.Close(t.Context()), two.Close(t.Context())); err != nil {
		t.Error(err)
	}
	if got := b.shared(); got != "a=1,3 b=2 seed=s" {
		t.Error(got)
	}
	if left, _ := filepath.Glob(filepath.Join(b.dir, "volume", "sessions", "*")); len(left) > 0 {
		t.Errorf("%q", left)
	}
	// A session that was killed: its copy is found, and merged by the next, and can go on.
	lost := b.open("lost")
	b.learn(lost, "lost", "x")
	old := time.Now().Add(-time.Hour)
	if err := os.Chtimes(filepath.Join(b.dir, "volume", "sessions", "lost", "memory.jsonl"), old, old); err != nil {
		t.Fatal(err)
	}
	b.seed = "/nonexistent"
	b.open("three")
	if got := b.shared(); got != "a=1,3 b=2 lost=x seed=s" {
		t.Error(got)
	}
	b.commit(lost, false)
	// One that was killed in the middle of a write deletes nothing.
	b.put(file(lost), `{"type":"entity","name":"new","entityType":"k","observations":[]}`+"\n"+`{"type":"enti`)
	b.commit(lost, true)
	if got := b.shared(); got != "a=1,3 b=2 lost=x new= seed=s" {
		t.Error(got)
	}
	// A shared file that is damaged is kept aside, and made good.
	path := filepath.Join(b.dir, "volume", "memory.jsonl")
	data, _ := os.ReadFile(path)
	b.put(path, string(data)+`{"type":"enti`)
	b.commit(lost, true)
	if got := b.shared(); got != "a=1,3 b=2 lost=x new= seed=s" {
		t.Error(got)
	}
	if kept, err := os.ReadFile(filepath.Join(b.dir, "volume", "damaged-lost.jsonl")); err != nil || !strings.HasSuffix(string(kept), `"enti`) {
		t.Errorf("%s, %v", kept, err)
	}
	b.put(file(lost), strings.Repeat("x", maxFile+1))
	if _, err := lost.Commit(t.Context()); fault.ReasonOf(err) != "MEMORY_TOO_LARGE" && err == nil {
		t.Error(err)
	}
	if _, err := Open(t.Context(), b.config("../x")); err == nil {
		t.Error("a session named ../x")
	}
}

// Of many sessions at once exactly one seeds, and no commit of any is lost.
func TestSessionsAtOnce(t *testing.T) {
	b := newBox(t)
	const n = 6
	var work sync.WaitGroup
	memories := make([]*Memory, n)
	for i := range n {
		work.Go(func() {
			m, err := Open(t.Context(), b.config(fmt.Sprint("s", i)))
			if err != nil {
				t.Error(err)
				return
			}
			memories[i] = m
		})
	}
	work.Wait()
	if t.Failed() {
		t.FailNow()
	}
	for i, m := range memories {
		b.learn(m, "shared", fmt.Sprint(i))
		work.Go(func() {
			if _, err := m.Commit(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
	work.Wait()
	if got := b.shared(); got != "seed=s shared=0,1,2,3,4,5" {
		t.Error(got)
	}
}

func TestSeed(t *testing.T) {
	b := newBox(t)
	b.put(b.seed, "neither")
	if _, err := Open(t.Context(), b.config("a")); fault.ReasonOf(err) != "MEMORY_SEED" {
		t.Error(err)
	}
	b.put(b.seed, e("line", "1")+"\n"+rel("line", "line"))
	b.open("a")
	if got := b.shared(); got != "line=1" {
		t.Error(got)
	}
	b.put(filepath.Join(b.dir, "volume", "memory.jsonl"), "") // deleted by somebody: that is data too
	b.open("b")
	if got := b.shared(); got != "" {
		t.Error(got)
	}
}

func TestKeep(t *testing.T) {
	b := newBox(t)
	m := b.open("s")
	ctx, cancel := context.WithCancelCause(t.Context())
	durable := make(chan struct{}, 100)
	failing := true
	var reports int
	var work sync.WaitGroup
	work.Go(func() {
		m.Keep(ctx, 10*time.Millisecond, func(context.Context) error {
			if failing {
				failing = false
				return errors.New("not now")
			}
			durable <- struct{}{}
			return nil
		}, func(error) { reports++ })
	})
	b.learn(m, "a", "1")
	<-durable // again after the failure, though nothing changed meanwhile
	cancel(nil)
	work.Wait()
	if reports != 1 || b.shared() != "a=1 seed=s" {
		t.Errorf("%d, %s", reports, b.shared())
	}
}
