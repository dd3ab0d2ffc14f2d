package config

import (
	"bytes"
	"fmt"

	"go.yaml.in/yaml/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	configv1 "github.com/harvest-run/executord/gen/harvest/config/v1"
)

// Print renders a configuration as a YAML file that Load reads: every field, in the
// order of the message and in the forms that people write.
func Print(config *configv1.Config) ([]byte, error) {
	config = proto.CloneOf(config) // reading a field makes the messages on its path
	var out bytes.Buffer
	encoder := yaml.NewEncoder(&out)
	encoder.SetIndent(2)
	if err := encoder.Encode(printed(config, config.ProtoReflect().Descriptor(), field{})); err != nil {
		return nil, fmt.Errorf("print configuration: %w", err)
	}
	if err := encoder.Close(); err != nil {
		return nil, fmt.Errorf("print configuration: %w", err)
	}
	return out.Bytes(), nil
}

func printed(config *configv1.Config, message protoreflect.MessageDescriptor, parent field) *yaml.Node {
	node := &yaml.Node{Kind: yaml.MappingNode}
	for i := range message.Fields().Len() {
		f := parent.child(message.Fields().Get(i))
		var value *yaml.Node
		switch {
		case f.isGroup():
			value = printed(config, f.descriptor().Message(), f)
		case f.descriptor().IsList():
			value = &yaml.Node{Kind: yaml.SequenceNode}
			for _, text := range f.get(config) {
				value.Content = append(value.Content, f.printedValue(text))
			}
		default:
			value = f.printedValue(f.get(config)[0])
		}
		key := &yaml.Node{}
		key.SetString(string(f.descriptor().Name()))
		node.Content = append(node.Content, key, value)
	}
	return node
}

// printedValue is a single value: a string is quoted where it must be, a number is not.
func (f field) printedValue(text string) *yaml.Node {
	node := &yaml.Node{}
	if f.descriptor().Kind() == protoreflect.StringKind {
		node.SetString(text)
		return node
	}
	node.Kind, node.Value = yaml.ScalarNode, text
	return node
}
