package clienttest

import (
	"context"
	"fmt"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
)

// SetTransport has the server encrypt its connections from the next Listen on.
func (s *Server) SetTransport(c credentials.TransportCredentials) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.transport = c
}

// Want has every call refused that does not show this authorization header, as
// UNAUTHENTICATED; "" takes all.
func (s *Server) Want(authorization string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.want = authorization
}

// Shown is the authorization header of the last call; "" if it had none.
func (s *Server) Shown() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.shown
}

// refuse returns an error for a call that does not show what is wanted.
func (s *Server) refuse(shown string) error {
	switch {
	case s.want == "" || s.want == shown:
		return nil
	case shown == "":
		return Error(codes.Unauthenticated, "CREDENTIALS_MISSING", nil, "the call has no credentials: give an API key")
	default:
		return Error(codes.Unauthenticated, "KEY_INVALID", nil, "the API key is not one of this server's")
	}
}

// GetCaller implements AuthService.
func (s *Server) GetCaller(context.Context, *executorv1.GetCallerRequest) (*executorv1.GetCallerResponse, error) {
	return &executorv1.GetCallerResponse{Principal: "key:ann", Role: executorv1.Role_ROLE_ADMIN}, nil
}

// CreateApiKey implements AuthService. Its keys are exk_k1_secret and so on.
func (s *Server) CreateApiKey(_ context.Context, r *executorv1.CreateApiKeyRequest) (*executorv1.CreateApiKeyResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	id := fmt.Sprintf("k%d", len(s.keys)+1)
	key := &executorv1.ApiKey{
		Name: "apiKeys/" + id, DisplayName: r.GetDisplayName(), Role: r.GetRole(), Principal: "key:" + r.GetDisplayName(), CreateTime: at(0),
	}
	if r.GetLifetime() != nil {
		key.ExpireTime = timestamppb.New(zero().Add(r.GetLifetime().AsDuration()))
	}
	s.keys = append(s.keys, key)
	return &executorv1.CreateApiKeyResponse{ApiKey: proto.CloneOf(key), Key: "exk_" + id + "_secret"}, nil
}

// ListApiKeys implements AuthService, with all on one page.
func (s *Server) ListApiKeys(_ context.Context, r *executorv1.ListApiKeysRequest) (*executorv1.ListApiKeysResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	answer := &executorv1.ListApiKeysResponse{}
	for i := len(s.keys) - 1; i >= 0; i-- {
		if r.GetShowEnded() || s.keys[i].GetRevokeTime() == nil {
			answer.ApiKeys = append(answer.ApiKeys, proto.CloneOf(s.keys[i]))
		}
	}
	return answer, nil
}

// RevokeApiKey implements AuthService.
func (s *Server) RevokeApiKey(_ context.Context, r *executorv1.RevokeApiKeyRequest) (*executorv1.RevokeApiKeyResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, key := range s.keys {
		if key.GetName() == r.GetName() {
			key.RevokeTime = at(60_000)
			return &executorv1.RevokeApiKeyResponse{ApiKey: proto.CloneOf(key)}, nil
		}
	}
	return nil, Error(codes.NotFound, "KEY_NOT_FOUND", nil, "there is no "+r.GetName())
}
