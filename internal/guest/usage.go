package guest

import (
	"bytes"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
)

// usage tells what the programs of the sandbox have used: those that are alive as /proc
// tells it, those that have been waited for as the kernel adds them up.
func (g *Guest) usage() *guestv1.UsageResponse {
	u := &guestv1.UsageResponse{}
	var past syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_CHILDREN, &past); err == nil {
		cpu := time.Duration(past.Utime.Nano() + past.Stime.Nano())
		u.CpuMicros = uint64(max(cpu, 0).Microseconds())
		u.PeakMemoryBytes = uint64(past.Maxrss) << 10
	}
	self := os.Getpid()
	alive := livingProcesses(self)
	// A process that left its parent while the table was being read may have been missed.
	if again := livingProcesses(self); len(again) > len(alive) {
		alive = again
	}
	u.Processes = uint32(len(alive))
	var now uint64
	for _, pid := range alive {
		used, memory := processUsage(pid)
		u.CpuMicros += uint64(used.Microseconds())
		now += memory
	}
	u.PeakMemoryBytes = max(u.PeakMemoryBytes, now)
	return u
}

// livingProcesses are the descendants of a process.
func livingProcesses(root int) []int {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	var all []process
	for _, e := range entries {
		if pid, err := strconv.Atoi(e.Name()); err == nil {
			if p, err := readProcess(pid); err == nil && p.alive {
				all = append(all, p)
			}
		}
	}
	family := map[int]bool{root: true}
	adoptChildren(all, family)
	var pids []int
	for _, p := range all {
		if family[p.pid] && p.pid != root {
			pids = append(pids, p.pid)
		}
	}
	return pids
}

// processUsage is the processor time of a process, with that of the children that it has
// waited for, and its memory.
func processUsage(pid int) (cpu time.Duration, memory uint64) {
	dir := "/proc/" + strconv.Itoa(pid)
	if text, err := os.ReadFile(dir + "/stat"); err == nil {
		cpu = parseCPU(text)
	}
	text, err := os.ReadFile(dir + "/status")
	if err != nil {
		return cpu, 0
	}
	for line := range bytes.Lines(text) {
		if rest, ok := strings.CutPrefix(string(line), "VmRSS:"); ok {
			kib, _ := strconv.ParseUint(strings.TrimSuffix(strings.TrimSpace(rest), " kB"), 10, 40)
			return cpu, kib << 10
		}
	}
	return cpu, 0
}
