package api

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"

	"buf.build/go/protovalidate"
	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
	"github.com/harvest-run/executord/internal/fault"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
)

// reasonInvalidField is the reason of a request with a bad field, unless there is a
// more exact one.
const reasonInvalidField = "INVALID_FIELD"

// newValidator compiles the rules of all requests now, so that the first request of
// each kind is not slow and a broken rule is found at the start.
func newValidator() (protovalidate.Validator, error) {
	validator, err := protovalidate.New(
		protovalidate.WithMessageDescriptors(requestDescriptors()...),
		protovalidate.WithDisableLazy(),
	)
	if err != nil {
		return nil, err
	}
	for _, descriptor := range requestDescriptors() {
		kind, err := protoregistry.GlobalTypes.FindMessageByName(descriptor.FullName())
		if err != nil {
			return nil, fmt.Errorf("find message %s: %w", descriptor.FullName(), err)
		}
		// Violations are expected of an empty message; a rule that does not compile
		// gives another error.
		err = validator.Validate(kind.New().Interface())
		if _, invalid := errors.AsType[*protovalidate.ValidationError](err); err != nil && !invalid {
			return nil, fmt.Errorf("rules of %s: %w", descriptor.FullName(), err)
		}
	}
	return validator, nil
}

// serviceDescriptors are the services of this API.
func serviceDescriptors() []protoreflect.ServiceDescriptor {
	return []protoreflect.ServiceDescriptor{
		executorv1.File_harvest_executor_v1_executor_service_proto.Services().Get(0),
		executorv1.File_harvest_executor_v1_session_service_proto.Services().Get(0),
		executorv1.File_harvest_executor_v1_image_service_proto.Services().Get(0),
		executorv1.File_harvest_executor_v1_admin_service_proto.Services().Get(0),
		executorv1.File_harvest_executor_v1_auth_service_proto.Services().Get(0),
	}
}

// requestDescriptors are the request messages of all RPCs.
func requestDescriptors() []protoreflect.MessageDescriptor {
	var requests []protoreflect.MessageDescriptor
	for _, service := range serviceDescriptors() {
		for i := range service.Methods().Len() {
			requests = append(requests, service.Methods().Get(i).Input())
		}
	}
	return requests
}

// gate lets good requests through to the handlers and turns what these return into
// statuses. Nothing above it sees a fault, nothing below it a status.
type gate struct {
	validator protovalidate.Validator
	statuses  *statuses
}

func (g *gate) unary(ctx context.Context, req any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
	malformed, _ := ctx.Value(malformedKey{}).(error)
	if err := g.check(req, malformed); err != nil {
		return nil, g.statuses.of(ctx, err, "")
	}
	resp, err := next(ctx, req)
	if err != nil {
		return nil, g.statuses.of(ctx, err, resourceOf(req))
	}
	return resp, nil
}

func (g *gate) stream(srv any, stream grpc.ServerStream, _ *grpc.StreamServerInfo, next grpc.StreamHandler) error {
	gated := &gatedStream{ServerStream: stream, gate: g}
	if err := next(srv, gated); err != nil {
		name := ""
		if about := gated.resource.Load(); about != nil {
			name = *about
		}
		return g.statuses.of(stream.Context(), err, name)
	}
	return nil
}

// gatedStream checks what it receives.
type gatedStream struct {
	grpc.ServerStream
	gate *gate
	// resource is what the last request that named something was about. An attached
	// client's messages are received beside the handler.
	resource atomic.Pointer[string]
}

// RecvMsg implements grpc.ServerStream.
func (s *gatedStream) RecvMsg(m any) error {
	in := received{message: m}
	if err := s.ServerStream.RecvMsg(&in); err != nil {
		return err
	}
	if err := s.gate.check(m, in.err); err != nil {
		return err
	}
	if name := resourceOf(m); name != "" {
		s.resource.Store(&name)
	}
	return nil
}

// check returns a fault Invalid for a request that could not be decoded or breaks a
// rule of the protos.
func (g *gate) check(req any, malformed error) error {
	if malformed != nil {
		// The decoder's words: which field, never what is in it.
		return fault.New(fault.Invalid, "MALFORMED_REQUEST", "the request cannot be decoded: %v", malformed)
	}
	message, ok := req.(proto.Message)
	if !ok || message.ProtoReflect().Descriptor().ParentFile().Package() != apiPackage {
		return nil
	}
	err := g.validator.Validate(message)
	if err == nil {
		return nil
	}
	invalid, ok := errors.AsType[*protovalidate.ValidationError](err)
	if !ok {
		return fmt.Errorf("validate %s: %w", message.ProtoReflect().Descriptor().FullName(), err)
	}
	fields := make([]fault.Field, 0, len(invalid.Violations))
	for _, v := range invalid.Violations {
		if len(fields) == maxViolations {
			break
		}
		fields = append(fields, fault.Field{
			Path:        protovalidate.FieldPathString(v.Proto.GetField()),
			Description: v.Proto.GetMessage(),
		})
	}
	return invalidFields(fields)
}

// maxViolations bounds the violations that an answer names: a request may have
// thousands, and the headers that carry the answer are small.
const maxViolations = 8

// apiPackage is the proto package of this API.
const apiPackage = "harvest.executor.v1"

// invalidFields makes one fault of all wrong fields.
func invalidFields(fields []fault.Field) error {
	var message strings.Builder
	for i, field := range fields {
		if i > 0 {
			message.WriteString("; ")
		}
		message.WriteString(field.Path + ": " + field.Description)
	}
	e := fault.New(fault.Invalid, reasonInvalidField, "%s", message.String())
	e.Fields = fields
	return e
}

// resourceOf is the resource name that a request is about, "" if it names none.
func resourceOf(req any) string {
	if attached, ok := req.(*executorv1.AttachExecutionRequest); ok {
		return attached.GetStart().GetName()
	}
	if named, ok := req.(interface{ GetName() string }); ok {
		return named.GetName()
	}
	if child, ok := req.(interface{ GetParent() string }); ok {
		return child.GetParent()
	}
	return ""
}
