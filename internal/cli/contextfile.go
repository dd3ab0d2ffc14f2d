package cli

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"

	"go.yaml.in/yaml/v3"
)

// contexts is the file of named servers.
type contexts struct {
	// Current is the name of the one in use; "" if none is.
	Current  string         `yaml:"current,omitempty"`
	Contexts []namedContext `yaml:"contexts,omitempty"`
}

// namedContext is a server that has a name, and how to reach it.
type namedContext struct {
	Name          string `yaml:"name"`
	Address       string `yaml:"address"`
	TLS           bool   `yaml:"tls,omitempty"`
	TLSCA         string `yaml:"tls_ca,omitempty"`
	TLSCert       string `yaml:"tls_cert,omitempty"`
	TLSKey        string `yaml:"tls_key,omitempty"`
	TLSServerName string `yaml:"tls_server_name,omitempty"`
	APIKeyFile    string `yaml:"api_key_file,omitempty"`
	// APIKey is the key itself. It is never shown.
	APIKey string `yaml:"api_key,omitempty"`
}

func (c *contexts) find(name string) *namedContext {
	i := slices.IndexFunc(c.Contexts, func(n namedContext) bool { return n.Name == name })
	if i < 0 {
		return nil
	}
	return &c.Contexts[i]
}

func (c *contexts) put(n namedContext) {
	if old := c.find(n.Name); old != nil {
		*old = n
		return
	}
	c.Contexts = append(c.Contexts, n)
}

func (n *namedContext) encrypted() bool {
	return n.TLS || n.TLSCA != "" || n.TLSCert != "" || n.TLSKey != "" || n.TLSServerName != ""
}

// field is where the value of a flag is kept, nil for that of --tls.
func (n *namedContext) field(flag string) *string {
	return map[string]*string{
		"address": &n.Address, "tls-ca": &n.TLSCA, "tls-cert": &n.TLSCert, "tls-key": &n.TLSKey,
		"tls-server-name": &n.TLSServerName, keyFileFlag: &n.APIKeyFile,
	}[flag]
}

func (n *namedContext) get(flag string) string {
	if field := n.field(flag); field != nil {
		return *field
	}
	if !n.TLS {
		return ""
	}
	return strconv.FormatBool(n.TLS)
}

func (n *namedContext) set(flag, value string) {
	if field := n.field(flag); field != nil {
		*field = value
		return
	}
	n.TLS = value == "true"
}

// contextPath is where the file is; "" if there is no place for it.
func (a *app) contextPath() string {
	if dir := a.env["XDG_CONFIG_HOME"]; filepath.IsAbs(dir) { // a relative one is to be ignored
		return filepath.Join(dir, "executor", "config.yaml")
	}
	if home := a.env["HOME"]; filepath.IsAbs(home) {
		return filepath.Join(home, ".config", "executor", "config.yaml")
	}
	return ""
}

// readContexts reads the file; one that is not there is empty.
func (a *app) readContexts() (*contexts, error) {
	path := a.contextPath()
	file := &contexts{}
	if path == "" {
		return file, nil
	}
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return file, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read contexts: %w", err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("read contexts: %w", err)
	}
	// It may hold keys, and whoever can write to it decides where they are sent.
	if mode := info.Mode().Perm(); mode&0o077 != 0 {
		return nil, fmt.Errorf("read contexts: others can read or write %q (mode %04o); make it private: chmod 600 %s", path, mode, path)
	}
	content, err := readKeyed(f)
	if err != nil {
		return nil, fmt.Errorf("read contexts: %q: %w", path, err)
	}
	decoder := yaml.NewDecoder(bytes.NewReader(content))
	decoder.KnownFields(true)
	if err := decoder.Decode(file); err != nil && len(bytes.TrimSpace(content)) > 0 {
		// The decoder's words may have a key in them.
		return nil, fmt.Errorf("read contexts: %q is not a file of contexts; mend it, or move it away", path)
	}
	return file, nil
}

// writeContexts puts another file in the place of the present one, in one step.
func (a *app) writeContexts(file *contexts) (err error) {
	path := a.contextPath()
	if path == "" {
		return errors.New("write contexts: there is no place for them without XDG_CONFIG_HOME and HOME")
	}
	content, err := yaml.Marshal(file)
	if err != nil {
		return fmt.Errorf("write contexts: %w", err)
	}
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("write contexts: %w", err)
	}
	draft, err := os.CreateTemp(dir, ".config-*") // with mode 0600
	if err != nil {
		return fmt.Errorf("write contexts: %w", err)
	}
	defer func() {
		if err != nil {
			_ = os.Remove(draft.Name())
			err = fmt.Errorf("write contexts: %w", err)
		}
	}()
	_, err = draft.Write(content)
	if err = errors.Join(err, draft.Sync(), draft.Close()); err != nil {
		return err
	}
	return os.Rename(draft.Name(), path)
}
