package main

import (
	"bufio"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/harvest-run/executord/internal/engine/modal/modaltest"
	modal "github.com/modal-labs/modal-client/go"
	"google.golang.org/grpc/codes"
)

func TestMain(m *testing.M) {
	if os.Getenv("BE_FAKEMODAL") != "" || filepath.Base(os.Args[0]) != filepath.Base(testBinary()) {
		main()
	}
	os.Exit(m.Run())
}

func testBinary() string {
	path, err := os.Executable()
	if err != nil {
		panic(err)
	}
	return path
}

// begin starts the program and waits until it serves.
func begin(t *testing.T, args ...string) (*exec.Cmd, ready) {
	t.Helper()
	cmd := exec.Command(testBinary(), args...)
	cmd.Env = append(os.Environ(), "BE_FAKEMODAL=1")
	cmd.Stderr = os.Stderr
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	var r ready
	if err := json.Unmarshal([]byte(line), &r); err != nil {
		t.Fatal(err)
	}
	return cmd, r
}

func TestProgram(t *testing.T) {
	dir := t.TempDir()
	cmd, r := begin(t, "-dir", dir, "-secret", "named:KEY=value")
	for k, v := range r.Environment {
		t.Setenv(k, v)
	}
	ctx := t.Context()
	c, err := modal.NewClient()
	if err != nil {
		t.Fatal(err)
	}
	app, err := c.Apps.FromName(ctx, "app", &modal.AppFromNameParams{CreateIfMissing: true})
	if err != nil {
		t.Fatal(err)
	}
	secret, err := c.Secrets.FromName(ctx, "named", nil)
	if err != nil {
		t.Fatal(err)
	}
	sb, err := c.Sandboxes.Create(ctx, app, c.Images.FromRegistry("debian", nil), &modal.SandboxCreateParams{Secrets: []*modal.Secret{secret}})
	if err != nil {
		t.Fatal(err)
	}
	// Who made it goes, and comes back.
	id := sb.SandboxID
	if err := sb.Detach(); err != nil {
		t.Fatal(err)
	}
	c.Close()
	if c, err = modal.NewClient(); err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if sb, err = c.Sandboxes.FromID(ctx, id, nil); err != nil {
		t.Fatal(err)
	}
	defer sb.Detach()
	if _, err := sb.Exec(ctx, []string{"sh", "-c", "test $KEY = value && exec sleep 98767"}, nil); err != nil {
		t.Fatal(err)
	}
	admin := modaltest.Remote{URL: r.Admin}
	sandboxes, err := admin.Sandboxes(ctx)
	if err != nil || len(sandboxes) != 1 || sandboxes[0].ID != id || sandboxes[0].SecretNames[0] != "named" {
		t.Fatalf("sandboxes: %+v, %v", sandboxes, err)
	}
	if err := admin.Inject(ctx, modaltest.Fault{RPC: "CP.SandboxTagsGetV2", Code: codes.NotFound}); err != nil {
		t.Fatal(err)
	}
	if _, err := sb.GetTags(ctx, nil); err == nil {
		t.Error("the fault did not come")
	}
	if counts, err := admin.Counts(ctx); err != nil || counts["CP.SandboxCreateV2"] != 1 {
		t.Errorf("counts: %v, %v", counts, err)
	}
	if err := admin.Preempt(ctx, "sb-none", modaltest.GoneFailed); err == nil || !strings.Contains(err.Error(), "not found") {
		t.Errorf("preempt what is not there: %v", err)
	}
	if running() != 1 {
		t.Errorf("%d processes run", running())
	}
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("it ended: %v", err)
	}
	if left, _ := filepath.Glob(filepath.Join(dir, "*")); len(left) > 0 || running() != 0 {
		t.Errorf("left behind: %v, %d processes", left, running())
	}
}

func TestKilledProgramTakesItsSandboxesWithIt(t *testing.T) {
	dir := t.TempDir()
	cmd, r := begin(t, "-dir", dir)
	for k, v := range r.Environment {
		t.Setenv(k, v)
	}
	ctx := t.Context()
	c, err := modal.NewClient()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	app, err := c.Apps.FromName(ctx, "app", &modal.AppFromNameParams{CreateIfMissing: true})
	if err != nil {
		t.Fatal(err)
	}
	sb, err := c.Sandboxes.Create(ctx, app, c.Images.FromRegistry("debian", nil), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer sb.Detach()
	if _, err := sb.Exec(ctx, []string{"sleep", "98767"}, nil); err != nil {
		t.Fatal(err)
	}
	// It dies with news from the sandbox unread, which ends their connection in another way.
	if _, err := sb.Exec(ctx, []string{"sleep", "0.2"}, nil); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	time.Sleep(500 * time.Millisecond)
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	cmd.Wait()
	for begun := time.Now(); running() > 0; time.Sleep(10 * time.Millisecond) {
		if time.Since(begun) > 20*time.Second {
			t.Fatal("its sandboxes live on")
		}
	}
	// What it left on the host is removed by the next one.
	left := func() []string {
		dirs, _ := filepath.Glob(filepath.Join(dir, "*"))
		for _, pattern := range []string{"/sys/fs/cgroup/", "/sys/fs/cgroup/*/"} {
			groups, _ := filepath.Glob(pattern + "modaltest-" + strconv.Itoa(cmd.Process.Pid) + "-*")
			dirs = append(dirs, groups...)
		}
		return dirs
	}
	if len(left()) == 0 {
		t.Error("nothing was left")
	}
	for begun := time.Now(); len(left()) > 0; time.Sleep(10 * time.Millisecond) {
		if time.Since(begun) > 20*time.Second {
			t.Fatalf("left behind: %v", left())
		}
		next, err := modaltest.Start(modaltest.Config{Dir: dir})
		if err != nil {
			t.Fatal(err)
		}
		if err := next.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// running counts the program that was started in the sandbox.
func running() int {
	text, _ := exec.Command("pgrep", "-fc", "^sleep 98767").Output()
	return int(text[0] - '0')
}
