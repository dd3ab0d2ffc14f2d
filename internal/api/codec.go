package api

import (
	"context"

	"google.golang.org/grpc"
	"google.golang.org/grpc/encoding"
	grpcproto "google.golang.org/grpc/encoding/proto"
	"google.golang.org/grpc/mem"
)

// grpc-go answers a message that cannot be decoded, such as one with invalid UTF-8
// in a string, with INTERNAL and no details, before any interceptor runs. It is the
// client's mistake and is to look like one: so decoding into a received never fails,
// and the gate refuses what could not be decoded.

// received is a request on its way through the codec.
type received struct {
	message any
	// err says why it could not be decoded.
	err error
}

// codec is the standard one, except for what it does with a received and with output.
type codec struct {
	encoding.CodecV2
}

func newCodec() codec {
	return codec{encoding.GetCodecV2(grpcproto.Name)}
}

// Marshal implements encoding.CodecV2.
func (c codec) Marshal(v any) (mem.BufferSlice, error) {
	if data, ok := encodeOutput(v); ok {
		return data, nil
	}
	return c.CodecV2.Marshal(v)
}

// Unmarshal implements encoding.CodecV2.
func (c codec) Unmarshal(data mem.BufferSlice, v any) error {
	r, ok := v.(*received)
	if !ok {
		return c.CodecV2.Unmarshal(data, v)
	}
	r.err = c.CodecV2.Unmarshal(data, r.message)
	return nil
}

// registrar registers services whose unary requests are decoded into a received.
type registrar struct {
	server *grpc.Server
}

// RegisterService implements grpc.ServiceRegistrar.
func (r registrar) RegisterService(desc *grpc.ServiceDesc, service any) {
	changed := *desc
	changed.Methods = make([]grpc.MethodDesc, len(desc.Methods))
	for i, method := range desc.Methods {
		changed.Methods[i] = grpc.MethodDesc{MethodName: method.MethodName, Handler: tolerant(method.Handler)}
	}
	r.server.RegisterService(&changed, service)
}

// malformedKey finds in a context why the request could not be decoded.
type malformedKey struct{}

func tolerant(handler grpc.MethodHandler) grpc.MethodHandler {
	return func(service any, ctx context.Context, decode func(any) error, chain grpc.UnaryServerInterceptor) (any, error) {
		var in received
		return handler(service, ctx,
			func(message any) error {
				in.message = message
				return decode(&in)
			},
			func(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
				if in.err != nil {
					ctx = context.WithValue(ctx, malformedKey{}, in.err)
				}
				return chain(ctx, req, info, next)
			})
	}
}
