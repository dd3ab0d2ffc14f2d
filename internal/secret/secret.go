// Package secret knows the credentials that executord adds on the way out. A Source has
// those that the operator named, found in a variable or a file each time they are used;
// a Bag has those of one session on top, in memory only. Values print as [redacted].
// A Set of values takes them out of what programs write.
package secret

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"

	"github.com/harvest-run/executord/internal/fault"
)

const (
	// redacted stands where a value would.
	redacted = "[redacted]"
	// maxValue bounds a value, in bytes.
	maxValue = 64 << 10
	// maxNamed bounds the secrets of a Source and of a Bag each.
	maxNamed = 256
)

// Value is a credential. It shows itself to nobody but who calls Reveal.
type Value struct{ text string }

// NewValue makes a Value. White space around it is none of it. Faults: Invalid, for one that is
// empty, longer than 64 KiB or could not stand in a header.
func NewValue(text string) (Value, error) {
	text = strings.TrimSpace(text)
	switch {
	case text == "":
		return Value{}, fault.New(fault.Invalid, "SECRET_EMPTY", "the secret is empty")
	case len(text) > maxValue:
		return Value{}, fault.New(fault.Invalid, "SECRET_TOO_LONG", "the secret has %d bytes, at most %d are allowed", len(text), maxValue)
	case strings.ContainsRune(text, 0):
		return Value{}, fault.New(fault.Invalid, "SECRET_NOT_TEXT", "the secret has a NUL byte")
	}
	return Value{text}, nil
}

// Reveal returns the credential itself, for the header that it goes into.
func (v Value) Reveal() string { return v.text }

// String implements fmt.Stringer.
func (Value) String() string { return redacted }

// GoString implements fmt.GoStringer.
func (Value) GoString() string { return redacted }

// Format implements fmt.Formatter: no verb shows it.
func (Value) Format(s fmt.State, _ rune) { _, _ = io.WriteString(s, redacted) }

// LogValue implements slog.LogValuer.
func (Value) LogValue() slog.Value { return slog.StringValue(redacted) }

// MarshalText implements encoding.TextMarshaler, and so hides it from JSON too.
func (Value) MarshalText() ([]byte, error) { return []byte(redacted), nil }

// Source has the secrets that the operator named.
type Source struct {
	places map[string]place
	getenv func(string) string
}

type place struct {
	variable, file string // one of them
}

// names are what secrets can be called.
func names() *regexp.Regexp { return regexp.MustCompile(`^[a-z0-9][a-z0-9._-]{0,62}$`) }

// CheckName says what is wrong with a secret's name.
func CheckName(name string) error {
	if !names().MatchString(name) {
		return fmt.Errorf("%q is not a name of 1 to 63 characters a-z, 0-9, dot, hyphen and underscore that begins with a letter or digit", name)
	}
	return nil
}

