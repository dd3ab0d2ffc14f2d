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
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
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

// creation is a request to create a sandbox that may be repeated.
type creation struct {
	done   chan struct{}
	answer *pb.SandboxCreateV2Response
	err    error
}

// create answers a request to create a sandbox, once per key.
func (f *Fake) create(ctx context.Context, key, id string, request *pb.SandboxCreateV2Request) (*pb.SandboxCreateV2Response, error) {
	if key == "" || f.cfg.ForgetRequests {
		return f.makeSandbox(ctx, id, request)
	}
	f.mu.Lock()
	c := f.created[key]
	if c != nil {
		f.mu.Unlock()
		select {
		case <-c.done:
			return c.answer, c.err
		case <-ctx.Done():
			return nil, status.FromContextError(ctx.Err()).Err()
		}
	}
	c = &creation{done: make(chan struct{})}
	f.created[key] = c
	f.mu.Unlock()
	c.answer, c.err = f.makeSandbox(context.WithoutCancel(ctx), id, request)
	if c.err != nil { // what failed is tried again
		f.mu.Lock()
		delete(f.created, key)
		f.mu.Unlock()
	}
	close(c.done)
	return c.answer, c.err
}

func (f *Fake) makeSandbox(ctx context.Context, id string, request *pb.SandboxCreateV2Request) (*pb.SandboxCreateV2Response, error) {
	d := request.GetDefinition()
	s, err := f.admit(id, request)
	if err != nil {
		return nil, err
	}
	f.mu.Lock()
	wait, startup := f.trouble.scheduling, f.trouble.startup
	f.mu.Unlock()
	if wait > 0 {
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			f.drop(s)
			return nil, status.FromContextError(ctx.Err()).Err()
		case <-f.done:
			f.drop(s)
			return nil, status.Error(codes.Unavailable, errClosed.Error())
		}
	}
	if err := f.open(ctx, s); err != nil {
		f.log.Error("start a sandbox", "error", err)
		f.drop(s)
		return nil, status.Errorf(codes.Internal, "start a sandbox: %v", err)
	}
	f.mu.Lock()
	s.up = time.Now().Add(startup)
	closed := f.closed
	f.mu.Unlock()
	if closed {
		f.destroy(s)
		return nil, status.Error(codes.Unavailable, errClosed.Error())
	}
	f.enter(s, d.GetEntrypointArgs())
	return pb.SandboxCreateV2Response_builder{
		SandboxId: s.id, TaskId: s.task, Tunnels: f.tunnelData(s, false),
		Metadata:            pb.SandboxHandleMetadata_builder{AppId: s.app}.Build(),
		CommandRouterAccess: pb.CommandRouterAccess_builder{Jwt: f.token(s.task, f.cfg.RouterTokenLife), Url: f.routerURL()}.Build(),
	}.Build(), nil
}

// routerURL is where the workers are: the SDK wants https here, and takes it for
// plaintext where the control plane is on loopback.
func (f *Fake) routerURL() string { return "https://" + f.Addr() }

// admit checks a request and takes a place and a name for the sandbox.
func (f *Fake) admit(id string, request *pb.SandboxCreateV2Request) (*sandbox, error) {
	d := request.GetDefinition()
	life := time.Duration(d.GetTimeoutSecs()) * time.Second
	if life == 0 {
		life = defaultTimeout
	}
	if life > longest {
		return nil, status.Errorf(codes.InvalidArgument, "sandbox timeout of %v exceeds the maximum of 24 hours", life)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	img, err := f.imageLocked(d.GetImageId())
	if err != nil {
		return nil, err
	}
	if !slices.Contains(slices.Collect(maps.Values(f.apps)), request.GetAppId()) {
		return nil, status.Errorf(codes.NotFound, "app %s not found", request.GetAppId())
	}
	env, err := f.environmentLocked(request.GetSecretSources())
	if err != nil {
		return nil, err
	}
	now := f.clock.now()
	s := &sandbox{
		id: id, first: len(id) == len(firstID()), task: newID("ta"), app: request.GetAppId(), name: d.GetName(), definition: d, image: img, workdir: d.GetWorkdir(),
		created: now, deadline: now.Add(life), idle: time.Duration(d.GetIdleTimeoutSecs()) * time.Second, lastBusy: now,
		over: make(chan struct{}), tags: tagMap(request.GetTags()), processes: make(map[string]*process),
		access: d.GetNetworkAccess(), outbound: d.GetExperimentalOutboundPolicy(), snapshots: make(map[string]string),
	}
	if s.workdir == "" {
		s.workdir = img.workdir
	}
	s.env = mergeEnv([]string{
		"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LANG=C.UTF-8", "TERM=xterm",
		"MODAL_SANDBOX_ID=" + s.id, "MODAL_TASK_ID=" + s.task,
	}, img.env, env)
	running := 0
	for _, other := range f.sandboxes {
		if other.ending {
			continue
		}
		running++
		if s.name != "" && other.name == s.name && other.app == s.app {
			return nil, status.Errorf(codes.AlreadyExists, "sandbox with name %q already exists", s.name)
		}
		if !s.created.After(other.created) {
			s.created = other.created.Add(time.Microsecond) // lists page by it
		}
	}
	if f.cfg.Capacity > 0 && running >= f.cfg.Capacity {
		return nil, status.Error(codes.ResourceExhausted, "no capacity for the sandbox")
	}
	for _, m := range d.GetVolumeMounts() {
		v := f.volumes[m.GetVolumeId()]
		if v == nil {
			return nil, status.Errorf(codes.NotFound, "volume %s not found", m.GetVolumeId())
		}
		s.mounts = append(s.mounts, &mounted{volume: v, mount: m})
	}
	f.sandboxes[s.id], f.tasks[s.task] = s, s
	return s, nil
}

// drop takes back what admit did.
func (f *Fake) drop(s *sandbox) {
	f.mu.Lock()
	delete(f.sandboxes, s.id)
	delete(f.tasks, s.task)
	f.mu.Unlock()
	if err := f.remove(s); err != nil {
		f.log.Error("remove a sandbox", "error", err)
	}
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
