package local

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/engine/local/cgroup"
)

// record is what executord must know to find a sandbox again.
type record struct {
	Limits engine.Limits `json:"limits"`
	Groups cgroup.Paths  `json:"groups,omitzero"`
	// The guest: its process id, when it started, and in which run of the host. 0 and
	// empty until there is one.
	PID        int    `json:"pid"`
	StartTicks uint64 `json:"start_ticks"`
	Boot       string `json:"boot"`
	// Loop is the number of the loop device of the sandbox's disk; nil if it has none, or
	// none yet.
	Loop *int `json:"loop,omitempty"`
	// Layers are those of the image that it was made from, and Volumes the names of its own.
	Layers  []string `json:"layers,omitempty"`
	Volumes []string `json:"volumes,omitempty"`
}

// recordFile is the record of a sandbox that is being made.
type recordFile struct{ file *os.File }

// newRecordFile makes the sandbox's directory and writes down what is known by now.
func newRecordFile(sb *sandbox) (*recordFile, error) {
	if err := os.Mkdir(sb.dir, 0o755); err != nil {
		return nil, fmt.Errorf("make the sandbox's directory: %w", err)
	}
	file, err := os.OpenFile(filepath.Join(sb.dir, recordName), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	r := &recordFile{file}
	if err := r.put(recordOf(sb)); err != nil {
		r.close()
		return nil, err
	}
	return r, nil
}

// write writes the record again, with the guest.
func (r *recordFile) write(sb *sandbox, boot string) error {
	s, err := statOf(sb.process.pid)
	if err != nil {
		return fmt.Errorf("look at the guest's process: %w", err)
	}
	known := recordOf(sb)
	known.PID, known.StartTicks, known.Boot = sb.process.pid, s.ticks, boot
	return r.put(known)
}

func recordOf(sb *sandbox) record {
	r := record{Limits: sb.limits, Loop: sb.loop, Layers: sb.layers, Volumes: sb.volumes}
	if sb.group != nil {
		r.Groups = sb.group.Paths()
	}
	return r
}

// put writes the record in place of the one that is there, with one system call that
// a kill does not cut in two. No record is shorter than one before it, which had less.
func (r *recordFile) put(known record) error {
	text, err := json.Marshal(known)
	if err != nil {
		return err
	}
	if _, err := r.file.WriteAt(text, 0); err != nil {
		return fmt.Errorf("write down the sandbox: %w", err)
	}
	return nil
}

func (r *recordFile) close() { _ = r.file.Close() } // written or not, that is known

var errDamaged = errors.New("is damaged")

// readRecord reads what is known of a sandbox; os.ErrProcessDone if there is nothing,
// which means that executord died before the guest could start anything.
func readRecord(path string) (record, error) {
	var r record
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return r, os.ErrProcessDone
	}
	if err != nil {
		return r, err
	}
	if err := json.Unmarshal(text, &r); err != nil {
		return record{}, fmt.Errorf("%s: %w: %w", path, errDamaged, err)
	}
	return r, nil
}
