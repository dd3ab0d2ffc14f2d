package local

import (
	"fmt"
	"os"
	"strings"

	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/fault"
	"golang.org/x/sys/unix"
)

// canLimitDisk says whether what a sandbox writes can be bounded, how or why not, and
// what to do about it.
func (e *Engine) canLimitDisk() (ok bool, detail, remedy string) {
	if e.disks == nil {
		return false, "executord runs as an ordinary user, who cannot mount file systems", "run executord as root"
	}
	return e.disks.Can()
}

// canLimitFiles says the same of the open files of a process; most is the largest limit
// that there can be.
func canLimitFiles() (ok bool, most uint64, detail, remedy string) {
	// A guest sets the limit of a program that is traced until then.
	if scope, _ := os.ReadFile("/proc/sys/kernel/yama/ptrace_scope"); strings.TrimSpace(string(scope)) == "3" {
		return false, 0, "tracing is switched off on this host, and a limit is set on a program that is traced",
			"kernel.yama.ptrace_scope below 3, which takes a restart of the host"
	}
	var own unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &own); err != nil {
		return false, 0, fmt.Sprintf("executord's own limit cannot be read: %v", err), ""
	}
	return true, own.Max, fmt.Sprintf("of each process, up to %d, which executord was started with", own.Max), ""
}

// checkFiles refuses limits of disk and open files that cannot be enforced.
func (e *Engine) checkFiles(l engine.Limits) error {
	if l.DiskBytes > 0 {
		if ok, why, remedy := e.canLimitDisk(); !ok {
			return notEnforceable("disk_bytes", why, remedy)
		}
	}
	if l.OpenFiles > 0 {
		ok, most, why, remedy := canLimitFiles()
		if ok && uint64(l.OpenFiles) > most {
			ok, why = false, fmt.Sprintf("executord itself was started with at most %d", most)
			remedy = "start it with more (LimitNOFILE= of a systemd service)"
		}
		if !ok {
			return notEnforceable("open_files", why, remedy)
		}
	}
	return nil
}

// enforceable returns l without the limits of disk and open files that cannot be enforced.
func (e *Engine) enforceable(l engine.Limits) engine.Limits {
	if e.checkFiles(engine.Limits{DiskBytes: l.DiskBytes}) != nil {
		l.DiskBytes = 0
	}
	if e.checkFiles(engine.Limits{OpenFiles: l.OpenFiles}) != nil {
		l.OpenFiles = 0
	}
	return l
}

// notEnforceable is the fault for a limit that was asked for and cannot be enforced.
func notEnforceable(field, why, remedy string) error {
	if remedy != "" {
		remedy += ", or "
	}
	return fault.New(fault.FailedPrecondition, "LIMIT_NOT_ENFORCEABLE",
		"limits.%s cannot be enforced on this host: %s; %sask for no such limit", field, why, remedy).
		With("field", "limits."+field)
}
