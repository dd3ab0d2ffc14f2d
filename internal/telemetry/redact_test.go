package telemetry

import (
	"bytes"
	"errors"
	"log/slog"
	"strings"
	"testing"
)

func TestRedactor(t *testing.T) {
	secrets := []string{
		"exk_01abc_Zm9vYmFyYmF6", "ghp_0123456789abcdefghij0123", "github_pat_11ABCDEFG0123456789_abcdef", "sk-" + strings.Repeat("k9", 12),
		"AIzaSyA0123456789abcdefghijklmnopqrstuv", "lin_api_0123456789abcdefghij", "AKIAIOSFODNN7EXAMPLE",
		"eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.c2lnbmF0dXJl", "xoxb-123456789012-abcdefghij",
	}
	var out bytes.Buffer
	log := slog.New(slog.NewTextHandler(&out, &slog.HandlerOptions{ReplaceAttr: NewRedactor().Attr}))
	for _, s := range secrets {
		log.Info("begin "+s+" end", "text", "a "+s+" b", "error", errors.New("with "+s), "any", []string{s}, slog.Group("deep", "x", s))
	}
	log.Info("x", "api_key", "plainvalue", "Authorization", "plainvalue", "github_token", "plainvalue", "env", "plainvalue", "password", 5)
	log.Info("header", "h", "Bearer plainvalue0", "url", "https://user:plainvalue@host/path")
	for _, s := range append(secrets, "plainvalue") {
		if strings.Contains(out.String(), s) {
			t.Errorf("the log tells %s", s)
		}
	}
	for _, stays := range []string{"begin", "end", "host/path", "error=\"with"} {
		if !strings.Contains(out.String(), stays) {
			t.Errorf("the log lacks %q", stays)
		}
	}
}

// What is no secret is not touched.
func TestRedactorLeavesTheRest(t *testing.T) {
	r := NewRedactor()
	for _, text := range []string{
		"", "an execution ended", "executions/01m89dj3ngv91b7s2s8mp4vjrz", "127.0.0.1:7070", "basic training", "task-force", "https://host:443/path",
		"environment", "rpc error: code = NotFound",
	} {
		if got := r.Text(text); got != text {
			t.Errorf("%q became %q", text, got)
		}
	}
	for _, key := range []string{"environment", "execution", "error", "sandbox", "method"} {
		if a := r.Attr(nil, slog.String(key, "value")); a.Value.String() != "value" {
			t.Errorf("%s became %q", key, a.Value)
		}
	}
	if a := r.Attr(nil, slog.Int("bytes", 5)); a.Value.Int64() != 5 {
		t.Errorf("%v", a)
	}
}

func FuzzRedactor(f *testing.F) {
	f.Add("Bearer abcdefgh exk_a_b eyJ")
	r := NewRedactor()
	f.Fuzz(func(t *testing.T, text string) {
		once := r.Text(text)
		if strings.Contains(once, "ghp_0123456789abcdefghij") {
			t.Errorf("%q", once)
		}
		_ = r.Attr(nil, slog.String("token", text))
	})
}
