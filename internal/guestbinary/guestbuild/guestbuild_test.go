package guestbuild

import (
	"bytes"
	"debug/elf"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestBuild(t *testing.T) {
	dir := t.TempDir()
	guest, err := Build(dir)
	if err != nil {
		t.Fatal(err)
	}
	f, err := elf.NewFile(bytes.NewReader(guest))
	if err != nil {
		t.Fatal(err)
	}
	// A guest that needs a loader could not start in a root that has none.
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP || p.Type == elf.PT_DYNAMIC {
			t.Errorf("the guest is not static: it has a %v segment", p.Type)
		}
	}
	if info, err := os.Stat(filepath.Join(dir, "executor-guest")); err != nil || info.Mode()&0o111 == 0 {
		t.Errorf("executor-guest in dir: %v, %v, want an executable file", info, err)
	}
}

func TestBuildTellsWhatTheCompilerSaid(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	// The path is what the compiler says, beside its exit status.
	_, err := Build(file)
	if err == nil || strings.Count(err.Error(), file) == 0 {
		t.Errorf("into a file instead of a directory: %v, want an error that names it", err)
	}
}
