package modaltest

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"strings"
	"time"

	"github.com/oklog/ulid/v2"
)

// newID makes an id as those of Modal's second backend: a prefix and a ULID.
func newID(prefix string) string { return prefix + "-" + ulid.Make().String() }

// claims are what a token says.
type claims struct {
	// Task is the task whose router takes it; empty for the control plane.
	Task string `json:"task,omitempty"`
	// Made and Expires are seconds of the epoch, Issued nanoseconds.
	Made    int64 `json:"iat"`
	Expires int64 `json:"exp"`
	Issued  int64 `json:"ns"`
}

var errToken = errors.New("token is not valid")

// token makes a token. The real clock counts, as the SDK looks at the end by it.
func (f *Fake) token(task string, life time.Duration) string {
	now := time.Now()
	body, _ := json.Marshal(claims{Task: task, Made: now.Unix(), Expires: now.Add(life).Unix(), Issued: now.UnixNano()}) // numbers and text
	text := encode([]byte(`{"alg":"HS256","typ":"JWT"}`)) + "." + encode(body)
	return text + "." + encode(f.sign(text))
}

func (f *Fake) sign(text string) []byte {
	h := hmac.New(sha256.New, f.key)
	h.Write([]byte(text))
	return h.Sum(nil)
}

func encode(b []byte) string { return base64.RawURLEncoding.EncodeToString(b) }

// check says whether a token is valid for a task, or without one for the control plane.
func (f *Fake) check(token, task string) error {
	text, signature := token, ""
	if at := strings.LastIndexByte(token, '.'); at >= 0 {
		text, signature = token[:at], token[at+1:]
	}
	if !hmac.Equal([]byte(encode(f.sign(text))), []byte(signature)) {
		return errToken
	}
	_, body, _ := strings.Cut(text, ".")
	raw, err := base64.RawURLEncoding.DecodeString(body)
	if err != nil {
		return errToken
	}
	var c claims
	if err := json.Unmarshal(raw, &c); err != nil {
		return errToken
	}
	f.mu.Lock()
	revoked := f.revoked
	f.mu.Unlock()
	over := time.Now().Unix() >= c.Expires || task != "" && !time.Unix(0, c.Issued).After(revoked)
	if c.Task != task || over {
		return errToken
	}
	return nil
}
