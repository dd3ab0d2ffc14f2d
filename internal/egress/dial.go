package egress

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"time"
)

const (
	// resolveTime bounds the resolution of a name, addressTime the connecting to one
	// address, connectTime that to all of a name.
	resolveTime = 10 * time.Second
	addressTime = 10 * time.Second
	connectTime = 30 * time.Second
	// maxAddresses are tried of a name.
	maxAddresses = 8
)

// Resolver resolves names. A *net.Resolver is one.
type Resolver interface {
	LookupNetIP(ctx context.Context, network, host string) ([]netip.Addr, error)
}

// Dialing says what a Dialer connects to.
type Dialing struct {
	// Rules name it.
	Rules []Rule
	// Denied are addresses that no rule can name.
	Denied []netip.Prefix
	// Resolver resolves names; nil as the host does.
	Resolver Resolver
	// Dial connects to an address; nil as the host does.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
}

// dialing is what a sandbox's policy makes of a Gateway's Config.
func (c Config) dialing(rules []Rule) Dialing {
	return Dialing{Rules: rules, Denied: c.Denied, Resolver: c.Resolver, Dial: c.Dial}
}

// Dialer connects to what rules name and to nothing else. It is what a Proxy dials by,
// for others who connect on behalf of a sandbox.
type Dialer struct {
	rules    rules
	resolver Resolver
	dial     func(ctx context.Context, network, address string) (net.Conn, error)
}

// NewDialer makes a Dialer of rules that Policy.Validate takes.
func NewDialer(d Dialing) *Dialer {
	if d.Resolver == nil {
		d.Resolver = &net.Resolver{PreferGo: true}
	}
	if d.Dial == nil {
		d.Dial = (&net.Dialer{KeepAlive: time.Minute}).DialContext
	}
	return &Dialer{rules: compile(Policy{Rules: d.Rules}, d.Denied), resolver: d.Resolver, dial: d.Dial}
}

// DialContext connects to HOST:PORT. The error of what is not reached tells why, to
// people too.
func (d *Dialer) DialContext(ctx context.Context, _, address string) (net.Conn, error) {
	t, err := parseTarget(address, 0)
	if err != nil {
		return nil, err
	}
	return d.connect(ctx, t)
}

// connect checks a target and connects to it. Every address is checked after the
// name was resolved, and what is dialled is the address that was checked: a name that
// resolves to something else the next time gains nothing.
func (d *Dialer) connect(ctx context.Context, t target) (net.Conn, error) {
	if err := d.rules.check(t); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, connectTime, fmt.Errorf("not connected within %v", connectTime))
	defer cancel()
	addrs := []netip.Addr{t.addr}
	if t.name != "" {
		var err error
		if addrs, err = d.resolve(ctx, t); err != nil {
			return nil, err
		}
	}
	var last error
	for _, addr := range addrs {
		conn, err := d.dialAddr(ctx, netip.AddrPortFrom(addr, t.port))
		if err == nil {
			return conn, nil
		}
		last = err
		if ctx.Err() != nil {
			break
		}
	}
	return nil, failed(ctx, fmt.Errorf("connect to %s: %w", t.host(), last))
}

func (d *Dialer) dialAddr(ctx context.Context, addr netip.AddrPort) (net.Conn, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, addressTime, fmt.Errorf("no answer from %s within %v", addr, addressTime))
	defer cancel()
	conn, err := d.dial(ctx, "tcp", addr.String())
	if err != nil && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	return conn, err
}

// resolve returns those addresses of a name that may be reached; the refusal of the
// first if there are none.
func (d *Dialer) resolve(ctx context.Context, t target) ([]netip.Addr, error) {
	bounded, cancel := context.WithTimeoutCause(ctx, resolveTime, fmt.Errorf("no answer within %v", resolveTime))
	defer cancel()
	name := t.name
	if strings.Contains(name, ".") {
		name += "." // the name as it is, and not below a search domain of the host
	}
	found, err := d.resolver.LookupNetIP(bounded, "ip", name)
	if err != nil && bounded.Err() != nil {
		err = context.Cause(bounded)
	}
	if dns, ok := errors.AsType[*net.DNSError](err); ok {
		err = errors.New(dns.Err) // without the host's nameserver
	}
	if err == nil && len(found) == 0 {
		err = errors.New("it has no address")
	}
	if err != nil {
		return nil, failed(ctx, fmt.Errorf("resolve %s: %w", t.name, err))
	}
	var addrs []netip.Addr
	var refused error
	for _, addr := range found {
		addr = addr.Unmap().WithZone("")
		switch err := d.rules.checkAddr(addr, t); {
		case err == nil && len(addrs) < maxAddresses && !slices.Contains(addrs, addr):
			addrs = append(addrs, addr)
		case err != nil && refused == nil:
			refused = err
		}
	}
	if len(addrs) == 0 {
		return nil, refused
	}
	return addrs, nil
}

// failed is the error of a target that is allowed and not reached.
func failed(ctx context.Context, err error) error {
	u := &unreachable{status: http.StatusBadGateway, err: err}
	if timeout, ok := errors.AsType[net.Error](err); ctx.Err() != nil || ok && timeout.Timeout() {
		u.status = http.StatusGatewayTimeout
	}
	return u
}
