package client

import (
	"net"
	"strings"
	"testing"
)

func TestTarget(t *testing.T) {
	tests := []struct{ address, want, err string }{
		{address: "", want: "dns:///127.0.0.1:7070"},
		{address: "127.0.0.1:7070", want: "dns:///127.0.0.1:7070"},
		{address: "[::1]:7070", want: "dns:///[::1]:7070"},
		{address: ":7070", want: "dns:///localhost:7070"},
		{address: "executord.internal:443", want: "dns:///executord.internal:443"},
		{address: "unix:/run/executord.sock", want: "unix:/run/executord.sock"},
		{address: "unix:///run/executord.sock", want: "unix:/run/executord.sock"},
		{address: "unix:executord.sock", want: "unix:executord.sock"},
		{address: "localhost", err: "must be host:port or unix:PATH"},
		{address: "/run/executord.sock", err: "must be host:port or unix:PATH"},
		{address: "::1:7070", err: "must be host:port or unix:PATH"},
		{address: "localhost:http", err: "is not a number"},
		{address: "localhost:0", err: "is not a number"},
		{address: "localhost:65536", err: "is not a number"},
		{address: "http://localhost:7070", err: "must be host:port"},
		{address: "a/b:7070", err: "is not a host"},
		{address: "unix:", err: "no path"},
		{address: "unix://relative", err: "absolute"},
		{address: "unix:/run/a?b", err: "must not contain"},
		{address: "unix:/run/a\x00b", err: "must not contain"},
	}
	for _, test := range tests {
		got, err := target(test.address)
		switch {
		case test.err == "" && (err != nil || got != test.want):
			t.Errorf("target(%q) = %q, %v; want %q", test.address, got, err, test.want)
		case test.err != "" && (err == nil || !strings.Contains(err.Error(), test.err)):
			t.Errorf("target(%q) = %q, %v; want an error with %q", test.address, got, err, test.err)
		}
	}
}

// FuzzTarget: what passes is one of two forms, and gRPC takes it.
func FuzzTarget(f *testing.F) {
	for _, seed := range []string{"", ":1", "[::1]:7070", "unix:/a", "unix:///a", "unix://a", "x:99999", "a:b:c", "dns:///x:1", "%zz:1"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, address string) {
		got, err := target(address)
		if err != nil {
			if got != "" {
				t.Errorf("a target %q beside error %v", got, err)
			}
			return
		}
		if path, ok := strings.CutPrefix(got, "unix:"); ok {
			if path == "" {
				t.Errorf("target(%q) = %q", address, got)
			}
		} else if host, port, err := net.SplitHostPort(strings.TrimPrefix(got, "dns:///")); err != nil || host == "" || port == "" {
			t.Errorf("target(%q) = %q", address, got)
		}
		c, err := Dial(Config{Address: address})
		if err != nil {
			t.Fatalf("dial %q: %v", address, err)
		}
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
}