// NewSource reads NAME=env:VARIABLE and NAME=file:/PATH. getenv is os.Getenv. The
// variables and files are looked at when a secret is used, not here.
func NewSource(named []string, getenv func(string) string) (*Source, error) {
	s := &Source{places: make(map[string]place, len(named)), getenv: getenv}
	if len(named) > maxNamed {
		return nil, fmt.Errorf("there are %d, at most %d are allowed", len(named), maxNamed)
	}
	for _, text := range named {
		name, where, found := strings.Cut(text, "=")
		if !found {
			// Not repeated: who writes it like this may have written the secret.
			return nil, errors.New("one of them is not NAME=env:VARIABLE or NAME=file:/PATH")
		}
		if err := CheckName(name); err != nil {
			return nil, err
		}
		if _, twice := s.places[name]; twice {
			return nil, fmt.Errorf("%q is given twice", name)
		}
		var p place
		if variable, ok := strings.CutPrefix(where, "env:"); ok && regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*$`).MatchString(variable) {
			p.variable = variable
		} else if file, ok := strings.CutPrefix(where, "file:"); ok && filepath.IsAbs(file) && filepath.Clean(file) == file {
			p.file = file
		} else {
			return nil, fmt.Errorf("%q is neither at env:VARIABLE nor at file: and an absolute path", name)
		}
		s.places[name] = p
	}
	return s, nil
}

// Names are those of its secrets, sorted.
func (s *Source) Names() []string {
	if s == nil {
		return nil
	}
	return slices.Sorted(maps.Keys(s.places))
}

// Lookup reads a secret. Faults: NotFound with reason SECRET_UNKNOWN, FailedPrecondition
// with reason SECRET_NOT_READABLE.
func (s *Source) Lookup(name string) (Value, error) {
	if s == nil {
		return Value{}, unknown(name)
	}
	p, ok := s.places[name]
	if !ok {
		return Value{}, unknown(name)
	}
	var text, where string
	if p.variable != "" {
		text, where = s.getenv(p.variable), "variable "+p.variable
	} else {
		where = "file " + p.file
		var err error
		if text, err = readFile(p.file); err != nil {
			return Value{}, fault.Wrap(err, fault.FailedPrecondition, "SECRET_NOT_READABLE", "read secret %q", name)
		}
	}
	v, err := NewValue(text)
	if err != nil {
		return Value{}, fault.Wrap(err, fault.FailedPrecondition, "SECRET_NOT_READABLE", "read secret %q from %s", name, where)
	}
	return v, nil
}

func unknown(name string) error {
	return fault.New(fault.NotFound, "SECRET_UNKNOWN", "no secret %q is known to this executord", name)
}

// readFile reads one that nobody else can read: 0600 or less, and ours.
func readFile(path string) (string, error) {
	file, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0) // a pipe must not make us wait
	if err != nil {
		return "", err
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil {
		return "", err
	}
	if !info.Mode().IsRegular() {
		return "", fmt.Errorf("%q is not a file", path)
	}
	if mode := info.Mode().Perm(); mode&0o077 != 0 {
		return "", fmt.Errorf("%q can be read by others (mode %04o): chmod 600 it", path, mode)
	}
	if owner, ok := info.Sys().(*syscall.Stat_t); ok && int(owner.Uid) != os.Geteuid() && owner.Uid != 0 {
		return "", fmt.Errorf("%q belongs to user %d and not to the one that executord runs as", path, owner.Uid)
	}
	text, err := io.ReadAll(io.LimitReader(file, maxValue+2))
	return string(text), err
}

// Values are all that can be read now, for taking them out of output and logs.
func (s *Source) Values() []Value {
	var values []Value
	for _, name := range s.Names() {
		if v, err := s.Lookup(name); err == nil {
			values = append(values, v)
		}
	}
	return values
}

// Bag has the secrets of one session: those that were given with it, in memory only, and
// for the other names those of a Source. It does not change.
type Bag struct {
	source *Source
	inline map[string]Value
}

// NewBag makes a Bag. Faults: Invalid, for a name or value that cannot be.
func NewBag(source *Source, inline map[string]string) (*Bag, error) {
	b := &Bag{source: source, inline: make(map[string]Value, len(inline))}
	if len(inline) > maxNamed {
		return nil, fault.New(fault.Invalid, "SECRETS", "there are %d secrets, at most %d are allowed", len(inline), maxNamed)
	}
	for name, text := range inline {
		if err := CheckName(name); err != nil {
			return nil, fault.Wrap(err, fault.Invalid, "SECRET_NAME", "name of a secret")
		}
		v, err := NewValue(text)
		if err != nil {
			return nil, fmt.Errorf("secret %q: %w", name, err)
		}
		b.inline[name] = v
	}
	return b, nil
}

// Lookup returns a secret. Faults as Source.Lookup.
func (b *Bag) Lookup(name string) (Value, error) {
	if v, ok := b.inline[name]; ok {
		return v, nil
	}
	return b.source.Lookup(name)
}

// Values are all that it can return now.
func (b *Bag) Values() []Value {
	return append(slices.Collect(maps.Values(b.inline)), b.source.Values()...)
}
