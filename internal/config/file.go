package config

import (
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"unicode/utf8"

	"buf.build/go/protoyaml"
	"go.yaml.in/yaml/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	configv1 "github.com/harvest-run/executord/gen/harvest/config/v1"
)

// readYAML sets what a file names.
func (l *loader) readYAML(path string, content []byte) {
	if !utf8.Valid(content) {
		l.errs = append(l.errs, fmt.Errorf("%s: not UTF-8", path))
		return
	}
	// YAML knows line breaks that protoyaml does not count.
	content = []byte(strings.NewReplacer("\r\n", "\n", "\r", "\n", "\u0085", "\n", "\u2028", "\n", "\u2029", "\n").
		Replace(string(content)))
	if err := oneDocument(content); err != nil {
		l.errs = append(l.errs, fmt.Errorf("%s: %w", path, err))
		return
	}
	reader := &yamlReader{loader: l, path: path}
	earlier := len(l.errs)
	err := protoyaml.UnmarshalOptions{Path: path, CustomUnmarshaler: reader}.Unmarshal(content, l.config)
	// protoyaml finds some of the same mistakes again, with less to say about them.
	if err != nil && len(l.errs) == earlier {
		l.errs = append(l.errs, fmt.Errorf("read configuration: %w", err))
	}
}

// oneDocument refuses what comes after the first document: it would be left out
// without a word.
func oneDocument(content []byte) error {
	decoder := yaml.NewDecoder(strings.NewReader(string(content)))
	for n := 0; ; n++ {
		var document yaml.Node
		switch err := decoder.Decode(&document); {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return err
		case n > 0:
			return errors.New("holds more than one YAML document")
		}
	}
}

// yamlReader prepares the nodes of a file for protoyaml, which reads structure and
// finds what does not belong there: it turns the forms that people write into those
// that protoyaml reads, and notes where each field was named.
type yamlReader struct {
	*loader
	path string
}

// Unmarshal implements protoyaml.CustomUnmarshaler. It leaves the reading to
// protoyaml.
func (r *yamlReader) Unmarshal(node *yaml.Node, message proto.Message) (bool, error) {
	if config, ok := message.(*configv1.Config); ok {
		r.prepare(node, config.ProtoReflect().Descriptor(), field{})
	}
	return false, nil
}

func (r *yamlReader) prepare(node *yaml.Node, message protoreflect.MessageDescriptor, parent field) {
	if node.Kind != yaml.MappingNode {
		return // an empty file, or one that protoyaml refuses
	}
	var known []string
	for i := range message.Fields().Len() {
		known = append(known, string(message.Fields().Get(i).Name()))
	}
	seen := make(map[string]int)
	for i := 0; i+1 < len(node.Content); i += 2 {
		key, value := node.Content[i], node.Content[i+1]
		descriptor := message.Fields().ByName(protoreflect.Name(key.Value))
		if descriptor == nil || key.Kind != yaml.ScalarNode {
			where := ""
			if parent.name != "" {
				where = " in " + parent.name
			}
			r.errs = append(r.errs, fmt.Errorf("%s: %w", r.at(key), unknown("field"+where, key.Value, known)))
			continue
		}
		f := parent.child(descriptor)
		if line, found := seen[f.name]; found {
			r.fail(f.name, r.at(key), fmt.Errorf("it is set already in line %d", line))
		}
		seen[f.name] = key.Line
		switch {
		case value.Tag == "!!null":
			r.fail(f.name, r.at(key), errors.New("it has no value; leave it out to have the one of the layer below"))
		case f.isGroup():
			if value.Kind != yaml.MappingNode {
				r.fail(f.name, r.at(value), errors.New("it must hold fields"))
				continue
			}
			r.prepare(value, descriptor.Message(), f)
		case descriptor.IsList():
			f.holder(r.config).Clear(descriptor) // protoyaml would add to the layer below
			if value.Kind != yaml.SequenceNode {
				r.fail(f.name, r.at(value), errors.New("it must be a list"))
				continue
			}
			for _, element := range value.Content {
				r.prepareValue(f, element)
			}
		default:
			r.prepareValue(f, value)
		}
	}
}

// prepareValue turns a single value into the form that protoyaml reads.
func (r *yamlReader) prepareValue(f field, node *yaml.Node) {
	if node.Kind != yaml.ScalarNode {
		r.fail(f.name, r.at(node), errors.New("it must be a single value"))
		return
	}
	value, err := f.parse(node.Value)
	if err != nil {
		r.fail(f.name, r.at(node), err)
		return
	}
	r.origins[f.name] = r.at(node)
	switch kind := f.descriptor().Kind(); kind {
	case protoreflect.BoolKind:
		node.Tag = "!!bool" // also for a quoted one
	case protoreflect.EnumKind:
		node.Value = f.enumPrefix() + strings.ToUpper(node.Value)
	case protoreflect.Int64Kind:
		node.Value = strconv.FormatInt(value.Int(), 10)
	case protoreflect.Uint32Kind:
		node.Value = strconv.FormatUint(value.Uint(), 10)
	case protoreflect.MessageKind:
		node.Value = f.format(value)
	}
}

// at is where a node stands.
func (r *yamlReader) at(node *yaml.Node) string { return fmt.Sprintf("%s:%d", r.path, node.Line) }
