package api

import (
	"encoding/json"
	"reflect"
	"strings"
	"testing"

	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
	"github.com/harvest-run/executord/internal/agent"
	"github.com/harvest-run/executord/internal/journal"
	"github.com/harvest-run/executord/internal/turn"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

func TestTurnEnums(t *testing.T) {
	t.Run("Turn_State", func(t *testing.T) {
		walk(t, []turn.State{turn.Queued, turn.Running, turn.Ended}, turnStateProto, func(s turn.State) string { return "STATE_" + s.String() })
	})
	t.Run("TurnOutcome", func(t *testing.T) {
		walk(t, []agent.OutcomeKind{agent.Completed, agent.Aborted, agent.Failed, agent.Truncated, agent.Rejected, agent.Lost}, turnOutcomeProto,
			func(o agent.OutcomeKind) string { return "TURN_OUTCOME_" + string(o) })
	})
	t.Run("Interaction_State", func(t *testing.T) {
		walk(t, []turn.InteractionState{turn.Pending, turn.Resolved, turn.Expired, turn.Void},
			func(s turn.InteractionState) executorv1.Interaction_State {
				return interactionProto(turn.Interaction{State: s}).GetState()
			},
			func(s turn.InteractionState) string { return "STATE_" + string(s) })
	})
	t.Run("FileDiff_Change", func(t *testing.T) {
		walk(t, []agent.FileChange{agent.FileAdded, agent.FileModified, agent.FileDeleted},
			func(c agent.FileChange) executorv1.FileDiff_Change {
				return fileDiffProto(agent.FileDiff{Change: c}).GetChange()
			},
			func(c agent.FileChange) string { return "CHANGE_" + string(c) })
	})
	t.Run("Decision", func(t *testing.T) {
		for number, name := range executorv1.Resolution_Decision_name {
			d := executorv1.Resolution_Decision(number)
			back := interactionProto(turn.Interaction{Answer: &agent.Answer{Decision: answerOf(&executorv1.Resolution{Decision: d}).Decision}})
			if back.GetResolution().GetDecision() != d {
				t.Errorf("%s becomes %v", name, back.GetResolution().GetDecision())
			}
		}
	})
}

// fill sets every field of a value, texts to s.
func fill(v reflect.Value, s string) {
	switch v.Kind() {
	case reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		fill(v.Elem(), s)
	case reflect.Struct:
		if v.Type().String() == "time.Time" {
			v.Set(reflect.ValueOf(at(1)))
			return
		}
		for i := range v.NumField() {
			fill(v.Field(i), s)
		}
	case reflect.Slice:
		if v.Type() == reflect.TypeFor[json.RawMessage]() {
			v.SetBytes([]byte(`{"a":["` + s + `"]}`))
			return
		}
		v.Set(reflect.MakeSlice(v.Type(), 1, 1))
		fill(v.Index(0), s)
	case reflect.String:
		switch v.Type().Name() {
		case "FileChange":
			s = string(agent.FileAdded)
		case "OutcomeKind":
			s = string(agent.Failed)
		case "InteractionState":
			s = string(turn.Expired)
		case "Decision":
			s = string(agent.Reject)
		case "GapReason":
			s = string(journal.GapDamaged)
		}
		v.SetString(s)
	case reflect.Bool:
		v.SetBool(true)
	case reflect.Int, reflect.Int32, reflect.Int64:
		v.SetInt(3)
	case reflect.Uint64, reflect.Uint8:
		v.SetUint(3)
	default:
		panic(v.Kind().String())
	}
}

// allTurnEvents has one event of each kind that the domain has, filled with s.
func allTurnEvents(s string) []turn.Event {
	var all []turn.Event
	add := func(kind reflect.Type, wrap func(reflect.Value) turn.Event) {
		for i := range kind.NumField() {
			if kind.Field(i).Type.Kind() == reflect.Pointer && kind.Field(i).Name != "Agent" {
				one := reflect.New(kind).Elem()
				fill(one.Field(i), s)
				all = append(all, wrap(one))
			}
		}
	}
	add(reflect.TypeFor[turn.Event](), func(v reflect.Value) turn.Event { return v.Interface().(turn.Event) })
	add(reflect.TypeFor[agent.Event](), func(v reflect.Value) turn.Event {
		e := v.Interface().(agent.Event)
		e.SubAgent = s
		return turn.Event{Agent: &e}
	})
	return all
}

// TestNoTurnFieldForgotten: every kind of event of the domain is told, and no field of
// the API stays empty but for the alternatives of what is asked.
func TestNoTurnFieldForgotten(t *testing.T) {
	told := make(map[protoreflect.Name]bool)
	var check func(message protoreflect.Message)
	check = func(message protoreflect.Message) {
		fields := message.Descriptor().Fields()
		for i := range fields.Len() {
			fd := fields.Get(i)
			one := fd.ContainingOneof() != nil && !fd.ContainingOneof().IsSynthetic()
			switch {
			case !message.Has(fd):
				if !one {
					t.Errorf("%s is empty", fd.FullName())
				}
			case fd.IsList() && fd.Message() != nil:
				check(message.Get(fd).List().Get(0).Message())
			case fd.Message() != nil && !fd.IsMap() && !fd.IsList() && fd.Message().ParentFile().Package() == apiPackage:
				check(message.Get(fd).Message())
			}
		}
	}
	for _, e := range allTurnEvents("x") {
		if e.Agent != nil && (e.Agent.Asked != nil || e.Agent.Answered != nil) {
			continue // told as interactions
		}
		converted := turnEventProto(e)
		kind := converted.ProtoReflect().WhichOneof(converted.ProtoReflect().Descriptor().Oneofs().ByName("kind"))
		if kind == nil {
			t.Errorf("%+v is not told", e)
			continue
		}
		told[kind.Name()] = true
		inner := converted.ProtoReflect().Get(kind).Message()
		if kind.Name() == "gap" {
			continue // has no streams
		}
		check(inner)
	}
	kinds := (&executorv1.TurnEvent{}).ProtoReflect().Descriptor().Oneofs().ByName("kind").Fields()
	for i := range kinds.Len() {
		if name := kinds.Get(i).Name(); !told[name] && name != "heartbeat" {
			t.Errorf("nothing is told as %s", name)
		}
	}
	var full turn.Turn
	fill(reflect.ValueOf(&full).Elem(), "x")
	converted := turnProto(full)
	for _, a := range converted.GetPrompt().GetAttachments() {
		if a.GetData() != nil {
			t.Error("a turn has the data of its attachments")
		}
		a.Data = []byte{1}
	}
	converted.State = executorv1.Turn_STATE_ENDED // there is none of the number 3 in names
	check(converted.ProtoReflect())
	question := interactionProto(turn.Interaction{Asked: agent.Asked{Call: "c", Question: &agent.Question{Items: []agent.QuestionItem{{
		Header: "h", Text: "t", Multiple: true, Custom: true, Options: []agent.Option{{Label: "l", Description: "d"}},
	}}}}})
	check(question.GetQuestion().ProtoReflect())
}

// TestHostileAgent: what an agent may have said must not make a message impossible to
// send.
func TestHostileAgent(t *testing.T) {
	for _, e := range allTurnEvents("a\xff\xfeb\x00") {
		if e.Started != nil || e.Running != nil {
			continue // these are executord's words
		}
		for _, i := range []*turn.Interaction{e.Requested, e.Resolved} {
			if i != nil {
				i.ID, i.Session, i.Turn = "i", "s", "t"
			}
		}
		if _, err := proto.Marshal(turnEventProto(e)); err != nil {
			t.Errorf("%+v: %v", e, err)
		}
	}
	for raw, want := range map[string]bool{
		`{}`: true, `{"a":{"b":[1,null,true,"x"]}}`: true, `{"a":1,"a":2}`: true, "{\"a\":\"\xff\"}": true, `{"\ud800":1}`: true, `{"n":1e999}`: false, `[]`: false, `x`: false, ``: false, `null`: true,
	} {
		s := structProto(json.RawMessage(raw))
		if _, err := proto.Marshal(s); (s != nil) != want || err != nil {
			t.Errorf("%s is %v, %v", raw, s, err)
		}
	}
}

// TestLongTurnEventsFit: whatever is kept of an agent's words fits into a message.
func TestLongTurnEventsFit(t *testing.T) {
	const most = 4 << 20 // what a client of gRPC takes by default
	long := strings.Repeat("<", 1<<20)
	result := &turn.Result{Text: long[:512<<10], Detail: long[:4096]}
	for range 1000 {
		result.Diffs = append(result.Diffs, agent.FileDiff{Path: long[:512], Patch: long[:1048]})
	}
	if size := proto.Size(turnProto(turn.Turn{Prompt: turn.Prompt{Text: long}, Result: result})); size > most {
		t.Errorf("a turn takes %d bytes", size)
	}
}
