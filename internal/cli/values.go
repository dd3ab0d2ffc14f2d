package cli

import (
	"fmt"
	"math"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
)

// value is a flag with a parser of its own that knows whether it was given.
type value[T any] struct {
	v     T
	given bool
	kind  string
	parse func(string) (T, error)
}

// Set parses a flag, as pflag.Value wants it.
func (f *value[T]) Set(text string) error {
	v, err := f.parse(text)
	if err != nil {
		return err
	}
	f.v, f.given = v, true
	return nil
}

// String is empty: none of these flags has a default that is worth showing.
func (f *value[T]) String() string { return "" }

// Type names the kind of value in the help.
func (f *value[T]) Type() string { return f.kind }

// parseSize reads bytes: a number, which may have a fraction, and a unit. Units are
// binary, as in "docker run --memory": 64m, 64M, 64MB and 64MiB are 67108864 bytes.
func parseSize(text string) (int64, error) {
	const wrong = "must be bytes or have a unit, such as 512m or 2GiB"
	digits := strings.TrimRightFunc(text, unicode.IsLetter)
	unit := strings.ToLower(text[len(digits):])
	shift := 0
	if unit != "" && unit != "b" {
		shift = 10 * (strings.IndexByte("kmgt", unit[0]) + 1)
		if rest := unit[1:]; shift == 0 || rest != "" && rest != "b" && rest != "ib" && rest != "i" {
			return 0, fmt.Errorf("%s", wrong)
		}
	}
	if !plainNumber(digits) {
		return 0, fmt.Errorf("%s", wrong)
	}
	number, err := strconv.ParseFloat(digits, 64)
	if err != nil {
		return 0, fmt.Errorf("%s", wrong)
	}
	bytes := number * float64(int64(1)<<shift)
	switch {
	case bytes >= math.MaxInt64:
		return 0, fmt.Errorf("is more than can be counted")
	case bytes < 1:
		return 0, fmt.Errorf("must be at least one byte")
	}
	return int64(bytes), nil
}

// parseCores reads a number of cores, such as 2, 0.5 or 500m, as thousandths.
func parseCores(text string) (int64, error) {
	const wrong = "must be a number of cores, such as 2, 0.5 or 500m"
	digits, thousandths := strings.CutSuffix(text, "m")
	if !plainNumber(digits) {
		return 0, fmt.Errorf("%s", wrong)
	}
	number, err := strconv.ParseFloat(digits, 64)
	if err != nil {
		return 0, fmt.Errorf("%s", wrong)
	}
	if !thousandths {
		number *= 1000
	}
	number = math.Round(number)
	switch {
	case number < 1:
		return 0, fmt.Errorf("must be at least 1m")
	case number > 1<<40:
		return 0, fmt.Errorf("is more than any machine has")
	}
	return int64(number), nil
}

// plainNumber says whether text is digits with at most one point among them:
// ParseFloat takes much more.
func plainNumber(text string) bool {
	whole, fraction, _ := strings.Cut(text, ".")
	return whole+fraction != "" && strings.Trim(whole+fraction, "0123456789") == ""
}

// parseCount reads a positive number.
func parseCount(text string) (int64, error) {
	n, err := strconv.ParseInt(text, 10, 64)
	if err != nil || n <= 0 {
		return 0, fmt.Errorf("must be a number from 1 on")
	}
	return n, nil
}

// parseDuration reads a span of time that is not negative.
func parseDuration(text string) (time.Duration, error) {
	d, err := time.ParseDuration(text)
	if err != nil || d < 0 {
		return 0, fmt.Errorf("must be a span of time, such as 500ms, 30s or 1h30m")
	}
	return d, nil
}

// parseCursor reads EPOCH/SEQUENCE.
func parseCursor(text string) (*executorv1.Cursor, error) {
	i := strings.LastIndexByte(text, '/')
	if i < 1 || !utf8.ValidString(text) {
		return nil, fmt.Errorf("must be EPOCH/SEQUENCE")
	}
	sequence, err := strconv.ParseUint(text[i+1:], 10, 64)
	if err != nil {
		return nil, fmt.Errorf("must be EPOCH/SEQUENCE, and %q is not a number", text[i+1:])
	}
	return &executorv1.Cursor{Epoch: text[:i], Sequence: sequence}, nil
}

