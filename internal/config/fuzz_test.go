package config

import (
	"net"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"

	configv1 "github.com/harvest-run/executord/gen/harvest/config/v1"
)

// Whatever a file and a variable hold: it is refused, or it is a configuration that
// keeps the promises and that survives being printed and read again.
func FuzzLoad(f *testing.F) {
	printed, err := Print(load(f, asRoot()))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(printed, 0, "127.0.0.1:0")
	f.Add([]byte("local: {extra_paths: [/a, \"/\\u2028\"]}\r\n"), 2, "1h")
	f.Add([]byte("? [listen]\n: &a x\n<<: *a\n---\n"), 3, "keep")
	f.Add([]byte("limits: {pids: !!float 9, memory_bytes: 0o17}\u0085"), 6, "2GiB")
	f.Add([]byte("listen: !!binary AAAA\ndrain_timeout: -0\n"), 15, "/a::/b")
	f.Add([]byte("listen: |+\n  unix:/x\n\n\n"), 1, "~/x")
	f.Add([]byte("tls: {cert_file: /c, key_file: /k}\nauth: {methods: [api_key]}\n"), 0, "0.0.0.0:1")
	f.Fuzz(func(t *testing.T, file []byte, n int, text string) {
		all := fields()
		chosen := all[uint(n)%uint(len(all))]
		in := asRoot().withEnv("HOME=/root").withFile(t, string(file)).withEnv(chosen.variable() + "=" + text)
		config, err := Load(in)
		if err != nil {
			if strings.TrimSpace(err.Error()) == "" {
				t.Error("an error without words")
			}
			return
		}
		guarded := config.GetTls().GetCertFile() != "" && config.GetTls().GetKeyFile() != "" && len(config.GetAuth().GetMethods()) > 0
		if !guarded && !isLocal(config.GetListen()) {
			t.Errorf("it listens on %q", config.GetListen())
		}
		if !strings.HasPrefix(config.GetStateDir(), "/") || config.GetOnStop() == configv1.OnStop_ON_STOP_UNSPECIFIED ||
			config.GetLimits().GetMemoryBytes() < 0 || config.GetOutput().GetMaxRetainedBytes() < config.GetOutput().GetDefaultRetainedBytes() {
			t.Errorf("it is accepted: %v", config)
		}
		printed, err := Print(config)
		if err != nil {
			t.Fatalf("it cannot be printed: %v", err)
		}
		again, err := Load(asRoot().withFile(t, string(printed)))
		if err != nil {
			t.Fatalf("printed, it is refused: %v\n%s", err, printed)
		}
		if !proto.Equal(config, again) {
			t.Errorf("printed and read again it is another:\n%v\n%v\n%s", config, again, printed)
		}
	})
}

// isLocal decides by the address that a listener would have.
func isLocal(listen string) bool {
	if strings.HasPrefix(listen, "unix:/") {
		return true
	}
	address, err := net.ResolveTCPAddr("tcp", strings.Replace(listen, "localhost:", "127.0.0.1:", 1))
	return err == nil && address.IP.IsLoopback()
}
