package cli

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"go.yaml.in/yaml/v3"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
)

// named is a resource.
type named interface {
	proto.Message
	GetName() string
}

// columns is how resources of a kind look as a table.
type columns[T named] struct {
	header []string
	row    func(T) []string
}

// printOne prints a resource.
func printOne[T named](a *app, one T, c columns[T]) error {
	if a.format == "json" || a.format == "yaml" {
		text, err := protoJSON(one)
		if err != nil {
			return err
		}
		return a.document(text)
	}
	return printAll(a, []T{one}, c)
}

// printAll prints resources: as a table, an array, lines of JSON, or names.
func printAll[T named](a *app, all []T, c columns[T]) error {
	switch a.format {
	case "name":
		for _, one := range all {
			if err := a.line([]byte(one.GetName())); err != nil {
				return err
			}
		}
		return nil
	case "json", "yaml", "jsonl":
		texts := make([][]byte, 0, len(all))
		for _, one := range all {
			text, err := protoJSON(one)
			if err != nil {
				return err
			}
			texts = append(texts, text)
		}
		if a.format == "jsonl" {
			for _, text := range texts {
				if err := a.line(text); err != nil {
					return err
				}
			}
			return nil
		}
		return a.document(append(append([]byte("["), bytes.Join(texts, []byte(","))...), ']'))
	}
	rows := [][]string{c.header}
	for _, one := range all {
		rows = append(rows, c.row(one))
	}
	return a.table(rows)
}

// table prints rows in columns. What is empty shows as "-", so that columns can be
// counted; control characters are spelled out.
func (a *app) table(rows [][]string) error {
	w := tabwriter.NewWriter(a.stdout, 0, 0, 2, ' ', 0)
	for _, row := range rows {
		for i, cell := range row {
			if cell = printable(cell); cell == "" {
				cell = "-"
			}
			row[i] = cell
		}
		fmt.Fprintln(w, strings.Join(row, "\t"))
	}
	if err := w.Flush(); err != nil {
		return fmt.Errorf("write stdout: %w", err)
	}
	return nil
}

// document prints JSON text as an indented document, or as YAML.
func (a *app) document(text []byte) error {
	var b bytes.Buffer
	if a.format == "yaml" {
		if err := toYAML(&b, text); err != nil {
			return err
		}
	} else {
		if err := json.Indent(&b, text, "", "  "); err != nil {
			return fmt.Errorf("indent JSON: %w", err)
		}
		b.WriteByte('\n')
	}
	if _, err := a.stdout.Write(b.Bytes()); err != nil {
		return fmt.Errorf("write stdout: %w", err)
	}
	return nil
}

// line prints a line.
func (a *app) line(text []byte) error {
	if _, err := a.stdout.Write(append(text, '\n')); err != nil {
		return fmt.Errorf("write stdout: %w", err)
	}
	return nil
}

// protoJSON is a message as compact JSON, with the field names of the protos.
func protoJSON(m proto.Message) ([]byte, error) {
	text, err := protojson.MarshalOptions{UseProtoNames: true}.Marshal(m)
	if err != nil {
		return nil, fmt.Errorf("write %s as JSON: %w", m.ProtoReflect().Descriptor().Name(), err)
	}
	// protojson varies its white space on purpose.
	var b bytes.Buffer
	if err := json.Compact(&b, text); err != nil {
		return nil, fmt.Errorf("compact JSON: %w", err)
	}
	return b.Bytes(), nil
}

// toYAML writes JSON text as YAML and keeps the order of its fields.
func toYAML(w io.Writer, text []byte) error {
	var document yaml.Node
	// JSON is YAML in flow style.
	if err := yaml.Unmarshal(text, &document); err != nil {
		return fmt.Errorf("read JSON as YAML: %w", err)
	}
	blockStyle(&document)
	e := yaml.NewEncoder(w)
	e.SetIndent(2)
	if err := e.Encode(&document); err != nil {
		return fmt.Errorf("write YAML: %w", err)
	}
	return e.Close()
}

func blockStyle(n *yaml.Node) {
	n.Style &^= yaml.FlowStyle | yaml.DoubleQuotedStyle
	for _, c := range n.Content {
		blockStyle(c)
	}
	if len(n.Content) == 0 && n.Kind != yaml.ScalarNode {
		n.Style |= yaml.FlowStyle // [] and {}
	}
}

func formatTime(t *timestamppb.Timestamp) string {
	if t == nil {
		return ""
	}
	return t.AsTime().UTC().Format(time.RFC3339)
}

// formatSize writes bytes with the largest binary unit that leaves no fraction.
func formatSize(n int64) string {
	units := []string{"B", "KiB", "MiB", "GiB", "TiB"}
	i := 0
	for n != 0 && n%1024 == 0 && i < len(units)-1 {
		n, i = n/1024, i+1
	}
	return fmt.Sprintf("%d %s", n, units[i])
}

// formatLimits tells the limits that are set.
func formatLimits(l *executorv1.Limits) string {
	var parts []string
	if n := l.GetMemoryBytes(); n != 0 {
		parts = append(parts, "memory "+formatSize(n))
	}
	if n := l.GetCpuMillis(); n != 0 {
		parts = append(parts, fmt.Sprintf("cpu %g", float64(n)/1000))
	}
	if n := l.GetPids(); n != 0 {
		parts = append(parts, fmt.Sprintf("pids %d", n))
	}
	if n := l.GetDiskBytes(); n != 0 {
		parts = append(parts, "disk "+formatSize(n))
	}
	if n := l.GetOpenFiles(); n != 0 {
		parts = append(parts, fmt.Sprintf("open files %d", n))
	}
	return strings.Join(parts, ", ")
}

// enumName is a value of an enum without the enum's own name in front.
func enumName(value fmt.Stringer, prefix string) string {
	name := strings.TrimPrefix(value.String(), prefix+"_")
	if name == "UNSPECIFIED" {
		return ""
	}
	return name
}
