// Package seccomp holds the system call filter of the local engine's sandboxes: an
// allow-list. What it leaves out either reaches beyond the sandbox (mounts, kernel
// modules, clocks, reboot), or is a large attack surface that ordinary programs do
// without (bpf, io_uring, perf, userfaultfd, keyrings).
package seccomp

import (
	"encoding/binary"
	"fmt"
	"maps"
	"math"
	"slices"

	"github.com/elastic/go-seccomp-bpf/arch"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// newNamespaces are the flags of clone and unshare that make a namespace.
const newNamespaces = unix.CLONE_NEWNS | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC | unix.CLONE_NEWUSER |
	unix.CLONE_NEWPID | unix.CLONE_NEWNET | unix.CLONE_NEWCGROUP

// Where the kernel puts what a filter may look at: struct seccomp_data.
const (
	offsetNumber   = 0
	offsetArch     = 4
	offsetArgument = 16
	// x32 is the bit that marks the calls of amd64's 32-bit ABI.
	x32 = 0x40000000
)

// Assemble returns the filter as struct sock_filter records in the machine's byte
// order. clone3 is allowed only where the guest needs it to start commands in
// cgroups; it relies on the sandbox forbidding user namespaces by other means,
// because a filter cannot see clone3's flags.
func Assemble(clone3 bool) ([]byte, error) {
	info, err := arch.GetInfo("")
	if err != nil {
		return nil, fmt.Errorf("system call numbers of this machine: %w", err)
	}
	raw, err := bpf.Assemble(program(info, clone3))
	if err != nil {
		return nil, fmt.Errorf("assemble the seccomp filter: %w", err)
	}
	out := make([]byte, 0, 8*len(raw))
	for _, r := range raw {
		out = binary.NativeEndian.AppendUint16(out, r.Op)
		out = append(out, r.Jt, r.Jf)
		out = binary.NativeEndian.AppendUint32(out, r.K)
	}
	return out, nil
}

// program is the filter. It is put together here and not by go-seccomp-bpf's own
// assembler, which (v1.6.0) compares the call's number with an argument's value
// once a condition on that argument did not hold.
func program(info *arch.Info, clone3 bool) []bpf.Instruction {
	p := []bpf.Instruction{
		// Calls by another entrance (int 0x80) have other numbers.
		bpf.LoadAbsolute{Off: offsetArch, Size: 4},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: uint32(info.ID), SkipTrue: 1},
		refuse(unix.ENOSYS),
		bpf.LoadAbsolute{Off: offsetNumber, Size: 4},
		bpf.JumpIf{Cond: bpf.JumpLessThan, Val: x32, SkipTrue: 1},
		refuse(unix.ENOSYS),
	}
	return append(p, tree(ranges(answers(info, clone3)))...)
}

func refuse(errno unix.Errno) bpf.Instruction {
	return bpf.RetConstant{Val: unix.SECCOMP_RET_ERRNO | uint32(errno)}
}

// answers are, by the number of each call that the filter knows, the instructions that
// decide about it. They begin with the number loaded and end in a return.
func answers(info *arch.Info, clone3 bool) map[uint32][]bpf.Instruction {
	allow := bpf.RetConstant{Val: unix.SECCOMP_RET_ALLOW}
	byNumber := make(map[uint32][]bpf.Instruction)
	on := func(name string, block ...bpf.Instruction) {
		if number, ok := info.SyscallNames[name]; ok {
			byNumber[uint32(number)] = block
		}
	}
	for _, name := range denied() {
		on(name, refuse(unix.EPERM))
	}
	for _, name := range allowed() {
		on(name, allow)
	}
	if clone3 {
		on("clone3", allow)
	}
	loadFirst := bpf.LoadAbsolute{Off: offsetArgument, Size: 4} // the low half: all that the kernel looks at
	for _, name := range []string{"clone", "unshare"} {
		on(name, loadFirst,
			bpf.JumpIf{Cond: bpf.JumpBitsSet, Val: newNamespaces, SkipTrue: 1}, allow, refuse(unix.EPERM))
	}
	oneOf := func(otherwise unix.Errno, values ...uint32) []bpf.Instruction {
		block := []bpf.Instruction{loadFirst}
		for _, v := range values {
			block = append(block, bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: v, SkipTrue: 1}, allow)
		}
		return append(block, refuse(otherwise))
	}
	on("socket", oneOf(unix.EAFNOSUPPORT, unix.AF_UNIX, unix.AF_INET, unix.AF_INET6, unix.AF_NETLINK)...)
	// Linux, with and without a randomised address space (debuggers), and asking.
	on("personality", oneOf(unix.EPERM, 0, 0x8, 0x20000, 0x20008, 0x40000, 0xffffffff)...)
	// Its own limits, as every C library asks for them; with those of another process,
	// which may be the guest, a command could end its sandbox.
	on("prlimit64", oneOf(unix.EPERM, 0)...)
	return byNumber
}

