package auth

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/harvest-run/executord/internal/fault"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// memory is a store of keys. Like the real one it never takes a revocation back.
type memory struct {
	mu     sync.Mutex
	keys   map[string]Key
	writes int
	fail   error
}

func (m *memory) InsertKey(_ context.Context, k Key) error { return m.put(k) }

func (m *memory) UpdateKey(_ context.Context, k Key) error { return m.put(k) }

func (m *memory) put(k Key) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.fail != nil {
		return m.fail
	}
	if m.keys == nil {
		m.keys = make(map[string]Key)
	}
	if old := m.keys[k.ID]; !old.RevokeTime.IsZero() {
		k.RevokeTime = old.RevokeTime
	}
	m.keys[k.ID] = k
	m.writes++
	return nil
}

func (m *memory) AllKeys(context.Context) ([]Key, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Collect(maps.Values(m.keys)), m.fail
}

func (m *memory) get(id string) Key {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.keys[id]
}

func openTestKeys(t *testing.T, store *memory) (*Keys, *log) {
	t.Helper()
	l := &log{}
	k, err := OpenKeys(t.Context(), store, l.logger())
	if err != nil {
		t.Fatal(err)
	}
	return k, l
}

func create(t *testing.T, k *Keys, n NewKey) (Key, string) {
	t.Helper()
	key, text, err := k.Create(t.Context(), n)
	if err != nil {
		t.Fatal(err)
	}
	return key, text
}

func TestKeyFormat(t *testing.T) {
	seen := make(map[string]bool)
	for range 100 {
		key, err := newKey()
		if err != nil {
			t.Fatal(err)
		}
		text := key.text()
		if seen[text] || seen[key.id] || len(text) != len("exk_")+16+1+52 || !IsKey(text) {
			t.Errorf("%q", text)
		}
		seen[text], seen[key.id] = true, true
		if back, ok := parseKey(text); !ok || back != key {
			t.Errorf("%q comes back as %v, %v", text, back, ok)
		}
	}
	key, err := newKey()
	if err != nil {
		t.Fatal(err)
	}
	text := key.text()
	last := map[byte]byte{'a': 'b', 'q': 'r'}[text[len(text)-1]]
	for label, bad := range map[string]string{
		"nothing": "", "no prefix": text[4:], "another prefix": "xxk_" + text[4:], "only a prefix": "exk_", "no secret": text[:20],
		"an empty secret": text[:21], "cut": text[:len(text)-1], "longer": text + "a", "upper case": strings.ToUpper(text),
		"a space": text + " ", "a line": text + "\n", "a line within": text[:30] + "\n" + text[31:], "another sign": text[:30] + "1" + text[31:],
		"short id": "exk_abc_" + text[21:], "id with a sign": text[:10] + "." + text[11:], "two secrets": text + "_" + text[21:],
		"spare bits": text[:len(text)-1] + string(last),
	} {
		if got, ok := parseKey(bad); ok {
			t.Errorf("%s: %q is %v", label, bad, got)
		}
	}
}

// FuzzParseKey: what is taken for a key is the one text of that key.
func FuzzParseKey(f *testing.F) {
	for range 3 {
		key, err := newKey()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(key.text())
	}
	f.Add("exk__")
	f.Add("exk_" + strings.Repeat("a", 16) + "_" + strings.Repeat("a", 51) + "\n")
	f.Fuzz(func(t *testing.T, text string) {
		key, ok := parseKey(text)
		if !ok {
			if key != (parsedKey{}) && key.text() == text {
				t.Errorf("%q is refused", text)
			}
			return
		}
		if key.text() != text || !IsKey(text) || !isKeyID(key.id) {
			t.Errorf("%q is taken for %q", text, key.text())
		}
	})
}

