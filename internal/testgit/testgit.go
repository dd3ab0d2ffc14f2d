// Package testgit is a git server for tests: git's own http-backend behind HTTP on
// loopback, with repositories made of a few files. It asks for credentials where it is
// told to, remembers who came with what, and can be slow or broken in the ways that
// servers are. It is not linked into any program of this module.
package testgit

import (
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/cgi"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// Failure is a way in which the server is broken.
type Failure int

const (
	// Works is the zero value.
	Works Failure = iota
	// Unavailable answers 503.
	Unavailable
	// Cut ends the connection in the middle of a pack.
	Cut
	// Stalled answers nothing until the request is given up.
	Stalled
	// RefusesPush answers 403 to pushes.
	RefusesPush
	// Elsewhere redirects to Server.Target.
	Elsewhere
)

// Request is one that the server was asked.
type Request struct {
	Method, Path string
	// User and Token are of its Authorization, "" without one; of a Bearer token the
	// user is "".
	User, Token string
	// Header is all of it.
	Header http.Header
	// Status is what it was answered.
	Status int
}

// Push says that the request changes a repository.
func (r Request) Push() bool { return strings.HasSuffix(r.Path, "/git-receive-pack") }

// Config says how the server behaves; the zero value serves everybody.
type Config struct {
	// Token, if not "", must come with every request, as the password of Basic or as a
	// Bearer token.
	Token string
	// PublicReads needs the token for pushes only.
	PublicReads bool
	// Delay lies before the answer to every request.
	Delay time.Duration
}

// Server is a running one. Its methods may be called from any goroutine.
type Server struct {
	// URL is http://127.0.0.1:PORT, without a slash at the end.
	URL string
	// Target is where Elsewhere redirects to, scheme and host.
	Target string

	t       testing.TB
	root    string
	backend string

	mu       sync.Mutex
	cfg      Config
	failure  Failure
	requests []Request
}

// New starts a server that ends with the test.
func New(t testing.TB, cfg Config) *Server {
	t.Helper()
	path, err := exec.Command("git", "--exec-path").Output()
	if err != nil {
		t.Fatalf("git is needed: %v", err)
	}
	s := &Server{t: t, root: t.TempDir(), cfg: cfg, backend: filepath.Join(strings.TrimSpace(string(path)), "git-http-backend")}
	if _, err := os.Stat(s.backend); err != nil {
		t.Fatalf("git's http-backend is needed: %v", err)
	}
	web := httptest.NewServer(s)
	t.Cleanup(func() {
		web.CloseClientConnections()
		web.Close()
	})
	s.URL = web.URL
	return s
}

// Set changes how the server behaves.
func (s *Server) Set(cfg Config) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.cfg = cfg
}

// Fail makes the server broken, or whole again with Works.
func (s *Server) Fail(f Failure) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.failure = f
}

// Requests are those so far, in the order of their answers.
func (s *Server) Requests() []Request {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]Request(nil), s.requests...)
}

// Repository makes owner/name with one commit of these files, path → content, on the
// branch main. Without files it is empty. It returns the URL.
func (s *Server) Repository(name string, files map[string]string) string {
	s.t.Helper()
	dir := s.Dir(name)
	s.run("", "init", "-q", "--bare", "-b", "main", dir)
	s.run(dir, "config", "http.receivepack", "true")
	if len(files) > 0 {
		s.Commit(name, "main", "first commit", files)
	}
	return s.URL + "/" + name + ".git"
}

// Dir is where a repository lies on the host, bare.
func (s *Server) Dir(name string) string { return filepath.Join(s.root, name+".git") }

// Commit adds a commit to a branch, which begins where HEAD is if it is new, as somebody
// else would. A content of "" removes the file. It returns the commit's name.
func (s *Server) Commit(name, branch, message string, files map[string]string) string {
	s.t.Helper()
	tree := s.t.TempDir()
	s.run("", "clone", "-q", "--no-hardlinks", s.Dir(name), tree)
	if s.Git(name, "for-each-ref", "refs/heads/"+branch) != "" {
		s.run(tree, "checkout", "-q", "-B", branch, "origin/"+branch)
	} else {
		s.run(tree, "checkout", "-q", "-B", branch)
	}
	for path, content := range files {
		file := filepath.Join(tree, path)
		if content == "" {
			s.check(os.Remove(file))
			continue
		}
		s.check(os.MkdirAll(filepath.Dir(file), 0o755))
		s.check(os.WriteFile(file, []byte(content), 0o644))
	}
	s.run(tree, "add", "-A")
	s.run(tree, "commit", "-q", "-m", message)
	s.run(tree, "push", "-q", "origin", branch)
	return s.Git(name, "rev-parse", branch)
}

// Git runs git in a repository of the server and returns what it says.
func (s *Server) Git(name string, args ...string) string {
	s.t.Helper()
	return s.run(s.Dir(name), args...)
}

