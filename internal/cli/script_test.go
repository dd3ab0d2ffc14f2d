package cli

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"google.golang.org/protobuf/proto"

	"github.com/harvest-run/executord/client/clienttest"
)

// serverKey finds a script's server.
type serverKey struct{}

// TestScripts runs testdata/script/*.txtar, each against a stand-in for executord of
// its own, at EXECUTOR_ADDRESS. See clienttest for the language of its programs.
// Beside the usual commands there are
//
//	exits CODE PROGRAM ARGS...    run it and expect this very exit code
//	server stop|start             take the stand-in away and bring it back
//	reached METHOD                wait until the method was called
//	asked METHOD REGEXP           match its last request, as JSON
//	never METHOD                  the method was not called
//	private FILE                  only its owner can read it and its directory
//	want HEADER                   take only calls with this authorization header
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:                 filepath.Join("testdata", "script"),
		RequireExplicitExec: true,
		Setup: func(e *testscript.Env) error {
			s := clienttest.New()
			if err := s.Listen("127.0.0.1:0"); err != nil {
				return err
			}
			e.Defer(s.Close)
			e.Values[serverKey{}] = s
			e.Setenv("EXECUTOR_ADDRESS", s.Address())
			e.Setenv("USER", "ann")
			e.Setenv("HOSTNAME", "box")
			return nil
		},
		Cmds: map[string]func(ts *testscript.TestScript, neg bool, args []string){
			"exits": func(ts *testscript.TestScript, neg bool, args []string) {
				if neg || len(args) < 2 {
					ts.Fatalf("usage: exits CODE PROGRAM ARGS...")
				}
				err := ts.Exec(args[1], args[2:]...)
				code := 0
				if failed, ok := errors.AsType[*exec.ExitError](err); ok {
					code = failed.ExitCode()
				} else {
					ts.Check(err)
				}
				if strconv.Itoa(code) != args[0] {
					ts.Fatalf("exit code %d, want %s", code, args[0])
				}
			},
			"server": func(ts *testscript.TestScript, _ bool, args []string) {
				s := serverOf(ts)
				switch strings.Join(args, " ") {
				case "stop":
					s.Stop()
				case "start":
					ts.Check(s.Listen(s.Address()))
				default:
					ts.Fatalf("usage: server stop|start")
				}
			},
			"reached": func(ts *testscript.TestScript, _ bool, args []string) {
				for range 6000 {
					if len(serverOf(ts).Calls(args[0])) > 0 {
						return
					}
					time.Sleep(10 * time.Millisecond)
				}
				ts.Fatalf("%s is never called", args[0])
			},
			"asked": func(ts *testscript.TestScript, neg bool, args []string) {
				if len(args) != 2 {
					ts.Fatalf("usage: asked METHOD REGEXP")
				}
				text, err := protoJSON(lastCall(ts, args[0]))
				ts.Check(err)
				if regexp.MustCompile(args[1]).Match(text) == neg {
					ts.Fatalf("request %s", text)
				}
			},
			"private": func(ts *testscript.TestScript, _ bool, args []string) {
				for path, mode := range map[string]os.FileMode{args[0]: 0o600, filepath.Dir(args[0]): 0o700} {
					info, err := os.Stat(ts.MkAbs(path))
					ts.Check(err)
					if info.Mode().Perm() != mode {
						ts.Fatalf("%s has mode %v", path, info.Mode())
					}
				}
			},
			"want": func(ts *testscript.TestScript, _ bool, args []string) { serverOf(ts).Want(strings.Join(args, " ")) },
			"never": func(ts *testscript.TestScript, _ bool, args []string) {
				if n := len(serverOf(ts).Calls(args[0])); n > 0 {
					ts.Fatalf("%s was called %d times", args[0], n)
				}
			},
		},
	})
}

func serverOf(ts *testscript.TestScript) *clienttest.Server {
	s, ok := ts.Value(serverKey{}).(*clienttest.Server)
	if !ok {
		ts.Fatalf("there is no server")
	}
	return s
}

func lastCall(ts *testscript.TestScript, method string) proto.Message {
	calls := serverOf(ts).Calls(method)
	if len(calls) == 0 {
		ts.Fatalf("%s was not called", method)
	}
	return calls[len(calls)-1]
}
