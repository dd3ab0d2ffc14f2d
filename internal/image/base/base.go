// Package base is the recipe of the image that sessions with an agent start from: OpenCode,
// its MCP servers, Node.js 22 and package managers from npm, at the versions of the lock file
// here; Chromium, ripgrep and whatever else is missing from Debian; and the agent's
// configuration. Packages are installed in the sandbox itself, so the result is in the image's
// own layers, and on the local engine nothing of the host changes.
package base

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	_ "embed"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/harvest-run/executord/internal/agent/opencode/config"
	"github.com/harvest-run/executord/internal/egress"
	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/guestfiles"
	"github.com/harvest-run/executord/internal/image"
)

// Name of the image.
const Name = "base"

// Config says from where things are taken.
type Config struct {
	// DpkgStatus is the host's /var/lib/dpkg/status, for an engine whose sandboxes see the
	// host's /usr: apt must know what is there. Empty where a sandbox has its own.
	DpkgStatus []byte
	// Key stands for what sandboxes see of the host beside that: another Key is another image.
	Key string
	// NoAVX2 takes the OpenCode for processors without AVX2.
	NoAVX2 bool
	// DebianMirror and NpmRegistry are URLs; "" for the projects' own.
	DebianMirror string
	NpmRegistry  string
	// Packages are further packages of Debian's.
	Packages []string
	// Allow are further rules of what the build reaches: for mirrors of one's own, and
	// where one has a private address, that address.
	Allow []egress.Rule
	// Cache is a directory of the sandbox with what was fetched before: CACHE/npm, an npm
	// cache, and CACHE/apt, archives of packages. Then no network is used.
	Cache string
}

var errOther = errors.New("the lock files differ")

const (
	defaultDebian = "http://deb.debian.org"
	defaultNpm    = "https://registry.npmjs.org"
)

//go:embed package.json
var manifest []byte

//go:embed package-lock.json
var lock []byte

//go:embed packages.sh
var packagesScript string

//go:embed tools.sh
var toolsScript string

//go:embed check.sh
var checkScript string

// Recipe returns the recipe.
func Recipe(cfg Config) (image.Recipe, error) {
	manifest, lock, err := Locked(cfg.NoAVX2)
	if err != nil {
		return image.Recipe{}, fmt.Errorf("choose what is installed from npm: %w", err)
	}
	settings, err := config.Options{}.Files()
	if err != nil {
		return image.Recipe{}, err
	}
	if cfg.DebianMirror == "" {
		cfg.DebianMirror = defaultDebian
	}
	if cfg.NpmRegistry == "" {
		cfg.NpmRegistry = defaultNpm
	}
	env := []string{"DEBIAN_MIRROR=" + cfg.DebianMirror, "CACHE=" + cfg.Cache, "PACKAGES=" + strings.Join(cfg.Packages, " "), "npm_config_registry=" + cfg.NpmRegistry}
	r := image.Recipe{Name: Name, Network: egress.Policy{Mode: engine.NetworkNone}}
	if cfg.Cache == "" {
		r.Network = egress.Policy{Mode: engine.NetworkEgress, Rules: append(rules(cfg), cfg.Allow...)}
	}
	packages := image.Step{Name: "system packages", Script: packagesScript, Env: env, Timeout: 30 * time.Minute, Key: cfg.Key}
	if len(cfg.DpkgStatus) > 0 {
		packages.Files = []guestfiles.File{{Path: "/var/lib/dpkg/status", Data: cfg.DpkgStatus}}
	}
	r.Steps = []image.Step{
		packages,
		{
			Name: "agent and MCP servers", Script: toolsScript, Env: env, Timeout: 30 * time.Minute,
			Files: []guestfiles.File{
				{Path: config.Tools + "/package.json", Data: manifest},
				{Path: config.Tools + "/package-lock.json", Data: lock},
			},
		},
		{Name: "configuration", Script: config.Script(), Files: settings},
		{Name: "check", Script: checkScript, Timeout: 5 * time.Minute},
	}
	return r, nil
}

// rules are those for the registries.
func rules(cfg Config) []egress.Rule {
	var all []egress.Rule
	for _, url := range []string{cfg.DebianMirror, cfg.NpmRegistry} {
		_, rest, _ := strings.Cut(url, "://")
		host, _, _ := strings.Cut(rest, "/")
		if rule, err := egress.ParseRule(host); err == nil {
			all = append(all, rule)
		}
	}
	return all
}

// Locked returns the npm manifest and lock file with one of the two builds of OpenCode.
func Locked(noAVX2 bool) (packageJSON, packageLock []byte, err error) {
	without := "opencode-linux-x64-baseline"
	if noAVX2 {
		without = "opencode-linux-x64"
	}
	var m, l map[string]any
	for _, f := range []struct {
		data []byte
		to   *map[string]any
	}{{manifest, &m}, {lock, &l}} {
		if err := json.Unmarshal(f.data, f.to); err != nil {
			return nil, nil, err
		}
	}
	packages, _ := l["packages"].(map[string]any)
	root, _ := packages[""].(map[string]any)
	for _, holder := range []map[string]any{m, root} {
		dependencies, _ := holder["dependencies"].(map[string]any)
		if _, ok := dependencies[without]; !ok {
			return nil, nil, fmt.Errorf("%s is not locked", without)
		}
		delete(dependencies, without)
	}
	delete(packages, "node_modules/"+without)
	if packageJSON, err = encode(m); err != nil {
		return nil, nil, err
	}
	packageLock, err = encode(l)
	return packageJSON, packageLock, err
}

func encode(v any) ([]byte, error) {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	err := e.Encode(v)
	return b.Bytes(), err
}

// Linked is the recipe of an image like base that fetches nothing: what base installs from
// npm lies in a directory that the sandbox sees at the same path, and is linked instead; all
// else is the host's. key is as Config's. It is an error if what lies there is not what base would install now.
func Linked(dir, key string) (image.Recipe, error) {
	if got, err := os.ReadFile(filepath.Join(dir, "package-lock.json")); err != nil || !bytes.Equal(got, lock) {
		return image.Recipe{}, fmt.Errorf("%s has not what the lock file of image %s asks for: install it there with npm ci: %w", dir, Name, cmp.Or(err, errOther))
	}
	settings, err := config.Options{}.Files()
	if err != nil {
		return image.Recipe{}, err
	}
	sum := sha256.Sum256(lock)
	return image.Recipe{
		Name: Name, Network: egress.Policy{Mode: engine.NetworkNone},
		Steps: []image.Step{
			{
				Name: "links", Key: hex.EncodeToString(sum[:]) + key, Env: []string{"CACHE=" + dir},
				Script: "mkdir -p " + config.Tools + "\nln -sfn \"$CACHE/node_modules\" " + config.Tools + "/node_modules\n" + toolsLinks(),
			},
			{Name: "configuration", Script: config.Script(), Files: settings},
		},
	}, nil
}

// toolsLinks is the part of toolsScript behind the installation.
func toolsLinks() string {
	_, links, _ := strings.Cut(toolsScript, "# Links.\n")
	return links
}
