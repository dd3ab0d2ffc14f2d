package secret

import (
	"bytes"
	"slices"
	"sort"
	"strings"
)

const (
	// minMasked is the length of the shortest text that is taken out: shorter ones would
	// make ordinary words unreadable, and are no credentials.
	minMasked = 8
	// minLine is that of a line of a value that has several, such as a private key.
	minLine = 16
	// maxMasked bounds the length of what is looked for, in bytes; of a longer value its
	// beginning is. What may be held back is never more.
	maxMasked = 4 << 10
	// streams is how many a Window tells apart.
	streams = 4
	// mask stands where a byte of a secret was: positions stay what they were.
	mask = '*'
)

// Set is an automaton that knows some texts (Aho and Corasick's). It does not change;
// any number of Streams use it at a time. A nil Set knows none.
type Set struct {
	nodes []node
	first [256]bool // with which bytes a text begins
}

type node struct {
	next    map[byte]int32
	failure int32
	depth   int32
	// matched is the length of the longest text that ends here; 0 if none does.
	matched int32
}

// NewSet makes a Set of what must not be shown of these values. Without any it is nil.
func NewSet(values ...Value) *Set {
	var texts []string
	for _, v := range values {
		texts = append(texts, textsOf(v.text)...)
	}
	if len(texts) == 0 {
		return nil
	}
	s := &Set{nodes: []node{{}}}
	for _, text := range texts {
		s.add(text)
	}
	s.link()
	return s
}

// textsOf are what is looked for of one value: the whole of it, and each line, since a
// terminal and most programs change the ends of lines.
func textsOf(value string) []string {
	var texts []string
	if len(value) >= minMasked {
		texts = append(texts, value[:min(len(value), maxMasked)])
	}
	lines := strings.FieldsFunc(value, func(r rune) bool { return r == '\n' || r == '\r' })
	for _, line := range lines {
		if line = strings.TrimSpace(line); len(lines) > 1 && len(line) >= minLine && !strings.HasPrefix(line, "-----") {
			texts = append(texts, line[:min(len(line), maxMasked)])
		}
	}
	return texts
}

func (s *Set) add(text string) {
	s.first[text[0]] = true
	at := int32(0)
	for i := range len(text) {
		n, ok := s.nodes[at].next[text[i]]
		if !ok {
			n = int32(len(s.nodes))
			if s.nodes[at].next == nil {
				s.nodes[at].next = make(map[byte]int32)
			}
			s.nodes[at].next[text[i]] = n
			s.nodes = append(s.nodes, node{depth: int32(i) + 1})
		}
		at = n
	}
	s.nodes[at].matched = int32(len(text))
}

// link finds for every node the longest other one that ends the same way, nearest to
// the root first.
func (s *Set) link() {
	queue := []int32{0}
	for len(queue) > 0 {
		at := queue[0]
		queue = queue[1:]
		for b, child := range s.nodes[at].next {
			if at != 0 {
				s.nodes[child].failure = s.step(s.nodes[at].failure, b)
			}
			if f := s.nodes[s.nodes[child].failure].matched; s.nodes[child].matched == 0 {
				s.nodes[child].matched = f
			}
			queue = append(queue, child)
		}
	}
}

// step is where a byte leads.
func (s *Set) step(at int32, b byte) int32 {
	for {
		if n, ok := s.nodes[at].next[b]; ok {
			return n
		}
		if at == 0 {
			return 0
		}
		at = s.nodes[at].failure
	}
}

// span is a text that was found, or the part of it that lies in what was looked at.
type span struct{ begin, end int }

// scan goes on from a state through data, which begins at a position, and returns the
// state behind it and what was found, after found. Positions before 0 are of what was passed on already.
func (s *Set) scan(at int32, data []byte, position int, found []span) (int32, []span) {
	for i := range len(data) {
		if at == 0 && !s.first[data[i]] {
			continue
		}
		at = s.step(at, data[i])
		if n := int(s.nodes[at].matched); n > 0 {
			end := position + i + 1
			found = append(found, span{max(0, end-n), end})
		}
	}
	return at, found
}

// Text returns a text without what the Set knows.
func (s *Set) Text(text string) string {
	if s == nil {
		return text
	}
	data := []byte(text)
	_, found := s.scan(0, data, 0, nil)
	hide([]Piece{{Data: data}}, len(data), [streams][]span{found})
	return string(data)
}

// Piece is some output of one of a command's streams.
type Piece struct {
	// Stream is any small number that tells streams apart: 0 to 3.
	Stream int
	Data   []byte
}

