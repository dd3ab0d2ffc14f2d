package modal

import (
	"context"
	"fmt"
	"sync"
	"time"

	sdk "github.com/modal-labs/modal-client/go"

	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/fault"
)

const (
	// callTimeout bounds a call of Modal's control plane, which has no bound of its own.
	callTimeout = time.Minute
	// maxThrottle bounds how long the SDK waits by itself when Modal tells it to slow down.
	maxThrottle = 30 * time.Second
	// buildTimeout bounds the build of the base image.
	buildTimeout = 30 * time.Minute
)

// within bounds a call.
func within(ctx context.Context, d time.Duration) (context.Context, context.CancelFunc) {
	return context.WithTimeoutCause(ctx, d, fault.Wrap(context.DeadlineExceeded, fault.Unavailable, reasonUnavailable, "Modal did not answer within %v", d))
}

// theApp is the app that the sandboxes are in.
func (e *Engine) theApp(ctx context.Context) (*sdk.App, error) {
	if err := e.prepare(ctx); err != nil {
		return nil, err
	}
	defer e.prepared()
	if e.app != nil {
		return e.app, nil
	}
	call, cancel := within(ctx, callTimeout)
	defer cancel()
	app, err := e.client.Apps.FromName(call, e.cfg.App, &sdk.AppFromNameParams{Environment: e.cfg.Environment, CreateIfMissing: true})
	if err != nil {
		return nil, translate(ctx, err, fmt.Sprintf("find the app %s of Modal", e.cfg.App))
	}
	e.app = app
	return app, nil
}

// prepare makes the caller the only one who asks for what is asked for once.
func (e *Engine) prepare(ctx context.Context) error {
	select {
	case e.preparing <- struct{}{}:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (e *Engine) prepared() { <-e.preparing }

// image is what a sandbox is made from. Only images that are built get out of here: the
// SDK writes to one that is not while it is used.
func (e *Engine) image(ctx context.Context, ref engine.ImageRef) (*sdk.Image, error) {
	if ref != "" {
		return &sdk.Image{ImageID: string(ref)}, nil
	}
	app, err := e.theApp(ctx)
	if err != nil {
		return nil, err
	}
	if err := e.prepare(ctx); err != nil {
		return nil, err
	}
	defer e.prepared()
	if e.base != nil {
		return e.base, nil
	}
	image := e.client.Images.FromRegistry(e.cfg.Image, nil)
	if len(e.cfg.ImageCommands) > 0 {
		image = image.DockerfileCommands(e.cfg.ImageCommands, nil)
	}
	call, cancel := within(ctx, buildTimeout)
	defer cancel()
	built, err := image.Build(call, app, nil)
	if err != nil {
		return nil, translate(ctx, err, "build the base image")
	}
	e.base = built
	return built, nil
}

// objects are the volumes and secrets that were asked for by name.
type objects struct {
	mu      sync.Mutex
	volumes map[string]*sdk.Volume
	secrets map[string]*sdk.Secret
}

// volume finds a volume, or makes it.
func (e *Engine) volume(ctx context.Context, name string, create bool) (*sdk.Volume, error) {
	e.objects.mu.Lock()
	v := e.objects.volumes[name]
	e.objects.mu.Unlock()
	if v != nil {
		return v, nil
	}
	call, cancel := within(ctx, callTimeout)
	defer cancel()
	v, err := e.client.Volumes.FromName(call, name, &sdk.VolumeFromNameParams{Environment: e.cfg.Environment, CreateIfMissing: create, Version: e.cfg.VolumeVersion})
	if isGone(err) {
		return nil, fault.Wrap(err, fault.NotFound, "VOLUME_NOT_FOUND", "Modal has no volume %q", name)
	}
	if err != nil {
		return nil, translate(ctx, err, "find the volume "+name)
	}
	e.objects.mu.Lock()
	defer e.objects.mu.Unlock()
	if e.objects.volumes == nil {
		e.objects.volumes = make(map[string]*sdk.Volume)
	}
	e.objects.volumes[name] = v
	return v, nil
}

// secret finds a named secret, which somebody has put there.
func (e *Engine) secret(ctx context.Context, name string) (*sdk.Secret, error) {
	e.objects.mu.Lock()
	s := e.objects.secrets[name]
	e.objects.mu.Unlock()
	if s != nil {
		return s, nil
	}
	call, cancel := within(ctx, callTimeout)
	defer cancel()
	s, err := e.client.Secrets.FromName(call, name, &sdk.SecretFromNameParams{Environment: e.cfg.Environment})
	if err != nil {
		err = translate(ctx, err, "find the secret "+name)
		if fault.KindOf(err) == fault.NotFound {
			err = fault.Wrap(err, fault.FailedPrecondition, "SECRETS_NOT_AVAILABLE", "Modal has no secret %q; make it with: modal secret create %s KEY=VALUE", name, name)
		}
		return nil, err
	}
	e.objects.mu.Lock()
	defer e.objects.mu.Unlock()
	if e.objects.secrets == nil {
		e.objects.secrets = make(map[string]*sdk.Secret)
	}
	e.objects.secrets[name] = s
	return s, nil
}

// forgetObjects makes volumes and secrets be asked for again: one may have been deleted
// by somebody else.
func (e *Engine) forgetObjects() {
	e.objects.mu.Lock()
	defer e.objects.mu.Unlock()
	clear(e.objects.volumes)
	clear(e.objects.secrets)
}

// Volumes are Modal's volumes.
func (e *Engine) Volumes() engine.Volumes { return volumes{e} }

type volumes struct{ engine *Engine }

// Ensure makes a volume that is not there.
func (v volumes) Ensure(ctx context.Context, name string) error {
	if err := checkVolume(name); err != nil {
		return err
	}
	_, err := v.engine.volume(ctx, name, true)
	return err
}

// Delete deletes a volume with all that is in it.
func (v volumes) Delete(ctx context.Context, name string) error {
	if err := checkVolume(name); err != nil {
		return err
	}
	call, cancel := within(ctx, callTimeout)
	defer cancel()
	err := v.engine.client.Volumes.Delete(call, name, &sdk.VolumeDeleteParams{Environment: v.engine.cfg.Environment, AllowMissing: true})
	v.engine.forgetObjects()
	if isGone(err) {
		return nil
	}
	return translate(ctx, err, "delete the volume "+name)
}

func checkVolume(name string) error {
	if err := (engine.VolumeMount{Name: name, Path: "/volume"}).Check(); err != nil {
		return fault.New(fault.Invalid, "VOLUMES", "%v", err)
	}
	return nil
}

// Images are Modal's images.
func (e *Engine) Images() engine.Images { return images{e} }

type images struct{ engine *Engine }

// Exists says whether there is such an image.
func (i images) Exists(ctx context.Context, ref engine.ImageRef) (bool, error) {
	if !objectName().MatchString(string(ref)) {
		return false, nil
	}
	call, cancel := within(ctx, callTimeout)
	defer cancel()
	_, err := i.engine.client.Images.FromID(call, string(ref), nil)
	if isGone(err) {
		return false, nil
	}
	return err == nil, translate(ctx, err, "look for the image "+string(ref))
}

// Delete deletes an image.
func (i images) Delete(ctx context.Context, ref engine.ImageRef) error {
	if !objectName().MatchString(string(ref)) {
		return nil
	}
	call, cancel := within(ctx, callTimeout)
	defer cancel()
	err := i.engine.client.Images.Delete(call, string(ref), nil)
	if isGone(err) {
		return nil
	}
	return translate(ctx, err, "delete the image "+string(ref))
}
