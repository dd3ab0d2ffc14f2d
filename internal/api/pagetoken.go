package api

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"strings"

	"github.com/harvest-run/executord/internal/fault"
	"google.golang.org/protobuf/proto"
)

const (
	defaultPageSize = 50
	maxPageSize     = 500
	// tokenMAC is how many bytes of the signature a token carries.
	tokenMAC = 16
	// maxTokenID bounds the id in a token.
	maxTokenID = 255
)

// pageTokens makes and reads page tokens: the id behind which the next page starts,
// signed together with the listing that it belongs to. So a token cannot be made up
// and is of no use for another listing.
type pageTokens struct {
	key []byte
}

func newPageTokens(key []byte) (*pageTokens, error) {
	if len(key) == 0 {
		key = make([]byte, sha256.Size)
		if _, err := rand.Read(key); err != nil {
			return nil, fmt.Errorf("read random bytes: %w", err)
		}
	}
	return &pageTokens{key: key}, nil
}

// encode makes the token for a page of listing that starts behind id.
func (p *pageTokens) encode(listing, id string) string {
	return base64.RawURLEncoding.EncodeToString(append(p.sign(listing, id), id...))
}

// decode returns the id in a token, "" for the empty token, and a fault Invalid for
// one that encode did not make for the same listing.
func (p *pageTokens) decode(listing, token string) (string, error) {
	if token == "" {
		return "", nil
	}
	raw, err := base64.RawURLEncoding.Strict().DecodeString(token)
	// The decoder skips line ends.
	if err != nil || strings.ContainsAny(token, "\r\n") || len(raw) <= tokenMAC || len(raw) > tokenMAC+maxTokenID {
		return "", errPageToken()
	}
	id := string(raw[tokenMAC:])
	if !hmac.Equal(raw[:tokenMAC], p.sign(listing, id)) {
		return "", errPageToken()
	}
	return id, nil
}

func (p *pageTokens) sign(listing, id string) []byte {
	mac := hmac.New(sha256.New, p.key)
	// A hash never returns an error. The length keeps listing and id apart.
	fmt.Fprintf(mac, "%d %s %s", len(listing), listing, id)
	return mac.Sum(nil)[:tokenMAC]
}

func errPageToken() error {
	return fault.InvalidField("INVALID_PAGE_TOKEN", "page_token", "is not a token that this server gave for this listing")
}

// pageSize is how many a page has when size are asked for.
func pageSize(size int32) int {
	switch {
	case size <= 0:
		return defaultPageSize
	case size > maxPageSize:
		return maxPageSize
	default:
		return int(size)
	}
}

// cutPage takes a page of at most size from items, which were asked for with one more,
// and makes the token of the next page, "" if there is none.
func cutPage[T any](items []T, size int, next func(last T) string) ([]T, string) {
	if len(items) <= size {
		return items, ""
	}
	items = items[:size]
	return items, next(items[size-1])
}

// maxPageBytes bounds a page of what can be large, so that a client with gRPC's usual
// 4 MiB can read it.
const maxPageBytes = 3 << 20

// fitPage converts items for as long as they fit into a page; the first one always does.
func fitPage[T any, M proto.Message](items []T, convert func(T) M) []M {
	page, size := make([]M, 0, len(items)), 0
	for _, item := range items {
		converted := convert(item)
		size += proto.Size(converted)
		if size > maxPageBytes && len(page) > 0 {
			break
		}
		page = append(page, converted)
	}
	return page
}

// tokenBehind is the token of the page behind the first n of items, "" if there is none.
func tokenBehind[T any](items []T, n int, token func(last T) string) string {
	if n >= len(items) {
		return ""
	}
	return token(items[n-1])
}
