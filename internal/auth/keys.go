package auth

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/harvest-run/executord/internal/fault"
)

const (
	// useGrain is how exact the time of the last use is: so often at most a key that is
	// used all the time costs a write.
	useGrain = 5 * time.Minute
	// flushEvery is how often the times of last uses are written.
	flushEvery = time.Minute
	// MaxKeyLifetime is the longest that a key that ends may be asked for.
	MaxKeyLifetime = 10 * 366 * 24 * time.Hour
)

// Key is what is kept of an API key.
type Key struct {
	// ID is the public part of the key.
	ID string
	// Name is whose key it is: those of one name are one principal.
	Name string
	Role Role
	// Hash is the SHA-256 of the secret.
	Hash       [sha256.Size]byte
	CreateTime time.Time
	// ExpireTime is zero for a key that does not expire, RevokeTime for one that was
	// not revoked, LastUseTime, which is coarse, for one that was not used.
	ExpireTime, RevokeTime, LastUseTime time.Time
}

// Principal is whom the key stands for.
func (k Key) Principal() Principal { return Principal{Name: "key:" + k.Name, Role: k.Role, Key: k.ID} }

// Ended says whether the key is not good any more.
func (k Key) Ended(now time.Time) bool {
	return !k.RevokeTime.IsZero() || !k.ExpireTime.IsZero() && !now.Before(k.ExpireTime)
}

// KeyStore keeps API keys. Every call is durable when it returns nil.
type KeyStore interface {
	// InsertKey records a new one; a fault AlreadyExists if the id is taken.
	InsertKey(ctx context.Context, k Key) error
	// UpdateKey replaces what can change: LastUseTime, and RevokeTime if that is not set
	// yet. A key that is revoked stays so, whoever writes last.
	UpdateKey(ctx context.Context, k Key) error
	// AllKeys reads all.
	AllKeys(ctx context.Context) ([]Key, error)
}

// Keys are the API keys. A copy is kept in memory, which is right because the state
// directory belongs to one process: so a request costs no read of the store.
type Keys struct {
	store KeyStore
	log   *slog.Logger
	// unknown is compared with where there is no key: a call with an id that does not
	// exist takes as long as one with a wrong secret.
	unknown [sha256.Size]byte

	mu    sync.Mutex
	keys  map[string]*Key
	dirty map[string]bool // ids whose LastUseTime is to be written
	// watches has what is to be told when a key is revoked, by its id.
	watches map[string]map[*watch]bool
}

type watch struct{ revoked func() }

// OpenKeys reads the keys of a store.
func OpenKeys(ctx context.Context, store KeyStore, log *slog.Logger) (*Keys, error) {
	all, err := store.AllKeys(ctx)
	if err != nil {
		return nil, err
	}
	k := &Keys{
		store: store, log: log, keys: make(map[string]*Key, len(all)),
		dirty: make(map[string]bool), watches: make(map[string]map[*watch]bool),
	}
	none, err := newKey()
	if err != nil {
		return nil, err
	}
	k.unknown = none.hash()
	for _, one := range all {
		k.keys[one.ID] = &one
	}
	return k, nil
}

// NewKey asks for a key.
type NewKey struct {
	Name string
	Role Role
	// Lifetime is how long it is good; 0 is for good.
	Lifetime time.Duration
}

