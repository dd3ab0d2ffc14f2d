// Package config reads the configuration of executord: one protobuf message, filled
// in layers by defaults, a YAML file, the environment and the command line, and then
// checked against its rules. Names of fields, variables and flags, their defaults and
// their help all come from the message's descriptor. It knows nothing of what the
// configuration is for and reads no globals; it opens only the file that it is told.
package config

import (
	"errors"
	"fmt"
	"io"
	"os"

	configv1 "github.com/harvest-run/executord/gen/harvest/config/v1"
)

// maxFile bounds a configuration file, in bytes.
const maxFile = 1 << 20

// Input is what a configuration is read from.
type Input struct {
	// Args are the arguments, without the name of the program or of a command.
	Args []string
	// Env are the variables, as NAME=value. Besides EXECUTORD_*, HOME and
	// XDG_STATE_HOME are looked at.
	Env []string
	// UID is the effective user id: root has another default for state_dir.
	UID int
	// WorkingDirectory is absolute; relative paths are taken from it.
	WorkingDirectory string
}

// Load reads the configuration and checks it. Its errors name the field, the layer
// its value came from and what is allowed; there is a line for each. If help is asked
// for, the error is pflag.ErrHelp.
func Load(in Input) (*configv1.Config, error) {
	env := environment(in.Env)
	fromFlags, file, err := readFlags(in.Args)
	if err != nil {
		return nil, err
	}
	if file == "" {
		file = env[variablePrefix+"CONFIG"]
	}

	l := &loader{config: &configv1.Config{}, origins: make(map[string]string)}
	for _, f := range fields() {
		f.holder(l.config) // so that groups are there, whichever layer names them
		if text := f.help().GetDefault(); text != "" {
			l.set(f, "default", text)
		}
	}
	if file != "" {
		content, err := readFile(in.absolute(file))
		if err != nil {
			return nil, fmt.Errorf("read configuration: %w", err)
		}
		l.readYAML(file, content)
	}
	l.readEnvironment(env)
	for _, a := range fromFlags {
		l.set(a.field, "flag --"+a.field.flag(), a.texts...)
	}
	if err := errors.Join(l.errs...); err != nil {
		return nil, err
	}
	if err := l.complete(in, env); err != nil {
		return nil, err
	}
	return l.config, nil
}

// loader is a configuration on its way through the layers.
type loader struct {
	config *configv1.Config
	// origins says for each field that a layer named which layer that was.
	origins map[string]string
	errs    []error
}

// set gives a field the value that a layer has for it. A field that is not a list
// takes the last of the texts.
func (l *loader) set(f field, origin string, texts ...string) {
	if err := f.set(l.config, texts); err != nil {
		l.fail(f.name, origin, err)
		return
	}
	l.origins[f.name] = origin
}

// fail notes that a field's value is wrong.
func (l *loader) fail(name, origin string, err error) {
	l.errs = append(l.errs, fmt.Errorf("%s: %w (from %s)", name, err, origin))
}

func readFile(path string) ([]byte, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	content, err := io.ReadAll(io.LimitReader(file, maxFile+1)) // it may be a pipe
	if err == nil && len(content) > maxFile {
		err = fmt.Errorf("%q is longer than %d bytes", path, maxFile)
	}
	return content, err
}
