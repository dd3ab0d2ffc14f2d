package e2e

import (
	"bytes"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/harvest-run/executord/internal/auth/authtest"
)

// guarded is an executord that others than this host's users could reach: it listens on
// every address, of a network of its own that only loopback leads to, with TLS, API
// keys, client certificates and an issuer.
type guarded struct {
	t       *testing.T
	dir     string
	ca      *authtest.CA
	args    []string
	process *exec.Cmd
	secrets []string // which nothing may hold
}

func startGuarded(t *testing.T, flags ...string) *guarded {
	t.Helper()
	needRoot(t)
	_ = engineFlags(t)
	dir, err := os.MkdirTemp("", "xd-")
	if err != nil {
		t.Fatal(err)
	}
	g := &guarded{t: t, dir: dir, ca: authtest.NewCA(t, "ca")}
	claim(g.state())
	g.ca.Reissue(authtest.Leaf{CommonName: "first", Server: true}, g.path("cert.pem"), g.path("key.pem"))
	g.args = append([]string{
		"serve", "--listen", "0.0.0.0:7070", "--state-dir", g.state(), "--on-stop", "terminate", "--drain-timeout", "1s", "--log-level", "debug",
		"--tls-cert-file", g.path("cert.pem"), "--tls-key-file", g.path("key.pem"), "--tls-client-ca-file", g.ca.File,
		"--auth-methods", "api_key", "--auth-methods", "certificate", "--auth-certificates-users", "CN=carol",
	}, flags...)
	t.Cleanup(func() {
		g.stop()
		if t.Failed() {
			text, _ := os.ReadFile(g.path("log"))
			t.Logf("log of executord:\n%s", tail(text, 8<<10))
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return g
}

func (g *guarded) path(name string) string { return filepath.Join(g.dir, name) }

func (g *guarded) state() string { return g.path("state") }

// up starts it and waits until it is ready.
func (g *guarded) up() {
	g.t.Helper()
	before, _ := os.ReadFile(g.path("log"))
	log, err := os.OpenFile(g.path("log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		g.t.Fatal(err)
	}
	defer log.Close()
	script := `ip link set lo up && exec "$@"`
	g.process = exec.Command("sh", append([]string{"-c", script, "sh", filepath.Join(binaries, "executord")}, g.args...)...)
	g.process.Stdout, g.process.Stderr = log, log
	g.process.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=" + g.dir}
	g.process.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	if err := g.process.Start(); err != nil {
		g.t.Fatal(err)
	}
	for range 600 {
		if text, _ := os.ReadFile(g.path("log")); bytes.Contains(text[len(before):], []byte("msg=ready")) {
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
	g.t.Fatal("executord does not come up")
}

func (g *guarded) stop() {
	if g.process == nil {
		return
	}
	_ = g.process.Process.Signal(syscall.SIGTERM)
	_ = g.process.Wait()
	g.process = nil
}

// as runs executorctl with a key in its network; "" shows none.
func (g *guarded) as(key string, args ...string) (stdout, stderr string, code int) {
	g.t.Helper()
	pid := strconv.Itoa(g.process.Process.Pid)
	cmd := exec.Command("nsenter", append([]string{"--net=/proc/" + pid + "/ns/net", filepath.Join(binaries, "executorctl")}, args...)...)
	cmd.Env = append(os.Environ(), "EXECUTOR_ADDRESS=127.0.0.1:7070", "EXECUTOR_TLS_CA="+g.ca.File)
	if key != "" {
		cmd.Env = append(cmd.Env, "EXECUTOR_API_KEY="+key)
	}
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	if _, ok := errors.AsType[*exec.ExitError](err); err != nil && !ok {
		g.t.Fatal(err)
	}
	for _, secret := range g.secrets {
		if strings.Contains(errs.String(), secret) {
			g.t.Errorf("executorctl %q tells a key: %s", args, errs.String())
		}
	}
	return out.String(), errs.String(), cmd.ProcessState.ExitCode()
}

// must is as, and the command works.
func (g *guarded) must(key string, args ...string) string {
	g.t.Helper()
	stdout, stderr, code := g.as(key, args...)
	if code != 0 {
		g.t.Fatalf("executorctl %q: exit code %d: %s", args, code, stderr)
	}
	return strings.TrimSpace(stdout)
}

// refused is as, and the command fails with a word.
func (g *guarded) refused(key, word string, args ...string) {
	g.t.Helper()
	stdout, stderr, code := g.as(key, args...)
	if code == 0 || !strings.Contains(stderr, word) {
		g.t.Errorf("executorctl %q: exit code %d, stdout %q, stderr %q; want %q", args, code, stdout, stderr, word)
	}
}

// keep notes a key that nothing may hold.
func (g *guarded) keep(key string) string {
	g.secrets = append(g.secrets, key[strings.LastIndex(key, "_")+1:])
	return key
}

// What executord refuses to be: reachable from elsewhere without TLS and authentication.
func TestReachableOnlyGuarded(t *testing.T) {
	for name, flags := range map[string][]string{
		"plain":        {},
		"only TLS":     {"--tls-cert-file=/c", "--tls-key-file=/k"},
		"only keys":    {"--auth-methods=api_key"},
		"half of TLS":  {"--auth-methods=api_key", "--tls-cert-file=/c"},
		"TLS of peers": {"--tls-cert-file=/c", "--tls-key-file=/k", "--tls-client-ca-file=/a", "--tls-client-auth=require"},
	} {
		cmd := exec.Command(filepath.Join(binaries, "executord"), append([]string{"serve", "--state-dir", t.TempDir(), "--listen=0.0.0.0:7070"}, flags...)...)
		cmd.Env = []string{"PATH=/usr/bin:/bin"}
		out, err := cmd.CombinedOutput()
		if cmd.ProcessState.ExitCode() != 2 || !bytes.Contains(out, []byte("can be reached from elsewhere")) {
			t.Errorf("%s: %v: %s", name, err, out)
		}
	}
}

// A whole life: the first key, others, what is whose, roles, revocation, certificates,
// their rotation while a program runs, a restart; and no key anywhere afterwards.
func TestWhoMayCall(t *testing.T) {
	g := startGuarded(t, "--auth-quotas-sessions", "1")
	bootstrap := exec.Command(filepath.Join(binaries, "executord"), "keys", "create", "--state-dir", g.state(), "--owner", "root")
	first, err := bootstrap.Output()
	if err != nil {
		t.Fatal(err)
	}
	root := g.keep(strings.TrimSpace(string(first)))
	g.up()

	ann := g.keep(g.must(root, "auth", "keys", "create", "--owner", "ann"))
	bob := g.keep(g.must(root, "auth", "keys", "create", "--owner", "bob", "--lifetime", "24h"))
	ops := g.keep(g.must(root, "auth", "keys", "create", "--owner", "ops", "--role", "operator"))
	if who := g.must(ann, "auth", "whoami", "-o", "name"); who != "key:ann" {
		t.Errorf("ann is %q", who)
	}
	if out := g.must(ann, "run", `print("Hello from sandbox")`); out != "Hello from sandbox" {
		t.Errorf("%q", out)
	}
	g.refused("", "no credentials", "executions", "list")
	g.refused(ann[:len(ann)-10]+"aaaaaaaaaa", "not one of this server's", "executions", "list")
	g.refused(ann, "needs the role admin", "auth", "keys", "list")
	g.refused(ops, "needs the role admin", "auth", "keys", "create", "--owner", "eve", "--role", "admin")

	// Not-yours is not there.
	session := g.must(ann, "session", "create", "-o", "name")
	g.refused(ann, "that is all it may have", "session", "create")
	running := g.must(ann, "run", "--detach", "import time\nfor n in range(600):\n print(n, flush=True)\n time.sleep(0.1)")
	for _, args := range [][]string{
		{"executions", "get", running}, {"executions", "watch", running}, {"executions", "output", running}, {"executions", "wait", running},
		{"executions", "cancel", running}, {"executions", "delete", running}, {"session", "get", session}, {"session", "terminate", session},
		{"exec", session, "--", "true"},
	} {
		g.refused(bob, "there is no ", args...)
	}
	if list := g.must(bob, "executions", "list", "-o", "name"); list != "" {
		t.Errorf("bob sees %q", list)
	}
	if list := g.must(ops, "executions", "list", "-o", "name"); !strings.Contains(list, running) {
		t.Errorf("ops sees %q", list)
	}

	for n := 0; !strings.Contains(g.must(ann, "executions", "output", running), "2\n"); n++ {
		if n == 300 {
			t.Fatal("the program says nothing")
		}
	}
	// A rotation of the server's certificate while the program is watched: the stream goes
	// on, and new connections see the new certificate.
	follower := exec.Command("nsenter", "--net=/proc/"+strconv.Itoa(g.process.Process.Pid)+"/ns/net", filepath.Join(binaries, "executorctl"), "executions", "watch", running)
	follower.Env = append(os.Environ(), "EXECUTOR_ADDRESS=127.0.0.1:7070", "EXECUTOR_TLS_CA="+g.ca.File, "EXECUTOR_API_KEY="+ann)
	var followed, said bytes.Buffer
	follower.Stdout, follower.Stderr = &followed, &said
	if err := follower.Start(); err != nil {
		t.Fatal(err)
	}
	g.ca.Reissue(authtest.Leaf{CommonName: "second", Server: true}, g.path("cert.pem"), g.path("key.pem"))
	for n := 0; ; n++ {
		g.must(ann, "auth", "whoami")
		if text, _ := os.ReadFile(g.path("log")); bytes.Contains(text, []byte("certificates were read again")) {
			break
		}
		if n == 300 {
			t.Fatal("the certificate was not read again")
		}
		time.Sleep(100 * time.Millisecond)
	}
	var ended struct {
		Result struct {
			CancelledBy string `json:"cancelled_by"`
		} `json:"result"`
	}
	if err := json.Unmarshal([]byte(g.must(ops, "executions", "cancel", running, "-o", "json")), &ended); err != nil || !strings.HasPrefix(ended.Result.CancelledBy, "key:ops at 127.0.0.1:") {
		t.Errorf("cancelled by %q, %v", ended.Result.CancelledBy, err)
	}
	if err := follower.Wait(); follower.ProcessState.ExitCode() != 130 || strings.Contains(said.String(), "no connection") || !strings.HasPrefix(followed.String(), "0\n1\n2\n") {
		t.Errorf("the watcher: %v, said %q", err, said.String())
	}

	// Certificates.
	stranger := authtest.NewCA(t, "stranger")
	carol := func(ca *authtest.CA, leaf authtest.Leaf) []string {
		cert, key := ca.Issue(leaf)
		return []string{"auth", "whoami", "-o", "name", "--tls-cert", cert, "--tls-key", key}
	}
	if who := g.must("", carol(g.ca, authtest.Leaf{CommonName: "carol"})...); who != "cert:CN=carol" {
		t.Errorf("carol is %q", who)
	}
	g.refused("", "needs the role user", carol(g.ca, authtest.Leaf{CommonName: "dave"})...)
	g.refused("", "client certificate", carol(stranger, authtest.Leaf{CommonName: "carol"})...)
	g.refused("", "has expired", carol(g.ca, authtest.Leaf{CommonName: "carol", NotAfter: time.Now().Add(-time.Minute)})...)

	// Revocation, also over a restart.
	id := strings.Split(ann, "_")[1]
	g.must(root, "auth", "keys", "revoke", id)
	g.refused(ann, "was revoked", "auth", "whoami")
	g.stop()
	g.up()
	g.refused(ann, "was revoked", "auth", "whoami")
	second := g.keep(g.must(root, "auth", "keys", "create", "--owner", "ann"))
	if list := g.must(second, "executions", "list", "-o", "name"); !strings.Contains(list, running) {
		t.Errorf("with her second key ann sees %q", list)
	}
	keys := g.must(root, "auth", "keys", "list", "--all")
	if !strings.Contains(keys, "apiKeys/"+id) {
		t.Errorf("%s", keys)
	}
	g.stop()
	searched := 0
	if err := filepath.WalkDir(g.dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		text, err := os.ReadFile(path)
		for _, secret := range g.secrets {
			if strings.Contains(string(text), secret) {
				t.Errorf("%s has a key", path)
			}
		}
		searched++
		return err
	}); err != nil || searched < 5 {
		t.Errorf("%d files, %v", searched, err)
	}
}
