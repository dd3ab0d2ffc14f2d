package api

import (
	"net"

	"github.com/harvest-run/executord/internal/auth"
	"google.golang.org/grpc/credentials"
)

// serverCredentials are TLS. A client's certificate is checked here, once for each
// connection, and not by the handshake: a client that is refused in a call is told why.
type serverCredentials struct {
	credentials.TransportCredentials
	certificates *auth.Certificates
}

func newServerCredentials(c *auth.Certificates) serverCredentials {
	return serverCredentials{credentials.NewTLS(c.ServerConfig()), c}
}

// connInfo is what is known of a connection.
type connInfo struct {
	credentials.TLSInfo
	client *auth.Client
}

// ServerHandshake implements credentials.TransportCredentials.
func (s serverCredentials) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	conn, info, err := s.TransportCredentials.ServerHandshake(raw)
	if err != nil {
		return nil, nil, err
	}
	known, ok := info.(credentials.TLSInfo)
	if !ok {
		return conn, info, nil
	}
	return conn, connInfo{known, s.certificates.Check(known.State.PeerCertificates)}, nil
}

// Clone implements credentials.TransportCredentials.
func (s serverCredentials) Clone() credentials.TransportCredentials {
	return serverCredentials{s.TransportCredentials.Clone(), s.certificates}
}
