package cli

import (
	"strings"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"

	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
)

func TestParseSize(t *testing.T) {
	good := map[string]int64{
		"1": 1, "1048576": 1 << 20, "64b": 64, "64B": 64, "1k": 1 << 10, "1K": 1 << 10, "512m": 512 << 20, "512M": 512 << 20,
		"512MB": 512 << 20, "512MiB": 512 << 20, "512Mi": 512 << 20, "2g": 2 << 30, "1.5GiB": 3 << 29, "1T": 1 << 40, "0.5k": 512,
	}
	for text, want := range good {
		if got, err := parseSize(text); err != nil || got != want {
			t.Errorf("parseSize(%q) = %d, %v; want %d", text, got, err, want)
		}
	}
	for _, text := range []string{"", "m", "-1", "+1", "0", "0.1", "1x", "1mm", "1 m", "1e3", "0x10", "inf", "nan", "1.2.3", ".", "9999999T", "1_0", "１m", "1mib/s", "1ſ"} {
		if got, err := parseSize(text); err == nil {
			t.Errorf("parseSize(%q) = %d, want an error", text, got)
		}
	}
}

func TestParseCores(t *testing.T) {
	good := map[string]int64{"1": 1000, "2": 2000, "0.5": 500, "500m": 500, "1.25": 1250, ".1": 100, "1m": 1, "0.0015": 2}
	for text, want := range good {
		if got, err := parseCores(text); err != nil || got != want {
			t.Errorf("parseCores(%q) = %d, %v; want %d", text, got, err, want)
		}
	}
	for _, text := range []string{"", "m", "0", "-1", "x", "1c", "1e9", "inf", "0.0001", "99999999999999"} {
		if got, err := parseCores(text); err == nil {
			t.Errorf("parseCores(%q) = %d, want an error", text, got)
		}
	}
}

func TestParseCursor(t *testing.T) {
	good := map[string]*executorv1.Cursor{
		"e1/7":                      {Epoch: "e1", Sequence: 7},
		"a/b/0":                     {Epoch: "a/b"},
		"e/18446744073709551615":    {Epoch: "e", Sequence: 1<<64 - 1},
		"0192-af/00000000000000001": {Epoch: "0192-af", Sequence: 1},
	}
	for text, want := range good {
		got, err := parseCursor(text)
		if err != nil || got.GetEpoch() != want.GetEpoch() || got.GetSequence() != want.GetSequence() {
			t.Errorf("parseCursor(%q) = %v, %v; want %v", text, got, err, want)
		}
	}
	for _, text := range []string{"", "7", "/7", "e/", "e/-1", "e/x", "e/18446744073709551616", "\xff/1"} {
		if got, err := parseCursor(text); err == nil {
			t.Errorf("parseCursor(%q) = %v, want an error", text, got)
		}
	}
}

func TestParseEnv(t *testing.T) {
	here := map[string]string{"HOME": "/root", "EMPTY": ""}
	got, err := parseEnv([]string{"A=1", "B=x=y", "C=", "HOME", "EMPTY", "A=2"}, here)
	want := map[string]string{"A": "2", "B": "x=y", "C": "", "HOME": "/root", "EMPTY": ""}
	if diff := cmp.Diff(want, got); err != nil || diff != "" {
		t.Errorf("error %v (-want +got):\n%s", err, diff)
	}
	for _, entry := range []string{"", "=1", "NOT_HERE", "A=\xff"} {
		if got, err := parseEnv([]string{entry}, here); err == nil {
			t.Errorf("parseEnv(%q) = %v, want an error", entry, got)
		}
	}
	// What is wrong with a variable must not tell its value.
	if _, err := parseEnv([]string{"TOKEN=secret\xff"}, nil); err == nil || strings.Contains(err.Error(), "secret") {
		t.Errorf("error %v", err)
	}
}

func TestParseLabels(t *testing.T) {
	got, err := parseLabels([]string{"team=core", "empty=", "a=b=c"})
	if diff := cmp.Diff(map[string]string{"team": "core", "empty": "", "a": "b=c"}, got); err != nil || diff != "" {
		t.Errorf("error %v (-want +got):\n%s", err, diff)
	}
	for _, entry := range []string{"", "team", "=core", "a=\xff"} {
		if got, err := parseLabels([]string{entry}); err == nil {
			t.Errorf("parseLabels(%q) = %v, want an error", entry, got)
		}
	}
}

func TestParseDuration(t *testing.T) {
	if d, err := parseDuration("1h30m"); err != nil || d != 90*time.Minute {
		t.Errorf("%v, %v", d, err)
	}
	for _, text := range []string{"", "30", "-1s", "soon"} {
		if d, err := parseDuration(text); err == nil {
			t.Errorf("parseDuration(%q) = %v, want an error", text, d)
		}
	}
}

