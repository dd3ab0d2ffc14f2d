package e2e

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
	"github.com/harvest-run/executord/internal/engine/modal/modaltest"
)

const (
	// onModal in the environment of these tests has every executord run its sandboxes on
	// Modal: "fake" on a fake of it, "real" on the service, with the credentials that are
	// there.
	onModal = "EXECUTORD_E2E_MODAL"
	// builtIn names the directory of the binaries for those tests.
	builtIn = "EXECUTORD_E2E_BINARIES"
)

// briefly are the tests of issues 1 and 2 that are run on Modal each time; `make
// test-modal-fake` runs all that the table below does not except.
func briefly() []string {
	return []string{
		"TestHello", "TestBytesComeApartAndExact", "TestFirstByteComesBeforeTheEnd", "TestResumeFromEveryCursor", "TestTimeoutEndsTheTree",
		"TestCancelEndsTheTree", "TestStraysDoNotDelayTheResult", "TestReadOutput", "TestStartFailedSaysWhy", "TestSecretsAreNotKept",
		"TestKillWhileRunning", "TestKillKeepsSessions", "TestForwardedStdin", "TestKillInMidInput", "TestTerminalIsGivenBack",
		"TestRepeatAfterKillJoins", "TestModalCosts", "TestModalDoctor", "TestModalBesideLocal",
	}
}

// exceptions are the tests that are not run on Modal, and why.
func exceptions() map[string]string {
	const (
		host    = "looks for what is left on the host, where a sandbox of Modal's never was"
		limit   = "is about a limit that Modal does not have"
		fakes   = "is about the memory or the descriptors of executord, which the engine has no part in"
		nothing = "makes no sandbox, or is about how executord is called"
		slow    = "makes hundreds of sandboxes to measure the local engine with"
	)
	return map[string]string{
		"TestOrdinaryUser":             "is about the local engine of an ordinary user",
		"TestFileLimitsAsOrdinaryUser": "is about the local engine of an ordinary user",
		"TestForkBombIsContained":      limit,
		"TestMemoryLimit":              "expects OOM_KILLED; Modal kills what goes over its limit of memory and tells nobody that it did, so that it is SIGNALED",
		"TestEgressOverARestart":       "expects new connections to fail at once while executord is away; the program that carries the pipe waits for it for 75 s, and so do they (docs/modal.md)",
		"TestOpenFiles":                "asks for more open files than the sandbox has, which a guest that is root only in somebody else's box cannot get",
		"TestWarmMemoryLimit":          "expects OOM_KILLED; see TestMemoryLimit",
		"TestEgressRefuses":            "tries packet sockets, which a sandbox of the fake may have on its loopback, the only interface; what Modal's have is Modal's affair",
		"TestDiskFill":                 limit,
		"TestKillWithDisks":            limit,
		"TestBurstOfCreates":           slow,
		"TestKillWithFiftySandboxes":   slow,
		"TestFewDescriptors":           fakes,
		"TestFloodKeepsMemoryFlat":     fakes,
		"TestEveryEnd":                 host,
		"TestKillOfEverything":         "kills the local engine's guests beside executord; Modal's workers are not in its reach",
		"TestWarmStart":                "compares times of the local engine with and without a pool",
		"TestReachableOnlyGuarded":     nothing,
		"TestWhoMayCall":               nothing,
		"TestBadStateIsRefused":        nothing,
		"TestOneDaemonPerState":        nothing,
		"TestRealPrograms":             "needs programs and files of this host",
		"TestHostNetwork":              "is about the network of this host",
	}
}

// modalEnv is what an executord on Modal needs in its environment; modalAdmin orders
// faults and counts calls, where it is a fake.
var (
	modalEnv   []string
	modalAdmin modaltest.Remote
)

