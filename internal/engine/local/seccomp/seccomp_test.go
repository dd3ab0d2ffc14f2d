package seccomp

import (
	"encoding/binary"
	"runtime"
	"slices"
	"testing"

	"github.com/elastic/go-seccomp-bpf/arch"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// run evaluates the filter for one system call, as the kernel would.
func run(t *testing.T, clone3 bool, machine uint32, number int, args ...uint64) uint32 {
	t.Helper()
	raw, err := Assemble(clone3)
	if err != nil {
		t.Fatal(err)
	}
	var program []bpf.Instruction
	for b := range slices.Chunk(raw, 8) {
		program = append(program, bpf.RawInstruction{
			Op: binary.NativeEndian.Uint16(b), Jt: b[2], Jf: b[3], K: binary.NativeEndian.Uint32(b[4:]),
		}.Disassemble())
	}
	vm, err := bpf.NewVM(program)
	if err != nil {
		t.Fatal(err)
	}
	// struct seccomp_data. The VM loads big-endian words, the kernel native ones.
	data := make([]byte, 64)
	binary.BigEndian.PutUint32(data[0:], uint32(number))
	binary.BigEndian.PutUint32(data[4:], machine)
	for i, a := range args {
		binary.BigEndian.PutUint32(data[16+8*i:], uint32(a))
		binary.BigEndian.PutUint32(data[20+8*i:], uint32(a>>32))
	}
	out, err := vm.Run(data)
	if err != nil {
		t.Fatal(err)
	}
	return uint32(out)
}

func TestFilter(t *testing.T) {
	if runtime.GOARCH != "amd64" {
		t.Skip("the table has the numbers of amd64")
	}
	const (
		amd64 = unix.AUDIT_ARCH_X86_64
		i386  = unix.AUDIT_ARCH_I386
		allow = uint32(unix.SECCOMP_RET_ALLOW)
	)
	refused := func(e unix.Errno) uint32 { return unix.SECCOMP_RET_ERRNO | uint32(e) }
	for name, c := range map[string]struct {
		clone3  bool
		machine uint32
		number  int
		args    []uint64
		want    uint32
	}{
		"read":                           {number: unix.SYS_READ, want: allow},
		"execve":                         {number: unix.SYS_EXECVE, want: allow},
		"thread":                         {number: unix.SYS_CLONE, args: []uint64{0x3d0f00}, want: allow},
		"user namespace by clone":        {number: unix.SYS_CLONE, args: []uint64{unix.CLONE_NEWUSER | 17}, want: refused(unix.EPERM)},
		"net namespace by unshare":       {number: unix.SYS_UNSHARE, args: []uint64{unix.CLONE_NEWNET}, want: refused(unix.EPERM)},
		"mount namespace by unshare":     {number: unix.SYS_UNSHARE, args: []uint64{unix.CLONE_NEWNS | unix.CLONE_FS}, want: refused(unix.EPERM)},
		"unshare of files":               {number: unix.SYS_UNSHARE, args: []uint64{unix.CLONE_FILES}, want: allow},
		"clone3":                         {number: unix.SYS_CLONE3, want: refused(unix.ENOSYS)},
		"clone3 where cgroups need it":   {clone3: true, number: unix.SYS_CLONE3, want: allow},
		"mount":                          {number: unix.SYS_MOUNT, want: refused(unix.EPERM)},
		"bpf":                            {number: unix.SYS_BPF, want: refused(unix.EPERM)},
		"io_uring":                       {number: unix.SYS_IO_URING_SETUP, want: refused(unix.ENOSYS)},
		"a call of the future":           {number: 9999, want: refused(unix.ENOSYS)},
		"unix socket":                    {number: unix.SYS_SOCKET, args: []uint64{unix.AF_UNIX}, want: allow},
		"vsock socket":                   {number: unix.SYS_SOCKET, args: []uint64{unix.AF_VSOCK}, want: refused(unix.EAFNOSUPPORT)},
		"crypto socket":                  {number: unix.SYS_SOCKET, args: []uint64{unix.AF_ALG}, want: refused(unix.EAFNOSUPPORT)},
		"family in the high bits":        {number: unix.SYS_SOCKET, args: []uint64{1<<32 | unix.AF_VSOCK}, want: refused(unix.EAFNOSUPPORT)},
		"personality asked":              {number: unix.SYS_PERSONALITY, args: []uint64{0xffffffff}, want: allow},
		"family that is a call's number": {number: unix.SYS_SOCKET, args: []uint64{unix.SYS_GETPID}, want: refused(unix.EAFNOSUPPORT)},
		"personality that maps 0":        {number: unix.SYS_PERSONALITY, args: []uint64{0x100000}, want: refused(unix.EPERM)},
		"own limits":                     {number: unix.SYS_PRLIMIT64, args: []uint64{0, unix.RLIMIT_CPU}, want: allow},
		"limits of the guest":            {number: unix.SYS_PRLIMIT64, args: []uint64{1, unix.RLIMIT_CPU}, want: refused(unix.EPERM)},
		"limits of the group's first":    {number: unix.SYS_PRLIMIT64, args: []uint64{0xffffffff, unix.RLIMIT_CPU}, want: refused(unix.EPERM)},
		"own limits by the low half":     {number: unix.SYS_PRLIMIT64, args: []uint64{1 << 32, unix.RLIMIT_CPU}, want: allow},
		"read by the 32-bit entrance":    {machine: i386, number: 3, want: refused(unix.ENOSYS)},
		"read by the x32 entrance":       {number: 0x40000000, want: refused(unix.ENOSYS)},
	} {
		t.Run(name, func(t *testing.T) {
			machine := c.machine
			if machine == 0 {
				machine = amd64
			}
			if got := run(t, c.clone3, machine, c.number, c.args...); got != c.want {
				t.Errorf("answers %#x, want %#x", got, c.want)
			}
		})
	}
}

// A misspelt name would be left out without a word, as one of another architecture is.
func TestNamesAreKnownSomewhere(t *testing.T) {
	known := make(map[string]bool)
	for _, machine := range []string{"amd64", "arm64", "386"} {
		info, err := arch.GetInfo(machine)
		if err != nil {
			t.Fatal(err)
		}
		for n := range info.SyscallNames {
			known[n] = true
		}
	}
	seen := make(map[string]bool)
	for _, n := range append(allowed(), denied()...) {
		if !known[n] {
			t.Errorf("%q is no system call of any architecture", n)
		}
		if seen[n] {
			t.Errorf("%q is listed twice", n)
		}
		seen[n] = true
	}
}

// Every number of every architecture gets the answer that its name has in the lists,
// and the kernel has little to do.
func TestTreeIsTheLists(t *testing.T) {
	for _, machine := range []string{"amd64", "arm64"} {
		for _, clone3 := range []bool{false, true} {
			info, err := arch.GetInfo(machine)
			if err != nil {
				t.Fatal(err)
			}
			filter := program(info, clone3)
			vm, err := bpf.NewVM(filter)
			if err != nil {
				t.Fatal(err)
			}
			if raw, err := bpf.Assemble(filter); err != nil || len(raw) > 400 {
				t.Errorf("%s: %d instructions, %v", machine, len(raw), err)
			}
			want := make(map[int]uint32)
			for name, number := range info.SyscallNames {
				switch {
				case slices.Contains(denied(), name):
					want[number] = unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)
				case slices.Contains(allowed(), name) || name == "clone3" && clone3:
					want[number] = unix.SECCOMP_RET_ALLOW
				case slices.Contains([]string{"clone", "unshare", "personality", "prlimit64"}, name): // with 0
					want[number] = unix.SECCOMP_RET_ALLOW
				case name == "socket":
					want[number] = unix.SECCOMP_RET_ERRNO | uint32(unix.EAFNOSUPPORT)
				}
			}
			data := make([]byte, 64)
			binary.BigEndian.PutUint32(data[4:], uint32(info.ID))
			for number := range 2048 {
				expected, ok := want[number]
				if !ok {
					expected = unix.SECCOMP_RET_ERRNO | uint32(unix.ENOSYS)
				}
				binary.BigEndian.PutUint32(data[0:], uint32(number))
				if got, err := vm.Run(data); err != nil || uint32(got) != expected {
					t.Errorf("%s, call %d: %#x, %v, want %#x", machine, number, got, err, expected)
				}
			}
		}
	}
}

// A tree of more spans than a condition can jump over, with an answer for each number.
func TestTreeOfAnySize(t *testing.T) {
	byNumber := make(map[uint32][]bpf.Instruction)
	for n := range uint32(1000) {
		if n%7 != 3 {
			byNumber[n] = []bpf.Instruction{bpf.LoadConstant{Dst: bpf.RegA, Val: n}, bpf.RetA{}}
		}
	}
	vm, err := bpf.NewVM(append([]bpf.Instruction{bpf.LoadAbsolute{Off: offsetNumber, Size: 4}}, tree(ranges(byNumber))...))
	if err != nil {
		t.Fatal(err)
	}
	for n := range uint32(1100) {
		data := binary.BigEndian.AppendUint32(nil, n)
		want := n
		if byNumber[n] == nil {
			want = unix.SECCOMP_RET_ERRNO | uint32(unix.ENOSYS)
		}
		if got, err := vm.Run(data); err != nil || uint32(got) != want {
			t.Errorf("%d: %#x, %v, want %#x", n, got, err, want)
		}
	}
}
