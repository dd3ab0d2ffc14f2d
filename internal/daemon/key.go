package daemon

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// The files of keys in the state directory.
const (
	// pageTokenFile has the key that signs page tokens, so that a listing can be continued
	// after a restart.
	pageTokenFile = "page-token.key"
	// requestIDFile has the key of the fingerprints of requests, so that a repeat is
	// known after a restart.
	requestIDFile = "request-id.key"
)

// keySize is that of a key in bytes.
const keySize = 32

// readKey reads a key from the state directory; the first time it makes one. A file of
// another size is replaced: what the key was for before counts as made by a stranger.
func readKey(dir, name string) ([]byte, error) {
	path := filepath.Join(dir, name)
	key, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("read the key %q: %w", path, err)
	}
	if len(key) == keySize {
		return key, nil
	}
	key = make([]byte, keySize)
	if _, err := rand.Read(key); err != nil {
		return nil, fmt.Errorf("make the key %q: %w", path, err)
	}
	if err := writeKey(path, key); err != nil {
		return nil, fmt.Errorf("write the key %q: %w", path, err)
	}
	return key, nil
}

// writeKey writes a key so that after a power cut it is there, whole, if anything is
// that was made with it.
func writeKey(path string, key []byte) error {
	next := path + ".new"
	file, err := os.OpenFile(next, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = file.Write(key)
	if err = errors.Join(err, file.Sync(), file.Close()); err != nil {
		return err
	}
	if err := os.Rename(next, path); err != nil {
		return err
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}
