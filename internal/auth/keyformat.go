package auth

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/base32"
	"fmt"
	"strings"
)

// An API key is exk_ID_SECRET. The id is public, names the record and stands in logs; the
// secret has 256 bits, so that its hash needs no salt and no slowness.
const (
	keyPrefix  = "exk_"
	idSize     = 16 // characters, 80 bits
	secretSize = 32 // bytes
)

// keyEncoding is Crockford-like in its aim: lower case, no signs, safe in URLs, shells
// and when selected by a double click.
func keyEncoding() *base32.Encoding {
	return base32.NewEncoding("abcdefghijklmnopqrstuvwxyz234567").WithPadding(base32.NoPadding)
}

// IsKey says whether a credential has the form of an API key as far as its beginning
// shows: what it is meant to be.
func IsKey(credential string) bool { return strings.HasPrefix(credential, keyPrefix) }

// parsedKey is an API key in its parts.
type parsedKey struct {
	id     string
	secret [secretSize]byte
}

func (k parsedKey) hash() [sha256.Size]byte { return sha256.Sum256(k.secret[:]) }

// text is the key as its owner gets it.
func (k parsedKey) text() string {
	return keyPrefix + k.id + "_" + keyEncoding().EncodeToString(k.secret[:])
}

// parseKey reads a key. There is one text for each key: what is not exactly that is none.
func parseKey(text string) (parsedKey, bool) {
	var key parsedKey
	rest, ok := strings.CutPrefix(text, keyPrefix)
	if !ok {
		return parsedKey{}, false
	}
	id, secret, ok := strings.Cut(rest, "_")
	if !ok || !isKeyID(id) || len(secret) != keyEncoding().EncodedLen(secretSize) {
		return parsedKey{}, false
	}
	key.id = id
	if n, err := keyEncoding().Decode(key.secret[:], []byte(secret)); err != nil || n != secretSize {
		return parsedKey{}, false
	}
	// The last character has bits to spare.
	return key, key.text() == text
}

func isKeyID(id string) bool {
	return len(id) == idSize && !strings.ContainsFunc(id, func(r rune) bool { return (r < 'a' || r > 'z') && (r < '2' || r > '7') })
}

// newKey makes a key.
func newKey() (parsedKey, error) {
	var key parsedKey
	id := make([]byte, idSize*5/8)
	if _, err := rand.Read(id); err != nil {
		return key, fmt.Errorf("make an API key: %w", err)
	}
	key.id = keyEncoding().EncodeToString(id)
	if _, err := rand.Read(key.secret[:]); err != nil {
		return key, fmt.Errorf("make an API key: %w", err)
	}
	return key, nil
}
