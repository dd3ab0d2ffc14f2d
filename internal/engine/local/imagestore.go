package local

import (
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/fault"
)

// image is what is known of a snapshot: the layers that lie over the host image, the
// uppermost first.
type image struct {
	Layers []string `json:"layers"`
	// Expires is when it is no more; zero for never.
	Expires time.Time `json:"expires,omitzero"`
}

// imageStore keeps images and their layers. A layer is a directory with a copy of the
// upper directory of each tree that had anything in it. It never changes, is shared by all
// images and sandboxes over it, and is removed when the last of them is gone.
type imageStore struct {
	images, layers string // directories
	log            *slog.Logger
	changed        chan struct{} // wakes the collector
	stop           chan struct{}
	work           sync.WaitGroup

	mu      sync.Mutex
	uses    map[string][]string // layers by the sandbox over them
	making  map[string]bool     // layers that no image names yet
	stopped bool
}

// openImageStore finds what is there. sandboxes has the directories of those that may
// live. Nothing is removed before it is collected.
func openImageStore(dir, sandboxes string, log *slog.Logger) (*imageStore, error) {
	s := &imageStore{
		images: filepath.Join(dir, "snapshots"), layers: filepath.Join(dir, "layers"), log: log,
		changed: make(chan struct{}, 1), stop: make(chan struct{}),
		uses: make(map[string][]string), making: make(map[string]bool),
	}
	for _, d := range []string{s.images, s.layers} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return nil, fmt.Errorf("make the directory of images: %w", err)
		}
	}
	half, err := filepath.Glob(filepath.Join(s.images, newPattern+"*"))
	if err != nil {
		return nil, err
	}
	for _, path := range half {
		if err := os.Remove(path); err != nil {
			return nil, fmt.Errorf("remove what is left of an image: %w", err)
		}
	}
	entries, err := os.ReadDir(sandboxes)
	if err != nil {
		return nil, err
	}
	for _, d := range entries {
		// One whose record cannot be read is ended when it is opened.
		if r, err := readRecord(filepath.Join(sandboxes, d.Name(), recordName)); err == nil && len(r.Layers) > 0 {
			s.uses[d.Name()] = r.Layers
		}
	}
	return s, nil
}

func imageNotFound(ref engine.ImageRef) error {
	return fault.New(fault.NotFound, "IMAGE_NOT_FOUND", "there is no image %q", ref)
}

// file is where an image is written down; false if nothing can have this name.
func (s *imageStore) file(ref engine.ImageRef) (string, bool) {
	return filepath.Join(s.images, string(ref)+".json"), validID(string(ref))
}

// find reads an image; a fault NotFound if there is none, or its time has passed.
func (s *imageStore) find(ref engine.ImageRef) (image, error) {
	path, ok := s.file(ref)
	if !ok {
		return image{}, imageNotFound(ref)
	}
	img, err := readImage(path)
	if errors.Is(err, fs.ErrNotExist) || (err == nil && img.expired(time.Now())) {
		return image{}, imageNotFound(ref)
	}
	return img, err
}

func (img image) expired(now time.Time) bool {
	return !img.Expires.IsZero() && !now.Before(img.Expires)
}

func readImage(path string) (image, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return image{}, err
	}
	var img image
	if err := json.Unmarshal(text, &img); err != nil {
		return image{}, fmt.Errorf("read image %s: %w", path, err)
	}
	return img, nil
}

