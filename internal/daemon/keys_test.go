package daemon

import (
	"bytes"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/harvest-run/executord/client"
	configv1 "github.com/harvest-run/executord/gen/harvest/config/v1"
	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
	"github.com/harvest-run/executord/internal/auth/authtest"
)

// makeKey makes a key as executord keys create does.
func makeKey(t *testing.T, args ...string) (key, told string) {
	t.Helper()
	var stdout bytes.Buffer
	stderr := &syncBuffer{}
	if code := Main(t.Context(), append([]string{"keys", "create"}, args...), nil, nil, &stdout, stderr); code != 0 {
		t.Fatalf("exit code %d: %s", code, stderr)
	}
	key = strings.TrimSpace(stdout.String())
	if !strings.HasPrefix(key, "exk_") || strings.Count(stdout.String(), "\n") != 1 || strings.Contains(stderr.String(), key) {
		t.Fatalf("stdout %q, stderr %q", stdout.String(), stderr)
	}
	return key, stderr.String()
}

// The first key is made before the first start; with it an admin makes others over TLS.
// Neither log nor state directory ever holds one.
func TestFirstKey(t *testing.T) {
	cfg := settings(t)
	admin, told := makeKey(t, "--state-dir", cfg.GetStateDir())
	if !strings.Contains(told, "of key:admin, role admin") {
		t.Errorf("%q", told)
	}
	user, _ := makeKey(t, "--state-dir", cfg.GetStateDir(), "--owner=ann", "--role=user", "--lifetime=1h")

	ca := authtest.NewCA(t, "ca")
	cert, certKey := ca.Issue(authtest.Leaf{Server: true})
	cfg.Tls = &configv1.Tls{CertFile: cert, KeyFile: certKey}
	cfg.Auth = &configv1.Auth{
		Methods: []configv1.Auth_Method{configv1.Auth_METHOD_API_KEY}, Quotas: &configv1.Quotas{Sessions: 1},
	}
	logs := &syncBuffer{}
	complete := Config{Settings: cfg, OpenEngines: newFakeEngine().open, Logger: slog.New(slog.NewTextHandler(logs, nil))}
	r := start(t, complete)
	dial := func(key string) *client.Client {
		c, err := client.Dial(client.Config{Address: cfg.GetListen(), TLS: &client.TLS{CAFile: ca.File, ServerName: "localhost"}, APIKey: key})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	root, ann, stranger := dial(admin), dial(user), dial("")
	made, err := root.Auth().CreateApiKey(t.Context(), &executorv1.CreateApiKeyRequest{DisplayName: "bob", Role: executorv1.Role_ROLE_USER})
	if err != nil {
		t.Fatal(err)
	}
	bob := dial(made.GetKey())
	if _, err := ann.Auth().ListApiKeys(t.Context(), &executorv1.ListApiKeysRequest{}); client.Reason(err) != "ROLE_REQUIRED" {
		t.Errorf("%v", err)
	}
	if _, err := stranger.Sessions().ListSessions(t.Context(), &executorv1.ListSessionsRequest{}); client.Reason(err) != "CREDENTIALS_MISSING" {
		t.Errorf("%v", err)
	}
	for who, c := range map[string]*client.Client{"key:ann": ann, "key:bob": bob} {
		s, err := c.Sessions().CreateSession(t.Context(), &executorv1.CreateSessionRequest{})
		if err != nil || s.GetSession().GetOwner() != who {
			t.Errorf("%v, %v", s, err)
		}
		if _, err := c.Sessions().CreateSession(t.Context(), &executorv1.CreateSessionRequest{}); client.Reason(err) != "QUOTA_EXCEEDED" {
			t.Errorf("%s: %v", who, err)
		}
		if list, err := c.Sessions().ListSessions(t.Context(), &executorv1.ListSessionsRequest{}); err != nil || len(list.GetSessions()) != 1 {
			t.Errorf("%v, %v", list, err)
		}
	}
	if list, err := root.Sessions().ListSessions(t.Context(), &executorv1.ListSessionsRequest{}); err != nil || len(list.GetSessions()) != 2 {
		t.Errorf("%v, %v", list, err)
	}

	// While it runs, it is the one to ask.
	stderr := &syncBuffer{}
	code := Main(t.Context(), []string{"keys", "create", "--state-dir", cfg.GetStateDir()}, nil, nil, &bytes.Buffer{}, stderr)
	if code != 1 || !strings.Contains(stderr.String(), "in use by another executord") || !strings.Contains(stderr.String(), "executorctl auth keys create") {
		t.Errorf("exit code %d: %s", code, stderr)
	}
	if err := r.stop(); err != nil {
		t.Fatal(err)
	}
	for _, key := range []string{admin, user, made.GetKey()} {
		secret := key[strings.LastIndex(key, "_")+1:]
		if strings.Contains(logs.String(), secret) {
			t.Error("the log has a key")
		}
		wantNowhere(t, cfg.GetStateDir(), secret)
	}
	// The last uses were recorded at the end.
	second := start(t, complete)
	list, err := dial(admin).Auth().ListApiKeys(t.Context(), &executorv1.ListApiKeysRequest{})
	if err != nil || len(list.GetApiKeys()) != 3 {
		t.Fatalf("%v, %v", list, err)
	}
	for _, key := range list.GetApiKeys() {
		if key.GetLastUseTime() == nil || time.Since(key.GetLastUseTime().AsTime()) > time.Hour {
			t.Errorf("%v", key)
		}
	}
	if err := second.stop(); err != nil {
		t.Fatal(err)
	}
}

// wantNowhere looks for a text in all files below a directory.
func wantNowhere(t *testing.T, dir, text string) {
	t.Helper()
	files := 0
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		content, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		files++
		if bytes.Contains(content, []byte(text)) {
			t.Errorf("%s has it", path)
		}
		return nil
	})
	if err != nil || files == 0 {
		t.Errorf("%d files, %v", files, err)
	}
}

