package config

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"buf.build/go/protovalidate"

	configv1 "github.com/harvest-run/executord/gen/harvest/config/v1"
)

// maxSocketPath is the longest path that the kernel takes for a unix socket, in bytes.
const maxSocketPath = 107

// endOfIDs is where the ranges of user ids must end.
const endOfIDs = 0xffff0000

// complete resolves paths, fills in what depends on the host and checks the whole.
func (l *loader) complete(in Input, env map[string]string) error {
	l.check("state_dir", l.resolveStateDir(in, env))
	l.resolveFiles(in)
	l.check("listen", l.resolveListen())
	if len(l.errs) == 0 {
		if err := l.checkRules(); err != nil {
			return err
		}
		l.check("output.default_retained_bytes", checkOutput(l.config.GetOutput()))
		l.checkNetwork(l.config.GetNetwork())
		l.completePool()
		l.check("modal.outbound_cidrs", checkOutbound(l.config.GetModal()))
		l.check("modal.dockerfile", checkDockerfile(l.config.GetModal().GetDockerfile()))
		l.check("local.uid_count", checkIDs(l.config.GetLocal()))
		l.check("local.cgroup_parent", checkCgroup(l.config.GetLocal().GetCgroupParent()))
		l.check("local.extra_paths", checkExtraPaths(l.config.GetLocal().GetExtraPaths()))
		l.check("images.tools_dir", checkTools(l.config.GetImages().GetToolsDir()))
		l.checkTLS()
		l.checkAuth()
	}
	return errors.Join(l.errs...)
}

// check notes an error about a field.
func (l *loader) check(name string, err error) {
	if err != nil {
		l.fail(name, l.origin(name), err)
	}
}

func (l *loader) origin(name string) string {
	if origin := l.origins[name]; origin != "" {
		return origin
	}
	return "default"
}

// checkRules checks the rules that stand in the message.
func (l *loader) checkRules() error {
	validator, err := protovalidate.New(protovalidate.WithMessages(&configv1.Config{}))
	if err != nil {
		return fmt.Errorf("read the rules of the configuration: %w", err)
	}
	err = validator.Validate(l.config)
	invalid, ok := errors.AsType[*protovalidate.ValidationError](err)
	if err != nil && !ok {
		return fmt.Errorf("check the configuration: %w", err)
	}
	if ok {
		for _, violation := range invalid.Violations {
			// Of a list its name: where an element came from is where the list did.
			name, _, _ := strings.Cut(protovalidate.FieldPathString(violation.Proto.GetField()), "[")
			l.check(name, errors.New(violation.Proto.GetMessage()))
		}
	}
	return nil
}

// resolveStateDir makes state_dir absolute and finds its default.
func (l *loader) resolveStateDir(in Input, env map[string]string) error {
	dir, home := l.config.GetStateDir(), env["HOME"]
	switch {
	case dir != "":
		if below, found := strings.CutPrefix(dir, "~/"); found {
			if !filepath.IsAbs(home) {
				return fmt.Errorf("%q needs HOME, which is not set to an absolute path", dir)
			}
			dir = filepath.Join(home, below)
		}
		dir = in.absolute(dir)
	case l.origins["state_dir"] != "":
		return errors.New("it is empty; it must be a path")
	case in.UID == 0:
		dir = "/var/lib/executord"
	case filepath.IsAbs(env["XDG_STATE_HOME"]): // a relative one is to be ignored
		dir = filepath.Join(env["XDG_STATE_HOME"], "executord")
	case filepath.IsAbs(home):
		dir = filepath.Join(home, ".local", "state", "executord")
	default:
		return errors.New("there is no default without XDG_STATE_HOME and HOME; set it")
	}
	l.config.StateDir = dir
	return nil
}

// absolute takes a relative path from the working directory.
func (in Input) absolute(path string) string {
	if filepath.IsAbs(path) {
		return filepath.Clean(path)
	}
	return filepath.Join(in.WorkingDirectory, path)
}