// hold keeps the layers of an image for a sandbox, until release, and returns them.
func (s *imageStore) hold(sandbox string, ref engine.ImageRef) ([]string, error) {
	if ref == "" {
		return nil, nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	img, err := s.find(ref)
	if err != nil {
		return nil, err
	}
	s.uses[sandbox] = img.Layers
	return img.Layers, nil
}

// release says that a sandbox is no more.
func (s *imageStore) release(sandbox string) {
	s.mu.Lock()
	_, held := s.uses[sandbox]
	delete(s.uses, sandbox)
	s.mu.Unlock()
	if held {
		s.wake()
	}
}

// begin names a layer that is going to be made, and where.
func (s *imageStore) begin() (name, dir string) {
	name = strings.ToLower(rand.Text())
	s.mu.Lock()
	defer s.mu.Unlock()
	s.making[name] = true
	return name, filepath.Join(s.layers, name)
}

// commit writes down an image of layers, the first of which was begun.
func (s *imageStore) commit(layers []string, ttl time.Duration) (engine.ImageRef, error) {
	img := image{Layers: layers}
	if ttl > 0 {
		img.Expires = time.Now().Add(ttl)
	}
	text, err := json.Marshal(img)
	if err != nil {
		return "", err
	}
	ref := engine.ImageRef("snapshot-" + strings.ToLower(rand.Text()))
	path, _ := s.file(ref)
	if err := writeDurably(path, text); err != nil {
		return "", fmt.Errorf("write down an image: %w", err)
	}
	s.over(layers[0])
	return ref, nil
}

// over says that a layer is not being made any more. If no image names it, it goes.
func (s *imageStore) over(layer string) {
	s.mu.Lock()
	delete(s.making, layer)
	s.mu.Unlock()
	s.wake()
}

// newPattern begins the names of files that are being written.
const newPattern = ".new-"

// writeDurably makes a file that is there as a whole or not at all, also after a crash.
func writeDurably(path string, text []byte) (err error) {
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer dir.Close()
	f, err := os.CreateTemp(dir.Name(), newPattern)
	if err != nil {
		return err
	}
	_, err = f.Write(text)
	if err = errors.Join(err, f.Sync(), f.Close()); err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	return dir.Sync()
}

// remove deletes an image. Its layers go when nobody is over them.
func (s *imageStore) remove(ref engine.ImageRef) error {
	path, ok := s.file(ref)
	if !ok {
		return nil
	}
	s.mu.Lock()
	err := os.Remove(path)
	s.mu.Unlock()
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("delete image %s: %w", ref, err)
	}
	s.wake()
	return nil
}

func (s *imageStore) wake() {
	select {
	case s.changed <- struct{}{}:
	default:
	}
}

// start begins to collect in the background.
func (s *imageStore) start() { s.work.Go(s.run) }

// close ends that and waits for it.
func (s *imageStore) close() {
	s.mu.Lock()
	if !s.stopped {
		s.stopped = true
		close(s.stop)
	}
	s.mu.Unlock()
	s.work.Wait()
}

// collectRetry is when what could not be removed is tried again.
const collectRetry = time.Minute

// run removes what nobody needs until close is called.
func (s *imageStore) run() {
	for {
		next, err := s.collect(time.Now())
		if err != nil {
			s.log.Warn("images that nobody needs cannot be removed", "error", err)
			next = min(next, collectRetry)
		}
		timer := time.NewTimer(next)
		select {
		case <-timer.C:
		case <-s.changed:
		case <-s.stop:
			timer.Stop()
			return
		}
		timer.Stop()
	}
}

// collect removes images whose time has passed and layers that nobody needs, such as
// what is left of one that was never finished. It returns how long there is nothing to do.
func (s *imageStore) collect(now time.Time) (next time.Duration, err error) {
	unused, next, err := s.unused(now)
	for _, name := range unused {
		select {
		case <-s.stop: // the next executord goes on
			return next, err
		default:
		}
		if removed := removeTree(filepath.Join(s.layers, name)); removed != nil {
			err = errors.Join(err, fmt.Errorf("remove layer %s: %w", name, removed))
		}
	}
	return next, err
}

// unused deletes images whose time has passed and names the layers that nobody needs. It
// names none if it cannot know.
func (s *imageStore) unused(now time.Time) (names []string, next time.Duration, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	next = 24 * time.Hour
	used := make(map[string]bool)
	for name := range s.making {
		used[name] = true
	}
	for _, layers := range s.uses {
		for _, name := range layers {
			used[name] = true
		}
	}
	entries, err := os.ReadDir(s.images)
	if err != nil {
		return nil, next, err
	}
	for _, d := range entries {
		path := filepath.Join(s.images, d.Name())
		if !strings.HasSuffix(d.Name(), ".json") {
			continue // being written
		}
		img, err := readImage(path)
		if err != nil {
			return nil, next, err
		}
		if img.expired(now) {
			if err := os.Remove(path); err != nil {
				return nil, next, err
			}
			continue
		}
		if !img.Expires.IsZero() {
			next = min(next, img.Expires.Sub(now))
		}
		for _, name := range img.Layers {
			used[name] = true
		}
	}
	entries, err = os.ReadDir(s.layers)
	if err != nil {
		return nil, next, err
	}
	for _, d := range entries {
		if !used[d.Name()] {
			names = append(names, d.Name())
		}
	}
	slices.Sort(names)
	return names, next, nil
}
