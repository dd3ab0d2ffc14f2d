package daemon

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/cpu"

	configv1 "github.com/harvest-run/executord/gen/harvest/config/v1"
	"github.com/harvest-run/executord/internal/api"
	"github.com/harvest-run/executord/internal/egress"
	"github.com/harvest-run/executord/internal/image"
	"github.com/harvest-run/executord/internal/image/base"
	"github.com/harvest-run/executord/internal/journal"
	"github.com/harvest-run/executord/internal/store"
)

// openImages makes the image service and lets it recover.
func (c Config) openImages(ctx context.Context, d *Daemon, st *store.Store, network *egress.Gateway) (*image.Service, error) {
	source, err := c.baseConfig()
	if err != nil {
		return nil, err
	}
	images, err := image.New(image.Config{
		Engines: d.engines, Network: network, Store: st,
		Recipes:   map[string]func(string) (image.Recipe, error){base.Name: source.recipe},
		Dir:       filepath.Join(c.Settings.GetStateDir(), "builds"),
		CheckRoom: d.disk.Check, Logger: c.Logger,
	})
	if err != nil {
		return nil, fmt.Errorf("make the image service: %w", err)
	}
	d.opened.add("images", images.Close)
	if err := images.Recover(ctx); err != nil {
		return nil, fmt.Errorf("take up builds of images: %w", err)
	}
	return images, nil
}

// baseSource makes the recipe of the base image for an engine.
type baseSource struct {
	cfg base.Config
	// status is where the host's dpkg says what is installed.
	status string
	// extra are further directories of the host that local sandboxes see.
	extra []string
	// tools is where the host has what base installs; "" if it has not.
	tools string
}

func (c Config) baseConfig() (*baseSource, error) {
	settings := c.Settings.GetImages()
	cfg := base.Config{DebianMirror: settings.GetDebianMirror(), NpmRegistry: settings.GetNpmRegistry(), Packages: settings.GetPackages()}
	for _, text := range settings.GetAllow() {
		rule, err := egress.ParseRule(text)
		if err != nil {
			return nil, fmt.Errorf("images.allow: %q: %w", text, err)
		}
		cfg.Allow = append(cfg.Allow, rule)
	}
	return &baseSource{cfg, "/var/lib/dpkg/status", hostPaths(c.Settings), settings.GetToolsDir()}, nil
}

// hostPaths are the directories of the host that sandboxes see beside /usr.
func hostPaths(settings *configv1.Config) []string {
	paths := settings.GetLocal().GetExtraPaths()
	if dir := settings.GetImages().GetToolsDir(); dir != "" && !slices.Contains(paths, dir) {
		paths = append(slices.Clone(paths), dir)
	}
	return paths
}

// recipe is asked for each use: the host may have got new software since the last, and
// then the image has to be another.
func (s *baseSource) recipe(engine string) (image.Recipe, error) {
	if s.tools != "" && engine == localName {
		return base.Linked(s.tools, strings.Join(s.extra, ":"))
	}
	cfg := s.cfg
	// Elsewhere the processor is not known.
	cfg.NoAVX2 = engine != localName || !cpu.X86.HasAVX2
	if engine == localName {
		status, err := os.ReadFile(s.status)
		if err != nil && !errors.Is(err, fs.ErrNotExist) { // a host without dpkg
			return image.Recipe{}, fmt.Errorf("read what is installed on the host: %w", err)
		}
		cfg.DpkgStatus = status
		// An image has layers for each of them.
		cfg.Key = strings.Join(s.extra, ":")
	}
	return base.Recipe(cfg)
}

// watchableImages is an image.Service as the api wants it: with a Watcher that is an
// interface.
type watchableImages struct{ *image.Service }

// Watch implements api.Images.
func (w watchableImages) Watch(ctx context.Context, build string, after *journal.Cursor) (api.BuildWatcher, error) {
	watcher, err := w.Service.Watch(ctx, build, after)
	if err != nil {
		// Not a nil pointer in an interface.
		return nil, err
	}
	return watcher, nil
}
