package local

import (
	"os"
	"slices"
	"strings"
)

// prelude is what the rows of the table have at hand: raw system calls, and attempts
// that print how they went.
const prelude = `
import ctypes, errno, fcntl, glob, mmap, os, re, signal, socket, stat, struct, subprocess, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
def call(name, *args):
    "makes a system call; returns its result, or the name of its error"
    ctypes.set_errno(0)
    r = libc.syscall(ctypes.c_long(NR[name]), *[ctypes.c_long(a) if isinstance(a, int) else a for a in args])
    return r if r != -1 else errno.errorcode[ctypes.get_errno()]
def attempt(f, *args):
    "calls f; returns 'done' or the name of the error"
    try: f(*args)
    except OSError as e: return errno.errorcode.get(e.errno, str(e))
    return "done"
def read(path):
    try:
        with open(path, "rb") as f: return f.read()
    except OSError as e: return errno.errorcode[e.errno]
def write(path, text="x"):
    def f():
        fd = os.open(path, os.O_WRONLY)
        try: os.write(fd, text.encode())
        finally: os.close(fd)
    return attempt(f)
`

// isolation is one thing that code in a sandbox tries.
type isolation struct {
	name string
	// script is Python, run after prelude; {{canary}}, {{state}}, {{port}},
	// {{abstract}}, {{pid}} and {{addresses}} are put in.
	script string
	// want is all that it prints.
	want string
	// ordinary is what it prints where executord runs as an ordinary user, if that is
	// something else; "-" leaves the row out there.
	ordinary string
}

