package modal

import (
	"maps"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/harvest-run/executord/internal/engine"
)

func TestRecordComesBack(t *testing.T) {
	for _, r := range []record{
		{id: "a", guest: guestDirectory + "g", until: time.Unix(1700000000, 0)},
		{id: "b-1", guest: guestDirectory + "g", until: time.Unix(1, 0), limits: engine.Limits{MemoryBytes: 1 << 40, CPUMillis: 1500, OpenFiles: 64}, volumes: []string{"/a", "/b/c"}},
	} {
		tags := r.tags("me", map[string]string{"team": "x"})
		if tags["team"] != "x" || tags[tagOwner] != "me" {
			t.Errorf("tags %q", tags)
		}
		got, err := parseRecord(tags)
		if err != nil || !reflect.DeepEqual(got, r) {
			t.Errorf("%+v became %+v, %v", r, got, err)
		}
	}
}

func TestRecordOfOthersIsRefused(t *testing.T) {
	good := record{id: "a", guest: guestDirectory + "g", until: time.Unix(1700000000, 0)}.tags("me", nil)
	for name, change := range map[string]func(map[string]string){
		"no id": func(m map[string]string) { delete(m, tagID) }, "an id that is none": func(m map[string]string) { m[tagID] = "../x" },
		"no guest": func(m map[string]string) { delete(m, tagGuest) }, "a guest elsewhere": func(m map[string]string) { m[tagGuest] = "/bin/sh" },
		"no deadline": func(m map[string]string) { m[tagUntil] = "" }, "no limits": func(m map[string]string) { m[tagLimits] = "a/b/c" },
	} {
		tags := maps.Clone(good)
		change(tags)
		if r, err := parseRecord(tags); err == nil {
			t.Errorf("%s: %+v", name, r)
		}
	}
}

func TestNames(t *testing.T) {
	seen := make(map[string]string)
	for _, owner := range []string{"a", "b"} {
		for _, id := range []string{"x", "y", strings.Repeat("z", 63), strings.Repeat("z", 62), "ap-aaaaaaaaaaaaaaaaaaaaaa"} {
			name := nameOf(owner, id)
			if len(name) > 64 || !objectName().MatchString(name) {
				t.Errorf("name %q of %s", name, id)
			}
			if name != nameOf(owner, id) {
				t.Errorf("the name of %s changes", id)
			}
			if other, taken := seen[name]; taken {
				t.Errorf("%s/%s and %s have the name %q", owner, id, other, name)
			}
			seen[name] = owner + "/" + id
		}
	}
}

func FuzzParseRecord(f *testing.F) {
	f.Add("a", "1700000000", guestDirectory+"g", "1/2/3", "/a:/b")
	f.Fuzz(func(t *testing.T, id, until, guest, limits, volumes string) {
		r, err := parseRecord(map[string]string{tagID: id, tagUntil: until, tagGuest: guest, tagLimits: limits, tagVolumes: volumes})
		if err == nil && (!validID(r.id) || !strings.HasPrefix(r.guest, guestDirectory)) {
			t.Errorf("%+v", r)
		}
	})
}
