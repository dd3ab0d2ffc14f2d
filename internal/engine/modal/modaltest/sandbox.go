package modaltest

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"time"

	pb "github.com/modal-labs/modal-client/go/proto/modal_proto"
)

const (
	// defaultTimeout is how long a sandbox lives that says nothing of it; longest is what
	// Modal allows.
	defaultTimeout = 300 * time.Second
	longest        = 24 * time.Hour
)

// sandbox is one sandbox, running or ended. Fields below "guarded" are under Fake.mu.
type sandbox struct {
	id, task, app, name string
	first               bool // it is of the first backend
	definition          *pb.Sandbox
	env                 []string
	workdir             string
	image               *image
	created, deadline   time.Time // by the fake's clock
	idle                time.Duration
	up                  time.Time // by the real clock: when its router is there
	box                 *box
	mounts              []*mounted
	over                chan struct{} // closed when it has ended and is removed

	// guarded
	tags       map[string]string
	processes  map[string]*process
	entry      *process
	busy       int       // what is going on that keeps it from being idle
	lastBusy   time.Time // by the fake's clock
	ending     bool
	result     *pb.GenericResult
	known      time.Time // by the real clock: when the control plane knows the result
	forgotten  bool      // the control plane says it never was
	workerDead bool
	access     *pb.NetworkAccess
	outbound   *pb.ExperimentalOutboundPolicy
	exit       exitSnapshot
	snapshots  map[string]string // image id by snapshot id
	tunnels    []*tunnel
}

// boxDir is where a sandbox keeps its own.
func (f *Fake) boxDir(s *sandbox) string { return filepath.Join(f.dir, "boxes", s.id) }

// open makes the sandbox's root and starts its first process.
func (f *Fake) open(ctx context.Context, s *sandbox) error {
	host, err := f.host.Prepare()
	if err != nil {
		return err
	}
	dir := f.boxDir(s)
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	set := &setup{Base: f.dir, Root: "root", Program: f.program, Hostname: s.task, Shared: f.sharesNetwork(s.definition)}
	for _, path := range append([]string{"/"}, host.Trees...) {
		t := tree{Path: path, Upper: filepath.Join("boxes", s.id, "upper", treeName(path)), Work: filepath.Join("boxes", s.id, "work", treeName(path))}
		for _, made := range []string{t.Upper, t.Work} {
			if err := os.MkdirAll(filepath.Join(f.dir, made), 0o755); err != nil {
				return err
			}
		}
		for _, layer := range s.image.layers {
			lower := filepath.Join(layer, treeName(path))
			if _, err := os.Stat(filepath.Join(f.dir, lower)); err == nil {
				t.Lower = append(t.Lower, lower)
			}
		}
		if path == "/" {
			path = host.Skeleton
		}
		t.Lower = append(t.Lower, path)
		set.Trees = append(set.Trees, t)
	}
	for i, m := range s.mounts {
		at := filepath.Join(dir, "volumes", fmt.Sprint(i))
		b, err := m.prepare(at)
		if err != nil {
			return err
		}
		set.Binds = append(set.Binds, b)
	}
	b, err := startBox(ctx, set, boxConfig{dir: dir, groups: f.groups, memory: s.definition.GetResources().GetMemoryMbMax(), owner: &f.boxes, shared: f.sharesNetwork(s.definition)})
	if err != nil {
		return err
	}
	f.mu.Lock()
	s.box = b
	f.mu.Unlock()
	f.boxes.Go(func() {
		<-b.gone
		f.mu.Lock()
		dead := s.workerDead
		f.mu.Unlock()
		if !dead { // its first process was killed, from outside or by the kernel
			f.finish(s, ended{result: internalFailure("the sandbox's processes are gone")})
		}
	})
	return f.openTunnels(s)
}

// sharesNetwork says whether a sandbox sees the host's network.
func (f *Fake) sharesNetwork(d *pb.Sandbox) bool {
	return f.cfg.HostNetwork && d.GetNetworkAccess().GetNetworkAccessType() == pb.NetworkAccess_OPEN
}

// enter starts what the sandbox was made for, and ends the sandbox with it. Without
// anything it just lives.
func (f *Fake) enter(s *sandbox, args []string) {
	if len(args) == 0 {
		return
	}
	p, err := s.box.start(program{id: "entrypoint", args: args, env: s.env, dir: s.dir("")})
	if err != nil {
		return // it has ended already
	}
	f.mu.Lock()
	s.entry = p
	f.mu.Unlock()
	f.boxes.Go(func() {
		<-p.ended
		f.finish(s, ended{result: exitResult(p), commit: true})
	})
}

// dir is the directory in which something runs.
func (s *sandbox) dir(wanted string) string {
	switch {
	case wanted != "":
		return wanted
	case s.workdir != "":
		return s.workdir
	}
	return "/root"
}

// treeName is the name of the directory for one of the trees of a root.
func treeName(path string) string {
	if path == "/" {
		return "root"
	}
	name := []byte(path[1:])
	for i, c := range name {
		if c == '/' {
			name[i] = '_'
		}
	}
	return string(name)
}

// remove removes what a sandbox kept, but for its record.
func (f *Fake) remove(s *sandbox) error {
	err := os.RemoveAll(f.boxDir(s))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

func tagMap(tags []*pb.SandboxTag) map[string]string {
	m := make(map[string]string, len(tags))
	for _, t := range tags {
		m[t.GetTagName()] = t.GetTagValue()
	}
	return m
}

func tagList(tags map[string]string) []*pb.SandboxTag {
	var list []*pb.SandboxTag
	for _, k := range slices.Sorted(maps.Keys(tags)) {
		list = append(list, pb.SandboxTag_builder{TagName: k, TagValue: tags[k]}.Build())
	}
	return list
}

// mergeEnv puts variables together; of those with one name the last counts.
func mergeEnv(groups ...[]string) []string {
	var env []string
	at := make(map[string]int)
	for _, g := range groups {
		for _, e := range g {
			name := e
			for i := range e {
				if e[i] == '=' {
					name = e[:i]
					break
				}
			}
			if i, ok := at[name]; ok {
				env[i] = e
				continue
			}
			at[name] = len(env)
			env = append(env, e)
		}
	}
	return env
}

// pairs are variables as programs have them, sorted.
func pairs(m map[string]string) []string {
	var env []string
	for k, v := range m {
		env = append(env, k+"="+v)
	}
	sort.Strings(env)
	return env
}
