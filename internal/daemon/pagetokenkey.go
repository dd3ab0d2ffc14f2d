package daemon

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// pageTokenKeySize is that of the key in bytes.
const pageTokenKeySize = 32

// pageTokenKey reads the key of page tokens from the state directory, so that a
// listing can be continued after a restart; the first time it makes one. A file that
// is cut off is replaced: nothing is lost but listings that are under way.
func pageTokenKey(dir string) ([]byte, error) {
	path := filepath.Join(dir, "page-token.key")
	key, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("read the key of page tokens: %w", err)
	}
	if len(key) == pageTokenKeySize {
		return key, nil
	}
	key = make([]byte, pageTokenKeySize)
	if _, err := rand.Read(key); err != nil {
		return nil, fmt.Errorf("make a key for page tokens: %w", err)
	}
	if err := os.WriteFile(path, key, 0o600); err != nil {
		return nil, fmt.Errorf("write the key of page tokens: %w", err)
	}
	return key, nil
}