func TestAuthenticateKey(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := &memory{}
		k, _ := openTestKeys(t, store)
		good, goodText := create(t, k, NewKey{Name: "ann", Role: Operator})
		short, shortText := create(t, k, NewKey{Name: "bob", Role: User, Lifetime: time.Hour})
		gone, goneText := create(t, k, NewKey{Name: "eve", Role: Admin})
		if _, err := k.Revoke(t.Context(), gone.ID); err != nil {
			t.Fatal(err)
		}
		other, err := newKey()
		if err != nil {
			t.Fatal(err)
		}
		wrongSecret := func(id string) string { return parsedKey{id: id, secret: other.secret}.text() }
		try := func(text string) (Principal, string) {
			p, err := k.Authenticate(text)
			if err != nil && (fault.KindOf(err) != fault.Unauthenticated || p != (Principal{}) || strings.Contains(err.Error(), text)) {
				t.Errorf("%v, %v", p, err)
			}
			return p, fault.ReasonOf(err)
		}
		for range 2 { // the second time as after a restart
			if p, reason := try(goodText); reason != "" || p != (Principal{Name: "key:ann", Role: Operator, Key: good.ID}) {
				t.Errorf("a good key: %v, %s", p, reason)
			}
			if p, reason := try(shortText); reason != "" || p.Name != "key:bob" {
				t.Errorf("a good key that will expire: %v, %s", p, reason)
			}
			for label, test := range map[string]struct{ text, want string }{
				"revoked":                {goneText, "KEY_REVOKED"},
				"revoked, wrong secret":  {wrongSecret(gone.ID), "KEY_INVALID"},
				"good id, wrong secret":  {wrongSecret(good.ID), "KEY_INVALID"},
				"unknown":                {other.text(), "KEY_INVALID"},
				"another's secret":       {"exk_" + short.ID + goodText[20:], "KEY_INVALID"},
				"no key":                 {"exk_", "KEY_INVALID"},
				"the hash as the secret": {parsedKey{id: good.ID, secret: good.Hash}.text(), "KEY_INVALID"},
			} {
				if _, reason := try(test.text); reason != test.want {
					t.Errorf("%s: %q, want %q", label, reason, test.want)
				}
			}
			k, _ = openTestKeys(t, store)
		}
		time.Sleep(time.Hour)
		if _, reason := try(shortText); reason != "KEY_EXPIRED" {
			t.Errorf("an expired key: %q", reason)
		}
		if _, reason := try(wrongSecret(short.ID)); reason != "KEY_INVALID" {
			t.Errorf("an expired key with a wrong secret: %q", reason)
		}
		if _, err := k.Revoke(t.Context(), short.ID); err != nil {
			t.Fatal(err)
		}
		if _, reason := try(shortText); reason != "KEY_REVOKED" {
			t.Errorf("expired and revoked: %q", reason)
		}
		// The store never saw a key.
		for _, text := range []string{goodText, shortText, goneText} {
			if kept := fmt.Sprintf("%+v %x", store.keys, store.keys); strings.Contains(kept, text) || strings.Contains(kept, text[21:]) {
				t.Error("the store has a key")
			}
			parsed, _ := parseKey(text)
			if kept := fmt.Sprintf("%x", store.keys); strings.Contains(kept, fmt.Sprintf("%x", parsed.secret)) {
				t.Error("the store has a secret")
			}
		}
	})
}

func TestCreateRefuses(t *testing.T) {
	store := &memory{}
	k, _ := openTestKeys(t, store)
	for label, bad := range map[string]NewKey{
		"no name": {Role: User}, "a space": {Name: "a b", Role: User}, "a colon": {Name: "a:b", Role: User}, "a line": {Name: "a\n", Role: User},
		"a sign first": {Name: ".a", Role: User}, "a letter of no ASCII": {Name: "é", Role: User}, "long": {Name: strings.Repeat("a", 64), Role: User},
		"no role": {Name: "a"}, "a role above": {Name: "a", Role: Admin + 1}, "negative": {Name: "a", Role: User, Lifetime: -1},
		"for ever": {Name: "a", Role: User, Lifetime: MaxKeyLifetime + 1},
	} {
		if key, text, err := k.Create(t.Context(), bad); fault.KindOf(err) != fault.Invalid || text != "" || key != (Key{}) {
			t.Errorf("%s: %v, %v", label, key, err)
		}
	}
	store.fail = errors.New("disk")
	if _, text, err := k.Create(t.Context(), NewKey{Name: "a", Role: User}); !errors.Is(err, store.fail) || text != "" {
		t.Errorf("%q, %v", text, err)
	}
	if len(k.List("", 10, true)) != 0 {
		t.Error("a key that was not recorded is there")
	}
	if _, err := OpenKeys(t.Context(), store, (&log{}).logger()); !errors.Is(err, store.fail) {
		t.Errorf("%v", err)
	}
}

func TestListKeys(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k, _ := openTestKeys(t, &memory{})
		var want []string
		for n := range 7 {
			key, _ := create(t, k, NewKey{Name: fmt.Sprint("k", n), Role: User, Lifetime: time.Hour})
			if n%3 == 0 {
				if _, err := k.Revoke(t.Context(), key.ID); err != nil {
					t.Fatal(err)
				}
			} else {
				want = append(want, key.ID)
			}
			if n != 4 { // two of one time
				time.Sleep(time.Second)
			}
		}
		read := func(size int, ended bool) (ids []string) {
			before := ""
			for range 20 {
				page := k.List(before, size, ended)
				for _, key := range page {
					ids = append(ids, key.ID)
				}
				if len(page) < size {
					return ids
				}
				before = page[len(page)-1].ID
			}
			t.Fatal("there is no end")
			return nil
		}
		all := read(100, false)
		slices.Sort(want)
		if !slices.Equal(slices.Sorted(slices.Values(all)), want) || len(read(100, true)) != 7 {
			t.Errorf("%q, want %q", all, want)
		}
		for size := 1; size < 5; size++ {
			if got := read(size, false); !slices.Equal(got, all) {
				t.Errorf("by %d: %q, want %q", size, got, all)
			}
		}
		// A page goes on behind a key that was revoked meanwhile.
		if _, err := k.Revoke(t.Context(), all[0]); err != nil {
			t.Fatal(err)
		}
		if page := k.List(all[0], 1, false); len(page) != 1 || page[0].ID != all[1] {
			t.Errorf("%v", page)
		}
		if page := k.List("nobody", 5, true); len(page) != 0 {
			t.Errorf("behind nobody: %v", page)
		}
		time.Sleep(time.Hour)
		if len(read(100, false)) != 0 || len(read(100, true)) != 7 {
			t.Error("expired keys are listed as good")
		}
	})
}

