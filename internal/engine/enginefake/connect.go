package enginefake

import (
	"fmt"
	"net"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
	"github.com/harvest-run/executord/internal/guest/wire"
)

// connect makes a pipe a connection to a server of the Config, until that returns.
func (sb *sandbox) connect(conn net.Conn, q *guestv1.Request) {
	if hook := sb.engine.cfg.Hooks.Ask; hook != nil && !hook(sb.id, q) {
		return
	}
	port := q.GetConnect().GetPort()
	a := &Answer{Response: &guestv1.Response{Answer: &guestv1.Response_Connect{Connect: &guestv1.ConnectResponse{}}}}
	var server func(net.Conn)
	if serve := sb.engine.cfg.Connect; serve != nil && port > 0 && port < 1<<16 {
		server = serve(sb.id, uint16(port))
	}
	if server == nil {
		a = refuse(guestv1.Error_KIND_NOT_FOUND, fmt.Sprintf("nobody listens on port %d", port))
	}
	a.Response.Id = q.GetId()
	if hook := sb.engine.cfg.Hooks.Answer; hook != nil {
		hook(sb.id, q, a)
	}
	if a.Drop || a.Cut || wire.Write(conn, a.Response) != nil || a.Response.GetConnect() == nil {
		return
	}
	server(conn)
}