// Create makes a key and returns what is kept of it, and the key itself, which is known
// to nobody afterwards.
func (k *Keys) Create(ctx context.Context, n NewKey) (Key, string, error) {
	if !isKeyName(n.Name) {
		return Key{}, "", fault.InvalidField("KEY_NAME", "display_name",
			"must be 1 to 63 characters of A-Z a-z 0-9 . _ @ -, the first a letter or digit")
	}
	if n.Role < User || n.Role > Admin {
		return Key{}, "", fault.InvalidField("ROLE", "role", "must be one of the roles")
	}
	if n.Lifetime < 0 || n.Lifetime > MaxKeyLifetime {
		return Key{}, "", fault.InvalidField("KEY_LIFETIME", "lifetime", "must be up to %v, not %v", MaxKeyLifetime, n.Lifetime)
	}
	fresh, err := newKey()
	if err != nil {
		return Key{}, "", err
	}
	key := Key{ID: fresh.id, Name: n.Name, Role: n.Role, Hash: fresh.hash(), CreateTime: time.Now().UTC()}
	if n.Lifetime > 0 {
		key.ExpireTime = key.CreateTime.Add(n.Lifetime)
	}
	if err := k.store.InsertKey(ctx, key); err != nil {
		return Key{}, "", err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	kept := key
	k.keys[key.ID] = &kept
	return key, fresh.text(), nil
}

// isKeyName is the rule of the protos, for those who do not come from there.
func isKeyName(name string) bool {
	for i := range len(name) {
		c := name[i]
		alphanumeric := c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9'
		if !alphanumeric && (i == 0 || !strings.ContainsRune("._@-", rune(c))) {
			return false
		}
	}
	return len(name) >= 1 && len(name) <= 63
}

// Authenticate returns whom a key stands for. Faults Unauthenticated: KEY_INVALID; and,
// only where the secret is right, KEY_REVOKED and KEY_EXPIRED.
func (k *Keys) Authenticate(text string) (Principal, error) {
	parsed, ok := parseKey(text)
	given := parsed.hash() // also of a text that is no key: to take as long
	now := time.Now()
	k.mu.Lock()
	defer k.mu.Unlock()
	key, known := k.keys[parsed.id]
	want := k.unknown
	if known {
		want = key.Hash
	}
	same := subtle.ConstantTimeCompare(given[:], want[:]) == 1
	switch {
	case !ok || !known || !same:
		return Principal{}, refuse("KEY_INVALID", "the API key is not one of this server's")
	case !key.RevokeTime.IsZero():
		return Principal{}, errRevoked()
	case key.Ended(now):
		return Principal{}, refuse("KEY_EXPIRED", "the API key has expired")
	}
	if now.Sub(key.LastUseTime) >= useGrain {
		key.LastUseTime = now.UTC()
		k.dirty[key.ID] = true
	}
	return key.Principal(), nil
}

func errRevoked() error { return refuse("KEY_REVOKED", "the API key was revoked") }

// List returns a page of keys, the newest first: those with an id behind before in that
// order, "" for the first page. ended includes those that are not good any more.
func (k *Keys) List(before string, limit int, ended bool) []Key {
	now := time.Now()
	k.mu.Lock()
	all := make([]Key, 0, len(k.keys))
	for _, key := range k.keys {
		if ended || !key.Ended(now) {
			all = append(all, *key)
		}
	}
	last := k.keys[before]
	k.mu.Unlock()
	newestFirst := func(a, b Key) int {
		if c := b.CreateTime.Compare(a.CreateTime); c != 0 {
			return c
		}
		return strings.Compare(b.ID, a.ID)
	}
	slices.SortFunc(all, newestFirst)
	if before != "" {
		if last == nil {
			return nil
		}
		from := slices.IndexFunc(all, func(one Key) bool { return newestFirst(one, *last) > 0 })
		if from < 0 {
			return nil
		}
		all = all[from:]
	}
	return all[:min(len(all), limit)]
}

// Revoke ends a key for good and tells those who watch it. One that is revoked already
// is returned as it is. A fault NotFound (KEY_NOT_FOUND) if there is none.
func (k *Keys) Revoke(ctx context.Context, id string) (Key, error) {
	k.mu.Lock()
	key, ok := k.keys[id]
	if !ok {
		k.mu.Unlock()
		return Key{}, fault.New(fault.NotFound, "KEY_NOT_FOUND", "there is no API key %q", id)
	}
	revoked := *key
	k.mu.Unlock()
	if !revoked.RevokeTime.IsZero() {
		return revoked, nil
	}
	revoked.RevokeTime = time.Now().UTC()
	if err := k.store.UpdateKey(ctx, revoked); err != nil {
		return Key{}, err
	}
	k.mu.Lock()
	if key.RevokeTime.IsZero() { // by another call meanwhile
		key.RevokeTime = revoked.RevokeTime
	}
	revoked = *key
	watches := k.watches[id]
	delete(k.watches, id)
	k.mu.Unlock()
	for w := range watches {
		w.revoked()
	}
	return revoked, nil
}

// Watch has f called once when a key is revoked, at once if it is already; what it
// returns undoes that.
func (k *Keys) Watch(id string, f func(error)) (undo func()) {
	w := &watch{func() { f(errRevoked()) }}
	k.mu.Lock()
	key, ok := k.keys[id]
	if ok && !key.RevokeTime.IsZero() {
		k.mu.Unlock()
		w.revoked()
		return func() {}
	}
	if k.watches[id] == nil {
		k.watches[id] = make(map[*watch]bool)
	}
	k.watches[id][w] = true
	k.mu.Unlock()
	return func() {
		k.mu.Lock()
		defer k.mu.Unlock()
		delete(k.watches[id], w)
		if len(k.watches[id]) == 0 {
			delete(k.watches, id)
		}
	}
}

// Run writes the times of last uses now and then until ctx ends, and once more then.
func (k *Keys) Run(ctx context.Context) {
	tick := time.NewTicker(flushEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			k.flush(ctx)
		case <-ctx.Done():
			k.flush(context.WithoutCancel(ctx))
			return
		}
	}
}

// flush writes the times of last uses. What fails is tried again the next time.
func (k *Keys) flush(ctx context.Context) {
	k.mu.Lock()
	var used []Key
	for id := range k.dirty {
		used = append(used, *k.keys[id])
	}
	clear(k.dirty)
	k.mu.Unlock()
	for _, key := range used {
		if err := k.write(ctx, key); err != nil {
			k.log.WarnContext(ctx, "record when an API key was used", "key", key.ID, "error", err)
			k.mu.Lock()
			k.dirty[key.ID] = true
			k.mu.Unlock()
		}
	}
}

func (k *Keys) write(ctx context.Context, key Key) error {
	if err := k.store.UpdateKey(ctx, key); err != nil {
		return fmt.Errorf("update API key %q: %w", key.ID, err)
	}
	return nil
}
