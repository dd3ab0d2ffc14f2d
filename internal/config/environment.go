package config

import (
	"maps"
	"slices"
	"strings"
)

// environment makes a map of NAME=value; the last of two with one name wins, as for
// os/exec.
func environment(variables []string) map[string]string {
	env := make(map[string]string, len(variables))
	for _, variable := range variables {
		if name, value, found := strings.Cut(variable, "="); found {
			env[name] = value
		}
	}
	return env
}

// readEnvironment sets what the variables name. One that begins like ours and is none
// is an error: a mistyped variable must not be a setting that is silently left out.
func (l *loader) readEnvironment(env map[string]string) {
	known := []string{variablePrefix + "CONFIG"}
	for _, f := range fields() {
		known = append(known, f.variable())
		text, found := env[f.variable()]
		if !found {
			continue
		}
		texts := []string{text}
		if f.descriptor().IsList() {
			texts = f.split(text)
		}
		l.set(f, "variable "+f.variable(), texts...)
	}
	for _, name := range slices.Sorted(maps.Keys(env)) {
		if strings.HasPrefix(name, variablePrefix) && !slices.Contains(known, name) {
			l.errs = append(l.errs, unknown("variable", name, known))
		}
	}
}

// split takes the elements of a list apart: paths stand between colons, as in PATH;
// hosts and ranges of addresses, which have colons of their own, between blanks.
func (f field) split(text string) []string {
	if !strings.HasSuffix(f.name, "_paths") {
		return strings.Fields(text)
	}
	return slices.DeleteFunc(strings.Split(text, ":"), func(s string) bool { return s == "" })
}
