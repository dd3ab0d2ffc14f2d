package local

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/engine/local/cgroup"
	"golang.org/x/sys/unix"
)

// Probe says what this host can do for local sandboxes, also where it cannot make
// any. It makes one and ends it, in a directory of its own under the state directory:
// an executord that works there is not disturbed.
func Probe(ctx context.Context, cfg Config) []engine.Capability {
	impossible := func(err error) []engine.Capability {
		return []engine.Capability{{Name: "sandbox", Detail: err.Error(), Remedy: strings.TrimPrefix(remedy(err, os.Geteuid() == 0), "; ")}}
	}
	if err := os.MkdirAll(cfg.StateDir, 0o700); err != nil {
		return impossible(err)
	}
	// One at a time, and always in the same place, so that what one leaves that is cut
	// off is found by the next.
	lock, err := os.Open(cfg.StateDir)
	if err != nil {
		return impossible(err)
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		return impossible(err)
	}
	cfg.StateDir = filepath.Join(cfg.StateDir, "probe")
	defer func() { _ = os.RemoveAll(cfg.StateDir) }() // what is left is there for the next
	e, err := prepare(ctx, cfg)
	if err != nil {
		return impossible(err)
	}
	defer func() { _ = e.Close() }() // it was only asked
	sandbox := engine.Capability{Name: "sandbox", Available: true, Detail: "namespaces, overlay, seccomp; one was made and ended"}
	if err := e.trial(ctx); err != nil {
		text, hint, _ := strings.Cut(err.Error(), "; ")
		sandbox = engine.Capability{Name: "sandbox", Detail: text, Remedy: hint}
	}
	return append([]engine.Capability{sandbox}, e.capabilities()...)
}

// capabilities looks at the host without making a sandbox.
func (e *Engine) capabilities() []engine.Capability {
	var c []engine.Capability
	add := func(name string, available bool, detail, remedy string) {
		if available {
			remedy = ""
		}
		c = append(c, engine.Capability{Name: name, Available: available, Detail: detail, Remedy: remedy})
	}
	const asRoot = "run executord as root"
	remedyForLimits := asRoot
	if e.groups != nil {
		remedyForLimits = "hand executord a control group with its controllers, as a systemd service does with Delegate=yes"
	}
	for _, limit := range []struct{ name, controller string }{
		{"limit.memory", cgroup.Memory}, {"limit.pids", cgroup.PIDs}, {"limit.cpu", cgroup.CPU},
	} {
		ok, detail := e.canLimit(limit.controller)
		add(limit.name, ok, detail, remedyForLimits)
	}
	ok, detail, hint := e.canLimitDisk()
	add("limit.disk", ok, detail, hint)
	ok, _, detail, hint = canLimitFiles()
	add("limit.open_files", ok, detail, hint)
	ok, detail, hint = e.canSnapshot()
	add("snapshot", ok, detail, hint)
	add("images", true, "sandboxes start from snapshots, whose layers they share", "")
	add("volumes", true, "directories of the host that several sandboxes share; without a limit of size", "")
	if e.groups != nil {
		ok, detail := e.groups.CanKill()
		add("kill.cgroup", ok, detail, "mount the cgroup2 file system; until then trees are followed through /proc")
		add("ids.own-range", true, fmt.Sprintf("each sandbox has 65,536 user ids of its own from %d on", e.cfg.UIDBase), "")
	} else {
		add("kill.cgroup", false, "an ordinary user has no control groups; trees are followed through /proc, and end with their sandbox", asRoot)
		add("ids.own-range", false, "an ordinary user's sandboxes all run as that user", asRoot)
	}
	add("network.none", true, "sandboxes have a loopback interface of their own and nothing else", "")
	add("network.egress", true, "and a proxy on it that reaches what the rules of a policy name", "")
	add("network.host", true, "the host's network, for development; refused unless --network-max-mode is host", "")
	for _, l := range languages() {
		path, ok := e.find(l.programs)
		if ok {
			add("language."+l.name, true, path, "")
		} else {
			add("language."+l.name, false, strings.Join(l.programs, " and ")+" not found in the host's /usr", "apt-get install "+l.pkg)
		}
	}
	return c
}

// language says what runs a language and which Debian package has it.
type language struct {
	name, pkg string
	programs  []string
}

func languages() []language {
	return []language{
		{"python", "python3", []string{"python3"}},
		{"bash", "bash", []string{"bash"}},
		{"node", "nodejs", []string{"node", "nodejs"}},
	}
}

// find looks for one of several programs where a sandbox would, and where it can: a
// link to what sandboxes do not see, such as a home, does not count.
func (e *Engine) find(programs []string) (string, bool) {
	img, err := e.images.Prepare()
	if err != nil {
		return "", false
	}
	for _, p := range programs {
		for _, dir := range []string{"/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"} {
			path := filepath.Join(dir, p)
			file, err := filepath.EvalSymlinks(path)
			if err != nil || !slices.ContainsFunc(img.Trees, func(tree string) bool { return strings.HasPrefix(file, tree+"/") }) {
				continue
			}
			if info, err := os.Stat(file); err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0 {
				return path, true
			}
		}
	}
	return "", false
}

// remedy says what to do about a host that cannot make a sandbox, as "; do this".
func remedy(err error, root bool) string {
	var shift *shiftError
	switch {
	case errors.As(err, &shift):
		return "; put --state-dir on a file system with id-mapped mounts (ext4, xfs, btrfs, tmpfs; Linux 5.19 or newer)"
	case errors.Is(err, unix.ENOSPC) && userNamespacesOff():
		return "; allow user namespaces: sysctl user.max_user_namespaces=15000"
	case errors.Is(err, syscall.EPERM) && !root:
		return "; unprivileged user namespaces are not allowed here: sysctl kernel.unprivileged_userns_clone=1 and kernel.apparmor_restrict_unprivileged_userns=0, or run executord as root"
	case errors.Is(err, syscall.EPERM):
		return "; namespaces are not allowed here: inside a container executord needs one that is privileged, or has CAP_SYS_ADMIN and an unmasked /proc"
	case errors.Is(err, fs.ErrPermission):
		return "; give the user of executord the right to --state-dir"
	case strings.Contains(err.Error(), "overlay"):
		return "; put --state-dir on a file system that is not itself an overlay, such as a volume"
	}
	return ""
}

func userNamespacesOff() bool {
	text, err := os.ReadFile("/proc/sys/user/max_user_namespaces")
	return err == nil && strings.TrimSpace(string(text)) == "0"
}
