package client

import (
	"fmt"
	"net"
	"strconv"
	"strings"
	"unicode"
)

// DefaultAddress is where executord listens if nobody says otherwise.
const DefaultAddress = "127.0.0.1:7070"

// target turns an address into what gRPC dials. An empty one is DefaultAddress.
// Only the two documented forms pass: gRPC would take many more and read a
// mistyped one as a name to look up.
func target(address string) (string, error) {
	if address == "" {
		address = DefaultAddress
	}
	if path, ok := strings.CutPrefix(address, "unix:"); ok {
		// unix:///run/x.sock is the same in the notation of URLs.
		if rest, ok := strings.CutPrefix(path, "//"); ok {
			if !strings.HasPrefix(rest, "/") {
				return "", fmt.Errorf("address %q: unix:// needs an absolute path", address)
			}
			path = rest
		}
		switch {
		case path == "":
			return "", fmt.Errorf("address %q: no path of a socket", address)
		case strings.ContainsAny(path, "?#%") || strings.ContainsFunc(path, unicode.IsControl):
			return "", fmt.Errorf("address %q: a socket's path must not contain '?', '#', '%%' or control characters", address)
		}
		return "unix:" + path, nil
	}
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return "", fmt.Errorf("address %q: must be host:port or unix:PATH", address)
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
		return "", fmt.Errorf("address %q: port %q is not a number from 1 to 65535", address, port)
	}
	if strings.ContainsFunc(host, func(r rune) bool { return r <= ' ' || r >= 0x7f || strings.ContainsRune(`/\?#@%"<>^{|}`+"`", r) }) {
		return "", fmt.Errorf("address %q: %q is not a host", address, host)
	}
	if host == "" {
		host = "localhost"
	}
	return "dns:///" + net.JoinHostPort(host, port), nil
}
