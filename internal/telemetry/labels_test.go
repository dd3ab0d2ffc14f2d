package telemetry

import (
	"strings"

	"go.opentelemetry.io/otel/attribute"
)

// labels writes all attributes of a set as they are.
type labels struct{}

func (labels) Encode(i attribute.Iterator) string {
	var b strings.Builder
	for i.Next() {
		a := i.Attribute()
		b.WriteString(string(a.Key) + "=" + a.Value.String() + " ")
	}
	return b.String()
}

func (labels) ID() attribute.EncoderID { return attribute.NewEncoderID() }
