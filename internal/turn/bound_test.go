package turn

import (
	"encoding/json"
	"reflect"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"

	"github.com/harvest-run/executord/internal/agent"
	"github.com/harvest-run/executord/internal/journal"
)

// stuff sets every field of a value to as much as there may be.
func stuff(v reflect.Value, text string, items int) {
	switch v.Kind() {
	case reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		stuff(v.Elem(), text, items)
	case reflect.Struct:
		if _, ok := v.Interface().(time.Time); ok {
			return
		}
		for i := range v.NumField() {
			stuff(v.Field(i), text, items)
		}
	case reflect.Slice:
		if v.Type() == reflect.TypeFor[json.RawMessage]() {
			object, _ := json.Marshal(map[string]string{"a": text})
			v.SetBytes(object)
			return
		}
		v.Set(reflect.MakeSlice(v.Type(), items, items))
		for i := range items {
			stuff(v.Index(i), text, max(items/10, 1))
		}
	case reflect.String:
		v.SetString(text)
	case reflect.Int32, reflect.Int64:
		v.SetInt(1 << 30)
	case reflect.Bool:
		v.SetBool(true)
	}
}

// TestWhatIsKeptIsBounded: whatever an agent says fits into an entry and into a message.
func TestWhatIsKeptIsBounded(t *testing.T) {
	for _, piece := range []string{"é", "\x01", "\xff"} {
		long := strings.Repeat(piece, (5<<18)/len(piece))
		kind := reflect.TypeFor[agent.Event]()
		for i := range kind.NumField() {
			if kind.Field(i).Type.Kind() != reflect.Pointer || kind.Field(i).Name == "Answered" { // which is not kept
				continue
			}
			text, items := long, 1
			if kind.Field(i).Name == "Todos" || kind.Field(i).Name == "PartsDropped" || kind.Field(i).Name == "Asked" {
				text, items = long[:32<<10], 300
			}
			var e agent.Event
			stuff(reflect.ValueOf(&e).Elem().Field(i), text, items)
			e.SubAgent = text
			if e.Asked != nil {
				for _, asked := range []agent.Asked{{ID: text, Call: text, Permission: e.Asked.Permission}, {ID: text, Call: text, Question: e.Asked.Question}} {
					check(t, kind.Field(i).Name, Event{Requested: &Interaction{ID: "i", SubAgent: clip(text, maxName), Asked: boundedAsked(asked)}})
				}
				continue
			}
			for _, one := range bounded(e) {
				check(t, kind.Field(i).Name, Event{Agent: &one})
			}
		}
		var r Result
		stuff(reflect.ValueOf(&r).Elem(), long[:300<<10], 1500)
		check(t, "result", Event{Result: boundedResult(r)})
	}
}

func check(t *testing.T, name string, e Event) {
	t.Helper()
	data, err := encode(e)
	if err != nil || len(data) > journal.MaxEntry || !utf8.Valid(data) {
		t.Errorf("%s takes %d bytes, %v", name, len(data), err)
	}
	back := decode(journal.Event{Data: data})
	// What a message takes is about what the texts have, without JSON's quoting.
	size := 0
	var sum func(v reflect.Value)
	sum = func(v reflect.Value) {
		switch v.Kind() {
		case reflect.Pointer:
			if !v.IsNil() {
				sum(v.Elem())
			}
		case reflect.Struct:
			for i := range v.NumField() {
				sum(v.Field(i))
			}
		case reflect.Slice:
			if v.Type().Elem().Kind() == reflect.Uint8 {
				size += v.Len()
				return
			}
			for i := range v.Len() {
				sum(v.Index(i))
			}
		case reflect.String:
			size += v.Len()
		}
	}
	sum(reflect.ValueOf(back))
	if size > 3<<20 {
		t.Errorf("%s has %d bytes", name, size)
	}
	if name == "Text" && size > 28<<10 {
		t.Errorf("a delta has %d bytes", size)
	}
	if back.Agent == nil && back.Requested == nil && back.Result == nil {
		t.Errorf("%s was not read back", name)
	}
}

