package local

import (
	"bufio"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/engine/enginetest"
)

func TestConformance(t *testing.T) {
	except := enginetest.Exceptions{}
	if os.Geteuid() != 0 {
		const why = "an ordinary user has no control groups, so nothing is limited or counted"
		for _, name := range []string{
			"usage grows", "the memory limit kills, and says so", "shared memory counts as memory",
			"the process limit refuses forks, and says so", "the processor limit holds", "the guest answers while everything is used up",
		} {
			except[name] = why
		}
		for _, name := range []string{
			"the limit of disk holds, wherever is written", "files without content meet the limit of disk",
			"a full sandbox is told why nothing starts, and goes on with room",
			"a sandbox with a limit of disk lives on with the next engine", "the end of a full sandbox is quick",
		} {
			except[name] = "an ordinary user cannot mount file systems"
		}
		except["a command can become another user"] = "an ordinary user can map no id but the own one"
	}
	enginetest.Run(t, func(t *testing.T) enginetest.Place {
		cfg := testConfig(t)
		cfg.Blank = 2 // the other tests have none
		return enginetest.Place{
			Open: func(t *testing.T) engine.Engine { return openEngine(t, cfg) },
			KillGuest: func(t *testing.T, id string) {
				r, err := readRecord(filepath.Join(cfg.StateDir, "local", "sandboxes", id, recordName))
				if err != nil {
					t.Fatal(err)
				}
				if err := syscall.Kill(r.PID, syscall.SIGKILL); err != nil {
					t.Fatalf("kill the guest of %s: %v", id, err)
				}
				await(t, "the guest is gone", func() bool { return !alive(r.PID) })
			},
		}
	}, except)
}

// TestAsOrdinaryUser runs this package's tests a second time, as a user who has
// nothing.
func TestAsOrdinaryUser(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("this is the run as an ordinary user")
	}
	dir, err := os.MkdirTemp(filepath.Dir(os.Getenv(envGuest)), "ordinary-")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(dir, ordinaryUser, ordinaryUser); err != nil {
		t.Fatal(err)
	}
	// By descriptor: go test puts the program where this user cannot go.
	self, err := os.Open("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	defer self.Close()
	args := []string{"-test.v", "-test.timeout=9m", "-test.skip=^TestAsOrdinaryUser$"}
	if testing.Short() {
		args = append(args, "-test.short")
	}
	cmd := exec.CommandContext(t.Context(), "/proc/self/fd/3", args...)
	cmd.ExtraFiles = []*os.File{self}
	cmd.Env = append(os.Environ(), envTemp+"="+dir, "HOME="+dir)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: ordinaryUser, Gid: ordinaryUser}}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = cmd.Stdout
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var last []string
	for lines := bufio.NewScanner(out); lines.Scan(); {
		line := lines.Text()
		if strings.Contains(line, "--- PASS") || strings.Contains(line, "--- SKIP") {
			t.Log(strings.TrimLeft(line, " "))
		} else if !strings.HasPrefix(line, "=== RUN") {
			last = append(last, line)
		}
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("as an ordinary user: %v\n%s", err, strings.Join(last, "\n"))
	}
}
