// Package caller says on whose behalf something is asked for. The api makes a Caller
// of the credentials that came with a request, and the domain compares it with the
// owners of its things: it knows nothing of credentials and roles. It imports nothing.
package caller

// Caller is on whose behalf something is asked for. The zero value owns nothing and
// sees only what has no owner, so that a call which forgets to say who asks finds
// nothing that somebody owns.
type Caller struct {
	// Owner is the name by which things are owned; it becomes that of new things.
	Owner string
	// All lets the caller see everybody's things.
	All bool
}

// Sees says whether things of owner exist for the caller.
func (c Caller) Sees(owner string) bool { return c.All || c.Owner == owner }
