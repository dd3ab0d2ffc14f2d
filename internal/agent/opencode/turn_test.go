package opencode

import (
	"testing"

	"github.com/harvest-run/executord/internal/testmodel"
)

func TestTurn(t *testing.T) {
	st := sharedStage(t)
	st.model.Script("tools",
		testmodel.Step{Parts: []testmodel.Part{testmodel.Reasoning("I think about it. "), testmodel.Text("First a command. "), testmodel.Tool("bash", map[string]any{"command": "echo hi; echo hi > made.txt", "description": "say hi"})}},
		testmodel.Say("Now a file. ", testmodel.Tool("write", map[string]any{"filePath": st.dir + "/new.txt", "content": "a\nb\n"})),
		testmodel.Say("And a change. ", testmodel.Tool("edit", map[string]any{"filePath": st.dir + "/new.txt", "oldString": "b", "newString": "c"})),
		testmodel.Say("A list. ", testmodel.Tool("todowrite", map[string]any{"todos": []any{map[string]any{"content": "x", "status": "completed", "priority": "high", "id": "1"}}})),
		testmodel.Say("All is done."),
	)
	k := begin(t, st.conversation(t, ConversationConfig{}), prompt("tools")).wait()
	t.Logf("%s\n%+v", k, k.outcome)
	k2 := begin(t, k.c, prompt("tools")).wait()
	t.Logf("%s\n%+v", k2, k2.outcome)
}