func TestNames(t *testing.T) {
	tests := []struct{ arg, execution, session string }{
		{"x1", "executions/x1", "sessions/x1"},
		{"executions/x1", "executions/x1", ""},
		{"sessions/s1", "", "sessions/s1"},
		{"sessions/s1/executions/x1", "sessions/s1/executions/x1", ""},
		{"", "", ""},
		{"X1", "", ""},
		{"x1\n", "", ""},
		{"../x1", "", ""},
		{"executions/", "", ""},
		{strings.Repeat("x", 64), "", ""},
	}
	for _, test := range tests {
		if got, err := executionName(test.arg); got != test.execution || (err == nil) != (got != "") {
			t.Errorf("executionName(%q) = %q, %v; want %q", test.arg, got, err, test.execution)
		}
		if got, err := sessionName(test.arg); got != test.session || (err == nil) != (got != "") {
			t.Errorf("sessionName(%q) = %q, %v; want %q", test.arg, got, err, test.session)
		}
	}
}

func TestLanguageOf(t *testing.T) {
	tests := map[string]executorv1.Language{
		"a.py": executorv1.Language_LANGUAGE_PYTHON, "/x/a.PY": executorv1.Language_LANGUAGE_PYTHON,
		"a.sh": executorv1.Language_LANGUAGE_BASH, "a.bash": executorv1.Language_LANGUAGE_BASH,
		"a.js": executorv1.Language_LANGUAGE_NODE, "a.mjs": executorv1.Language_LANGUAGE_NODE, "a.cjs": executorv1.Language_LANGUAGE_NODE,
		"a.rb": 0, "py": 0, "": 0,
	}
	for path, want := range tests {
		if got, ok := languageOf(path); got != want || ok != (want != 0) {
			t.Errorf("languageOf(%q) = %v, %v", path, got, ok)
		}
	}
}

func TestPrintable(t *testing.T) {
	tests := map[string]string{
		"plain ü 漢":         "plain ü 漢",
		"\x1b[31mred\x1b[m": `\x1b[31mred\x1b[m`,
		"a\nb\tc\rd":        `a\nb\tc\rd`,
		"\u202eabc":         `\u202eabc`,
		"\xff":              "\uFFFD",
	}
	for text, want := range tests {
		if got := printable(text); got != want {
			t.Errorf("printable(%q) = %q, want %q", text, got, want)
		}
	}
}

func TestFormatSize(t *testing.T) {
	tests := map[int64]string{0: "0 B", 1: "1 B", 1000: "1000 B", 1024: "1 KiB", 1 << 20: "1 MiB", 3 << 29: "1536 MiB", 1 << 50: "1024 TiB"}
	for n, want := range tests {
		if got := formatSize(n); got != want {
			t.Errorf("formatSize(%d) = %q, want %q", n, got, want)
		}
	}
}

func FuzzParseSize(f *testing.F) {
	for _, seed := range []string{"1", "64m", "1.5GiB", "1e9", "9223372036854775808", "0x1p4", "1İ"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		if n, err := parseSize(text); err == nil && n < 1 || err != nil && n != 0 {
			t.Errorf("parseSize(%q) = %d, %v", text, n, err)
		}
	})
}

func FuzzParseCores(f *testing.F) {
	for _, seed := range []string{"1", "0.5", "500m", "1e9", "nan"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		if n, err := parseCores(text); err == nil && n < 1 || err != nil && n != 0 {
			t.Errorf("parseCores(%q) = %d, %v", text, n, err)
		}
	})
}

// FuzzParseCursor: what is read is written back the same.
func FuzzParseCursor(f *testing.F) {
	for _, seed := range []string{"e1/7", "a/b/0", "/", "e/+1", "e/01"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		c, err := parseCursor(text)
		if err != nil {
			return
		}
		again, err := parseCursor(formatCursor(c))
		if err != nil || again.GetEpoch() != c.GetEpoch() || again.GetSequence() != c.GetSequence() || c.GetEpoch() == "" {
			t.Errorf("parseCursor(%q) = %v, again %v, %v", text, c, again, err)
		}
	})
}

// FuzzPrintable: nothing that a terminal obeys comes through.
func FuzzPrintable(f *testing.F) {
	f.Add("\x1b]0;title\x07")
	f.Add("\u009b31m\u2028\u202e")
	f.Fuzz(func(t *testing.T, text string) {
		got := printable(text)
		if !utf8.ValidString(got) || strings.ContainsFunc(got, unicode.IsControl) || strings.ContainsAny(got, "\u2028\u2029\u202e") {
			t.Errorf("printable(%q) = %q", text, got)
		}
	})
}