func TestRevoke(t *testing.T) {
	store := &memory{}
	k, _ := openTestKeys(t, store)
	key, text := create(t, k, NewKey{Name: "ann", Role: User})
	var told []error
	undone := false
	undo := k.Watch(key.ID, func(error) { undone = true })
	undo()
	undo()
	k.Watch(key.ID, func(err error) { told = append(told, err) })
	defer k.Watch(key.ID, func(err error) { told = append(told, err) })()
	store.fail = errors.New("disk")
	if _, err := k.Revoke(t.Context(), key.ID); !errors.Is(err, store.fail) {
		t.Errorf("%v", err)
	}
	if _, err := k.Authenticate(text); err != nil {
		t.Errorf("what could not be recorded happened all the same: %v", err)
	}
	store.fail = nil
	first, err := k.Revoke(t.Context(), key.ID)
	if err != nil || first.RevokeTime.IsZero() {
		t.Fatalf("%v, %v", first, err)
	}
	if len(told) != 2 || fault.ReasonOf(told[0]) != "KEY_REVOKED" || undone {
		t.Errorf("told %v, undone %v", told, undone)
	}
	again, err := k.Revoke(t.Context(), key.ID)
	if err != nil || again != first || len(told) != 2 {
		t.Errorf("again: %v, %v", again, err)
	}
	k.Watch(key.ID, func(err error) { told = append(told, err) })
	if len(told) != 3 {
		t.Error("who watches a revoked key is not told")
	}
	if _, err := k.Revoke(t.Context(), "none"); fault.KindOf(err) != fault.NotFound || fault.ReasonOf(err) != "KEY_NOT_FOUND" {
		t.Errorf("%v", err)
	}
}

// The last use is recorded coarsely, and its recording never takes a revocation back.
func TestLastUse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := &memory{}
		k, l := openTestKeys(t, store)
		key, text := create(t, k, NewKey{Name: "ann", Role: User})
		ctx, cancel := context.WithCancelCause(t.Context())
		var running sync.WaitGroup
		running.Go(func() { k.Run(ctx) })
		defer running.Wait()
		defer cancel(nil)
		use := func() {
			t.Helper()
			if _, err := k.Authenticate(text); err != nil {
				t.Fatal(err)
			}
		}
		store.writes = 0
		for range 3600 {
			use()
			time.Sleep(time.Second)
		}
		if store.writes < 10 || store.writes > 14 {
			t.Errorf("an hour of use took %d writes", store.writes)
		}
		if age := time.Since(store.get(key.ID).LastUseTime); age > useGrain+flushEvery {
			t.Errorf("the last use is %v old", age)
		}
		time.Sleep(useGrain)
		store.mu.Lock()
		store.fail = errors.New("disk")
		store.mu.Unlock()
		use()
		used := time.Now().UTC()
		time.Sleep(flushEvery)
		synctest.Wait()
		if !strings.Contains(l.String(), "record when an API key was used") {
			t.Errorf("the log has %q", l)
		}
		store.mu.Lock()
		store.fail = nil
		store.mu.Unlock()
		time.Sleep(flushEvery)
		synctest.Wait()
		if got := store.get(key.ID).LastUseTime; !got.Equal(used) {
			t.Errorf("the last use is %v, want %v", got, used)
		}
		// Used, revoked before it is written, and the program ends.
		time.Sleep(useGrain)
		use()
		if _, err := k.Revoke(t.Context(), key.ID); err != nil {
			t.Fatal(err)
		}
		cancel(nil)
		running.Wait()
		if kept := store.get(key.ID); kept.RevokeTime.IsZero() || time.Since(kept.LastUseTime) > time.Minute {
			t.Errorf("%+v", kept)
		}
		reopened, _ := openTestKeys(t, store)
		if _, err := reopened.Authenticate(text); fault.ReasonOf(err) != "KEY_REVOKED" {
			t.Errorf("%v", err)
		}
	})
}

func TestKeysTogether(t *testing.T) {
	k, _ := openTestKeys(t, &memory{})
	var work sync.WaitGroup
	for n := range 8 {
		work.Go(func() {
			for range 50 {
				key, text, err := k.Create(t.Context(), NewKey{Name: fmt.Sprint("k", n), Role: User})
				if err != nil {
					t.Error(err)
					return
				}
				undo := k.Watch(key.ID, func(error) {})
				if _, err := k.Authenticate(text); err != nil {
					t.Error(err)
				}
				if n%2 == 0 {
					undo()
				}
				if _, err := k.Revoke(t.Context(), key.ID); err != nil {
					t.Error(err)
				}
				undo()
				k.List("", 10, true)
			}
		})
	}
	work.Wait()
	k.mu.Lock()
	defer k.mu.Unlock()
	if len(k.watches) != 0 || len(k.keys) != 400 {
		t.Errorf("%d watches, %d keys are left", len(k.watches), len(k.keys))
	}
}
