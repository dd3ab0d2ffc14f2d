// Package modaltest is a fake of Modal at the level of its wire: the control plane and
// the workers' command router, as the unmodified Go SDK v0.11.1 talks to them, on one
// plaintext port of loopback. Its sandboxes really run their processes: each has a root,
// a process tree and a network of its own (docs/decisions/0017).
//
// It is a test's instrument: time can be moved, faults can be ordered for each RPC, and
// every call is counted. It runs in the program of the tests, which has to call MaybeRun
// first, or by itself (fakemodal), so that it outlives who uses it.
package modaltest

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/harvest-run/executord/internal/engine/local/hostimage"
	pb "github.com/modal-labs/modal-client/go/proto/modal_proto"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/keepalive"
)

// Config says what the fake is like. The zero value is a well-behaved one.
type Config struct {
	// Addr is where it listens, an address of loopback. Empty: any free port.
	Addr string
	// Dir is where it keeps everything; it makes a directory of its own in it and removes
	// that at Close. Empty: the directory for temporary files.
	Dir string
	// TokenID and TokenSecret are the credentials that it takes. Empty: "ak-fake" and
	// "as-fake".
	TokenID, TokenSecret string
	// AuthTokenLife and RouterTokenLife are how long the tokens that it gives out are
	// valid, by the real clock. Zero: an hour.
	AuthTokenLife, RouterTokenLife time.Duration
	// Secrets are the named secrets of the workspace: name, then variables.
	Secrets map[string]map[string]string
	// Capacity is how many sandboxes may run at a time; creations beyond are answered with
	// ResourceExhausted. Zero: no limit.
	Capacity int
	// PageSize is how many sandboxes one page of a list has. Zero: 100.
	PageSize int
	// RoundTrip is added to every exchange with a client, half on each way. See
	// SetRoundTrip.
	RoundTrip time.Duration
	// HostNetwork gives sandboxes whose network is open that of the host. Otherwise they
	// have one of their own with nothing but loopback, as those have that are blocked.
	HostNetwork bool
	// OpenFiles refuses to reload volumes of which a program in the sandbox has a file open,
	// as Modal's documentation says; what was written is committed all the same, which it
	// does not say.
	OpenFiles bool
	// ForgetRequests makes it answer a repeated creation as if it were a new one. It is
	// not known whether Modal keeps the idempotency keys that the SDK sends.
	ForgetRequests bool
	// Logger hears of what goes wrong in the fake itself. Nil: nobody does.
	Logger *slog.Logger
}

// Fake is a Modal workspace with one environment. Make one with Start; it must be closed.
type Fake struct {
	cfg     Config
	dir     string
	program string // this program's path
	boot    string // names this run
	host    *hostimage.Images
	key     []byte // signs tokens
	server  *grpc.Server
	link    *link // the listener
	groups  group // of all sandboxes
	// web is where connect tokens lead.
	web       net.Listener
	webServer *http.Server
	owner     sync.WaitGroup
	boxes     sync.WaitGroup // goroutines of sandboxes
	log       *slog.Logger
	calls     calls
	faults    faults
	clock     clock
	stop      context.CancelCauseFunc
	done      chan struct{} // closed at Close

	mu        sync.Mutex
	closed    bool
	revoked   time.Time // tokens for routers that were made before are not valid
	apps      map[string]string
	sandboxes map[string]*sandbox // by id
	tasks     map[string]*sandbox // by task id
	created   map[string]*creation
	secrets   map[string]*secret
	images    map[string]*image
	built     map[string]string // image id by what it is made of
	tags      map[string]string // image id by the name it is published under
	tokens    map[string]connectToken
	builds    builds
	volumes   map[string]*volume
	trouble   trouble
}

// trouble is what is wrong for sandboxes to come.
type trouble struct {
	scheduling time.Duration // how long creations take
	startup    time.Duration // how long the router of a new sandbox is not there
	resultLag  time.Duration // how long an end is not yet known to the control plane
}

// dirPrefix begins the names of what a fake makes on the host; the process id follows.
const dirPrefix = "modaltest-"

// sweep removes what fakes left in a directory whose processes were killed.
func sweep(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if name, ok := strings.CutPrefix(e.Name(), dirPrefix); ok && dead(name) {
			err = errors.Join(err, os.RemoveAll(filepath.Join(dir, e.Name())))
		}
	}
	return err
}

// dead says that a name begins with the id of a process that is not there.
func dead(name string) bool {
	id, _, ok := strings.Cut(name, "-")
	pid, err := strconv.Atoi(id)
	return ok && err == nil && pid > 0 && errors.Is(unix.Kill(pid, 0), unix.ESRCH)
}

// errClosed is the cause of the end of everything at Close.
var errClosed = errors.New("the fake of Modal was closed")

