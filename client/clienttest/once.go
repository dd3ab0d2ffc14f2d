package clienttest

import (
	"sync"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
)

// remembered is a request that was carried out, and what came of it.
type remembered struct {
	request proto.Message
	made    any
}

// requests are those with a request_id.
type requests struct {
	mu  sync.Mutex
	all map[string]remembered
}

// once does what a request asks for, unless a request with its request_id has: then it
// returns what that made. What fails is not remembered. One at a time, so do must not
// wait for a program.
func once[T any](s *Server, r interface {
	proto.Message
	GetRequestId() string
}, do func() (T, error)) (T, error) {
	id := r.GetRequestId()
	if id == "" {
		return do()
	}
	s.requests.mu.Lock()
	defer s.requests.mu.Unlock()
	if earlier, ok := s.requests.all[id]; ok {
		made, same := earlier.made.(T)
		if !same || !proto.Equal(withoutHeartbeat(earlier.request), withoutHeartbeat(r)) {
			var none T
			return none, Error(codes.AlreadyExists, "REQUEST_ID_REUSED", nil, "request_id "+id+" was used for another request")
		}
		return made, nil
	}
	made, err := do()
	if err == nil {
		if s.requests.all == nil {
			s.requests.all = make(map[string]remembered)
		}
		s.requests.all[id] = remembered{request: proto.Clone(r), made: made}
	}
	return made, err
}

// withoutHeartbeat is a request without what a repeat may change.
func withoutHeartbeat(r proto.Message) proto.Message {
	if e, ok := r.(*executorv1.ExecuteRequest); ok {
		e = proto.CloneOf(e)
		e.HeartbeatInterval = nil
		return e
	}
	return r
}
