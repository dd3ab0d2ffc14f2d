package filter

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

// Times lie between these years, so that their nanoseconds fit into 64 bits.
const (
	firstYear = 1970
	lastYear  = 2261
)

// Parse reads a filter. The empty text is the Filter that is always true. The error is
// an *Error.
func Parse(text string, schema Schema) (Filter, error) {
	if len(text) > MaxBytes {
		return Filter{}, &Error{MaxBytes + 1, fmt.Sprintf("it has %d bytes; at most %d are allowed", len(text), MaxBytes)}
	}
	p := parser{scanner: scanner{text: text}, schema: schema}
	return p.filter()
}

type parser struct {
	scanner
	schema Schema
}

// filter reads `term AND term AND …`. There is no recursion: no text can make it deep.
func (p *parser) filter() (Filter, error) {
	var f Filter
	first, err := p.next()
	if err != nil || first.kind == end {
		return f, err
	}
	for t := first; ; {
		term, err := p.term(t)
		if err != nil {
			return Filter{}, err
		}
		f.Terms = append(f.Terms, term)
		and, err := p.next()
		switch {
		case err != nil:
			return Filter{}, err
		case and.kind == end:
			return f, nil
		case and.kind != word || and.text != "AND":
			return Filter{}, and.wrong("comparisons are joined by AND, and by nothing else")
		}
		if t, err = p.next(); err != nil {
			return Filter{}, err
		}
	}
}

// term reads `field op value` from its first token on.
func (p *parser) term(field token) (Term, error) {
	if field.kind != word {
		return Term{}, field.wrong("a field is expected, one of %s", p.fields())
	}
	switch field.text {
	case "AND", "OR", "NOT":
		return Term{}, field.wrong("a field is expected, one of %s; OR and NOT are not supported", p.fields())
	}
	t := Term{Field: field.text}
	name, key, dotted := strings.Cut(field.text, ".")
	enum, isEnum := p.schema.Enums[field.text]
	isTime := slices.Contains(p.schema.Times, field.text)
	isMap := slices.Contains(p.schema.Maps, name)
	switch {
	case isEnum, isTime:
	case isMap && dotted && key != "":
		t.Field, t.Key = name, key
	case isMap:
		return Term{}, field.wrong("an entry of %s is compared by its name, as in %s.NAME", name, name)
	default:
		return Term{}, field.wrong("the fields are %s", p.fields())
	}
	op, err := p.next()
	if err != nil {
		return Term{}, err
	}
	ops := "= or !="
	if isTime {
		ops = "=, !=, <, <=, > or >="
	}
	t.Op = Op(op.text)
	if op.kind != operator || !isTime && t.Op != Equal && t.Op != NotEqual {
		return Term{}, op.wrong("%s is compared by %s", field.text, ops)
	}
	value, err := p.next()
	if err != nil {
		return Term{}, err
	}
	if value.kind != word && value.kind != quoted {
		return Term{}, value.wrong("a value is expected")
	}
	t.Text = value.text
	switch {
	case isEnum:
		// As they are written in an answer: with the name of the enum before them.
		t.Text = strings.TrimPrefix(value.text, strings.ToUpper(field.text)+"_")
		if !slices.Contains(enum, t.Text) {
			return Term{}, value.wrong("%s is one of %s", field.text, strings.Join(enum, ", "))
		}
	case isTime:
		t.Text = ""
		if t.Time, err = time.Parse(time.RFC3339Nano, value.text); err != nil {
			return Term{}, value.wrong(`a time is expected, in quotes and as in "2026-11-25T08:00:00Z"`)
		}
		if t.Time = t.Time.UTC(); t.Time.Year() < firstYear || t.Time.Year() > lastYear {
			return Term{}, value.wrong("a time lies in the years %d to %d", firstYear, lastYear)
		}
	}
	return t, nil
}

// fields are all that can be compared, for people.
func (p *parser) fields() string {
	all := slices.Concat(slices.Sorted(maps.Keys(p.schema.Enums)), p.schema.Times)
	for _, m := range p.schema.Maps {
		all = append(all, m+".NAME")
	}
	return strings.Join(all, ", ")
}

type kind int

const (
	end kind = iota
	word
	quoted
	operator
)

// token is a piece of the text and where it begins, from 1.
type token struct {
	kind kind
	text string
	at   int
}

// wrong makes the error about a token, which it quotes up to a length.
func (t token) wrong(format string, args ...any) error {
	found := "the end"
	if t.kind != end {
		found = quote(t.text)
	}
	return &Error{t.at, found + ": " + fmt.Sprintf(format, args...)}
}

func quote(text string) string {
	const most = 40
	if len(text) > most {
		text = strings.ToValidUTF8(text[:most], "") + "…"
	}
	return strconv.Quote(text)
}

// scanner cuts a text into tokens.
type scanner struct {
	text string
	pos  int
}

func (s *scanner) next() (token, error) {
	for s.pos < len(s.text) && strings.IndexByte(" \t\r\n", s.text[s.pos]) >= 0 {
		s.pos++
	}
	begin := s.pos
	if begin == len(s.text) {
		return token{end, "", begin + 1}, nil
	}
	c := s.text[begin]
	switch {
	case isWord(c):
		for s.pos < len(s.text) && isWord(s.text[s.pos]) {
			s.pos++
		}
		return token{word, s.text[begin:s.pos], begin + 1}, nil
	case c == '"' || c == '\'':
		return s.quoted(c)
	case strings.IndexByte("=!<>", c) >= 0:
		s.pos++
		if s.pos < len(s.text) && s.text[s.pos] == '=' && c != '=' {
			s.pos++
		}
		if t := (token{operator, s.text[begin:s.pos], begin + 1}); t.text != "!" {
			return t, nil
		}
		return token{}, &Error{begin + 1, `"!" is followed by "="; NOT is not supported`}
	case c == '(' || c == ')':
		return token{}, &Error{begin + 1, fmt.Sprintf("%q: parentheses are not supported; comparisons are joined by AND", c)}
	default:
		r, _ := utf8.DecodeRuneInString(s.text[begin:])
		return token{}, &Error{begin + 1, fmt.Sprintf("%q is neither part of a word nor an operator; values with other characters than A-Z a-z 0-9 . _ / - are put in quotes", r)}
	}
}

// quoted reads a text in quotes; a backslash keeps the character after it.
func (s *scanner) quoted(mark byte) (token, error) {
	begin := s.pos
	var text strings.Builder
	for s.pos++; s.pos < len(s.text); s.pos++ {
		switch c := s.text[s.pos]; {
		case c == mark:
			s.pos++
			return token{quoted, text.String(), begin + 1}, nil
		case c == '\\' && s.pos+1 < len(s.text):
			s.pos++
			text.WriteByte(s.text[s.pos])
		default:
			text.WriteByte(c)
		}
	}
	return token{}, &Error{begin + 1, "a quote is not closed"}
}

func isWord(c byte) bool {
	return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.IndexByte("._/-", c) >= 0
}
