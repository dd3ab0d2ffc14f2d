package config

import (
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/durationpb"
)

// parse reads a value, or an element of a list, from the form that people write.
func (f field) parse(text string) (protoreflect.Value, error) {
	var none protoreflect.Value
	if f.isDuration() {
		d, err := time.ParseDuration(text)
		if err != nil {
			return none, fmt.Errorf("%q is not a duration such as 30s or 1h30m", text)
		}
		return protoreflect.ValueOfMessage(durationpb.New(d).ProtoReflect()), nil
	}
	switch kind := f.descriptor().Kind(); kind {
	case protoreflect.StringKind:
		if !isPlain(text) {
			return none, fmt.Errorf("%q holds control characters or is not UTF-8", text)
		}
		return protoreflect.ValueOfString(text), nil
	case protoreflect.BoolKind:
		switch text {
		case "true", "false":
			return protoreflect.ValueOfBool(text == "true"), nil
		}
		return none, fmt.Errorf("%q is neither true nor false", text)
	case protoreflect.EnumKind:
		value := f.descriptor().Enum().Values().ByName(protoreflect.Name(f.enumPrefix() + strings.ToUpper(text)))
		if value == nil || value.Number() == 0 || text != strings.ToLower(text) {
			return none, fmt.Errorf("%q is none of %s", text, strings.Join(f.enumNames(), ", "))
		}
		return protoreflect.ValueOfEnum(value.Number()), nil
	case protoreflect.Int64Kind, protoreflect.Uint32Kind:
		number, err := f.parseNumber(text)
		if err != nil {
			return none, err
		}
		if kind == protoreflect.Int64Kind {
			return protoreflect.ValueOfInt64(number), nil
		}
		if number < 0 || number > math.MaxUint32 {
			return none, fmt.Errorf("%s is not between 0 and %d", text, uint32(math.MaxUint32))
		}
		return protoreflect.ValueOfUint32(uint32(number)), nil
	default:
		return none, fmt.Errorf("fields of type %v cannot be set", kind)
	}
}

// format is the inverse of parse, in the shortest form.
func (f field) format(value protoreflect.Value) string {
	if f.isDuration() {
		d, _ := value.Message().Interface().(*durationpb.Duration)
		return d.AsDuration().String()
	}
	switch f.descriptor().Kind() {
	case protoreflect.EnumKind:
		return f.enumName(value.Enum())
	case protoreflect.Int64Kind:
		if f.isSize() {
			return formatSize(value.Int())
		}
	}
	return value.String()
}

func (f field) parseNumber(text string) (int64, error) {
	digits, unit := text, int64(1)
	if f.isSize() {
		for _, u := range units() {
			if before, found := strings.CutSuffix(text, u.name); found {
				digits, unit = before, u.bytes
				break
			}
		}
	}
	number, err := strconv.ParseInt(digits, 10, 64)
	switch {
	case errors.Is(err, strconv.ErrRange):
		return 0, fmt.Errorf("%s does not fit into 64 bits", text)
	case err != nil && f.isSize():
		return 0, fmt.Errorf("%q is not a size: a number of bytes, or such as 512MiB or 2GiB", text)
	case err != nil:
		return 0, fmt.Errorf("%q is not a whole number", text)
	case number > math.MaxInt64/unit || number < math.MinInt64/unit:
		return 0, fmt.Errorf("%s does not fit into 64 bits", text)
	}
	return number * unit, nil
}

type unit struct {
	name  string
	bytes int64
}

// units are those of sizes, the largest first.
func units() []unit {
	return []unit{{"TiB", 1 << 40}, {"GiB", 1 << 30}, {"MiB", 1 << 20}, {"KiB", 1 << 10}}
}

func formatSize(n int64) string {
	for _, u := range units() {
		if n != 0 && n%u.bytes == 0 {
			return strconv.FormatInt(n/u.bytes, 10) + u.name
		}
	}
	return strconv.FormatInt(n, 10)
}

// enumPrefix begins the names of the values of its enum: ON_STOP_ for OnStop.
func (f field) enumPrefix() string {
	zero := f.descriptor().Enum().Values().ByNumber(0).Name()
	return strings.TrimSuffix(string(zero), "UNSPECIFIED")
}

func (f field) enumName(number protoreflect.EnumNumber) string {
	value := f.descriptor().Enum().Values().ByNumber(number)
	if value == nil {
		return strconv.Itoa(int(number))
	}
	return strings.ToLower(strings.TrimPrefix(string(value.Name()), f.enumPrefix()))
}

// enumNames are the values that can be set.
func (f field) enumNames() []string {
	var names []string
	values := f.descriptor().Enum().Values()
	for i := range values.Len() {
		if number := values.Get(i).Number(); number != 0 {
			names = append(names, f.enumName(number))
		}
	}
	return names
}

// isPlain says that a text is UTF-8 without control characters and line separators.
func isPlain(text string) bool {
	return utf8.ValidString(text) && !strings.ContainsFunc(text, func(r rune) bool { return !unicode.IsGraphic(r) })
}
