package modaltest_test

import (
	"errors"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/harvest-run/executord/internal/engine/modal/modaltest"
	modal "github.com/modal-labs/modal-client/go"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

func TestSnapshotHasTheRoot(t *testing.T) {
	f := start(t, modaltest.Config{})
	w := prepare(t, f)
	sb := w.create(t, &modal.SandboxCreateParams{Workdir: "/opt"})
	out(t, sb, "mkdir /opt/deep && echo 1 > /opt/deep/file && echo 2 > /usr/bin/tool && chmod 755 /usr/bin/tool && rm /etc/hosts && ln -s deep /opt/link && rm -r /usr/share/doc")
	img, err := sb.SnapshotFilesystem(t.Context(), &modal.SandboxSnapshotFilesystemParams{TTL: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	out(t, sb, "echo changed > /opt/deep/file")
	start := func() *modal.Sandbox {
		again, err := w.Sandboxes.Create(t.Context(), w.app, img, nil)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = again.Detach() })
		return again
	}
	one, two := start(), start()
	for _, again := range []*modal.Sandbox{one, two} {
		got := out(t, again, "pwd; cat /opt/link/file /usr/bin/tool; test -e /etc/hosts || echo gone; test -e /usr/share/doc || echo gone; echo mine >> /opt/deep/file")
		if got != "/opt\n1\n2\ngone\ngone" {
			t.Errorf("got %q", got)
		}
	}
	f.Advance(61 * time.Minute)
	if _, err := w.Images.FromID(t.Context(), img.ImageID, nil); !errors.As(err, new(modal.NotFoundError)) {
		t.Errorf("after its life: %v", err)
	}
}

func TestSnapshotWhileProgramsWriteIsOfOneMoment(t *testing.T) {
	w := prepare(t, start(t, modaltest.Config{}))
	sb := w.create(t, nil)
	out(t, sb, "mkdir /a /b")
	// Two files that are never more than a line apart: that of b is written first.
	if _, err := sb.Exec(t.Context(), []string{"sh", "-c", "n=0; while :; do n=$((n+1)); echo $n >> /b/n; echo $n >> /a/n; done"}, nil); err != nil {
		t.Fatal(err)
	}
	out(t, sb, "head -c 30m /dev/urandom > /a/zzz; sleep 0.2")
	img, err := sb.SnapshotFilesystem(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	again, err := w.Sandboxes.Create(t.Context(), w.app, img, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer again.Detach()
	fields := strings.Fields(out(t, again, "tail -qn 1 /a/n /b/n"))
	var n []int
	for _, field := range fields {
		i, err := strconv.Atoi(field)
		if err != nil {
			t.Fatal(err)
		}
		n = append(n, i)
	}
	if len(n) != 2 || n[1] < n[0] || n[1]-n[0] > 1 {
		t.Errorf("the files are of different moments: %v", n)
	}
	if before := out(t, sb, "wc -l < /b/n; sleep 0.3"); before == out(t, sb, "wc -l < /b/n") {
		t.Error("the program does not go on")
	}
}

func TestDirectorySnapshots(t *testing.T) {
	w := prepare(t, start(t, modaltest.Config{}))
	sb := w.create(t, nil)
	ctx := t.Context()
	out(t, sb, "mkdir -p /data/d && echo 1 > /data/d/f && ln -s /data /link")
	img, err := sb.SnapshotDirectory(ctx, "/link", nil)
	if err != nil {
		t.Fatal(err)
	}
	other := w.create(t, nil)
	if err := other.MountImage(ctx, "/mnt/there", img, nil); err != nil {
		t.Fatal(err)
	}
	if got := out(t, other, "cat /mnt/there/d/f; echo 2 > /mnt/there/d/f"); got != "1" {
		t.Errorf("got %q", got)
	}
	if err := other.UnmountImage(ctx, "/mnt/there", nil); err != nil {
		t.Fatal(err)
	}
	if got := out(t, other, "ls /mnt/there | wc -l"); got != "0" {
		t.Errorf("%s files are left", got)
	}
	if err := other.MountImage(ctx, "/mnt/empty", nil, nil); err != nil {
		t.Fatal(err)
	}
	out(t, other, "echo 1 > /mnt/empty/f")
	if got := out(t, sb, "cat /data/d/f"); got != "1" {
		t.Errorf("the first sandbox has %q", got)
	}
}

func TestVolumesAreSeenWhenTheyAreCommitted(t *testing.T) {
	w := prepare(t, start(t, modaltest.Config{}))
	ctx := t.Context()
	v, err := w.Volumes.FromName(ctx, "cache", &modal.VolumeFromNameParams{CreateIfMissing: true})
	if err != nil {
		t.Fatal(err)
	}
	mounts := &modal.SandboxCreateParams{Volumes: map[string]*modal.Volume{"/cache": v}}
	one, two := w.create(t, mounts), w.create(t, mounts)
	out(t, one, "mkdir /cache/d && echo 1 > /cache/d/a && echo 1 > /cache/b")
	if got := out(t, two, "ls /cache | wc -l"); got != "0" {
		t.Errorf("seen before: %s", got)
	}
	if err := one.ReloadVolumes(ctx, nil); err != nil {
		t.Fatal(err)
	}
	if got := out(t, two, "ls /cache | wc -l"); got != "0" {
		t.Errorf("seen before it was reloaded: %s", got)
	}
	out(t, two, "echo 2 > /cache/b; echo 2 > /cache/c")
	if err := two.ReloadVolumes(ctx, nil); err != nil {
		t.Fatal(err)
	}
	if got := out(t, two, "cat /cache/d/a /cache/b /cache/c"); got != "1\n2\n2" {
		t.Errorf("got %q", got)
	}
	out(t, one, "rm /cache/d/a; echo 3 > /cache/d/e")
	if _, err := one.Terminate(ctx, nil); err != nil { // the end commits
		t.Fatal(err)
	}
	three := w.create(t, mounts)
	if got := out(t, three, "ls -R /cache; cat /cache/b"); got != "/cache:\nb\nc\nd\n\n/cache/d:\ne\n2" {
		t.Errorf("got %q", got)
	}
	read := true
	sub := "d"
	four := w.create(t, &modal.SandboxCreateParams{Volumes: map[string]*modal.Volume{
		"/ro": v.WithMountOptions(&modal.VolumeMountOptionsParams{ReadOnly: &read, SubPath: &sub}),
	}})
	if got := out(t, four, "ls /ro; touch /ro/x 2>/dev/null || echo refused"); got != "e\nrefused" {
		t.Errorf("got %q", got)
	}
	if err := w.Volumes.Delete(ctx, "cache", nil); err != nil {
		t.Error(err)
	}
	if _, err := w.Volumes.FromName(ctx, "cache", nil); !errors.As(err, new(modal.NotFoundError)) {
		t.Errorf("after it was deleted: %v", err)
	}
}

func TestReloadWithOpenFiles(t *testing.T) {
	w := prepare(t, start(t, modaltest.Config{OpenFiles: true}))
	v, err := w.Volumes.FromName(t.Context(), "cache", &modal.VolumeFromNameParams{CreateIfMissing: true})
	if err != nil {
		t.Fatal(err)
	}
	mounts := &modal.SandboxCreateParams{Volumes: map[string]*modal.Volume{"/cache": v}}
	sb := w.create(t, mounts)
	p, err := sb.Exec(t.Context(), []string{"sh", "-c", "exec 3>/cache/f; echo word >&3; echo up; read x"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(p.Stdout, make([]byte, 3)); err != nil {
		t.Fatal(err)
	}
	if err := sb.ReloadVolumes(t.Context(), nil); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("with an open file: %v", err)
	}
	if got := out(t, w.create(t, mounts), "cat /cache/f"); got != "word" {
		t.Errorf("committed is %q", got)
	}
	if err := p.Stdin.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := p.Wait(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	if err := sb.ReloadVolumes(t.Context(), nil); err != nil {
		t.Errorf("without: %v", err)
	}
}

func TestPreemptionCommitsNothing(t *testing.T) {
	f := start(t, modaltest.Config{})
	w := prepare(t, f)
	v, err := w.Volumes.FromName(t.Context(), "cache", &modal.VolumeFromNameParams{CreateIfMissing: true})
	if err != nil {
		t.Fatal(err)
	}
	mounts := &modal.SandboxCreateParams{Volumes: map[string]*modal.Volume{"/cache": v}}
	sb := w.create(t, mounts)
	out(t, sb, "echo 1 > /cache/a")
	if err := f.Preempt(sb.SandboxID, modaltest.GoneFailed); err != nil {
		t.Fatal(err)
	}
	if got := out(t, w.create(t, mounts), "ls /cache | wc -l"); got != "0" {
		t.Errorf("%s files", got)
	}
}

func TestSecrets(t *testing.T) {
	f := start(t, modaltest.Config{Secrets: map[string]map[string]string{"harvest-github": {"GITHUB_TOKEN": "named", "SAME": "named"}}})
	w := prepare(t, f)
	ctx := t.Context()
	named, err := w.Secrets.FromName(ctx, "harvest-github", &modal.SecretFromNameParams{RequiredKeys: []string{"GITHUB_TOKEN"}})
	if err != nil {
		t.Fatal(err)
	}
	inline, err := w.Secrets.FromMap(ctx, map[string]string{"INLINE": "inline", "SAME": "inline"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	f.ResetCounts()
	sb := w.create(t, &modal.SandboxCreateParams{Secrets: []*modal.Secret{named, inline}, Env: map[string]string{"LAST": "env"}})
	if n := f.Counts()["CP.SecretGetOrCreate"]; n != 0 {
		t.Errorf("%d calls for secrets", n)
	}
	if got := out(t, sb, "echo $GITHUB_TOKEN $INLINE $SAME $LAST"); got != "named inline inline env" {
		t.Errorf("got %q", got)
	}
	if _, err := w.Secrets.FromName(ctx, "missing", nil); !errors.As(err, new(modal.NotFoundError)) {
		t.Errorf("a missing secret: %v", err)
	}
	if _, err := w.Secrets.FromName(ctx, "harvest-github", &modal.SecretFromNameParams{RequiredKeys: []string{"OTHER"}}); !errors.As(err, new(modal.NotFoundError)) {
		t.Errorf("a missing key: %v", err)
	}
}

func TestWhatWasAskedForIsRecorded(t *testing.T) {
	f := start(t, modaltest.Config{})
	w := prepare(t, f)
	w.create(t, &modal.SandboxCreateParams{
		CPU: 1.5, CPULimit: 2, MemoryMiB: 256, MemoryLimitMiB: 512, Regions: []string{"eu-west"}, Runtime: modal.SandboxRuntimeVM,
		Timeout: time.Hour, IdleTimeout: time.Minute, OutboundDomainAllowlist: &modal.Allowlist{Entries: []string{"example.com"}},
	})
	i := f.Sandboxes()[0]
	if i.MilliCPU != 1500 || i.MilliCPULimit != 2000 || i.MemoryMiB != 256 || i.MemoryLimitMiB != 512 || i.Regions[0] != "eu-west" ||
		i.Runtime == "" || i.Deadline.Sub(i.Created) != time.Hour || i.IdleTimeout != time.Minute || i.Network != "ALLOWLIST" ||
		i.Domains[0] != "example.com" || i.PID == 0 || !i.Running || i.Dockerfile[0] != "FROM debian:stable" {
		t.Errorf("got %+v", i)
	}
}

func TestNetworks(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	w := prepare(t, start(t, modaltest.Config{HostNetwork: true}))
	_, port, _ := net.SplitHostPort(l.Addr().String())
	connect := "bash -c 'exec 3<>/dev/tcp/127.0.0.1/" + port + "' 2>/dev/null && echo open || echo blocked"
	if got := out(t, w.create(t, nil), connect); got != "open" {
		t.Errorf("an open network: %s", got)
	}
	if got := out(t, w.create(t, &modal.SandboxCreateParams{BlockNetwork: true}), connect+"; cat /proc/net/dev | grep -c :"); got != "blocked\n1" {
		t.Errorf("a blocked network: %s", got)
	}
}

func TestTunnelsAndConnectTokens(t *testing.T) {
	w := prepare(t, start(t, modaltest.Config{}))
	ctx := t.Context()
	sb := w.create(t, &modal.SandboxCreateParams{EncryptedPorts: []int{8000}, UnencryptedPorts: []int{8001}})
	if _, err := sb.Exec(ctx, []string{"python3", "-m", "http.server", "8000", "--directory", "/etc/ssl"}, nil); err != nil {
		t.Fatal(err)
	}
	out(t, sb, "for i in $(seq 100); do (exec 3<>/dev/tcp/127.0.0.1/8000) 2>/dev/null && exit 0; bash -c 'exec 3<>/dev/tcp/127.0.0.1/8000' 2>/dev/null && exit 0; sleep 0.1; done; exit 1")
	tunnels, err := sb.Tunnels(ctx, 10*time.Second, nil)
	if err != nil || len(tunnels) != 2 {
		t.Fatalf("tunnels: %v, %v", tunnels, err)
	}
	if _, _, err := tunnels[8001].TCPSocket(); err != nil {
		t.Error(err)
	}
	get := func(url, token string) (int, string) {
		r, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
		if err != nil {
			t.Fatal(err)
		}
		r.Close = true
		if token != "" {
			r.Header.Set("Authorization", "Bearer "+token)
		}
		answer, err := http.DefaultClient.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		defer answer.Body.Close()
		body, err := io.ReadAll(answer.Body)
		if err != nil {
			t.Fatal(err)
		}
		return answer.StatusCode, string(body)
	}
	host, port := tunnels[8000].TLSSocket()
	if code, body := get("http://"+net.JoinHostPort(host, strconv.Itoa(port))+"/", ""); code != 200 || !strings.Contains(body, "openssl.cnf") {
		t.Errorf("over the tunnel: %d, %s", code, body)
	}
	credentials, err := sb.CreateConnectToken(ctx, &modal.SandboxCreateConnectTokenParams{Port: 8000})
	if err != nil {
		t.Fatal(err)
	}
	if code, body := get(credentials.URL+"/", credentials.Token); code != 200 || !strings.Contains(body, "openssl.cnf") {
		t.Errorf("with the token: %d, %s", code, body)
	}
	if code, _ := get(credentials.URL+"/", "other"); code != 401 {
		t.Errorf("with another token: %d", code)
	}
}
