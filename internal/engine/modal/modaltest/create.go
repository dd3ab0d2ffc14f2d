package modaltest

import (
	"context"
	"maps"
	"slices"
	"time"

	pb "github.com/modal-labs/modal-client/go/proto/modal_proto"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

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
