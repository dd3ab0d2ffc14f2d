package config

import (
	"fmt"
	"math"
	"strings"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/durationpb"

	configv1 "github.com/harvest-run/executord/gen/harvest/config/v1"
)

// variablePrefix begins the name of every variable.
const variablePrefix = "EXECUTORD_"

// field is one thing that can be set: a scalar, an enum, a duration or a list of
// strings, at the end of a path through messages.
type field struct {
	name string // such as "limits.memory_bytes"
	path []protoreflect.FieldDescriptor
}

// fields are all fields, in the order of the message.
func fields() []field {
	return fieldsOf((&configv1.Config{}).ProtoReflect().Descriptor(), field{})
}

func fieldsOf(message protoreflect.MessageDescriptor, parent field) []field {
	var all []field
	for i := range message.Fields().Len() {
		f := parent.child(message.Fields().Get(i))
		if f.isGroup() {
			all = append(all, fieldsOf(f.descriptor().Message(), f)...)
		} else {
			all = append(all, f)
		}
	}
	return all
}

func (f field) child(descriptor protoreflect.FieldDescriptor) field {
	name := string(descriptor.Name())
	if f.name != "" {
		name = f.name + "." + name
	}
	return field{name, append(f.path[:len(f.path):len(f.path)], descriptor)}
}

func (f field) descriptor() protoreflect.FieldDescriptor { return f.path[len(f.path)-1] }

// isGroup says that it is a message with fields of its own.
func (f field) isGroup() bool {
	return f.descriptor().Message() != nil && !f.isDuration()
}

func (f field) isDuration() bool {
	message := f.descriptor().Message()
	return message != nil && message.FullName() == (&durationpb.Duration{}).ProtoReflect().Descriptor().FullName()
}

// isSize says that it is a number of bytes.
func (f field) isSize() bool { return strings.HasSuffix(f.name, "_bytes") }

func (f field) help() *configv1.Help {
	help, _ := proto.GetExtension(f.descriptor().Options(), configv1.E_Help).(*configv1.Help)
	return help
}

// separator is what separates the values of a list in its variable.
func (f field) separator() string {
	if s := f.help().GetSeparator(); s != "" {
		return s
	}
	return ":"
}

// variable is the name of its variable.
func (f field) variable() string {
	return variablePrefix + strings.ToUpper(strings.ReplaceAll(f.name, ".", "_"))
}

// flag is the name of its flag.
func (f field) flag() string {
	return strings.NewReplacer(".", "-", "_", "-").Replace(f.name)
}

// set gives it in a configuration the value that texts stand for.
func (f field) set(config *configv1.Config, texts []string) error {
	holder, descriptor := f.holder(config), f.descriptor()
	if !descriptor.IsList() {
		value, err := f.parse(texts[len(texts)-1])
		if err != nil {
			return err
		}
		holder.Set(descriptor, value)
		return nil
	}
	list := holder.NewField(descriptor).List()
	for _, text := range texts {
		value, err := f.parse(text)
		if err != nil {
			return err
		}
		list.Append(value)
	}
	holder.Set(descriptor, protoreflect.ValueOfList(list))
	return nil
}

// get returns the texts of its value: one, or those of a list.
func (f field) get(config *configv1.Config) []string {
	holder, descriptor := f.holder(config), f.descriptor()
	if !descriptor.IsList() {
		return []string{f.format(holder.Get(descriptor))}
	}
	var texts []string
	list := holder.Get(descriptor).List()
	for i := range list.Len() {
		texts = append(texts, f.format(list.Get(i)))
	}
	return texts
}

// holder is the message that directly has it.
func (f field) holder(config *configv1.Config) protoreflect.Message {
	message := config.ProtoReflect()
	for _, descriptor := range f.path[:len(f.path)-1] {
		message = message.Mutable(descriptor).Message()
	}
	return message
}

// unknown is the error for a name that there is none of, with the most similar one
// that there is.
func unknown(what, name string, known []string) error {
	best, distance := "", math.MaxInt
	for _, k := range known {
		// One that has nothing in common with the name would only confuse.
		d := editDistance(strings.ToLower(name), strings.ToLower(k))
		if d < distance && d < max(len(name), len(k)) {
			best, distance = k, d
		}
	}
	if best == "" {
		return fmt.Errorf("unknown %s %q", what, name)
	}
	return fmt.Errorf("unknown %s %q; the nearest known one is %q", what, name, best)
}

// editDistance is how many bytes must be put in, taken out or replaced to make b of a.
func editDistance(a, b string) int {
	row := make([]int, len(b)+1) // distances of the part of a so far to each beginning of b
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			replaced := diagonal
			if a[i] != b[j] {
				replaced++
			}
			diagonal = row[j+1]
			row[j+1] = min(replaced, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}
