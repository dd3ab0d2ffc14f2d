package secret

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/harvest-run/executord/internal/fault"
)

func TestValueHides(t *testing.T) {
	const text = "hunter2-hunter2"
	v := value(t, text+"\n")
	if v.Reveal() != text {
		t.Errorf("%q", v.Reveal())
	}
	var log strings.Builder
	slog.New(slog.NewTextHandler(&log, nil)).Info("x", "value", v, "in", struct{ V Value }{v})
	encoded, err := json.Marshal(map[string]Value{"a": v})
	if err != nil {
		t.Fatal(err)
	}
	for _, shown := range []string{
		log.String(), string(encoded), v.String(), fmt.Sprint(v), fmt.Sprintf("%v %+v %#v %s %q %x", v, v, v, v, v, v),
		fmt.Sprintf("%+v %#v", struct{ V Value }{v}, []Value{v}), fmt.Errorf("no: %v", v).Error(),
	} {
		if strings.Contains(shown, "hunter2") || strings.Contains(shown, "68756e") {
			t.Errorf("it shows itself: %s", shown)
		}
	}
	for name, text := range map[string]string{"empty": " \n", "long": strings.Repeat("x", maxValue+1), "NUL": "a\x00b"} {
		if _, err := NewValue(text); fault.KindOf(err) != fault.Invalid {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestSource(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "token")
	write := func(text string, mode os.FileMode) {
		t.Helper()
		if err := os.WriteFile(path, []byte(text), mode); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
	}
	env := map[string]string{"GITHUB_TOKEN": "ghp_one"}
	s, err := NewSource([]string{"github=env:GITHUB_TOKEN", "model=file:" + path, "dir=file:" + dir}, func(name string) string { return env[name] })
	if err != nil {
		t.Fatal(err)
	}
	if got := s.Names(); !slices.Equal(got, []string{"dir", "github", "model"}) {
		t.Errorf("%q", got)
	}
	look := func(name string) string {
		v, err := s.Lookup(name)
		if err != nil {
			if strings.Contains(err.Error(), "first") {
				t.Errorf("the error shows it: %v", err)
			}
			return fault.ReasonOf(err)
		}
		return v.Reveal()
	}
	for _, c := range []struct {
		do         func()
		name, want string
	}{
		{func() {}, "github", "ghp_one"},
		{func() { env["GITHUB_TOKEN"] = "ghp_two" }, "github", "ghp_two"},
		{func() { delete(env, "GITHUB_TOKEN") }, "github", "SECRET_NOT_READABLE"},
		{func() {}, "model", "SECRET_NOT_READABLE"},
		{func() { write("first\n", 0o600) }, "model", "first"},
		{func() { write("second", 0o400) }, "model", "second"},
		{func() { write("first", 0o644) }, "model", "SECRET_NOT_READABLE"},
		{func() { write("", 0o600) }, "model", "SECRET_NOT_READABLE"},
		{func() {}, "dir", "SECRET_NOT_READABLE"},
		{func() {}, "unheard-of", "SECRET_UNKNOWN"},
	} {
		c.do()
		if got := look(c.name); got != c.want {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
	}
	write("third", 0o600)
	if got := s.Values(); len(got) != 1 || got[0].Reveal() != "third" {
		t.Errorf("%d values", len(got))
	}
	bag, err := NewBag(s, map[string]string{"model": "of the session", "own": "mine"})
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{"model": "of the session", "own": "mine"} {
		if v, err := bag.Lookup(name); err != nil || v.Reveal() != want {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := bag.Lookup("github"); fault.ReasonOf(err) != "SECRET_NOT_READABLE" {
		t.Error(err)
	}
	if got := len(bag.Values()); got != 3 {
		t.Errorf("%d values", got)
	}
	for _, inline := range []map[string]string{{"A": "x"}, {"a": ""}} {
		if _, err := NewBag(nil, inline); fault.KindOf(err) != fault.Invalid {
			t.Errorf("%v: %v", inline, err)
		}
	}
	lonely, err := NewBag(nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := lonely.Lookup("x"); fault.ReasonOf(err) != "SECRET_UNKNOWN" {
		t.Error(err)
	}
}

func TestNewSourceRefuses(t *testing.T) {
	for _, text := range []string{
		"ghp_secret", "github", "=env:X", "A=env:X", "a=env:", "a=env:1", "a=env:A B", "a=file:relative", "a=file:/a/../b", "a=vault:x", "a=", "-a=env:X",
	} {
		_, err := NewSource([]string{text}, os.Getenv)
		if err == nil || strings.Contains(err.Error(), "ghp_secret") {
			t.Errorf("%q: %v", text, err)
		}
	}
	if _, err := NewSource([]string{"a=env:X", "a=env:Y"}, os.Getenv); err == nil {
		t.Error("a name is taken twice")
	}
}
