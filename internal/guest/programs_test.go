package guest

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// program is a command of a test, where a shell cannot do what the test needs.
func program(args []string) int {
	var err error
	switch args[0] {
	case "random":
		err = writeRandom(atoi(args[1]), atoi(args[2]))
	case "alternate":
		err = alternate(args[1], atoi(args[2]))
	case "progress":
		err = progress(args[1], atoi(args[2]))
	case "packets":
		err = packets(atoi(args[1]))
	case "headless":
		headless()
	case "keep":
		err = keep(args[1], args[2] == "flood")
	case "give":
		err = give(args[1], atoi(args[2]))
	case "single":
		single(atoi(args[1]))
	case "attack":
		if os.Getppid() != 1 || os.Getpid() > 100 {
			err = errors.New("not in a namespace of processes made for this")
			break
		}
		attack(1)
		fmt.Println("attacked")
	default:
		err = fmt.Errorf("unknown program %q", args)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 99
	}
	return 0
}

func atoi(s string) int {
	n, err := strconv.Atoi(s)
	if err != nil {
		panic(err)
	}
	return n
}

// randomBytes are the same for the same seed, in the program and in its test.
func randomBytes(seed, size int) []byte {
	r := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)})
	data := make([]byte, size)
	_, _ = r.Read(data)
	return data
}

// writeRandom writes to both streams at once, in pieces of all sizes.
func writeRandom(seed, size int) error {
	var both sync.WaitGroup
	var errs [2]error
	for i, f := range []*os.File{os.Stdout, os.Stderr} {
		both.Go(func() {
			r := rand.New(rand.NewPCG(uint64(seed), uint64(i)))
			for data := randomBytes(seed+i, size); len(data) > 0 && errs[i] == nil; {
				n := min(len(data), 1+r.IntN(1<<r.IntN(18)))
				_, errs[i] = f.Write(data[:n])
				data = data[n:]
			}
		})
	}
	both.Wait()
	return errors.Join(errs[:]...)
}

// alternate writes a byte to one stream after the other, each when it is allowed to
// by a byte from the named pipe.
func alternate(fifo string, n int) error {
	turn, err := os.OpenFile(fifo, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	for i := range n {
		if _, err := turn.Read(make([]byte, 1)); err != nil {
			return err
		}
		f := os.Stdout
		if i%2 == 1 {
			f = os.Stderr
		}
		if _, err := f.Write([]byte{byte(i)}); err != nil {
			return err
		}
	}
	return nil
}

// single writes single bytes to one stream after the other as fast as it can.
func single(n int) {
	for i := range n {
		_, _ = syscall.Write(1+i%2, []byte{byte(i)})
	}
}

// progress writes size bytes and notes in a file how many were taken.
func progress(file string, size int) error {
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	data := randomBytes(0, size)
	for done := 0; done < size; {
		n, err := os.Stdout.Write(data[done:min(done+4096, size)])
		if err != nil {
			return err
		}
		done += n
		if _, err := f.WriteAt(binary.LittleEndian.AppendUint64(nil, uint64(done)), 0); err != nil {
			return err
		}
	}
	return nil
}

// packets puts its standard output into packet mode, where a read that is too short
// loses the rest of a packet.
func packets(n int) error {
	if _, err := unix.FcntlInt(1, unix.F_SETFL, unix.O_WRONLY|unix.O_DIRECT); err != nil {
		return err
	}
	for i := range n {
		if _, err := syscall.Write(1, bytes.Repeat([]byte{byte(i)}, 1+(i*997)%4096)); err != nil {
			return err
		}
	}
	return nil
}

// init keeps main on the first thread, for headless.
func init() {
	if os.Getenv(roleVariable) == "program" {
		runtime.LockOSThread()
	}
}

// headless goes on after its first thread has ended, so that it looks like a zombie.
func headless() {
	var rest sync.WaitGroup
	rest.Go(func() {
		stat := func() string {
			text, _ := os.ReadFile("/proc/self/stat")
			return string(text)
		}
		for !strings.Contains(stat(), ") Z ") {
			time.Sleep(time.Millisecond)
		}
		fmt.Println("headless", os.Getpid())
		time.Sleep(time.Minute)
	})
	_, _, _ = unix.Syscall(unix.SYS_EXIT, 0, 0, 0) // of this thread alone
	rest.Wait()
}

// keep takes a descriptor that it is sent and holds it.
func keep(path string, flood bool) error {
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path})
	if err != nil {
		return err
	}
	fmt.Println("listening")
	conn, err := l.AcceptUnix()
	if err != nil {
		return err
	}
	oob := make([]byte, 64)
	_, n, _, _, err := conn.ReadMsgUnix(make([]byte, 1), oob)
	if err != nil {
		return err
	}
	messages, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil {
		return err
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil {
		return err
	}
	if _, err := conn.Write([]byte("k")); err != nil {
		return err
	}
	kept := os.NewFile(uintptr(fds[0]), "kept")
	for flood {
		if _, err := kept.Write(make([]byte, 4096)); err != nil {
			return err
		}
	}
	time.Sleep(time.Minute)
	return kept.Close()
}

// give sends its standard output to keep and writes size bytes to it.
func give(path string, size int) error {
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: path})
	if err != nil {
		return err
	}
	if _, _, err := conn.WriteMsgUnix([]byte("x"), unix.UnixRights(1), nil); err != nil {
		return err
	}
	if _, err := io.ReadFull(conn, make([]byte, 1)); err != nil {
		return err
	}
	_, err = os.Stdout.Write(randomBytes(3, size))
	return err
}

// attack sends a process every signal there is, as kill does and as sigqueue does.
func attack(pid int) {
	for sig := syscall.Signal(1); sig <= 64; sig++ {
		_ = syscall.Kill(pid, sig)
		info := struct {
			signo, errno, code, pad int32
			rest                    [28]int32
		}{signo: int32(sig), code: -1}
		_, _, _ = unix.RawSyscall(unix.SYS_RT_SIGQUEUEINFO, uintptr(pid), uintptr(sig), uintptr(unsafe.Pointer(&info)))
	}
}
