package memory

import (
	"crypto/sha256"
	"encoding/hex"
	"regexp"
	"strings"

	"github.com/harvest-run/executord/internal/workspace"
)

const (
	// volumePrefix begins the name of every volume with a memory.
	volumePrefix = "harvest-memory-"
	// maxVolume bounds the name of a volume.
	maxVolume = 63
)

// VolumeName is the name of the volume with a repository's memory, another one for each
// repository: harvest-memory-{owner}-{repo} for one of github.com, where capitals do not
// count, with each hyphen of the owner doubled, so that a-b/c and a/b-c differ. What
// does not fit into that, is of another host or could be taken for it has what fits and a hash of the whole.
func VolumeName(r workspace.Remote) string {
	host, owner, name := r.Host, r.Owner, r.Name
	if host == "github.com" {
		owner, name = strings.ToLower(owner), strings.ToLower(name)
		plain := volumePrefix + strings.ReplaceAll(owner, "-", "--") + "-" + name
		if len(plain) <= maxVolume && regexp.MustCompile(`^[a-z0-9]+(-[a-z0-9]+)*$`).MatchString(owner) &&
			regexp.MustCompile(`^[a-z0-9._][a-z0-9._-]*$`).MatchString(name) && !regexp.MustCompile(`-[0-9a-f]{16}$`).MatchString(name) {
			return plain
		}
	}
	sum := sha256.Sum256([]byte(host + "\x00" + owner + "\x00" + name))
	hash := "-" + hex.EncodeToString(sum[:8])
	slug := strings.Trim(regexp.MustCompile(`[^a-z0-9._]+`).ReplaceAllString(strings.ToLower(owner+"-"+name), "-"), "-")
	slug = slug[:min(len(slug), maxVolume-len(volumePrefix)-len(hash))]
	return volumePrefix + strings.TrimRight(slug, "-") + hash
}
