package api

import (
	"encoding/base64"
	"strings"
	"testing"

	"github.com/harvest-run/executord/internal/fault"
)

func tokens(t testing.TB, key string) *pageTokens {
	t.Helper()
	p, err := newPageTokens([]byte(key))
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestPageTokens(t *testing.T) {
	p := tokens(t, "key")
	token := p.encode("ListExecutions sessions/a", "e42")
	if id, err := p.decode("ListExecutions sessions/a", token); err != nil || id != "e42" {
		t.Errorf("%q, %v", id, err)
	}
	if id, err := tokens(t, "key").decode("ListExecutions sessions/a", token); err != nil || id != "e42" {
		t.Errorf("after a restart: %q, %v", id, err)
	}
	if id, err := p.decode("ListExecutions sessions/a", ""); err != nil || id != "" {
		t.Errorf("the empty token: %q, %v", id, err)
	}
	if strings.Contains(token, "e42") {
		t.Errorf("%q is not opaque", token)
	}
	raw, err := base64.RawURLEncoding.DecodeString(token)
	if err != nil {
		t.Fatal(err)
	}
	changed := append([]byte(nil), raw...)
	changed[len(changed)-1]++
	for name, test := range map[string]struct {
		tokens         *pageTokens
		listing, token string
	}{
		"another parent":  {p, "ListExecutions sessions/b", token},
		"no parent":       {p, "ListExecutions ", token},
		"another listing": {p, "ListSessions all", token},
		"another key":     {tokens(t, "other"), "ListExecutions sessions/a", token},
		"a random key":    {tokens(t, ""), "ListExecutions sessions/a", token},
		"another id":      {p, "ListExecutions sessions/a", base64.RawURLEncoding.EncodeToString(changed)},
		"no id":           {p, "ListExecutions sessions/a", p.encode("ListExecutions sessions/a", "")},
		"signature only":  {p, "ListExecutions sessions/a", base64.RawURLEncoding.EncodeToString(raw[:tokenMAC])},
		"long":            {p, "ListExecutions sessions/a", p.encode("ListExecutions sessions/a", strings.Repeat("x", 256))},
		"not base64":      {p, "ListExecutions sessions/a", "!" + token},
		"padded":          {p, "ListExecutions sessions/a", token + "="},
		"with a newline":  {p, "ListExecutions sessions/a", token[:4] + "\n" + token[4:]},
		"just an id":      {p, "ListExecutions sessions/a", base64.RawURLEncoding.EncodeToString([]byte("e42"))},
	} {
		t.Run(name, func(t *testing.T) {
			id, err := test.tokens.decode(test.listing, test.token)
			if fault.KindOf(err) != fault.Invalid || fault.ReasonOf(err) != "INVALID_PAGE_TOKEN" || id != "" {
				t.Errorf("%q, %v", id, err)
			}
		})
	}
}

// TestPageTokenBoundary: no bytes may wander from the listing into the id.
func TestPageTokenBoundary(t *testing.T) {
	p := tokens(t, "key")
	if string(p.sign("a", "b c")) == string(p.sign("a b", "c")) {
		t.Error("one signature for two pages")
	}
}

func FuzzPageToken(f *testing.F) {
	p := tokens(f, "key")
	f.Add("ListSessions all", p.encode("ListSessions all", "s1"))
	f.Add("ListSessions all", "")
	f.Add("", "AAAA")
	f.Add("x", strings.Repeat("A", 512))
	f.Fuzz(func(t *testing.T, listing, token string) {
		id, err := p.decode(listing, token)
		switch {
		case err != nil:
			if fault.KindOf(err) != fault.Invalid || id != "" {
				t.Errorf("%q, %v", id, err)
			}
		case token == "":
			if id != "" {
				t.Errorf("%q of nothing", id)
			}
		case p.encode(listing, id) != token:
			t.Errorf("%q is accepted, but %q was given", token, p.encode(listing, id))
		}
		if long := len(id) > maxTokenID; long {
			t.Error("id too long")
		}
	})
}

func TestPageSize(t *testing.T) {
	for size, want := range map[int32]int{0: 50, 1: 1, 499: 499, 500: 500, 501: 500, 1e9: 500} {
		if got := pageSize(size); got != want {
			t.Errorf("%d becomes %d, want %d", size, got, want)
		}
	}
}

func TestCutPage(t *testing.T) {
	next := func(last int) string { return strings.Repeat("x", last) }
	for name, test := range map[string]struct {
		items []int
		size  int
		page  int
		token string
	}{
		"empty":     {nil, 2, 0, ""},
		"not full":  {[]int{1}, 2, 1, ""},
		"just full": {[]int{1, 2}, 2, 2, ""},
		"more":      {[]int{1, 2, 3}, 2, 2, "xx"},
	} {
		t.Run(name, func(t *testing.T) {
			page, token := cutPage(test.items, test.size, next)
			if len(page) != test.page || token != test.token {
				t.Errorf("%v, %q", page, token)
			}
		})
	}
}
