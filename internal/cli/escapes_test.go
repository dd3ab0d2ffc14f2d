package cli

import (
	"bytes"
	"strings"
	"testing"
)

func TestEscapes(t *testing.T) {
	for keys, want := range map[string]struct {
		out   string
		leave bool
	}{
		"":                 {"", false},
		"ls -l\r":          {"ls -l\r", false},
		"~.":               {"", true},
		"ls\r~.rest":       {"ls\r", true},
		"ls\n~.":           {"ls\n", true},
		"ls ~.\r":          {"ls ~.\r", false},
		"~~.":              {"~.", false},
		"~~~":              {"~~", false},
		"~x\r~y":           {"~x\r~y", false},
		"cd ~/x\r~/bin/y":  {"cd ~/x\r~/bin/y", false},
		"~\r~.":            {"~\r", true},
		"~":                {"~", false},
		"a\r~":             {"a\r~", false},
		"\x03~.":           {"\x03~.", false},
		"\r\r~.":           {"\r\r", true},
		"\xff\x00\r~\xfe.": {"\xff\x00\r~\xfe.", false},
	} {
		// However the keys are cut into reads.
		for size := 1; size <= len(keys)+1; size++ {
			var e escapes
			var out []byte
			left := false
			for rest := []byte(keys); len(rest) > 0 && !left; {
				n := min(size, len(rest))
				var some []byte
				some, left = e.filter(rest[:n])
				out, rest = append(out, some...), rest[n:]
			}
			out = append(out, e.rest()...)
			if string(out) != want.out || left != want.leave {
				t.Errorf("%q in pieces of %d: %q, %v, want %q, %v", keys, size, out, left, want.out, want.leave)
			}
		}
	}
}

// What has no "~" at the start of a line passes as it is; nothing else is ever lost but
// that and what follows "~.".
func FuzzEscapes(f *testing.F) {
	for _, seed := range []string{"", "~.", "a\r~~b", "~", "\n~x~.", "x~.\r~."} {
		f.Add([]byte(seed), 3)
	}
	f.Fuzz(func(t *testing.T, keys []byte, size int) {
		size = max(size, 1)
		var e escapes
		var out []byte
		for rest := keys; len(rest) > 0; {
			n := min(size, len(rest))
			some, left := e.filter(rest[:n])
			out, rest = append(out, some...), rest[n:]
			if left {
				if !bytes.Contains(keys, []byte("~.")) {
					t.Errorf("left at %q", keys)
				}
				return
			}
		}
		out = append(out, e.rest()...)
		if !strings.Contains("\r"+strings.ReplaceAll(string(keys), "\n", "\r"), "\r~") && !bytes.Equal(out, keys) {
			t.Errorf("%q became %q", keys, out)
		}
		if gone := len(keys) - len(out); gone < 0 || gone > bytes.Count(keys, []byte("~~")) {
			t.Errorf("%q became %q", keys, out)
		}
	})
}