func formatCursor(c *executorv1.Cursor) string {
	return c.GetEpoch() + "/" + strconv.FormatUint(c.GetSequence(), 10)
}

// parseEnv reads K=V and K entries; the value of the latter comes from the
// environment of executorctl.
func parseEnv(entries []string, env map[string]string) (map[string]string, error) {
	if len(entries) == 0 {
		return nil, nil
	}
	vars := make(map[string]string, len(entries))
	for _, entry := range entries {
		name, v, ok := strings.Cut(entry, "=")
		if name == "" {
			return nil, usagef("--env %q: has no name", entry)
		}
		if !ok {
			// A program that silently lacks a variable fails later and stranger.
			if v, ok = env[name]; !ok {
				return nil, usagef("--env %s: is not set in the environment of executorctl", name)
			}
		}
		if !utf8.ValidString(name) || !utf8.ValidString(v) {
			return nil, usagef("--env %s: is not valid UTF-8", strings.ToValidUTF8(name, "?"))
		}
		vars[name] = v
	}
	return vars, nil
}

// parseLabels reads K=V entries.
func parseLabels(entries []string) (map[string]string, error) {
	if len(entries) == 0 {
		return nil, nil
	}
	labels := make(map[string]string, len(entries))
	for _, entry := range entries {
		name, v, ok := strings.Cut(entry, "=")
		if !ok || name == "" || !utf8.ValidString(entry) {
			return nil, usagef("--label %q: must be NAME=VALUE", entry)
		}
		labels[name] = v
	}
	return labels, nil
}

// parseLanguage reads the name of a language.
func parseLanguage(text string) (executorv1.Language, error) {
	switch text {
	case "python":
		return executorv1.Language_LANGUAGE_PYTHON, nil
	case "bash":
		return executorv1.Language_LANGUAGE_BASH, nil
	case "node":
		return executorv1.Language_LANGUAGE_NODE, nil
	}
	return 0, fmt.Errorf("must be python, bash or node")
}

// languageOf guesses the language of a file from its name.
func languageOf(path string) (executorv1.Language, bool) {
	switch strings.ToLower(filepath.Ext(path)) {
	case ".py":
		return executorv1.Language_LANGUAGE_PYTHON, true
	case ".sh", ".bash":
		return executorv1.Language_LANGUAGE_BASH, true
	case ".js", ".mjs", ".cjs":
		return executorv1.Language_LANGUAGE_NODE, true
	}
	return 0, false
}

// executionName takes a resource name or the bare id of a one-shot.
func executionName(arg string) (string, error) {
	name := arg
	if !strings.Contains(arg, "/") {
		name = "executions/" + arg
	}
	if !regexp.MustCompile(`^(sessions/[a-z0-9-]{1,63}/)?executions/[a-z0-9-]{1,63}$`).MatchString(name) {
		return "", usagef("execution %q: must be ID, executions/ID or sessions/ID/executions/ID", arg)
	}
	return name, nil
}

// sessionName takes a resource name or a bare id.
func sessionName(arg string) (string, error) {
	name := "sessions/" + strings.TrimPrefix(arg, "sessions/")
	if !regexp.MustCompile(`^sessions/[a-z0-9-]{1,63}$`).MatchString(name) {
		return "", usagef("session %q: must be ID or sessions/ID", arg)
	}
	return name, nil
}

// printable makes text of a server or a program harmless on a terminal: control
// characters, which could move the cursor or worse, are spelled out.
func printable(text string) string {
	text = strings.ToValidUTF8(text, "\uFFFD")
	if strings.IndexFunc(text, unprintable) < 0 {
		return text
	}
	var b strings.Builder
	for _, r := range text {
		if unprintable(r) {
			quoted := strconv.QuoteRuneToASCII(r)
			b.WriteString(quoted[1 : len(quoted)-1])
		} else {
			b.WriteRune(r)
		}
	}
	return b.String()
}

func unprintable(r rune) bool { return !unicode.IsPrint(r) && r != '\u00a0' }