func isolationTable() []isolation {
	const (
		noop   = ""
		absent = "-"
	)
	return []isolation{
		// What can be seen.
		{"the root has only what is allowed", `print(*sorted(os.listdir("/")))`, "?root", ""},
		{"homes, work and service directories are empty", `
for d in "/home", "/root", "/srv", "/mnt", "/media", "/opt", "/var/lib", "/var/log", "/var/cache", "/var/spool", "/tmp", "/var/tmp": print(d, os.listdir(d))`,
			strings.Join([]string{"/home []", "/root []", "/srv []", "/mnt []", "/media []", "/opt []", "/var/lib []", "/var/log []", "/var/cache []", "/var/spool []", "/tmp []", "/var/tmp []"}, "\n"), ""},
		{"secrets of /etc are not there", `
for f in "shadow", "gshadow", "sudoers", "ssh", "ssl/private", "machine-id", "environment", "fstab", "crontab", "hostid", "cloud": print(f, os.path.lexists("/etc/" + f))`,
			strings.Join([]string{"shadow False", "gshadow False", "sudoers False", "ssh False", "ssl/private False", "machine-id False", "environment False", "fstab False", "crontab False", "hostid False", "cloud False"}, "\n"), ""},
		{"no file of the host with the canary's name", `print(subprocess.run("find / -name '*{{canary}}*' -not -path '/proc/*' 2>/dev/null", shell=True, capture_output=True, text=True).stdout)`, "", ""},
		{"paths of the host lead nowhere", `
for p in "{{state}}", "{{state}}/local", "/work", "/tmp/root", "/tmp/l0", "/tmp/l1", "/.old", "/oldroot": print(os.path.lexists(p))
print([p for p in os.popen("cat /proc/self/mountinfo /proc/self/mounts") if "{{canary}}" in p or "{{state}}" in p])`,
			strings.Repeat("False\n", 8) + "[]", ""},
		{"upwards there is only the own root", `
same = lambda p: os.stat(p).st_ino == os.stat("/").st_ino and os.stat(p).st_dev == os.stat("/").st_dev
print(same("/.."), same("/../../../../.."), same("/proc/self/root"), same("/proc/self/root/.."))`, "True True True True", ""},
		{"chroot is no way out", `
os.mkdir("/tmp/jail"); os.chroot("/tmp/jail")
for _ in range(100): os.chdir("..")
os.chroot(".")
print(*sorted(os.listdir("/")))`, "?root", ""},
		{"a link is no way to the host's files", `
os.symlink("{{state}}", "/tmp/link"); print(attempt(os.listdir, "/tmp/link"))
os.symlink("/tmp/root", "/tmp/staging"); print(attempt(os.listdir, "/tmp/staging"))
print(attempt(os.link, "/proc/1/exe", "/tmp/exe"))`, "ENOENT\nENOENT\nEXDEV", ""},
		{"process 1 shows nothing", `
for f in "environ", "maps", "mem", "stack", "auxv", "io", "pagemap": print(f, read("/proc/1/" + f))
for f in "exe", "cwd", "root", "ns/mnt", "ns/user", "ns/net": print(f, attempt(os.readlink, "/proc/1/" + f), read("/proc/1/" + f))
print(set(attempt(os.readlink, f) for f in glob.glob("/proc/1/fd/*")), set(read(f) for f in glob.glob("/proc/1/fd/*")))
for d in "map_files", "fdinfo", "root/", "cwd/": print(d, attempt(os.listdir, "/proc/1/" + d))
print(b"{{canary}}" in read("/proc/1/cmdline"), read("/proc/1/syscall"))`,
			"environ EACCES\nmaps EACCES\nmem EACCES\nstack EACCES\nauxv EACCES\nio EACCES\npagemap EACCES\n" +
				"exe EACCES EACCES\ncwd EACCES EACCES\nroot EACCES EACCES\nns/mnt EACCES EACCES\nns/user EACCES EACCES\nns/net EACCES EACCES\n" +
				"{'EACCES'} {'EACCES'}\nmap_files EACCES\nfdinfo EACCES\nroot/ EACCES\ncwd/ EACCES\nFalse EPERM", ""},
		{"no environment has anything of executord's", `
print([p for p in glob.glob("/proc/[0-9]*/environ") if b"{{canary}}" in (read(p) if isinstance(read(p), bytes) else b"")])
print(sorted(os.environ))`, "[]\n['EXECUTOR_EXECUTION', 'HOME', 'LC_CTYPE', 'PATH']", ""},
		{"descriptors are the standard ones", `
fds = [int(f) for f in os.listdir("/proc/self/fd")]
print([(f, re.sub(r"\d+", "N", os.readlink("/proc/self/fd/%d" % f))) for f in sorted(fds) if os.path.lexists("/proc/self/fd/%d" % f)])`,
			"[(0, '/dev/null'), (1, 'pipe:[N]'), (2, 'pipe:[N]')]", ""},
		{"only own processes are there", `
pids = sorted(int(p) for p in os.listdir("/proc") if p.isdigit())
print(pids[0], set(pids) - {1, os.getpid(), os.getppid()}, os.getppid(), b"{{canary}}" in b"".join(b or b"" for b in map(read, glob.glob("/proc/[0-9]*/cmdline")) if isinstance(b, bytes)))
print(attempt(os.kill, {{pid}}, 0))`, "1 set() 1 False\nESRCH", ""},
		{"/dev has only what programs need", `print(*sorted(os.listdir("/dev")))`, "fd full null ptmx pts random shm stderr stdin stdout tty urandom zero", ""},
		{"the kernel's memory and log are not readable", `
for f in "kcore", "kallsyms", "keys", "kmsg", "kpagecount", "kpageflags", "kpagecgroup", "timer_list", "sched_debug", "latency_stats", "modules", "sysrq-trigger":
    p = "/proc/" + f
    if os.path.exists(p) and not (os.stat(p).st_rdev == os.stat("/dev/null").st_rdev and read(p) == b""): print(f, "is there")
for f in "slabinfo", "vmallocinfo", "pagetypeinfo": print(f, read("/proc/" + f))
for d in "/proc/acpi", "/proc/scsi", "/sys/firmware", "/sys/fs/bpf", "/sys/kernel/debug", "/sys/kernel/tracing", "/sys/kernel/security":
    if os.path.exists(d) and os.listdir(d): print(d, "is there")
print(all(l.strip().startswith(b"00000000-00000000") for l in read("/proc/iomem").splitlines()), call("syslog", 3, ctypes.create_string_buffer(99), 99))`,
			"slabinfo EACCES\nvmallocinfo EACCES\npagetypeinfo EACCES\nTrue EPERM", ""},
		{"control groups are out of reach", `
print([l for l in open("/proc/mounts") if "cgroup" in l.split()[2]], os.listdir("/sys/fs/cgroup"))
for kind in b"cgroup", b"cgroup2": print(call("mount", b"x", b"/mnt", kind, 0, 0), call("fsopen", kind, 0))`, "[] []\nEPERM EPERM\nEPERM EPERM", ""},

		// Privileges.
		{"capabilities, no_new_privs and seccomp", `
s = dict(l.rstrip("\n").split(":\t", 1) for l in open("/proc/self/status") if ":\t" in l)
kept = [n for n in range(64) if int(s["CapEff"], 16) >> n & 1]
print(kept, s["CapPrm"] == s["CapEff"] == s["CapBnd"], s["CapInh"], s["CapAmb"], s["NoNewPrivs"], s["Seccomp"])`,
			// chown, dac_override, fowner, fsetid, kill, setgid, setuid, setpcap, net_bind_service, net_raw, sys_chroot, mknod, audit_write, setfcap
			"[0, 1, 3, 4, 5, 6, 7, 8, 10, 13, 18, 27, 29, 31] True 0000000000000000 0000000000000000 1 2", ""},
		{"a program that asks for more does not get it", `
def effective():
    return [l for l in open("/proc/self/status") if l.startswith("CapEff")][0].split()[1]
before = effective()
print(before == subprocess.run(["grep", "^CapEff", "/proc/self/status"], capture_output=True, text=True).stdout.split()[1])
sys_admin, keep, ambient = 21, 8, 47
header = struct.pack("<Ii", 0x20080522, 0)
print(call("prctl", keep, 1), call("prctl", 23, sys_admin), call("prctl", ambient, 2, sys_admin, 0, 0), call("capset", header, struct.pack("<6I", *[1 << sys_admin, 1 << sys_admin, 0, 0, 0, 0])))
print(call("prctl", 38, 0, 0, 0, 0), call("prctl", 39, 0, 0, 0, 0))  # no_new_privs back to 0, and as it is`, "True\n0 0 EPERM EPERM\nEINVAL 1", ""},
		{"set-user-id programs gain nothing", `
import shutil
shutil.copy("/usr/bin/id", "/workspace/id"); os.chmod("/workspace/id", 0o6755)
os.chmod("/workspace", 0o755)
os.setgid(1000); os.setuid(1000)
print(subprocess.run(["/workspace/id", "-u"], capture_output=True, text=True).stdout.strip())
print([p for p in glob.glob("/usr/bin/*") if os.stat(p).st_mode & 0o6000 and os.path.basename(p) in ("su", "passwd", "mount")] != [])
print(subprocess.run(["/usr/bin/su", "-c", "id -u"], capture_output=True, text=True).stdout.strip() or "refused")`, "1000\nTrue\nrefused", absent},
		{"file capabilities gain nothing", `
import shutil
shutil.copy("/usr/bin/python3", "/workspace/p")
# version 2, effective: all of them
caps = struct.pack("<IIIII", 0x02000001, 0xffffffff, 0, 0xffffffff, 0)
print(attempt(os.setxattr, "/workspace/p", "security.capability", caps) in ("done", "EPERM"))
os.setgid(1000); os.setuid(1000)
print(subprocess.run(["/workspace/p", "-c", "print([l for l in open('/proc/self/status') if l.startswith('CapEff')][0].split()[1])"], capture_output=True, text=True).stdout.strip())`,
			"True\n0000000000000000", absent},
		{"limits of resources are not raised", `
import resource
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
def up(): resource.setrlimit(resource.RLIMIT_NOFILE, (hard + 1, hard + 1))
try: up(); print("raised")
except (ValueError, OSError, PermissionError): print("refused")
print(attempt(os.nice, -5), attempt(os.sched_setscheduler, 0, os.SCHED_FIFO, os.sched_param(1)), write("/proc/self/oom_score_adj", "-1000"), write("/proc/1/oom_score_adj", "-1000"))`,
			"refused\nEPERM EPERM EACCES EACCES", ""},
		{"limits of other processes are not set, own ones are", `
import resource
print(call("prlimit64", 1, resource.RLIMIT_CPU, struct.pack("<QQ", 1, 1), 0), call("prlimit64", os.getpid(), resource.RLIMIT_CORE, 0, ctypes.create_string_buffer(16)))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
print(resource.getrlimit(resource.RLIMIT_CORE), subprocess.run(["bash", "-c", "ulimit -n 99; ulimit -n"], capture_output=True, text=True).stdout.strip())`,
			"EPERM EPERM\n(0, 0) 99", ""},

		// Namespaces and mounts.
		{"no new namespaces by unshare", `print(*[call("unshare", f) for f in FLAGS])`, strings.TrimSpace(strings.Repeat("EPERM ", 8)), ""},
		{"no new namespaces by clone", `print(*[call("clone", f | 17, 0, 0, 0, 0) for f in FLAGS[:7]])`, strings.TrimSpace(strings.Repeat("EPERM ", 7)), ""},
		{"no new namespaces by clone3", `
def clone3(flags):
    args = struct.pack("<11Q", flags, 0, 0, 0, 17, 0, 0, 0, 0, 0, 0)
    r = call("clone3", args, len(args))
    if r == 0: os._exit(0)
    return r
print(*[clone3(f) for f in FLAGS])`, "?clone3", ""},
		{"no user namespace is counted as allowed", `print(read("/proc/sys/user/max_user_namespaces"), write("/proc/sys/user/max_user_namespaces", "100"))`, `b'0\n' EACCES`, ""},
		{"no joining of namespaces", `
out = []
for n in "user", "mnt", "net", "pid", "ipc", "uts", "cgroup":
    fd = os.open("/proc/self/ns/" + n, os.O_RDONLY)
    out.append(call("setns", fd, 0))
print(*out, call("setns", os.pidfd_open(1), 0x20000))`, strings.TrimSpace(strings.Repeat("EPERM ", 8)), ""},
		{"no mounts", `
print(call("mount", b"tmpfs", b"/mnt", b"tmpfs", 0, 0), call("mount", b"/", b"/mnt", 0, 4096, 0), call("mount", b"proc", b"/mnt", b"proc", 0, 0))
print(call("open_tree", -100, b"/", 1), call("fsopen", b"tmpfs", 0), call("fspick", -100, b"/", 0), call("move_mount", -100, b"/usr", -100, b"/mnt", 0), call("mount_setattr", -100, b"/proc/sys", 0, bytes(32), 32), call("fsmount", 0, 0, 0), call("fsconfig", 0, 0, 0, 0, 0))`,
			"EPERM EPERM EPERM\nEPERM EPERM EPERM EPERM EPERM EPERM EPERM", ""},
		{"what is read-only stays read-only", `
for p in b"/proc/sys", b"/sys", b"/proc/fs", b"/proc/irq": print(call("mount", 0, p, 0, 4096 | 32, 0), call("umount2", p, 2))`, strings.TrimSpace(strings.Repeat("EPERM EPERM\n", 4)), ""},
		{"masks stay", `
for p in b"/proc/keys", b"/proc/kallsyms", b"/sys/firmware", b"/proc/timer_list": print(call("umount2", p, 2))`, strings.TrimSpace(strings.Repeat("EPERM\n", 4)), ""},
		{"no other root", `print(call("pivot_root", b"/", b"/tmp"))`, "EPERM", ""},

		// The guest.
		{"no debugging of the guest", `
for request in 16, 0x4206: print(call("ptrace", request, 1, 0, 0))
buf = ctypes.create_string_buffer(8)
iov = struct.pack("<QQ", ctypes.addressof(buf), 8)
print(call("process_vm_readv", 1, iov, 1, iov, 1, 0), call("process_vm_writev", 1, iov, 1, iov, 1, 0), call("kcmp", os.getpid(), 1, 0, 0, 0))
print(call("pidfd_getfd", os.pidfd_open(1), 3, 0), call("process_madvise", os.pidfd_open(1), iov, 1, 20, 0), call("migrate_pages", 1, 0, 0, 0))`,
			"EPERM\nEPERM\nEPERM EPERM EPERM\nEPERM EACCES EPERM", ""},
		{"the guest's files are not opened through its threads", `
out = set()
for task in glob.glob("/proc/1/task/*"):
    for f in "environ", "mem", "maps": out.add(read(task + "/" + f))
    for l in glob.glob(task + "/fd/*") + glob.glob(task + "/ns/*"): out.add(attempt(os.readlink, l))
    out.add(attempt(os.listdir, task + "/fdinfo"))
    for l in "root", "cwd", "exe": out.add(attempt(os.readlink, task + "/" + l))
print(*out)`, "EACCES", ""},

		// The kernel.
		{"calls that reach beyond the sandbox are refused", `
for n in ("acct add_key adjtimex bpf clock_adjtime clock_settime delete_module fanotify_init finit_module init_module kexec_file_load kexec_load keyctl "
          "name_to_handle_at open_by_handle_at perf_event_open quotactl reboot request_key setdomainname sethostname settimeofday swapoff swapon syslog userfaultfd vhangup").split():
    r = call(n, 0, 0, 0, 0, 0)
    if r != "EPERM": print(n, r)`, noop, ""},
		{"new and rare calls look missing", `
for n in "io_uring_setup io_uring_enter io_uring_register _sysctl sysfs uselib ustat nfsservctl getpmsg kexec_nothing".split():
    if n in NR and call(n, 0, 0, 0, 0, 0) not in ("ENOSYS", "EPERM"): print(n, call(n, 0, 0, 0, 0, 0))
print(call("io_uring_setup", 1, bytes(120)))
NR["future"] = 4000; print(call("future"))
NR["x32"] = 0x40000000 | 39; print(call("x32"))`, "ENOSYS\nENOSYS\nENOSYS", ""},
		{"the 32-bit entrance is shut", `
if os.uname().machine == "x86_64":
    m = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    m.write(bytes.fromhex("53 b8 14000000 cd80 5b c3"))  # push rbx; mov eax, 20 (getpid); int 0x80; pop rbx; ret
    print(ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(m)))())
else: print(-38)`, "-38", ""},
		{"/proc/sys, /sys and /proc are not writable", `
open_ok = []
for top in "/proc/sys", "/sys":
    for d, _, files in os.walk(top):
        for f in files:
            p = os.path.join(d, f)
            if not os.path.islink(p):
                r = attempt(lambda: os.close(os.open(p, os.O_WRONLY | os.O_NONBLOCK)))
                if r not in ("EROFS", "EACCES", "EPERM"): open_ok.append((p, r))
for d, dirs, files in os.walk("/proc"):
    dirs[:] = [x for x in dirs if not x.isdigit() and x not in ("sys", "self", "thread-self", "net")]
    for f in files:
        p = os.path.join(d, f)
        if stat.S_ISREG(os.lstat(p).st_mode):
            r = attempt(lambda: os.close(os.open(p, os.O_WRONLY | os.O_NONBLOCK)))
            if r not in ("EROFS", "EACCES", "EPERM", "EIO"): open_ok.append((p, r))
print(open_ok)
print(write("/proc/sys/kernel/hostname"), write("/proc/sys/kernel/core_pattern"), write("/proc/sys/vm/drop_caches", "3"), stat.S_ISCHR(os.stat("/proc/sysrq-trigger").st_mode) if os.path.exists("/proc/sysrq-trigger") else True)`,
			"[]\nEACCES EACCES EACCES True", ""},
		{"no devices can be made", `
for mode, major, minor in (stat.S_IFBLK, 8, 0), (stat.S_IFBLK, 254, 0), (stat.S_IFCHR, 1, 1), (stat.S_IFCHR, 1, 11), (stat.S_IFCHR, 10, 229), (stat.S_IFCHR, 1, 3), (stat.S_IFCHR, 0, 0):
    print(attempt(os.mknod, "/workspace/device-%d-%d" % (major, minor), mode | 0o666, os.makedev(major, minor)))`, strings.TrimSpace(strings.Repeat("EPERM\n", 7)), ""},
		{"devices of the host are not there", `
for d in "sda", "vda", "nvme0n1", "mem", "kmem", "port", "kmsg", "kvm", "fuse", "net/tun", "loop0", "loop-control", "mapper/control", "snd", "dri", "vhost-net", "vsock", "userfaultfd", "cpu_dma_latency", "rtc0", "watchdog":
    if os.path.lexists("/dev/" + d): print(d)`, noop, ""},
		{"the host's device nodes are not changed", `
for n in "null", "zero", "full", "random", "urandom", "tty":
    p = "/dev/" + n
    print(*[attempt(f, *a) for f, a in ((os.chmod, (p, 0)), (os.chown, (p, 0, 0)), (os.remove, (p,)), (os.setxattr, (p, "user.x", b"x")), (os.rename, (p, "/dev/x")))])
fd = os.open("/dev/random", os.O_RDWR)
print(attempt(fcntl.ioctl, fd, 0x5204, 0), attempt(fcntl.ioctl, fd, 0x40045201, struct.pack("i", 1)))  # RNDZAPENTCNT, RNDADDTOENTCNT`,
			strings.Repeat("EPERM EPERM EBUSY EPERM EBUSY\n", 6) + "EPERM EPERM", ""},
		{"the clock is the host's", `
import time
print(attempt(time.clock_settime, time.CLOCK_REALTIME, time.time() + 1000), write("/proc/self/timens_offsets", "monotonic 1 0"))`, "EPERM EPERM", ""},

		// The network.
		{"the host's loopback is not this one", `
print(attempt(socket.create_connection, ("127.0.0.1", {{port}}), 5))
print(attempt(socket.socket(socket.AF_UNIX).connect, "\0{{abstract}}"), "{{abstract}}" in open("/proc/net/unix").read())
print(attempt(os.stat, "{{state}}/{{canary}}"))`, "ECONNREFUSED\nECONNREFUSED False\nENOENT", ""},
		{"there is no way out", `
print(os.listdir("/sys/class/net"), [i[1] for i in socket.if_nameindex()], open("/proc/net/route").read().count("\n"))
out = set()
for address in ["169.254.169.254", "8.8.8.8", "1.1.1.1", "192.0.2.1", "10.0.0.1", "172.17.0.1", "255.255.255.255", *{{addresses}}]:
    for kind in socket.SOCK_STREAM, socket.SOCK_DGRAM:
        s = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, kind); s.settimeout(5)
        s.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        r = attempt(s.connect, (address, {{port}}))
        out.add(r)
for address in "2001:4860:4860::8888", "fe80::1", "fd00:ec2::254", "::ffff:8.8.8.8":
    s = socket.socket(socket.AF_INET6, socket.SOCK_STREAM); s.settimeout(5)
    out.add(attempt(s.connect, (address, 80)))
print("done" in out, out <= {"ENETUNREACH", "EADDRNOTAVAIL", "EINVAL"})
try: socket.getaddrinfo("example.com", 80); print("resolved")
except socket.gaierror: print("not resolved")
raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
print(attempt(raw.sendto, b"\x08\x00\xf7\xff\x00\x00\x00\x00", ("8.8.8.8", 0)))`, "['lo'] ['lo'] 1\nFalse True\nnot resolved\nENETUNREACH", ""},
		{"other kinds of sockets are not there", `
for n, family, kind in ("vsock", 40, 1), ("packet", 17, 3), ("alg", 38, 5), ("bluetooth", 31, 3), ("can", 29, 3), ("tipc", 30, 1), ("xdp", 44, 3), ("key", 15, 3), ("rds", 21, 5), ("nfc", 39, 3), ("qipcrtr", 42, 2), ("smc", 43, 1):
    print(n, attempt(socket.socket, family, kind))`,
			strings.Join([]string{"vsock EAFNOSUPPORT", "packet EAFNOSUPPORT", "alg EAFNOSUPPORT", "bluetooth EAFNOSUPPORT", "can EAFNOSUPPORT", "tipc EAFNOSUPPORT",
				"xdp EAFNOSUPPORT", "key EAFNOSUPPORT", "rds EAFNOSUPPORT", "nfc EAFNOSUPPORT", "qipcrtr EAFNOSUPPORT", "smc EAFNOSUPPORT"}, "\n"), ""},
		{"the network cannot be set up", `
s = socket.socket()
print(attempt(fcntl.ioctl, s, 0x8914, struct.pack("16sh14x", b"lo", 0)))          # SIOCSIFFLAGS
print(attempt(fcntl.ioctl, s, 0x8916, struct.pack("16sHH4s8x", b"lo", 2, 0, bytes(4))))  # SIOCSIFADDR
n = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
n.bind((0, 0))
n.send(struct.pack("=IHHII", 32, 16, 0x605, 1, 0) + struct.pack("=BxHiII", 0, 0, 0, 0, 0))  # RTM_NEWLINK
print(errno.errorcode[-struct.unpack_from("=i", n.recv(4096), 16)[0]])
print(attempt(s.setsockopt, socket.IPPROTO_IP, 64, bytes(84)))  # IPT_SO_SET_REPLACE`, "EPERM\nEPERM\nEPERM\nEPERM", ""},
	}
}

// expand resolves the wants that depend on the host.
func (c isolation) expand(root bool) string {
	want := c.want
	if !root && c.ordinary != "" {
		want = c.ordinary
	}
	switch want {
	case "?root":
		names := []string{"dev", "etc", "home", "media", "mnt", "opt", "proc", "root", "run", "srv", "sys", "tmp", "usr", "var", "workspace"}
		for _, n := range []string{"bin", "sbin", "lib", "lib32", "lib64", "libx32"} {
			if _, err := os.Lstat("/" + n); err == nil {
				names = append(names, n)
			}
		}
		slices.Sort(names)
		return strings.Join(names, " ")
	case "?clone3":
		if root { // a filter cannot look into its arguments: the kernel itself refuses
			return "ENOSPC EPERM EPERM EPERM EPERM EPERM EPERM EPERM"
		}
		return strings.TrimSpace(strings.Repeat("ENOSYS ", 8))
	}
	return want
}
