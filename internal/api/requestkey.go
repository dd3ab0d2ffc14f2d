package api

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"strings"

	"github.com/harvest-run/executord/internal/idempotency"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// requestKeys makes the keys of requests that can be repeated.
type requestKeys struct {
	secret []byte
}

func newRequestKeys(secret []byte) (*requestKeys, error) {
	if len(secret) == 0 {
		secret = make([]byte, sha256.Size)
		if _, err := rand.Read(secret); err != nil {
			return nil, fmt.Errorf("read random bytes: %w", err)
		}
	}
	return &requestKeys{secret: secret}, nil
}

// namedRequest is a request with a name of its own.
type namedRequest interface {
	proto.Message
	GetRequestId() string
}

// of returns the key of a request, the zero Key if the request has no request_id. Its
// method is the one that the message is called after.
func (k *requestKeys) of(ctx context.Context, req namedRequest) (idempotency.Key, error) {
	if req.GetRequestId() == "" {
		return idempotency.Key{}, nil
	}
	fingerprint, err := k.fingerprint(req.ProtoReflect())
	if err != nil {
		return idempotency.Key{}, err
	}
	return idempotency.Key{
		Owner: owner(ctx), ID: req.GetRequestId(), Fingerprint: fingerprint,
		Method: strings.TrimSuffix(string(req.ProtoReflect().Descriptor().Name()), "Request"),
	}, nil
}

// fingerprint is a keyed hash of the parameters: those of a short secret could be found
// out from a plain one by trying.
func (k *requestKeys) fingerprint(req protoreflect.Message) (string, error) {
	parameters := req.New()
	req.Range(func(field protoreflect.FieldDescriptor, value protoreflect.Value) bool {
		if isParameter(field.Name()) {
			parameters.Set(field, value)
		}
		return true
	})
	// Those that a newer client knows count as well.
	parameters.SetUnknown(req.GetUnknown())
	encoded, err := proto.MarshalOptions{Deterministic: true}.Marshal(parameters.Interface())
	if err != nil {
		return "", fmt.Errorf("encode the parameters of a request: %w", err)
	}
	mac := hmac.New(sha256.New, k.secret)
	mac.Write(encoded) // a hash never returns an error
	return hex.EncodeToString(mac.Sum(nil)), nil
}

// isParameter says whether a field of a request says what is to be done: a repeat may
// differ in the others.
func isParameter(field protoreflect.Name) bool {
	switch field {
	case "request_id", "heartbeat_interval":
		return false
	}
	return true
}

// owner is who makes a request, as things are owned.
func owner(ctx context.Context) string { return callerOf(ctx).Owner }
