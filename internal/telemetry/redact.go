package telemetry

import (
	"log/slog"
	"regexp"
	"strings"
)

// redacted stands where a secret was.
const redacted = "[redacted]"

// secretNames are parts of names under which secrets are kept.
func secretNames() []string {
	return []string{"authorization", "token", "secret", "password", "passwd", "api_key", "apikey", "api-key", "cookie", "credential", "private_key", "env"}
}

// Redactor keeps secrets out of logs, in case something should hand them over by
// mistake: values under names of secrets, and what looks like a credential in any text.
type Redactor struct {
	names    []string
	patterns *regexp.Regexp
}

// NewRedactor makes a Redactor.
func NewRedactor() *Redactor {
	return &Redactor{
		names: secretNames(),
		// What follows the scheme of an authorization, our own keys, those of GitHub,
		// Anthropic, Google, Linear, Sentry, Slack and AWS, the three parts of a JWT, and
		// what stands before the host of a URL.
		patterns: regexp.MustCompile(`(?i:bearer)\s+[A-Za-z0-9+/=._~-]{8,}|(?i:basic)\s+[A-Za-z0-9+/=]{12,}` +
			`|exk_[A-Za-z0-9]+_[A-Za-z0-9_-]+` +
			`|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,}` +
			`|sk-[A-Za-z0-9_-]{16,}|AIza[A-Za-z0-9_-]{30,}|lin_api_[A-Za-z0-9]{20,}|sntr[a-z]{1,2}_[A-Za-z0-9_=+/.-]{20,}` +
			`|xox[abprs]-[A-Za-z0-9-]{10,}|AKIA[A-Z0-9]{16}` +
			`|eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*` +
			`|://[^/\s:@]*:[^/\s@]+@`),
	}
}

// Attr is a slog.HandlerOptions.ReplaceAttr.
func (r *Redactor) Attr(_ []string, a slog.Attr) slog.Attr {
	if r.secret(a.Key) && a.Value.Kind() != slog.KindGroup {
		return slog.String(a.Key, redacted)
	}
	switch a.Value.Kind() {
	case slog.KindString:
		return slog.String(a.Key, r.Text(a.Value.String()))
	case slog.KindAny:
		switch v := a.Value.Any().(type) {
		case error:
			return slog.String(a.Key, r.Text(v.Error()))
		case *slog.Source:
			return a
		default:
			// Whatever it is, it is written as a text in the end.
			text := a.Value.String()
			if clean := r.Text(text); clean != text {
				return slog.String(a.Key, clean)
			}
		}
	}
	return a
}

// Text takes out what looks like a credential.
func (r *Redactor) Text(text string) string {
	return r.patterns.ReplaceAllStringFunc(text, func(found string) string {
		if strings.HasPrefix(found, "://") {
			return "://" + redacted + "@"
		}
		return redacted
	})
}

// secret says whether something of this name is a secret.
func (r *Redactor) secret(name string) bool {
	name = strings.ToLower(name)
	for _, part := range r.names {
		if name == part || len(part) > 4 && strings.Contains(name, part) {
			return true
		}
	}
	return false
}
