package cli

import (
	"strings"

	"github.com/spf13/cobra"
)

// listFlags are those that choose and order what is listed.
type listFlags struct {
	expression, orderBy, state string
	labels                     []string
}

// filterHelp explains the filter; fields are those beside what all resources have.
func filterHelp(fields string) string {
	return `A filter is made of comparisons that are joined by AND. They compare ` + fields + ` and
labels.NAME by = and !=, create_time and end_time by = != < <= > >= with a time as in
"2026-11-25T08:00:00Z". --state and --label say more of it in short.`
}

func (l *listFlags) bind(cmd *cobra.Command, states ...string) {
	cmd.Flags().StringVar(&l.expression, "filter", "", "only those of which this is true")
	cmd.Flags().StringVar(&l.orderBy, "order-by", "", `"create_time desc" (the default) or "create_time": the oldest first`)
	cmd.Flags().StringVar(&l.state, "state", "", "only those in this state: "+strings.Join(states, ", "))
	cmd.Flags().StringArrayVar(&l.labels, "label", nil, "only those with this label, NAME=VALUE; may be repeated")
	completeWith(cmd, "state", states...)
	completeWith(cmd, "order-by", "create_time desc", "create_time")
}

// filter joins everything to one filter.
func (l *listFlags) filter() (string, error) {
	var terms []string
	if strings.TrimSpace(l.expression) != "" {
		terms = append(terms, l.expression)
	}
	if l.state != "" {
		terms = append(terms, "state = "+quoteValue(strings.ToUpper(l.state)))
	}
	for _, label := range l.labels {
		name, value, ok := strings.Cut(label, "=")
		if !ok || name == "" {
			return "", usagef("--label %q: must be NAME=VALUE", label)
		}
		if strings.Trim(name, labelCharacters) != "" {
			return "", usagef("--label %q: a name has only the characters A-Z a-z 0-9 . _ / -", label)
		}
		terms = append(terms, "labels."+name+" = "+quoteValue(value))
	}
	return strings.Join(terms, " AND "), nil
}

// labelCharacters are those that a label's name can have.
const labelCharacters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._/-"

// leftOut says what is not listed.
func (l *listFlags) leftOut() string {
	if l.orderBy == "" || strings.HasSuffix(l.orderBy, "desc") {
		return "older ones are left out; --limit 0 lists all"
	}
	return "newer ones are left out; --limit 0 lists all"
}

// quoteValue writes a value of a filter.
func quoteValue(text string) string {
	return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(text) + `"`
}
