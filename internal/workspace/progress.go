package workspace

import (
	"bytes"
	"regexp"
	"strconv"
	"strings"
)

// Progress is how far a clone has come.
type Progress struct {
	// Phase is git's word for what it does, in lower case: "counting objects", "compressing
	// objects", "receiving objects", "resolving deltas", "updating files".
	Phase string
	// Remote says that the server does it.
	Remote bool
	// Percent is 0 to 100; -1 where git does not know.
	Percent int
	// Objects of Total have been done; Total is 0 where git does not know.
	Objects, Total int64
	// Bytes that have been received, and per second; 0 where git does not tell.
	Bytes, BytesPerSecond int64
	// Done says that the phase is over.
	Done bool
}

// progressParser reads what git writes to its standard error.
type progressParser struct {
	// tell gets each step.
	tell func(Progress)
	// message gets the other lines.
	message func(string)

	line    []byte
	pattern *regexp.Regexp
}

// maxLine bounds a line; what is longer is cut.
const maxLine = 4 << 10

func newProgressParser(tell func(Progress), message func(string)) *progressParser {
	return &progressParser{tell: tell, message: message, pattern: regexp.MustCompile(
		`^(remote: )?([A-Z][a-z]+(?: [a-z]+){0,3}): +(?:([0-9]{1,3})% \(([0-9]{1,18})/([0-9]{1,18})\)|([0-9]{1,18}))` +
			`(?:, ([0-9]{1,12}(?:\.[0-9]{1,3})?) (bytes|KiB|MiB|GiB|TiB))?(?: \| ([0-9]{1,12}(?:\.[0-9]{1,3})?) (bytes|KiB|MiB|GiB|TiB)/s)?(, done\.)?\s*$`)}
}

// write takes what comes next. Steps end with a carriage return, other lines with a
// newline.
func (p *progressParser) write(data []byte) {
	for len(data) > 0 {
		i := bytes.IndexAny(data, "\r\n")
		if i < 0 {
			p.add(data)
			return
		}
		p.add(data[:i])
		p.end()
		data = data[i+1:]
	}
}

func (p *progressParser) add(data []byte) {
	p.line = append(p.line, data[:min(len(data), maxLine-len(p.line))]...)
}

// end takes the line that has come together.
func (p *progressParser) end() {
	// A server ends its lines with a sequence that clears the rest of a terminal's.
	line := strings.TrimRight(strings.TrimSuffix(string(p.line), "\x1b[K"), " ")
	p.line = p.line[:0]
	if line == "" || line == "remote:" {
		return
	}
	m := p.pattern.FindStringSubmatch(line)
	if m == nil {
		p.message(strings.Map(printable, strings.ToValidUTF8(line, "?")))
		return
	}
	step := Progress{Phase: strings.ToLower(m[2]), Remote: m[1] != "", Percent: -1, Done: m[11] != ""}
	if m[3] != "" {
		step.Percent = min(int(number(m[3])), 100)
		step.Objects, step.Total = number(m[4]), number(m[5])
	} else {
		step.Objects = number(m[6])
	}
	step.Bytes, step.BytesPerSecond = size(m[7], m[8]), size(m[9], m[10])
	p.tell(step)
}

func printable(r rune) rune {
	if r < ' ' || r == 0x7f {
		return '?'
	}
	return r
}

func number(text string) int64 {
	n, _ := strconv.ParseInt(text, 10, 64) // the pattern has at most 18 digits
	return n
}

func size(text, unit string) int64 {
	if text == "" {
		return 0
	}
	f, _ := strconv.ParseFloat(text, 64) // the pattern has digits only
	shift := map[string]uint{"bytes": 0, "KiB": 10, "MiB": 20, "GiB": 30, "TiB": 40}[unit]
	if f >= float64(uint64(1)<<62>>shift) {
		return 1 << 62
	}
	return int64(f * float64(uint64(1)<<shift))
}