// startModal starts the fake, if these tests are on one. What it returns ends it.
func startModal(dir string) (stop func() error, err error) {
	stop = func() error { return nil }
	switch os.Getenv(onModal) {
	case "":
		return stop, nil
	case "real":
		for _, v := range os.Environ() {
			if strings.HasPrefix(v, "MODAL_") {
				modalEnv = append(modalEnv, v)
			}
		}
		return stop, nil
	}
	cmd := exec.Command(filepath.Join(dir, "fakemodal"), "-secret", "harvest-github:GITHUB_TOKEN=fake")
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return stop, err
	}
	if err := cmd.Start(); err != nil {
		return stop, err
	}
	stop = func() error { return errors.Join(cmd.Process.Signal(syscall.SIGTERM), cmd.Wait()) }
	line, err := bufio.NewReader(out).ReadBytes('\n')
	if err != nil && !errors.Is(err, io.EOF) {
		return stop, err
	}
	var said struct {
		Environment map[string]string
		Admin       string
	}
	if err := json.Unmarshal(line, &said); err != nil {
		return stop, fmt.Errorf("the fake of Modal said %q: %w", line, err)
	}
	for name, value := range said.Environment {
		modalEnv = append(modalEnv, name+"="+value)
	}
	modalAdmin = modaltest.Remote{URL: said.Admin}
	return stop, nil
}

// leftAtModal is an error if a sandbox is alive in the fake.
func leftAtModal() error {
	if modalAdmin.URL == "" {
		return nil
	}
	all, err := modalAdmin.Sandboxes(context.Background())
	if err != nil {
		return err
	}
	var left []string
	for _, s := range all {
		if s.Running {
			left = append(left, s.Name)
		}
	}
	if len(left) > 0 {
		return fmt.Errorf("sandboxes are left: %v", left)
	}
	return nil
}

// atModal names the sandboxes of a daemon that are alive at the fake.
func (d *daemon) atModal() []string {
	d.t.Helper()
	if modalAdmin.URL == "" {
		return nil // the service is asked by the engine's own tests
	}
	key, err := os.ReadFile(filepath.Join(d.dir, "state/modal-owner.key"))
	if err != nil {
		d.t.Fatal(err)
	}
	all, err := modalAdmin.Sandboxes(d.t.Context())
	if err != nil {
		d.t.Fatal(err)
	}
	var names []string
	for _, s := range all {
		if s.Running && s.Tags["executord-owner"] == fmt.Sprintf("x%x", key[:10]) {
			names = append(names, s.Tags["executord-id"])
		}
	}
	return names
}

// engineFlags are those of an executord in these tests; a test that is not for its engine
// is left out.
func engineFlags(t *testing.T) []string {
	t.Helper()
	if os.Getenv(onModal) == "" {
		return nil
	}
	name, _, _ := strings.Cut(t.Name(), "/")
	if why, ok := exceptions()[name]; ok {
		t.Skip("not on Modal: it " + why)
	}
	return []string{"--engine", "modal", "--local-enabled=false"}
}

// engineName is the engine of these tests.
func engineName() string {
	if os.Getenv(onModal) == "" {
		return "local"
	}
	return "modal"
}

// needModal skips what only makes sense there; TestOnModal runs it.
func needModal(t *testing.T) {
	t.Helper()
	if os.Getenv(onModal) != "fake" {
		t.Skip("is run by TestOnModal")
	}
}

// TestOnModal runs tests of the behaviour once more, with all sandboxes on a fake of Modal,
// to which the real SDK speaks: the same outcomes.
func TestOnModal(t *testing.T) {
	needRoot(t)
	if os.Getenv(onModal) != "" {
		t.Skip("is this test's own child")
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeoutCause(t.Context(), 10*time.Minute, errors.New("not through within 10 min"))
	defer cancel()
	cmd := exec.CommandContext(ctx, self, "-test.v", "-test.run", "^("+strings.Join(briefly(), "|")+")$")
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGQUIT) } // says where it stands
	cmd.WaitDelay = time.Minute
	cmd.Env = append(os.Environ(), onModal+"=fake", builtIn+"="+binaries)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, tail(out, 24<<10))
	}
	for _, name := range briefly() {
		if !strings.Contains(string(out), "--- PASS: "+name+" ") {
			t.Errorf("%s was not run:\n%s", name, tail(out, 4<<10))
		}
	}
}

// TestExceptionsAreTests has no exception for a test that there is not.
func TestExceptionsAreTests(t *testing.T) {
	var text strings.Builder
	files, err := filepath.Glob("*_test.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		content, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		text.Write(content)
	}
	for _, name := range slices.Concat(briefly(), slices.Sorted(maps.Keys(exceptions()))) {
		if !strings.Contains(text.String(), "func "+name+"(t *testing.T)") {
			t.Errorf("there is no test %s", name)
		}
		if slices.Contains(briefly(), name) && exceptions()[name] != "" {
			t.Errorf("%s is run and excepted", name)
		}
	}
}

