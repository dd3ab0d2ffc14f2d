// Package config makes what an agent's sandbox has in /app: the instructions for the
// agent, OpenCode's configuration with its MCP servers, and the seed of a memory. The
// agent image has it with nothing but the defaults; the start of a session writes it
// again with the session's model and with the servers whose keys are there. No key is
// ever part of it: a file names the place where OpenCode finds one.
package config

import (
	"embed"
	"encoding/json"
	"fmt"
	"path"
	"regexp"
	"slices"
	"strings"

	"github.com/harvest-run/executord/internal/guestfiles"
)

// Places in the sandbox.
const (
	// Dir holds the files; HomeLink is where OpenCode looks for them, a link to it.
	Dir      = "/app"
	HomeLink = "/root/.config/opencode"
	// Tools is where the image has what came from npm.
	Tools = "/opt/harvest"
	// OpenCode is the agent's program, Node the Node.js that its MCP servers run with.
	OpenCode = Tools + "/bin/opencode"
	Node     = Tools + "/bin/node"
	// Workspace holds the repositories.
	Workspace = "/workspace"
	// MemoryDir is where a repository's memory is mounted. MemoryFile is what the memory
	// server writes; its directory becomes a link to the session's own in MemoryDir.
	// MemorySeed is what a memory is seeded from.
	MemoryDir  = "/root/.mcp-memory"
	MemoryFile = "/root/.harvest/memory/memory.jsonl"
	MemorySeed = Dir + "/memory-seed.json"
)

// Version of OpenCode that all of this is made for.
const Version = "1.18.33"

//go:embed files
var embedded embed.FS

// Options are what differs between sessions. The zero value is the image's own.
type Options struct {
	// Model and SmallModel, PROVIDER/MODEL, are used where a prompt names none; "" leaves
	// the choice to each prompt. SmallModel, for titles, is Model if it is "".
	Model, SmallModel string
	// Providers of models, by their id.
	Providers map[string]Provider
	// Permission is what the agent may do, asks for or may not: allow, ask or deny by the
	// kind; nil allows everything and lets it ask no questions.
	Permission map[string]string
	// The MCP servers that need a key. One with the zero Key is left out.
	GitHub, Gemini, Sentry, Linear Key
}

// Provider says where models are had. Fields that are "" stay as OpenCode has them.
type Provider struct {
	// BaseURL is where its API is: for one whose key executord adds, an address on the
	// sandbox's loopback.
	BaseURL string
	// Key is what OpenCode shows there.
	Key Key
	// Compatible says that it is no provider that OpenCode knows: it speaks OpenAI's chat
	// API, and has the Models.
	Compatible bool
	// Name for people, of a Compatible one.
	Name string
	// Models are the ids of its models, of a Compatible one.
	Models []string
}

// Key says where OpenCode finds a credential when it starts. The zero Key is none.
type Key struct {
	// Env names a variable of OpenCode's own environment. What the agent starts sees
	// that variable too.
	Env string
	// File is a path: OpenCode reads it when it loads its configuration, and only the
	// server that the key is for gets it in its environment. It belongs on a tmpfs, such as
	// /dev/shm, which no snapshot holds.
	File string
	// URL, of GitHub and Linear, is where their server is reached instead of at their own
	// address: one at which executord adds the key, so that neither Env nor File is
	// needed.
	URL string
}

func (k Key) given() bool { return k != Key{} }

// reference is what stands for the credential in OpenCode's configuration.
func (k Key) reference() string {
	switch {
	case k.File != "":
		return "{file:" + k.File + "}"
	case k.Env != "":
		return "{env:" + k.Env + "}"
	}
	return ""
}

// check says what is wrong with a Key. Braces and the like would not only be no name:
// they could end the reference and begin another.
func (k Key) check() error {
	switch {
	case k.Env != "" && k.File != "":
		return fmt.Errorf("is in the environment and in a file")
	case k.Env != "" && !regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*$`).MatchString(k.Env):
		return fmt.Errorf("%q is not the name of a variable", k.Env)
	case k.File != "" && (!regexp.MustCompile(`^/[A-Za-z0-9._/-]+$`).MatchString(k.File) || path.Clean(k.File) != k.File):
		return fmt.Errorf("%q is not a plain absolute path", k.File)
	}
	return nil
}

// JSON is the configuration alone: given to OpenCode as OPENCODE_CONFIG_CONTENT it goes
// over that of the image.
func (o Options) JSON() (json.RawMessage, error) {
	settings, err := o.settings()
	if err != nil {
		return nil, fmt.Errorf("make the configuration of OpenCode: %w", err)
	}
	return settings, nil
}

// Files returns the files of Dir.
func (o Options) Files() ([]guestfiles.File, error) {
	settings, err := o.settings()
	if err != nil {
		return nil, fmt.Errorf("make the configuration of OpenCode: %w", err)
	}
	files := []guestfiles.File{{Path: Dir + "/opencode.json", Data: settings}}
	for _, name := range []string{"AGENTS.md", "memory-seed.json"} {
		data, err := embedded.ReadFile("files/" + name)
		if err != nil {
			return nil, err
		}
		files = append(files, guestfiles.File{Path: Dir + "/" + name, Data: data})
	}
	for name, text := range seeds() {
		files = append(files, guestfiles.File{Path: Dir + "/" + name, Data: []byte(text)})
	}
	for i := range files {
		files[i].Mode = 0o444
	}
	slices.SortFunc(files, func(a, b guestfiles.File) int { return strings.Compare(a.Path, b.Path) })
	return files, nil
}

// seeds are what keeps OpenCode from installing its plugin package into Dir by npm when
// it starts: it does so unless there are a node_modules (see Script) and a lock file that
// names the package. The .gitignore it would write.
func seeds() map[string]string {
	const dependency = `"dependencies": {"@opencode-ai/plugin": "` + Version + `"}`
	return map[string]string{
		"package.json":      "{\"private\": true, " + dependency + "}\n",
		"package-lock.json": "{\"name\": \"app\", \"lockfileVersion\": 3, \"requires\": true, \"packages\": {\"\": {" + dependency + "}}}\n",
		".gitignore":        "node_modules\npackage.json\npackage-lock.json\nbun.lock\n.gitignore\n",
	}
}

// Script completes Dir, by /bin/sh, when its files are written: the empty directory,
// and the link at which OpenCode finds them, in place of what OpenCode makes there by
// itself.
func Script() string {
	return `set -eu
mkdir -p ` + Dir + `/node_modules ` + Workspace + ` ` + path.Dir(HomeLink) + ` ` + MemoryDir + ` ` + path.Dir(MemoryFile) + `
chmod 755 ` + Dir + `
if [ -d ` + HomeLink + ` ] && [ ! -L ` + HomeLink + ` ]; then rm -rf ` + HomeLink + `; fi
ln -sfn ` + Dir + ` ` + HomeLink + `
`
}
