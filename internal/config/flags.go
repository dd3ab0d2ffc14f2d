package config

import (
	"errors"
	"io"
	"strings"

	"github.com/spf13/pflag"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// assignment is what one layer has for a field.
type assignment struct {
	field field
	texts []string
}

// readFlags returns what the arguments set, and the file that they name.
func readFlags(args []string) (set []assignment, file string, err error) {
	flags, all := newFlags(&file)
	if err := flags.Parse(args); err != nil {
		if missing, ok := errors.AsType[*pflag.NotExistError](err); ok {
			var names []string
			flags.VisitAll(func(f *pflag.Flag) { names = append(names, f.Name) })
			return nil, "", unknown("flag", missing.GetSpecifiedName(), names)
		}
		return nil, "", err
	}
	if flags.NArg() > 0 {
		return nil, "", unknown("argument", flags.Arg(0), nil)
	}
	for _, f := range all {
		if f.texts != nil {
			set = append(set, assignment{f.field, f.texts})
		}
	}
	return set, file, nil
}

// Usage describes the flags, in lines for the end of a help text.
func Usage() string {
	flags, _ := newFlags(new(string))
	return flags.FlagUsages()
}

func newFlags(file *string) (*pflag.FlagSet, []*flagValue) {
	flags := pflag.NewFlagSet("executord", pflag.ContinueOnError)
	flags.SortFlags = false
	flags.SetOutput(io.Discard)
	flags.Usage = func() {}
	flags.StringVar(file, "config", "", "YAML `file` with the configuration (also "+variablePrefix+"CONFIG)")
	var all []*flagValue
	for _, f := range fields() {
		value := &flagValue{field: f}
		all = append(all, value)
		flag := flags.VarPF(value, f.flag(), "", f.help().GetUsage())
		flag.DefValue = f.help().GetDefault()
		if f.descriptor().Kind() == protoreflect.BoolKind {
			flag.NoOptDefVal = "true"
		}
	}
	return flags, all
}

// flagValue collects the texts of a flag; they are read when its layer comes.
type flagValue struct {
	field field
	texts []string
}

// Set implements pflag.Value.
func (v *flagValue) Set(text string) error {
	v.texts = append(v.texts, text)
	return nil
}

// String implements pflag.Value.
func (v *flagValue) String() string { return strings.Join(v.texts, " ") }

// Type implements pflag.Value: the word for the value in a help text.
func (v *flagValue) Type() string {
	switch kind := v.field.descriptor().Kind(); {
	case v.field.isDuration():
		return "duration"
	case v.field.isSize():
		return "size"
	case kind == protoreflect.BoolKind:
		return "bool"
	case kind == protoreflect.EnumKind:
		return strings.Join(v.field.enumNames(), "|")
	case kind == protoreflect.StringKind:
		return "string"
	default:
		return "number"
	}
}