func TestKeysCreateRefuses(t *testing.T) {
	dir := t.TempDir()
	for name, test := range map[string]struct {
		args []string
		code int
		want string
	}{
		"a role that is none":    {[]string{"--state-dir", dir, "--role=root"}, 2, "none of user, operator, admin"},
		"an owner that is none":  {[]string{"--state-dir", dir, "--owner=a b"}, 1, "must be 1 to 63 characters"},
		"a lifetime of the past": {[]string{"--state-dir", dir, "--lifetime=-1s"}, 1, "lifetime"},
		"no directory":           {[]string{"--state-dir", "/dev/null/x"}, 1, "make state directory"},
		"no configuration":       {[]string{"--config", "/nowhere/x"}, 2, "/nowhere/x"},
		"an argument":            {[]string{"x"}, 2, "unknown command"},
	} {
		t.Run(name, func(t *testing.T) {
			var stdout bytes.Buffer
			stderr := &syncBuffer{}
			code := Main(t.Context(), append([]string{"keys", "create"}, test.args...), nil, nil, &stdout, stderr)
			if code != test.code || !strings.Contains(stderr.String(), test.want) || stdout.Len() > 0 {
				t.Errorf("exit code %d, %q, %q", code, stdout.String(), stderr)
			}
		})
	}
}

// A certificate that cannot be read is found at the start, before anything is taken up.
func TestBadCertificate(t *testing.T) {
	cfg := settings(t)
	cfg.Tls = &configv1.Tls{CertFile: "/nowhere/c", KeyFile: "/nowhere/k"}
	engine := newFakeEngine()
	if _, err := (Config{Settings: cfg, Logger: discard(), OpenEngines: engine.open}).Complete(t.Context()); err == nil || !strings.Contains(err.Error(), "prepare TLS: ") || engine.closed != 0 {
		t.Errorf("%v", err)
	}
}
