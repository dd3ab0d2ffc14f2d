package modal

import (
	"crypto/sha256"
	"encoding/base32"
	"fmt"
	"maps"
	"strconv"
	"strings"
	"time"

	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/fault"
)

// Tags by which a sandbox is found again, and known. Everything that executord must know
// of one is there, so that nothing on this machine has to agree with it.
const (
	tagPrefix  = "executord-"
	tagOwner   = "executord-owner"
	tagID      = "executord-id"
	tagUntil   = "executord-until"
	tagGuest   = "executord-guest"
	tagLimits  = "executord-limits"
	tagVolumes = "executord-volumes"
)

// record is what is known of a sandbox.
type record struct {
	id      string
	until   time.Time // when Modal ends it
	guest   string    // the file of its guest
	limits  engine.Limits
	volumes []string // where they are mounted
}

func (r record) tags(owner string, labels map[string]string) map[string]string {
	tags := maps.Clone(labels)
	if tags == nil {
		tags = make(map[string]string)
	}
	l := r.limits
	tags[tagOwner], tags[tagID], tags[tagGuest] = owner, r.id, r.guest
	tags[tagUntil] = strconv.FormatInt(r.until.Unix(), 10)
	tags[tagLimits] = fmt.Sprintf("%d/%d/%d", l.MemoryBytes, l.CPUMillis, l.OpenFiles)
	if len(r.volumes) > 0 {
		tags[tagVolumes] = strings.Join(r.volumes, ":")
	}
	return tags
}

// parseRecord reads tags. They are the provider's and anybody's who has an account there.
func parseRecord(tags map[string]string) (record, error) {
	r := record{id: tags[tagID], guest: tags[tagGuest]}
	if !validID(r.id) || !strings.HasPrefix(r.guest, guestDirectory) {
		return record{}, fmt.Errorf("tags %q are not those of a sandbox of executord", tags)
	}
	until, err := strconv.ParseInt(tags[tagUntil], 10, 64)
	if err != nil {
		return record{}, fmt.Errorf("tag %s: %w", tagUntil, err)
	}
	r.until = time.Unix(until, 0)
	if _, err := fmt.Sscanf(tags[tagLimits], "%d/%d/%d", &r.limits.MemoryBytes, &r.limits.CPUMillis, &r.limits.OpenFiles); err != nil {
		return record{}, fmt.Errorf("tag %s: %w", tagLimits, err)
	}
	if v := tags[tagVolumes]; v != "" {
		r.volumes = strings.Split(v, ":")
	}
	return r, nil
}

// nameOf is what Modal knows a sandbox by, of which it has only one at a time: whoever
// asks for it twice finds the first. It has at most 64 characters.
func nameOf(owner, id string) string {
	sum := sha256.Sum256([]byte(owner + "\x00" + id))
	return id[:min(len(id), 32)] + "." + strings.ToLower(base32.StdEncoding.EncodeToString(sum[:15]))
}

// validID is Spec's rule.
func validID(id string) bool {
	if len(id) == 0 || len(id) > 63 {
		return false
	}
	return strings.Trim(id, "abcdefghijklmnopqrstuvwxyz0123456789-") == ""
}

func invalidID(id string) error {
	return fault.New(fault.Invalid, "SANDBOX_ID", "sandbox id %q: must be 1 to 63 characters of a-z, 0-9 and \"-\"", id)
}