// resolveListen refuses every address that others than this host's users can reach, unless
// callers show who they are over an encrypted connection, and brings a socket's into the
// form unix:/path.
func (l *loader) resolveListen() error {
	listen := l.config.GetListen()
	if path, found := strings.CutPrefix(listen, "unix:"); found {
		path = filepath.Clean(path)
		if !filepath.IsAbs(path) || path == "/" || len(path) > maxSocketPath {
			return fmt.Errorf("%q does not name a socket by an absolute path of at most %d bytes", listen, maxSocketPath)
		}
		l.config.Listen = "unix:" + path
		return nil
	}
	host, port, err := net.SplitHostPort(listen)
	if err != nil {
		return fmt.Errorf("%q is neither HOST:PORT nor unix:/PATH", listen)
	}
	if _, err := strconv.ParseUint(port, 10, 16); err != nil {
		return fmt.Errorf("port %q is not a number from 0 to 65535", port)
	}
	if ip, err := netip.ParseAddr(host); host == "localhost" || (err == nil && ip.IsLoopback() && ip.Zone() == "") {
		return nil
	}
	var missing []string
	if l.config.GetTls().GetCertFile() == "" || l.config.GetTls().GetKeyFile() == "" {
		missing = append(missing, "tls.cert_file and tls.key_file")
	}
	if len(l.config.GetAuth().GetMethods()) == 0 {
		missing = append(missing, "auth.methods")
	}
	if len(missing) > 0 {
		return fmt.Errorf("%q can be reached from elsewhere, so %s must be set too; "+
			"or listen on 127.0.0.1:PORT, [::1]:PORT, localhost:PORT or unix:/PATH", listen, strings.Join(missing, ", and "))
	}
	return nil
}

func checkOutput(o *configv1.Output) error {
	if o.GetDefaultRetainedBytes() > o.GetMaxRetainedBytes() {
		return fmt.Errorf("%s is more than output.max_retained_bytes, %s",
			formatSize(o.GetDefaultRetainedBytes()), formatSize(o.GetMaxRetainedBytes()))
	}
	return nil
}

func checkIDs(local *configv1.Local) error {
	const size = 65536
	end := uint64(local.GetUidBase()) + uint64(local.GetUidCount())*size
	if end > endOfIDs {
		return fmt.Errorf("%d ranges of %d ids from local.uid_base %d on end at %d; they must end at %d or before",
			local.GetUidCount(), size, local.GetUidBase(), end, uint64(endOfIDs))
	}
	return nil
}

func checkCgroup(parent string) error {
	if parent != "" && !isCleanPath(parent) {
		return fmt.Errorf("%q is not an absolute path without \".\", \"..\" and double slashes", parent)
	}
	return nil
}

func checkExtraPaths(paths []string) error {
	i := slices.IndexFunc(paths, func(path string) bool { return path == "/" || !isCleanPath(path) })
	if i >= 0 {
		return fmt.Errorf("%q is not an absolute path of a directory below /, without \".\", \"..\" and double slashes", paths[i])
	}
	return nil
}

func checkTools(dir string) error {
	if dir == "" {
		return nil
	}
	return checkExtraPaths([]string{dir})
}

// completePool turns the pool off where its sandboxes would cost money that nobody asked
// for.
func (l *loader) completePool() {
	if l.config.GetEngine() == "modal" && l.origin("pool.size") == "default" {
		l.config.Pool.Size = 0
	}
}

func checkOutbound(modal *configv1.Modal) error {
	if len(modal.GetOutboundCidrs()) > 0 && !modal.GetOpenNetwork() {
		return errors.New("it has no effect without modal.open_network")
	}
	for _, text := range modal.GetOutboundCidrs() {
		if prefix, err := netip.ParsePrefix(text); err != nil || !prefix.Addr().Is4() || prefix.Masked() != prefix {
			return fmt.Errorf("%q is not an IPv4 prefix such as 192.0.2.0/24", text)
		}
	}
	return nil
}

// checkDockerfile refuses what Modal's SDK would, when sandboxes are already wanted: there
// is no context here to copy from.
func checkDockerfile(commands []string) error {
	for _, command := range commands {
		verb, rest, _ := strings.Cut(strings.TrimSpace(command), " ")
		copies := strings.EqualFold(verb, "COPY") && !strings.HasPrefix(strings.ToLower(strings.TrimSpace(rest)), "--from=")
		if copies || strings.EqualFold(verb, "ADD") || strings.EqualFold(verb, "FROM") {
			return fmt.Errorf("%q is not possible: commands that take files from here, and FROM, are not taken; modal.image says what the image begins with", command)
		}
	}
	return nil
}

func isCleanPath(path string) bool { return filepath.IsAbs(path) && filepath.Clean(path) == path }