// span is the answer to the calls from a number on, up to the next span.
type span struct {
	from  uint32
	block []bpf.Instruction
}

// ranges joins neighbours with the same answer. A call that is not known looks like
// one that the kernel does not have: C libraries then fall back to an older one.
func ranges(byNumber map[uint32][]bpf.Instruction) []span {
	unknown := []bpf.Instruction{refuse(unix.ENOSYS)}
	spans := []span{{0, unknown}}
	add := func(from uint32, block []bpf.Instruction) {
		last := &spans[len(spans)-1]
		switch {
		case slices.Equal(last.block, block):
		case last.from == from:
			last.block = block
		default:
			spans = append(spans, span{from, block})
		}
	}
	for _, number := range slices.Sorted(maps.Keys(byNumber)) {
		add(number, byNumber[number])
		if _, ok := byNumber[number+1]; !ok {
			add(number+1, unknown)
		}
	}
	return spans
}

// tree finds the span of a number by halves. The kernel runs the filter once for every
// number when it is loaded, to remember what it always allows: in a chain of
// comparisons that took a good part of a sandbox's start.
func tree(spans []span) []bpf.Instruction {
	if len(spans) == 1 {
		return spans[0].block
	}
	middle := len(spans) / 2
	below, above := tree(spans[:middle]), tree(spans[middle:])
	var p []bpf.Instruction
	if len(below) <= math.MaxUint8 {
		p = append(p, bpf.JumpIf{Cond: bpf.JumpGreaterOrEqual, Val: spans[middle].from, SkipTrue: uint8(len(below))})
	} else { // farther than a condition can jump
		p = append(p, bpf.JumpIf{Cond: bpf.JumpLessThan, Val: spans[middle].from, SkipTrue: 1}, bpf.Jump{Skip: uint32(len(below))})
	}
	return append(append(p, below...), above...)
}

// denied are calls that programs try and that must fail with EPERM, as they would
// without the capability, rather than look missing.
func denied() []string {
	return []string{
		"acct", "add_key", "adjtimex", "bpf", "clock_adjtime", "clock_settime", "create_module", "delete_module",
		"fanotify_init", "finit_module", "fsconfig", "fsmount", "fsopen", "fspick", "init_module", "ioperm", "iopl",
		"kexec_file_load", "kexec_load", "keyctl", "lookup_dcookie", "mount", "mount_setattr", "move_mount", "name_to_handle_at",
		"nfsservctl", "open_by_handle_at", "open_tree", "perf_event_open", "pivot_root", "quotactl", "quotactl_fd", "reboot",
		"request_key", "setdomainname", "sethostname", "setns", "settimeofday", "swapoff", "swapon", "syslog", "umount2",
		"userfaultfd", "vhangup",
	}
}