// Window masks output that is read by position, several streams in one sequence, as an
// execution's run reads it from a guest. What could be the beginning of a secret is not
// settled: its reader keeps it where it is and presents it again with what follows, so
// that nothing needs to be remembered over a crash. It is not for several goroutines.
type Window struct {
	set    *Set
	states [streams]int32
}

// NewWindow makes a Window. With a nil Set everything is settled as it is.
func (s *Set) NewWindow() *Window { return &Window{set: s} }

// Mask masks the pieces, which follow what was settled before, in place, and returns how
// many of their bytes, taken together, are settled: these may be shown, the rest must be
// presented again, first. With all set everything is settled, also the beginning of
// what may be a secret; if the rest of it comes next, that is masked. It is for the end, and for when nothing
// has come for a while.
func (w *Window) Mask(pieces []Piece, all bool) (settled int) {
	total := 0
	for _, p := range pieces {
		total += len(p.Data)
	}
	if w.set == nil {
		return total
	}
	states, sizes := w.states, [streams]int{}
	var found [streams][]span
	for _, p := range pieces {
		states[p.Stream], found[p.Stream] = w.set.scan(states[p.Stream], p.Data, sizes[p.Stream], found[p.Stream])
		sizes[p.Stream] += len(p.Data)
	}
	settled = total
	if !all {
		settled = w.settle(pieces, total, states, sizes, found)
	}
	if settled == total {
		w.states = states
	} else {
		left := settled
		for _, p := range pieces {
			n := min(left, len(p.Data))
			left -= n
			w.states[p.Stream], _ = w.set.scan(w.states[p.Stream], p.Data[:n], 0, nil)
		}
	}
	hide(pieces, settled, found)
	return settled
}

// settle is how much may be shown: nothing from where a text begins that may go on
// behind the pieces, and no part of one that was found without the rest.
func (w *Window) settle(pieces []Piece, total int, states [streams]int32, sizes [streams]int, found [streams][]span) int {
	settled := total
	var whole []span
	for stream, size := range sizes {
		places := placesOf(pieces, stream)
		// Of what was settled in spite of it nothing can be taken back.
		if held := min(int(w.set.nodes[states[stream]].depth), size); held > 0 {
			settled = min(settled, places.of(size-held))
		}
		for _, f := range found[stream] {
			whole = append(whole, span{places.of(f.begin), places.of(f.end-1) + 1})
		}
	}
	slices.SortFunc(whole, func(a, b span) int { return b.begin - a.begin })
	for _, s := range whole {
		if s.begin < settled && settled < s.end {
			settled = s.begin
		}
	}
	return settled
}

// places tells where the bytes of a stream lie in the sequence of all.
type places []struct{ position, place, size int }

func placesOf(pieces []Piece, stream int) places {
	var all places
	position, place := 0, 0
	for _, p := range pieces {
		if p.Stream == stream {
			all = append(all, struct{ position, place, size int }{position, place, len(p.Data)})
			position += len(p.Data)
		}
		place += len(p.Data)
	}
	return all
}

func (all places) of(position int) int {
	i := sort.Search(len(all), func(i int) bool { return position < all[i].position+all[i].size })
	return all[i].place + position - all[i].position
}

// hide masks what was found, as far as it is settled.
func hide(pieces []Piece, settled int, found [streams][]span) {
	var positions, next [streams]int
	place := 0
	for _, p := range pieces {
		spans := found[p.Stream]
		position := positions[p.Stream]
		for i := next[p.Stream]; i < len(spans); i++ {
			begin, end := max(spans[i].begin-position, 0), min(spans[i].end-position, len(p.Data), settled-place)
			for j := begin; j < end; j++ {
				p.Data[j] = mask
			}
			if spans[i].end > position+len(p.Data) {
				break // the rest lies in the next piece
			}
			next[p.Stream] = i + 1
		}
		positions[p.Stream] += len(p.Data)
		place += len(p.Data)
	}
}

// Stream masks one stream of bytes that is not read by position, such as a log. It
// holds back what could be the beginning of a secret.
type Stream struct {
	window *Window
	held   bytes.Buffer
}

// NewStream makes a Stream.
func (s *Set) NewStream() *Stream { return &Stream{window: s.NewWindow()} }

// Next takes what comes next and returns what may be shown, valid until the next call.
func (s *Stream) Next(data []byte) []byte { return s.pass(data, false) }

// Rest returns what was held back.
func (s *Stream) Rest() []byte { return s.pass(nil, true) }

func (s *Stream) pass(data []byte, all bool) []byte {
	s.held.Write(data)
	n := s.window.Mask([]Piece{{Data: s.held.Bytes()}}, all)
	return s.held.Next(n)
}