// Start starts a fake.
func Start(cfg Config) (*Fake, error) {
	program, err := os.Executable()
	if err != nil {
		return nil, err
	}
	if cfg.Dir == "" {
		cfg.Dir = os.TempDir()
	}
	if cfg.Dir, err = filepath.Abs(cfg.Dir); err != nil {
		return nil, err
	}
	if err := sweep(cfg.Dir); err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp(cfg.Dir, fmt.Sprintf("%s%d-", dirPrefix, os.Getpid()))
	if err != nil {
		return nil, err
	}
	f := &Fake{
		cfg: cfg, dir: dir, program: program, boot: strings.ToLower(rand.Text()[:8]), key: []byte(rand.Text()), log: cfg.Logger,
		apps: make(map[string]string), sandboxes: make(map[string]*sandbox), tasks: make(map[string]*sandbox),
		created: make(map[string]*creation), secrets: make(map[string]*secret), images: make(map[string]*image), done: make(chan struct{}),
		built: make(map[string]string), tags: make(map[string]string), tokens: make(map[string]connectToken), volumes: make(map[string]*volume),
	}
	if f.log == nil {
		f.log = slog.New(slog.DiscardHandler)
	}
	f.setDefaults()
	if err := f.serve(); err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	return f, nil
}

func (f *Fake) setDefaults() {
	c := &f.cfg
	for _, d := range []struct {
		value *string
		to    string
	}{{&c.Addr, "127.0.0.1:0"}, {&c.TokenID, "ak-fake"}, {&c.TokenSecret, "as-fake"}} {
		if *d.value == "" {
			*d.value = d.to
		}
	}
	if c.AuthTokenLife == 0 {
		c.AuthTokenLife = time.Hour
	}
	if c.RouterTokenLife == 0 {
		c.RouterTokenLife = time.Hour
	}
	if c.PageSize == 0 {
		c.PageSize = 100
	}
	for name, env := range c.Secrets {
		f.secrets[newID("st")] = &secret{name: name, env: env}
	}
}

func (f *Fake) serve() error {
	if err := os.Chmod(f.dir, 0o755); err != nil { // processes of sandboxes may give up being root
		return err
	}
	for _, name := range []string{"root", "host", "layers", "boxes", "volumes"} {
		if err := os.Mkdir(filepath.Join(f.dir, name), 0o755); err != nil {
			return err
		}
	}
	if err := f.makeBaseLayer(); err != nil {
		return err
	}
	var err error
	if f.groups, err = newGroups(filepath.Base(f.dir)); err != nil {
		return err
	}
	f.host = hostimage.New(hostimage.Config{Dir: filepath.Join(f.dir, "host"), Host: "/", Boot: f.boot})
	listener, err := net.Listen("tcp", f.cfg.Addr)
	if err != nil {
		return err
	}
	f.link = newLink(listener, f.cfg.RoundTrip)
	f.server = grpc.NewServer(
		grpc.WaitForHandlers(true),
		grpc.MaxRecvMsgSize(100<<20), grpc.MaxSendMsgSize(100<<20),
		grpc.InitialWindowSize(64<<20), grpc.InitialConnWindowSize(64<<20),
		// The SDK pings every 30 s; a server that does not expect it hangs up.
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 10 * time.Second, PermitWithoutStream: true}),
		grpc.ChainUnaryInterceptor(f.unary), grpc.ChainStreamInterceptor(f.stream),
	)
	pb.RegisterModalClientServer(f.server, &controlPlane{fake: f})
	pb.RegisterTaskCommandRouterServer(f.server, &router{fake: f})
	if err := f.serveWeb(); err != nil {
		listener.Close()
		return err
	}
	ctx, stop := context.WithCancelCause(context.Background())
	f.stop = stop
	f.owner.Go(func() {
		if err := f.server.Serve(f.link); err != nil {
			f.log.Error("serve", "error", err)
		}
	})
	f.owner.Go(func() { f.reapers(ctx) })
	return nil
}

// Addr is where it listens.
func (f *Fake) Addr() string { return f.link.Addr().String() }

// Environment is what a program needs in its environment so that the SDK in it talks to
// this fake: variables and their values.
func (f *Fake) Environment() map[string]string {
	return map[string]string{
		"MODAL_CONFIG_PATH":  "/nonexistent",
		"MODAL_SERVER_URL":   "http://" + f.Addr(),
		"MODAL_TOKEN_ID":     f.cfg.TokenID,
		"MODAL_TOKEN_SECRET": f.cfg.TokenSecret,
		"MODAL_LOGLEVEL":     "ERROR", // it warns of each connection that is not encrypted
	}
}

// Setenv sets Environment, with the method of a test.
func (f *Fake) Setenv(t interface{ Setenv(key, value string) }) {
	for k, v := range f.Environment() {
		t.Setenv(k, v)
	}
}

// Close ends all sandboxes and removes everything.
func (f *Fake) Close() error {
	f.mu.Lock()
	f.closed = true
	all := make([]*sandbox, 0, len(f.sandboxes))
	for _, s := range f.sandboxes {
		all = append(all, s)
	}
	f.mu.Unlock()
	f.stop(errClosed)
	close(f.done)
	f.link.resetAll() // no call is waited for
	f.server.Stop()
	_ = f.webServer.Close() // its listener is of nobody's concern
	for _, s := range all {
		f.destroy(s)
	}
	f.owner.Wait()
	f.boxes.Wait()
	if err := errors.Join(f.groups.remove(), os.RemoveAll(f.dir)); err != nil {
		return fmt.Errorf("remove what the fake of Modal kept: %w", err)
	}
	return nil
}
