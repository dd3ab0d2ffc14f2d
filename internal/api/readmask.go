package api

import (
	"strings"

	"github.com/harvest-run/executord/internal/fault"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/fieldmaskpb"
)

// maxMaskPaths bounds the paths of a mask: no resource has as many.
const maxMaskPaths = 128

// readMask says which fields of a resource are answered with; nil is all.
type readMask map[protoreflect.Name]readMask

// parseReadMask reads the mask for a kind of resource. A fault Invalid names a path that
// the resource does not have.
func parseReadMask(mask *fieldmaskpb.FieldMask, resource proto.Message) (readMask, error) {
	if len(mask.GetPaths()) == 0 {
		return nil, nil
	}
	if len(mask.GetPaths()) > maxMaskPaths {
		return nil, fault.InvalidField("INVALID_READ_MASK", "read_mask", "has %d paths, at most %d are allowed", len(mask.GetPaths()), maxMaskPaths)
	}
	kind := resource.ProtoReflect().Descriptor()
	keep := make(readMask)
	for _, path := range mask.GetPaths() {
		if path == "*" {
			return nil, nil
		}
		first, second, deep := strings.Cut(path, ".")
		field := kind.Fields().ByName(protoreflect.Name(first))
		if field == nil {
			return nil, errMask(path, kind)
		}
		inner, chosen := keep[field.Name()]
		if !deep {
			keep[field.Name()] = nil
			continue
		}
		if field.Message() == nil || field.IsMap() || field.IsList() || field.Message().Fields().ByName(protoreflect.Name(second)) == nil {
			return nil, errMask(path, kind)
		}
		if chosen && inner == nil {
			continue // all of it is wanted already
		}
		if inner == nil {
			inner = make(readMask)
			keep[field.Name()] = inner
		}
		inner[protoreflect.Name(second)] = nil
	}
	return keep, nil
}

func errMask(path string, kind protoreflect.MessageDescriptor) error {
	return fault.InvalidField("INVALID_READ_MASK", "read_mask", "%q is not a field of %s, nor one a level below", clip(path, maxMaskPath), kind.Name())
}

// maxMaskPath is how much of a bad path is quoted.
const maxMaskPath = 80

// apply removes what is not wanted.
func (m readMask) apply(resource proto.Message) { m.prune(resource.ProtoReflect()) }

func (m readMask) prune(message protoreflect.Message) {
	if m == nil {
		return
	}
	message.Range(func(field protoreflect.FieldDescriptor, value protoreflect.Value) bool {
		inner, wanted := m[field.Name()]
		switch {
		case !wanted:
			message.Clear(field)
		case inner != nil:
			inner.prune(value.Message())
		}
		return true
	})
}