// allowed are the calls of ordinary programs, whatever their arguments.
func allowed() []string {
	return []string{
		"accept", "accept4", "access", "alarm", "arch_prctl", "bind", "brk", "cachestat", "capget", "capset", "chdir", "chmod", "chown",
		"chroot", "clock_getres", "clock_gettime", "clock_nanosleep", "close", "close_range", "connect", "copy_file_range", "creat",
		"dup", "dup2", "dup3", "epoll_create", "epoll_create1", "epoll_ctl", "epoll_pwait", "epoll_pwait2", "epoll_wait",
		"eventfd", "eventfd2", "execve", "execveat", "exit", "exit_group", "faccessat", "faccessat2", "fadvise64", "fallocate",
		"fchdir", "fchmod", "fchmodat", "fchmodat2", "fchown", "fchownat", "fcntl", "fdatasync", "fgetxattr", "flistxattr", "flock", "fork",
		"fremovexattr", "fsetxattr", "fstat", "fstatfs", "fsync", "ftruncate", "futex", "futex_wait", "futex_waitv", "futex_wake", "futex_requeue", "futimesat",
		"get_mempolicy", "get_robust_list", "get_thread_area", "getcpu", "getcwd", "getdents", "getdents64", "getegid", "geteuid", "getgid",
		"getgroups", "getitimer", "getpeername", "getpgid", "getpgrp", "getpid", "getppid", "getpriority", "getrandom", "getresgid",
		"getresuid", "getrlimit", "getrusage", "getsid", "getsockname", "getsockopt", "gettid", "gettimeofday", "getuid", "getxattr",
		"inotify_add_watch", "inotify_init", "inotify_init1", "inotify_rm_watch", "io_cancel", "io_destroy", "io_getevents",
		"io_pgetevents", "io_setup", "io_submit", "ioctl", "ioprio_get", "ioprio_set", "kcmp", "kill", "landlock_add_rule", "landlock_create_ruleset",
		"landlock_restrict_self", "lchown", "lgetxattr", "link", "linkat", "listen", "listxattr", "llistxattr", "lremovexattr", "lseek", "lsetxattr",
		"lstat", "madvise", "map_shadow_stack", "mbind", "membarrier", "memfd_create", "memfd_secret", "migrate_pages", "mincore", "mkdir", "mkdirat",
		"mknod", "mknodat", "mlock", "mlock2", "mlockall", "mmap", "modify_ldt", "move_pages", "mprotect", "mq_getsetattr", "mq_notify", "mq_open",
		"mq_timedreceive", "mq_timedsend", "mq_unlink", "mremap", "msgctl", "msgget", "msgrcv", "msgsnd", "msync", "munlock",
		"munlockall", "munmap", "nanosleep", "newfstatat", "open", "openat", "openat2", "pause", "pidfd_getfd", "pidfd_open",
		"pidfd_send_signal", "pipe", "pipe2", "pkey_alloc", "pkey_free", "pkey_mprotect", "poll", "ppoll", "prctl", "pread64",
		"preadv", "preadv2", "process_madvise", "process_mrelease", "process_vm_readv", "process_vm_writev", "pselect6", "ptrace",
		"pwrite64", "pwritev", "pwritev2", "read", "readahead", "readlink", "readlinkat", "readv", "recvfrom", "recvmmsg", "recvmsg",
		"remap_file_pages", "removexattr", "rename", "renameat", "renameat2", "restart_syscall", "rmdir", "rseq", "rt_sigaction",
		"rt_sigpending", "rt_sigprocmask", "rt_sigqueueinfo", "rt_sigreturn", "rt_sigsuspend", "rt_sigtimedwait", "rt_tgsigqueueinfo",
		"sched_get_priority_max", "sched_get_priority_min", "sched_getaffinity", "sched_getattr", "sched_getparam",
		"sched_getscheduler", "sched_rr_get_interval", "sched_setaffinity", "sched_setattr", "sched_setparam", "sched_setscheduler",
		"sched_yield", "seccomp", "select", "semctl", "semget", "semop", "semtimedop", "sendfile", "sendmmsg", "sendmsg", "sendto",
		"set_mempolicy", "set_mempolicy_home_node", "set_robust_list", "set_thread_area", "set_tid_address", "setfsgid", "setfsuid", "setgid", "setgroups", "setitimer",
		"setpgid", "setpriority", "setregid", "setresgid", "setresuid", "setreuid", "setrlimit", "setsid", "setsockopt", "setuid",
		"setxattr", "shmat", "shmctl", "shmdt", "shmget", "shutdown", "sigaltstack", "signalfd", "signalfd4", "socketpair",
		"splice", "stat", "statfs", "statx", "symlink", "symlinkat", "sync", "sync_file_range", "syncfs", "sysinfo", "tee", "tgkill", "time",
		"timer_create", "timer_delete", "timer_getoverrun", "timer_gettime", "timer_settime", "timerfd_create", "timerfd_gettime",
		"timerfd_settime", "times", "tkill", "truncate", "umask", "uname", "unlink", "unlinkat", "utime", "utimensat", "utimes",
		"vfork", "vmsplice", "wait4", "waitid", "write", "writev",
	}
}
