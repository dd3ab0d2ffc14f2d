package api

import (
	"context"
	"strings"

	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
	"github.com/harvest-run/executord/internal/auth"
)

// Keys keeps API keys. auth.Keys is meant.
type Keys interface {
	// Create makes one and returns what is kept of it, and the key itself.
	Create(ctx context.Context, n auth.NewKey) (auth.Key, string, error)
	// List reads a page of at most limit, the newest first, behind the one with the id
	// before; ended includes those that are not good any more.
	List(before string, limit int, ended bool) []auth.Key
	// Revoke ends one for good.
	Revoke(ctx context.Context, id string) (auth.Key, error)
}

// authService implements the AuthService.
type authService struct {
	executorv1.UnimplementedAuthServiceServer
	keys   Keys
	tokens *pageTokens
}

// keyNamePrefix begins the resource names of API keys.
const keyNamePrefix = "apiKeys/"

// GetCaller implements executorv1.AuthServiceServer.
func (s *authService) GetCaller(ctx context.Context, _ *executorv1.GetCallerRequest) (*executorv1.GetCallerResponse, error) {
	principal := principalOf(ctx)
	return &executorv1.GetCallerResponse{Principal: principal.Name, Role: roleProto(principal.Role)}, nil
}

// CreateApiKey implements executorv1.AuthServiceServer.
func (s *authService) CreateApiKey(ctx context.Context, req *executorv1.CreateApiKeyRequest) (*executorv1.CreateApiKeyResponse, error) {
	lifetime, err := duration("lifetime", req.GetLifetime())
	if err != nil {
		return nil, err
	}
	key, text, err := s.keys.Create(ctx, auth.NewKey{Name: req.GetDisplayName(), Role: roleOf(req.GetRole()), Lifetime: lifetime})
	if err != nil {
		return nil, err
	}
	return &executorv1.CreateApiKeyResponse{ApiKey: keyProto(key), Key: text}, nil
}

// ListApiKeys implements executorv1.AuthServiceServer.
func (s *authService) ListApiKeys(ctx context.Context, req *executorv1.ListApiKeysRequest) (*executorv1.ListApiKeysResponse, error) {
	scope := "good"
	if req.GetShowEnded() {
		scope = "all"
	}
	list := listing(ctx, "ListApiKeys", scope, "", false)
	before, err := s.tokens.decode(list, req.GetPageToken())
	if err != nil {
		return nil, err
	}
	size := pageSize(req.GetPageSize())
	page, next := cutPage(s.keys.List(before, size+1, req.GetShowEnded()), size, func(last auth.Key) string {
		return s.tokens.encode(list, last.ID)
	})
	resp := &executorv1.ListApiKeysResponse{NextPageToken: next, ApiKeys: make([]*executorv1.ApiKey, len(page))}
	for i, key := range page {
		resp.ApiKeys[i] = keyProto(key)
	}
	return resp, nil
}

// RevokeApiKey implements executorv1.AuthServiceServer.
func (s *authService) RevokeApiKey(ctx context.Context, req *executorv1.RevokeApiKeyRequest) (*executorv1.RevokeApiKeyResponse, error) {
	id, ok := strings.CutPrefix(req.GetName(), keyNamePrefix)
	if !ok {
		return nil, errName("apiKeys/{api_key}")
	}
	// Who revokes its own key is still to hear that it worked.
	key, err := s.keys.Revoke(context.WithoutCancel(ctx), id)
	if err != nil {
		return nil, err
	}
	return &executorv1.RevokeApiKeyResponse{ApiKey: keyProto(key)}, nil
}

func keyProto(k auth.Key) *executorv1.ApiKey {
	return &executorv1.ApiKey{
		Name:        keyNamePrefix + k.ID,
		DisplayName: k.Name,
		Role:        roleProto(k.Role),
		Principal:   k.Principal().Name,
		CreateTime:  timestamp(k.CreateTime),
		ExpireTime:  timestamp(k.ExpireTime),
		RevokeTime:  timestamp(k.RevokeTime),
		LastUseTime: timestamp(k.LastUseTime),
	}
}
