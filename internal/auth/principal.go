// Package auth finds out who is calling: from an API key, from a token of an OpenID
// Connect issuer, or from a client certificate; and it keeps the server's own
// certificate fresh. It knows nothing of gRPC: the api brings it what came with a
// request and takes back a Principal or a fault. Nothing here ever writes a
// credential anywhere: not into an error, not into the log, and of API keys only
// their hash into the store. Its goroutines are that of Keys.Run, whose caller waits
// for it, and one while an issuer is asked, for which OIDC.Close waits.
package auth

import (
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/harvest-run/executord/internal/caller"
	"github.com/harvest-run/executord/internal/fault"
)

// Role is what a principal may do. Each includes those before it.
type Role uint8

// The roles. They are stored by these numbers, which are those of the API.
const (
	// User starts things, and sees and ends its own.
	User Role = iota + 1
	// Operator sees and ends everybody's.
	Operator
	// Admin also decides who may call.
	Admin
)

// String is its name.
func (r Role) String() string {
	switch r {
	case User:
		return "user"
	case Operator:
		return "operator"
	case Admin:
		return "admin"
	default:
		return "none"
	}
}

// ParseRole is the inverse of String. A fault Invalid for what is no role.
func ParseRole(name string) (Role, error) {
	for _, r := range []Role{User, Operator, Admin} {
		if r.String() == name {
			return r, nil
		}
	}
	return 0, fault.InvalidField("ROLE", "role", "%q is none of user, operator, admin", name)
}

// Principal is who is calling.
type Principal struct {
	// Name is stable for as long as the principal exists: things are owned by it.
	Name string
	// Role is 0 for one that is known and may do nothing.
	Role Role
	// Key is the id of the API key that was shown, "" if none was.
	Key string
}

// Caller is what the domain has to know.
func (p Principal) Caller() caller.Caller {
	return caller.Caller{Owner: p.Name, All: p.Role >= Operator}
}

// Local is everybody on a server that asks nobody who they are, which only this host's
// users reach.
func Local() Principal { return Principal{Name: "local", Role: Admin} }

// maxName bounds the name of a principal in bytes.
const maxName = 512

// isName says that a text from a credential can be part of a principal's name: it is
// shown in logs and tables.
func isName(s string) bool {
	return s != "" && len(s) <= maxName && utf8.ValidString(s) && s == strings.TrimSpace(s) &&
		!strings.ContainsFunc(s, func(r rune) bool { return !unicode.IsGraphic(r) })
}

// Roles says which role somebody has by what is known of them: for a token the values of
// its role claim, for a certificate its name.
type Roles struct {
	// Users, Operators and Admins have one of these values; "*" is any.
	Users, Operators, Admins []string
}

// of returns the highest role that one of the values gives, 0 if none does. Somebody of
// whom no value is known has "": so "*" is for them too.
func (r Roles) of(values ...string) Role {
	for _, level := range []struct {
		role Role
		have []string
	}{{Admin, r.Admins}, {Operator, r.Operators}, {User, r.Users}} {
		for _, want := range level.have {
			for _, value := range append(values, "") {
				if want == "*" || want == value && value != "" {
					return level.role
				}
			}
		}
	}
	return 0
}

// refuse makes the fault of a caller who did not show who it is. The words are fixed:
// nothing of a credential gets into them.
func refuse(reason, message string) error {
	return fault.New(fault.Unauthenticated, reason, "%s", message)
}
