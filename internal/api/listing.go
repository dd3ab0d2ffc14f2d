package api

import (
	"context"
	"errors"
	"fmt"
	"strings"

	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
	"github.com/harvest-run/executord/internal/fault"
	"github.com/harvest-run/executord/internal/filter"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// executionFilters are the fields of executions that can be filtered by.
func executionFilters() filter.Schema {
	return filter.Schema{
		Enums: map[string][]string{
			"state":  enumNames(executorv1.Execution_STATE_UNSPECIFIED.Descriptor(), "STATE_"),
			"reason": enumNames(executorv1.Reason_REASON_UNSPECIFIED.Descriptor(), "REASON_"),
		},
		Maps: []string{"labels"}, Times: []string{"create_time", "end_time"},
	}
}

// sessionFilters are the fields of sessions that can be filtered by.
func sessionFilters() filter.Schema {
	return filter.Schema{
		Enums: map[string][]string{
			"state":      enumNames(executorv1.Session_STATE_UNSPECIFIED.Descriptor(), "STATE_"),
			"end_reason": enumNames(executorv1.Session_END_REASON_UNSPECIFIED.Descriptor(), "END_REASON_"),
		},
		Maps: []string{"labels"}, Times: []string{"create_time", "end_time"},
	}
}

// enumNames are the names of an enum without their prefix, as the domain has them too.
func enumNames(enum protoreflect.EnumDescriptor, prefix string) []string {
	var names []string
	for i := range enum.Values().Len() {
		if value := enum.Values().Get(i); value.Number() != 0 {
			names = append(names, strings.TrimPrefix(string(value.Name()), prefix))
		}
	}
	return names
}

// parseFilter reads the filter of a list.
func parseFilter(text string, schema filter.Schema) (filter.Filter, error) {
	f, err := filter.Parse(text, schema)
	if wrong, ok := errors.AsType[*filter.Error](err); ok {
		return f, fault.InvalidField("INVALID_FILTER", "filter", "%v", wrong).With("position", fmt.Sprint(wrong.Position))
	}
	return f, err
}

// parseOrder reads the order of a list: whether the oldest come first.
func parseOrder(order string) (ascending bool, err error) {
	switch strings.Join(strings.Fields(order), " ") {
	case "", "create_time desc":
		return false, nil
	case "create_time", "create_time asc":
		return true, nil
	}
	return false, fault.InvalidField("INVALID_ORDER", "order_by", `%q is not one of "create_time desc", "create_time", "create_time asc"`, clip(order, maxOrder))
}

// maxOrder is how much of a bad order is quoted.
const maxOrder = 40

// listing names one list with everything that decides what is on its pages, so that a
// page token of another, or of somebody else, is not taken.
func listing(ctx context.Context, method, scope, filter string, ascending bool) string {
	return fmt.Sprintf("%s %q %q %q %t", method, owner(ctx), scope, filter, ascending)
}