// callsOf returns the calls that f makes, by their names.
func callsOf(t *testing.T, f func()) map[string]int {
	t.Helper()
	if err := modalAdmin.ResetCounts(t.Context()); err != nil {
		t.Fatal(err)
	}
	f()
	counts, err := modalAdmin.Counts(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return counts
}

// controlPlane sums up the calls of the control plane.
func controlPlane(counts map[string]int) (n int) {
	for name, count := range counts {
		if strings.HasPrefix(name, "CP.") {
			n += count
		}
	}
	return n
}

// TestModalCosts counts what Modal is asked for: a one-shot from an image that is built
// takes at most 8 calls of the control plane, a command in a live sandbox none.
func TestModalCosts(t *testing.T) {
	needModal(t)
	d := start(t)
	c := d.dial()
	hello := func(parent string) {
		k := execute(t, c, &executorv1.ExecuteRequest{Parent: parent, Command: bash("echo hello")})
		k.wants(t, executorv1.Reason_REASON_EXITED)
		if k.stdout() != "hello\n" {
			t.Errorf("%q", k.stdout())
		}
	}
	hello("") // has the image built and the guest in it
	counts := callsOf(t, func() { hello("") })
	t.Logf("a one-shot: %v", counts)
	if n := controlPlane(counts); n == 0 || n > 8 {
		t.Errorf("a one-shot took %d calls of the control plane: %v", n, counts)
	}
	made, _, code := d.ctl("session", "create")
	if code != 0 {
		t.Fatal("no session")
	}
	session := strings.TrimSpace(made)
	hello(session)
	counts = callsOf(t, func() {
		for range 5 {
			hello(session)
		}
	})
	t.Logf("five commands in a session: %v", counts)
	if n := controlPlane(counts); n != 0 {
		t.Errorf("commands in a live sandbox took %d calls of the control plane: %v", n, counts)
	}
	if n := counts["TCR.TaskExecStart"]; n != 0 {
		t.Errorf("commands in a live sandbox took %d execs of Modal's: %v", n, counts)
	}
}

// doctor runs executord doctor.
func (d *daemon) doctor(env []string, args ...string) (string, int) {
	d.t.Helper()
	cmd := exec.Command(filepath.Join(binaries, "executord"), append([]string{"doctor", "--state-dir", filepath.Join(d.dir, "doctor")}, args...)...)
	cmd.Env = append([]string{"PATH=/usr/bin:/bin", "HOME=" + d.dir}, env...)
	out, err := cmd.CombinedOutput()
	if _, ok := errors.AsType[*exec.ExitError](err); err != nil && !ok {
		d.t.Fatal(err)
	}
	return string(out), cmd.ProcessState.ExitCode()
}

// TestModalDoctor finds what is there and what is not, says what to do, and tells no
// secret.
func TestModalDoctor(t *testing.T) {
	needModal(t)
	d := start(t)
	changed := func(name, value string) []string {
		env := slices.DeleteFunc(slices.Clone(modalEnv), func(v string) bool { return strings.HasPrefix(v, name+"=") })
		if value != "" {
			env = append(env, name+"="+value)
		}
		return env
	}
	for _, test := range []struct {
		name string
		env  []string
		args []string
		code int
		want []string
	}{
		{"all there", modalEnv, nil, 0, []string{"ok credentials from MODAL_TOKEN_ID and MODAL_TOKEN_SECRET", "ok workspace", "ok app harvest-agent-executor is ap-", "ok image", "ok secret harvest-github"}},
		{"no credentials", changed("MODAL_TOKEN_SECRET", ""), nil, 1, []string{"missing credentials", "to get it: run `modal token new`", "essential and missing: credentials, workspace, secret harvest-github"}},
		{"wrong credentials", changed("MODAL_TOKEN_SECRET", "as-wrong-canary"), nil, 1, []string{"ok credentials", "missing workspace Modal refuses the credentials"}},
		{"nobody answers", changed("MODAL_SERVER_URL", "http://127.0.0.1:1"), nil, 1, []string{"missing workspace no answer", "see whether this host reaches api.modal.com"}},
		{"no secret", modalEnv, []string{"--modal-secrets", "other"}, 1, []string{"missing secret other", "modal secret create other", "essential and missing: secret other"}},
		{"no app", modalEnv, []string{"--modal-app", "not-there"}, 0, []string{"ok workspace", "missing app", "`executord serve` makes it", "missing image"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			out, code := d.doctor(test.env, append([]string{"--engine", "modal"}, test.args...)...)
			squeezed := strings.Join(strings.Fields(out), " ")
			for _, want := range test.want {
				if !strings.Contains(squeezed, want) {
					t.Errorf("it does not say %q", want)
				}
			}
			if code != test.code {
				t.Errorf("exit code %d, want %d", code, test.code)
			}
			for _, v := range append(slices.Clone(modalEnv), "X=as-wrong-canary") {
				if name, value, _ := strings.Cut(v, "="); (strings.HasPrefix(name, "MODAL_TOKEN") || name == "X") && strings.Contains(out, value) {
					t.Errorf("it tells %s", name)
				}
			}
			if t.Failed() {
				t.Log(out)
			}
		})
	}
	// The server finds the same.
	out, _, code := d.ctl("doctor", "--engine", "modal")
	if code != 0 || !strings.Contains(strings.Join(strings.Fields(out), " "), "ok secret harvest-github is there") || strings.Contains(out, "limit.memory no") {
		t.Errorf("executorctl doctor: %d\n%s", code, out)
	}
	if _, errs, code := d.ctl("doctor", "--engine", "moon"); code == 0 || !strings.Contains(errs, "it has modal") {
		t.Errorf("of an engine that is not there: %d, %s", code, errs)
	}
}

// TestModalBesideLocal chooses between two engines, and leaves what is on one alone that is
// turned off for a while.
func TestModalBesideLocal(t *testing.T) {
	needModal(t)
	d := start(t)
	d.stop(syscall.SIGTERM)
	d.flags = []string{"--modal-enabled", "--on-stop", "keep"}
	d.up()
	where := func(args ...string) string {
		t.Helper()
		out, errs, code := d.ctl(append([]string{"run", "-o", "json"}, append(args, "--", "true")...)...)
		var sum struct{ Engine string }
		if err := json.Unmarshal([]byte(out), &sum); err != nil || code != 0 {
			t.Fatalf("%v: %v, %d, %s %s", args, err, code, out, errs)
		}
		return sum.Engine
	}
	for want, args := range map[string][]string{"local": nil, "modal": {"--engine", "modal", "--region", "us-east", "--runtime", "gvisor"}} {
		if got := where(args...); got != want {
			t.Errorf("%v ran on %q, want %q", args, got, want)
		}
	}
	if _, errs, code := d.ctl("run", "--gpu", "T4", "--", "true"); code == 0 || !strings.Contains(errs, "ask for no placement") {
		t.Errorf("a GPU of the local engine: %d, %s", code, errs)
	}
	if _, errs, code := d.ctl("run", "--engine", "moon", "--", "true"); code == 0 || !strings.Contains(errs, "it has local, modal") {
		t.Errorf("an engine that is not there: %d, %s", code, errs)
	}
	info, _, _ := d.ctl("admin", "info")
	if !strings.Contains(info, "engine local") || !strings.Contains(info, "engine modal") {
		t.Errorf("admin info:\n%s", info)
	}
	made, errs, code := d.ctl("session", "create", "--engine", "modal")
	if code != 0 {
		t.Fatal(errs)
	}
	session := strings.TrimSpace(made)
	if _, _, code := d.ctl("exec", session, "--", "sh", "-c", "echo kept > /root/file"); code != 0 {
		t.Fatal("nothing runs in the session")
	}
	d.kill()
	with := d.flags
	d.flags = []string{"--on-stop", "keep"}
	d.up()
	if _, errs, code := d.ctl("exec", session, "--", "true"); code == 0 || !strings.Contains(errs, `no engine "modal"; it has local`) {
		t.Errorf("in a session on an engine that is turned off: %d, %s", code, errs)
	}
	if got := where(); got != "local" {
		t.Errorf("without Modal it ran on %q", got)
	}
	d.kill()
	d.flags = with
	d.up()
	if out, errs, code := d.ctl("exec", session, "--", "cat", "/root/file"); code != 0 || out != "kept\n" {
		t.Errorf("when it is on again: %d, %q, %s", code, out, errs)
	}
	if _, errs, code := d.ctl("session", "terminate", session); code != 0 {
		t.Error(errs)
	}
}
