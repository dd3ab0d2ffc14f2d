package cli

import (
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
)

func TestEveryReasonHasItsCodeAndWords(t *testing.T) {
	begin := time.Unix(1000, 0)
	times := &executorv1.StageTimes{Started: timestamppb.New(begin), Ended: timestamppb.New(begin.Add(2 * time.Second))}
	failed := func(kind string) *executorv1.Result {
		return &executorv1.Result{Reason: executorv1.Reason_REASON_START_FAILED, Detail: "facts", Evidence: map[string]string{"kind": kind}}
	}
	tests := []struct {
		result *executorv1.Result
		code   int
		words  string
	}{
		{&executorv1.Result{Reason: executorv1.Reason_REASON_EXITED, ExitCode: proto.Int32(0)}, 0, ""},
		{&executorv1.Result{Reason: executorv1.Reason_REASON_EXITED, ExitCode: proto.Int32(255)}, 255, ""},
		// No exit code is ever invented, so one that is not there is no 0.
		{&executorv1.Result{Reason: executorv1.Reason_REASON_EXITED}, 125, ""},
		{&executorv1.Result{Reason: executorv1.Reason_REASON_SIGNALED, Signal: 11, Detail: "ended by SIGSEGV"}, 139, "killed by signal 11 (ended by SIGSEGV)"},
		{&executorv1.Result{Reason: executorv1.Reason_REASON_SIGNALED}, 125, "killed by signal 0"},
		{&executorv1.Result{Reason: executorv1.Reason_REASON_TIMED_OUT, Times: times, ExitCode: proto.Int32(0)}, 124, "timed out after 2s"},
		{&executorv1.Result{Reason: executorv1.Reason_REASON_CANCELLED, CancelledBy: "ann@box", Detail: "cancelled by ann@box"}, 130, "cancelled by ann@box"},
		{&executorv1.Result{Reason: executorv1.Reason_REASON_CANCELLED}, 130, "cancelled"},
		{&executorv1.Result{Reason: executorv1.Reason_REASON_OOM_KILLED, Detail: "64 MiB"}, 137, "out of memory (64 MiB)"},
		{&executorv1.Result{Reason: executorv1.Reason_REASON_SESSION_ENDED}, 125, "its session ended"},
		{&executorv1.Result{Reason: executorv1.Reason_REASON_SANDBOX_LOST, ExitCode: proto.Int32(0)}, 125, "the sandbox was lost"},
		{&executorv1.Result{Reason: executorv1.Reason_REASON_DISK_FULL}, 125, "the server's disk is full"},
		{&executorv1.Result{Reason: executorv1.Reason_REASON_SERVER_STOPPED}, 125, "the server was stopped"},
		{&executorv1.Result{Reason: executorv1.Reason_REASON_IDLE_TIMED_OUT}, 124, "idle for too long"},
		{&executorv1.Result{Reason: executorv1.Reason_REASON_OUTPUT_LIMIT, Detail: "1 MiB"}, 125, "too much output (1 MiB)"},
		{&executorv1.Result{Reason: executorv1.Reason_REASON_ABANDONED}, 125, "nobody watched it"},
		{failed("no_working_directory"), 126, "not started (facts)"},
		{failed("not_found"), 127, "not started (facts)"},
		{failed("no_interpreter"), 127, "not started (facts)"},
		{failed("not_executable"), 126, "not started (facts)"},
		{failed("sandbox"), 125, "not started (facts)"},
		{&executorv1.Result{Reason: 99, ExitCode: proto.Int32(0)}, 125, "ended for a reason that this version does not know"},
	}
	told := make(map[executorv1.Reason]bool)
	for _, test := range tests {
		told[test.result.GetReason()] = true
		if got := exitCode(test.result); got != test.code {
			t.Errorf("%v: exit code %d, want %d", test.result, got, test.code)
		}
		if got := ending(test.result, 0); got != test.words {
			t.Errorf("%v: %q, want %q", test.result, got, test.words)
		}
	}
	for number, name := range executorv1.Reason_name {
		if number != 0 && !told[executorv1.Reason(number)] {
			t.Errorf("%s has no case here", name)
		}
	}
	// What it was given is said where it is known: the measured time is longer.
	if got := ending(tests[5].result, 1500*time.Millisecond); got != "timed out after 1.5s" {
		t.Error(got)
	}
}

func TestText(t *testing.T) {
	tests := []struct{ bytes, text, base64 string }{
		{"", "", ""},
		{"hällo\n", "hällo\n", ""},
		{"a\x00b", "a\x00b", ""},
		{"a\xffb", "a\uFFFDb", "Yf9i"},
	}
	for _, test := range tests {
		if gotText, got64 := text([]byte(test.bytes)); gotText != test.text || got64 != test.base64 {
			t.Errorf("text(%q) = %q, %q", test.bytes, gotText, got64)
		}
	}
}
