package secret

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
)

func value(t testing.TB, text string) Value {
	t.Helper()
	v, err := NewValue(text)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func setOf(t testing.TB, texts ...string) *Set {
	t.Helper()
	var values []Value
	for _, text := range texts {
		values = append(values, value(t, text))
	}
	return NewSet(values...)
}

func TestText(t *testing.T) {
	s := setOf(t, "hunter2-hunter2", "sk-ant-0123456789", "nter2-hunter2-long", "short")
	for in, want := range map[string]string{
		"":                                "",
		"nothing to see":                  "nothing to see",
		"a hunter2-hunter2 b":             "a *************** b",
		"hunter2-hunter2hunter2-hunter2":  strings.Repeat("*", 30),
		"hunter2-hunter hunter2-hunter2":  "hunter2-hunter ***************",
		"hunter2-hunter2-long":            strings.Repeat("*", 20), // one ends in another
		"hunter2-hunter2-hunter2":         "***********************"[:15] + "********",
		"short":                           "short",
		"x=sk-ant-0123456789sk-ant-01234": "x=*****************sk-ant-01234",
	} {
		if in == "hunter2-hunter2-hunter2" {
			want = strings.Repeat("*", 23) // twice, overlapping
		}
		if got := s.Text(in); got != want {
			t.Errorf("%q: %q, want %q", in, got, want)
		}
	}
	if got := NewSet().Text("anything"); got != "anything" {
		t.Error(got)
	}
	key := setOf(t, "-----BEGIN KEY-----\nMIIEvQIBADANBgkqhkiG9w0BAQ\nabc\n-----END KEY-----\n")
	if got, want := key.Text("-----BEGIN KEY-----\r\nMIIEvQIBADANBgkqhkiG9w0BAQ\r\nabc\r\n"), "-----BEGIN KEY-----\r\n**************************\r\nabc\r\n"; got != want {
		t.Errorf("%q", got)
	}
}

// read is how a run reads from a guest: from the position that was settled on, cut
// somewhere, until everything is settled.
func read(s *Set, all []Piece, cut func() int, crash func() bool) []Piece {
	flat, streams := flatten(all)
	var out []Piece
	w := s.NewWindow()
	size := cut()
	for position, patience := 0, 0; position < len(flat); {
		if crash() {
			w = s.NewWindow()
		}
		end := min(position+size, len(flat))
		pieces := gather(flat[position:end], streams[position:end])
		last := end == len(flat)
		n := w.Mask(pieces, last)
		if n == 0 {
			if patience++; patience > len(flat)+10 {
				panic("it is stuck")
			}
			size += cut() // more has come
			continue
		}
		left := n
		for _, p := range pieces {
			k := min(left, len(p.Data))
			left -= k
			out = append(out, Piece{p.Stream, p.Data[:k]})
		}
		position, size = position+n, cut()
	}
	return out
}

func flatten(pieces []Piece) (flat []byte, streams []int) {
	for _, p := range pieces {
		flat = append(flat, p.Data...)
		for range p.Data {
			streams = append(streams, p.Stream)
		}
	}
	return flat, streams
}

func gather(flat []byte, streams []int) (pieces []Piece) {
	for i, b := range flat {
		if n := len(pieces); n > 0 && pieces[n-1].Stream == streams[i] {
			pieces[n-1].Data = append(pieces[n-1].Data, b)
		} else {
			pieces = append(pieces, Piece{streams[i], []byte{b}})
		}
	}
	return pieces
}

// of is what one stream has.
func of(pieces []Piece, stream int) string {
	var b strings.Builder
	for _, p := range pieces {
		if p.Stream == stream {
			b.Write(p.Data)
		}
	}
	return b.String()
}

// However output is cut, interleaved and read again after a crash, what is shown of each
// stream is that of the stream as a whole.
func TestWindow(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for range 3000 {
		// An alphabet of two, so that everything overlaps.
		word := func(n int) string {
			b := make([]byte, n)
			for i := range b {
				b[i] = "ab"[r.IntN(2)]
			}
			return string(b)
		}
		s := setOf(t, word(8+r.IntN(4)), word(8+r.IntN(8)), word(12))
		var all []Piece
		for range 1 + r.IntN(12) {
			all = append(all, Piece{r.IntN(2), []byte(word(1 + r.IntN(20)))})
		}
		var want [2]string
		for stream := range want {
			want[stream] = s.Text(of(all, stream))
		}
		got := read(s, all, func() int { return 1 + r.IntN(40) }, func() bool { return r.IntN(4) == 0 })
		for stream := range want {
			if of(got, stream) != want[stream] {
				t.Fatalf("stream %d of %s:\n%q, want\n%q", stream, fmt.Sprintf("%q", [2]string{of(all, 0), of(all, 1)}), of(got, stream), want[stream])
			}
		}
	}
}

// What was shown because nothing more came does not keep the rest from being masked.
func TestForced(t *testing.T) {
	s := setOf(t, "sk-ant-0123456789")
	w := s.NewWindow()
	first := []byte("key: sk-ant-")
	if n := w.Mask([]Piece{{0, first}}, false); n != 5 {
		t.Errorf("%d", n)
	}
	if n := w.Mask([]Piece{{0, []byte("sk-ant-")}}, false); n != 0 {
		t.Errorf("%d", n)
	}
	forced := []byte("sk-ant-")
	if n := w.Mask([]Piece{{0, forced}}, true); n != 7 || string(forced) != "sk-ant-" {
		t.Errorf("%d, %q", n, forced)
	}
	rest := []byte("0123456789 sk-")
	if n := w.Mask([]Piece{{0, rest}}, false); n != 11 || string(rest[:n]) != "********** " {
		t.Errorf("%d, %q", n, rest)
	}
	var none *Set
	if n := none.NewWindow().Mask([]Piece{{0, forced}, {1, rest}}, false); n != len(forced)+len(rest) {
		t.Errorf("%d", n)
	}
}

func TestStream(t *testing.T) {
	s := setOf(t, "hunter2-hunter2").NewStream()
	var got bytes.Buffer
	for _, b := range []byte("a hunter2-hunter2 and hunter2-hun") {
		got.Write(s.Next([]byte{b}))
	}
	if want := "a *************** and "; got.String() != want {
		t.Errorf("%q", got.String())
	}
	got.Write(s.Rest())
	if want := "a *************** and hunter2-hun"; got.String() != want {
		t.Errorf("%q", got.String())
	}
}

func FuzzStream(f *testing.F) {
	f.Add("hunter2-hunter2", "sk-ant-0123456789", []byte("a hunter2-hunter2 b"), uint8(3))
	f.Add("aaaaaaaab", "aaaaaaaa", []byte("aaaaaaaaaaaaaaaabaaaa"), uint8(1))
	f.Fuzz(func(t *testing.T, one, two string, data []byte, size uint8) {
		var values []Value
		for _, text := range []string{one, two} {
			if v, err := NewValue(text); err == nil {
				values = append(values, v)
			}
		}
		set := NewSet(values...)
		want := set.Text(string(data))
		s := set.NewStream()
		var got []byte
		for rest := bytes.Clone(data); len(rest) > 0; {
			n := min(int(size)+1, len(rest))
			got = append(got, s.Next(rest[:n])...)
			rest = rest[n:]
		}
		got = append(got, s.Rest()...)
		if string(got) != want {
			t.Errorf("%q, want %q", got, want)
		}
		for _, v := range values {
			if len(v.text) >= minMasked && len(v.text) <= maxMasked && strings.Trim(v.text, "*") == v.text && bytes.Contains(got, []byte(v.text)) {
				t.Errorf("%q is shown", v.text)
			}
		}
	})
}

func BenchmarkClean(b *testing.B) {
	s := setOf(b, "ghp_0123456789abcdefghij0123456789abcdef", "sk-ant-0123456789")
	data := bytes.Repeat([]byte("an ordinary line of output, such as a compiler writes\n"), 1000)
	w := s.NewWindow()
	b.SetBytes(int64(len(data)))
	for b.Loop() {
		w.Mask([]Piece{{0, data}}, false)
	}
}