func (s *Server) run(dir string, args ...string) string {
	s.t.Helper()
	out, err := Command(dir, args...).CombinedOutput()
	if err != nil {
		s.t.Fatalf("git %q: %v\n%s", args, err, out)
	}
	return strings.TrimSpace(string(out))
}

func (s *Server) check(err error) {
	s.t.Helper()
	if err != nil {
		s.t.Fatal(err)
	}
}

// Command is a git that looks at no configuration of the host, as somebody who is not
// the agent.
func Command(dir string, args ...string) *exec.Cmd {
	cmd := exec.Command("git", args...)
	cmd.Dir = dir
	cmd.Env = []string{
		"PATH=" + os.Getenv("PATH"), "HOME=/nonexistent", "GIT_CONFIG_NOSYSTEM=1", "GIT_CONFIG_GLOBAL=/dev/null", "GIT_TERMINAL_PROMPT=0", "LANG=C",
		"GIT_AUTHOR_NAME=Somebody Else", "GIT_AUTHOR_EMAIL=else@example.com", "GIT_COMMITTER_NAME=Somebody Else", "GIT_COMMITTER_EMAIL=else@example.com",
	}
	return cmd
}

// ServeHTTP implements http.Handler.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	cfg, failure := s.cfg, s.failure
	s.mu.Unlock()
	asked := Request{Method: r.Method, Path: r.URL.Path, Header: r.Header.Clone()}
	asked.User, asked.Token = credentials(r)
	answer := &recorder{ResponseWriter: w, status: http.StatusOK, cutAfter: -1}
	defer func() {
		asked.Status = answer.status
		s.mu.Lock()
		s.requests = append(s.requests, asked)
		s.mu.Unlock()
	}()
	pause(r, cfg.Delay)
	pushes := asked.Push() || r.URL.Query().Get("service") == "git-receive-pack"
	switch {
	case failure == Unavailable:
		http.Error(answer, "the server is being repaired", http.StatusServiceUnavailable)
		return
	case failure == Stalled:
		_, _ = io.Copy(io.Discard, r.Body)
		pause(r, time.Hour)
		return
	case failure == RefusesPush && pushes:
		http.Error(answer, "you may not push here", http.StatusForbidden)
		return
	case failure == Elsewhere:
		http.Redirect(answer, r, s.Target+r.URL.RequestURI(), http.StatusTemporaryRedirect)
		return
	case cfg.Token != "" && asked.Token != cfg.Token && (pushes || !cfg.PublicReads):
		answer.Header().Set("WWW-Authenticate", `Basic realm="testgit"`)
		http.Error(answer, "who are you?", http.StatusUnauthorized)
		return
	case failure == Cut && strings.HasSuffix(r.URL.Path, "/git-upload-pack"):
		answer.cutAfter = 300
	}
	handler := &cgi.Handler{
		Path: s.backend, Dir: s.root,
		Env: []string{"GIT_PROJECT_ROOT=" + s.root, "GIT_HTTP_EXPORT_ALL=1", "GIT_CONFIG_NOSYSTEM=1", "HOME=/nonexistent", "REMOTE_USER=" + asked.User},
	}
	if protocol := r.Header.Get("Git-Protocol"); protocol != "" {
		handler.Env = append(handler.Env, "GIT_PROTOCOL="+protocol)
	}
	handler.Stderr = io.Discard
	handler.ServeHTTP(answer, r)
}

// credentials are those of a request.
func credentials(r *http.Request) (user, token string) {
	if user, password, ok := r.BasicAuth(); ok {
		return user, password
	}
	token, _ = strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	return "", token
}

// BasicAuth is the header by which a token is shown.
func BasicAuth(user, token string) string {
	return "Basic " + base64.StdEncoding.EncodeToString([]byte(user+":"+token))
}

func pause(r *http.Request, d time.Duration) {
	if d == 0 {
		return
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-r.Context().Done():
	}
}

// recorder notes the status, and cuts an answer off where it is told to.
type recorder struct {
	http.ResponseWriter
	status   int
	cutAfter int
}

var errCut = errors.New("the test cuts the answer off")

func (r *recorder) WriteHeader(status int) {
	r.status = status
	r.ResponseWriter.WriteHeader(status)
}

func (r *recorder) Write(p []byte) (int, error) {
	if r.cutAfter < 0 {
		return r.ResponseWriter.Write(p)
	}
	if len(p) <= r.cutAfter {
		r.cutAfter -= len(p)
		return r.ResponseWriter.Write(p)
	}
	_, _ = r.ResponseWriter.Write(p[:r.cutAfter])
	_ = http.NewResponseController(r.ResponseWriter).Flush()
	conn, _, err := http.NewResponseController(r.ResponseWriter).Hijack()
	if err != nil {
		return 0, fmt.Errorf("%w: %w", errCut, err)
	}
	_ = conn.Close()
	return 0, errCut
}

// Unwrap is for http.ResponseController.
func (r *recorder) Unwrap() http.ResponseWriter { return r.ResponseWriter }
