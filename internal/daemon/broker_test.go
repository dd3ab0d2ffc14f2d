package daemon

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	configv1 "github.com/harvest-run/executord/gen/harvest/config/v1"
)

func TestOpenBroker(t *testing.T) {
	path := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(path, []byte("hunter2\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	settings := func(secrets, private []string) Config {
		return Config{Settings: &configv1.Config{Broker: &configv1.Broker{Secrets: secrets, PrivateUpstreams: private}}}
	}
	b, named, err := settings([]string{"github=file:" + path}, []string{"10.0.0.0/8:443", "127.0.0.1:80"}).openBroker()
	if err != nil {
		t.Fatal(err)
	}
	if v, err := named.Lookup("github"); err != nil || v.Reveal() != "hunter2" {
		t.Error(err)
	}
	if err := b.Close(); err != nil {
		t.Error(err)
	}
	for name, c := range map[string]struct {
		cfg  Config
		want string
	}{
		"a secret":   {settings([]string{"hunter2"}, nil), "broker.secrets: "},
		"a name":     {settings(nil, []string{"a.example"}), "broker.private_upstreams: "},
		"no address": {settings(nil, []string{"10.0.0.0/33"}), "broker.private_upstreams: "},
	} {
		if _, _, err := c.cfg.openBroker(); err == nil || !strings.HasPrefix(err.Error(), c.want) || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%s: %v", name, err)
		}
	}
}
