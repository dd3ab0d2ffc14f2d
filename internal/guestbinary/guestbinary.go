// Package guestbinary carries the executor-guest that executord starts in its
// sandboxes. `make build` puts it into bin/ before executord is compiled; a build
// without it compiles too, and says so when it is asked for it.
package guestbinary

import (
	"embed"
	"errors"
	"fmt"
)

//go:embed bin
var files embed.FS

// Bytes returns the static binary for this machine's architecture.
func Bytes() ([]byte, error) {
	b, err := files.ReadFile("bin/executor-guest")
	if err != nil {
		return nil, errors.New("this executord was compiled without an executor-guest: build it with `make build`")
	}
	if len(b) < 4 || string(b[:4]) != "\x7fELF" {
		return nil, fmt.Errorf("the embedded executor-guest (%d bytes) is not a program", len(b))
	}
	return b, nil
}