// TestDeltasAreWhole: a long text is told in pieces that make it up, characters in one.
func TestDeltasAreWhole(t *testing.T) {
	text := strings.Repeat("aé€😀", 20000)
	var got string
	pieces := bounded(agent.Event{SubAgent: "s", Text: &agent.Delta{Part: "p", Text: text}})
	for _, e := range pieces {
		if e.SubAgent != "s" || e.Text.Part != "p" || !utf8.ValidString(e.Text.Text) {
			t.Fatalf("%+v", e)
		}
		got += e.Text.Text
	}
	if got != text || len(pieces) < 8 {
		t.Errorf("%d pieces of %d bytes in all, want %d", len(pieces), len(got), len(text))
	}
	// An empty one is told too: it begins a part.
	if pieces := bounded(agent.Event{Text: &agent.Delta{Part: "p"}}); len(pieces) != 1 {
		t.Errorf("%d pieces", len(pieces))
	}
}

func TestMiddle(t *testing.T) {
	text := strings.Repeat("é", 100) + strings.Repeat("€", 100)
	got := middle(text, 120)
	if len(got) > 120 || !utf8.ValidString(got) || !strings.HasPrefix(got, "éé") || !strings.HasSuffix(got, "€€") || !strings.Contains(got, "380 bytes left out") {
		t.Errorf("%d bytes: %q", len(got), got)
	}
	if middle("short", 10) != "short" {
		t.Error("what fits is changed")
	}
}

func TestObjects(t *testing.T) {
	for raw, kept := range map[string]bool{
		`{"a":[1,{"b":"}{[\"\\"}]}`: true, `[]`: false, `x`: false, `{"a":` + strings.Repeat("[", 22) + strings.Repeat("]", 22) + `}`: true,
		`{"a":` + strings.Repeat("[", 24) + strings.Repeat("]", 24) + `}`: false, `{"a":"` + strings.Repeat("[", 100) + `"}`: true,
		`{"a":"` + strings.Repeat("x", maxObject) + `"}`: false,
	} {
		if got := object(json.RawMessage(raw)); (string(got) == raw) != kept || !json.Valid(got) {
			t.Errorf("%.60s becomes %.60s", raw, got)
		}
	}
	if object(nil) != nil {
		t.Error("none becomes one")
	}
}

// FuzzDecode: whatever lies in a journal, reading it makes an event or an unknown one, and
// what was written is read back.
func FuzzDecode(f *testing.F) {
	for _, e := range []Event{
		{Started: &Started{Session: "s", Turn: "t", Before: 2}}, {Running: &Began{Model: agent.Model{Provider: "p"}}},
		{Agent: &agent.Event{SubAgent: "x", ToolStarted: &agent.ToolStarted{Call: "c", Input: json.RawMessage(`{"a":1}`)}}},
		{Requested: &Interaction{ID: "i", State: Pending, Asked: agent.Asked{ID: "per", Permission: &agent.Permission{Kind: "bash"}}}},
		{Result: &Result{Outcome: agent.Failed, Error: &agent.Error{Name: "n"}}},
	} {
		data, err := encode(e)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Add([]byte(`{"later":{"a":1}}`))
	f.Add([]byte("\xff"))
	f.Fuzz(func(t *testing.T, data []byte) {
		at := journal.Cursor{Epoch: "e", Sequence: 7}
		e := decode(journal.Event{Cursor: at, Data: data})
		if e.Cursor != at {
			t.Fatalf("%+v", e)
		}
		again, err := encode(e)
		if err != nil {
			return // a raw object that is none: it was never written so
		}
		back := decode(journal.Event{Cursor: at, Data: again})
		twice, err := encode(back)
		if diff := cmp.Diff(string(again), string(twice)); diff != "" || err != nil {
			t.Errorf("%s, %v", diff, err)
		}
	})
}

// TestLife holds the table of states to what it is for: nothing follows on the end, and
// nothing goes back.
func TestLife(t *testing.T) {
	for from, all := range next() {
		for _, to := range all {
			if to <= from {
				t.Errorf("%v follows on %v", to, from)
			}
		}
	}
	if len(next()[Ended]) != 0 || Queued.String() != "QUEUED" || State(9).String() != "" {
		t.Error("the table is not what it was")
	}
}
