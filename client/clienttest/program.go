package clienttest

import (
	"fmt"
	"hash/crc32"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
)

// run executes a program: the source of the code, or the argv, one statement each.
// Statements are separated by ";" or a line end:
//
//	out TEXT, err TEXT    write TEXT and a newline
//	raw QUOTED            write a Go string literal to stdout, as it is
//	fill N                write N bytes to stdout in chunks
//	env NAME              write the variable's value and a newline to stdout
//	gap N                 drop N events of 10 bytes of stdout each
//	await                 wait until it is cancelled, or its session ends
//	cat                   copy stdin to stdout, to its end
//	line                  read a line of stdin, or its rest, and write it to stdout
//	shut                  close stdin
//	size                  wait until the terminal is resized and write ROWSxCOLUMNS
//	signalled             wait for a signal and write "signal N SCOPE"
//	cut                   cut the streams that follow, behind what was written so far
//	exit N, signal N      end so
//	timeout, oom, lost, stopped, full, ended   end with that reason
//	start KIND            START_FAILED with evidence kind=KIND
//	refuse CODE REASON FIELD TEXT...    at the start: refuse the request
//
// Without an end it exits with 0; an unknown statement is a START_FAILED.
func run(x *execution, statements []string) {
	for _, statement := range statements {
		verb, rest, _ := strings.Cut(statement, " ")
		if end := step(x, verb, strings.TrimSpace(rest)); end != nil {
			x.finish(end)
			return
		}
	}
	x.finish(exited(0))
}

// step does one statement and returns the result if that ended the program.
func step(x *execution, verb, rest string) *executorv1.Result {
	if end, ok := interact(x, verb, rest); ok {
		return end
	}
	n, _ := strconv.ParseInt(rest, 10, 32)
	switch verb {
	case "":
	case "out":
		x.write(executorv1.Stream_STREAM_STDOUT, []byte(rest+"\n"))
	case "err":
		x.write(executorv1.Stream_STREAM_STDERR, []byte(rest+"\n"))
	case "raw":
		text, err := strconv.Unquote(rest)
		if err != nil {
			return failed("syntax", "raw needs a string literal")
		}
		x.write(executorv1.Stream_STREAM_STDOUT, []byte(text))
	case "fill":
		for n > 0 {
			size := min(n, 31744)
			x.write(executorv1.Stream_STREAM_STDOUT, []byte(strings.Repeat("0123456789abcdef", int(size)/16+1)[:size]))
			n -= size
		}
	case "env":
		x.write(executorv1.Stream_STREAM_STDOUT, []byte(x.env[rest]+"\n"))
	case "gap":
		x.drop(uint64(n))
	case "await":
		<-x.stopped
		return x.ending()
	case "cut":
		x.cut()
	case "exit":
		return exited(int32(n))
	case "signal":
		return &executorv1.Result{
			Reason: executorv1.Reason_REASON_SIGNALED, Outcome: executorv1.Outcome_OUTCOME_CRASHED,
			Signal: int32(n), TreeEmpty: true,
		}
	case "timeout":
		return &executorv1.Result{
			Reason: executorv1.Reason_REASON_TIMED_OUT, Outcome: executorv1.Outcome_OUTCOME_TIMEOUT,
			Signal: 15, ReapedProcesses: 1, TreeEmpty: true, Detail: rest,
		}
	case "oom":
		return &executorv1.Result{
			Reason: executorv1.Reason_REASON_OOM_KILLED, Outcome: executorv1.Outcome_OUTCOME_CRASHED, Signal: 9, TreeEmpty: true,
			Detail: "memory limit of 64 MiB", Evidence: map[string]string{"memory_limit_bytes": "67108864", "oom_kills": "1"},
		}
	case "lost":
		return &executorv1.Result{Reason: executorv1.Reason_REASON_SANDBOX_LOST, Outcome: executorv1.Outcome_OUTCOME_CRASHED, Detail: rest}
	case "stopped":
		return &executorv1.Result{Reason: executorv1.Reason_REASON_SERVER_STOPPED, Outcome: executorv1.Outcome_OUTCOME_CANCELLED, TreeEmpty: true}
	case "full":
		return &executorv1.Result{Reason: executorv1.Reason_REASON_DISK_FULL, Outcome: executorv1.Outcome_OUTCOME_CRASHED, TreeEmpty: true}
	case "ended":
		return &executorv1.Result{Reason: executorv1.Reason_REASON_SESSION_ENDED, Outcome: executorv1.Outcome_OUTCOME_CANCELLED, TreeEmpty: true}
	case "start":
		return failed(rest, "the program could not be started")
	default:
		return failed("not_found", fmt.Sprintf("%q not found", verb))
	}
	return nil
}

func exited(code int32) *executorv1.Result {
	outcome := executorv1.Outcome_OUTCOME_SUCCESS
	if code != 0 {
		outcome = executorv1.Outcome_OUTCOME_ERROR
	}
	return &executorv1.Result{Reason: executorv1.Reason_REASON_EXITED, Outcome: outcome, ExitCode: proto.Int32(code), TreeEmpty: true}
}

func failed(kind, detail string) *executorv1.Result {
	return &executorv1.Result{
		Reason: executorv1.Reason_REASON_START_FAILED, Outcome: executorv1.Outcome_OUTCOME_ERROR,
		Detail: detail, Evidence: map[string]string{"kind": kind},
	}
}

// parse splits a command into statements, or returns the error that its first one,
// a refuse, asks for.
func parse(c *executorv1.Command) ([]string, error) {
	text := c.GetCode().GetSource()
	if len(c.GetArgs()) > 0 {
		text = strings.Join(c.GetArgs(), "\n")
	}
	statements := strings.FieldsFunc(text, func(r rune) bool { return r == ';' || r == '\n' })
	for i := range statements {
		statements[i] = strings.TrimSpace(statements[i])
	}
	if len(statements) == 0 {
		return nil, nil
	}
	words := strings.Fields(statements[0])
	if len(words) < 5 || words[0] != "refuse" {
		return statements, nil
	}
	var code codes.Code
	if err := code.UnmarshalJSON([]byte(strconv.Quote(words[1]))); err != nil {
		return nil, err
	}
	reason, text := words[2], strings.Join(words[4:], " ")
	var fields []Field
	if words[3] != "-" {
		fields = []Field{{words[3], text}}
		text = words[3] + ": " + text
	}
	return nil, Error(code, reason, nil, text, fields...)
}

// zero is when everything begins; at is a number of milliseconds later.
func zero() time.Time { return time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC) }

func at(ms int) *timestamppb.Timestamp {
	return timestamppb.New(zero().Add(time.Duration(ms) * time.Millisecond))
}

// Totals are the totals of a log's output, by which a client proves it whole.
func Totals(log []*executorv1.Event) []*executorv1.StreamTotal {
	totals := []*executorv1.StreamTotal{{Stream: executorv1.Stream_STREAM_STDOUT}, {Stream: executorv1.Stream_STREAM_STDERR}}
	for _, e := range log {
		for _, t := range totals {
			if c := e.GetOutput(); c != nil && c.GetStream() == t.GetStream() {
				t.Size = c.GetOffset() + int64(len(c.GetData()))
				t.Crc32C = crc32.Update(t.GetCrc32C(), crc32.MakeTable(crc32.Castagnoli), c.GetData())
			}
		}
	}
	return totals
}

// complete fills in what every result has.
func complete(r *executorv1.Result, log []*executorv1.Event) *executorv1.Result {
	r.Totals = Totals(log)
	r.Times = &executorv1.StageTimes{Queued: at(0), SandboxReady: at(10), Ended: at(1270)}
	if r.GetReason() != executorv1.Reason_REASON_START_FAILED {
		r.Times.Started = at(20)
		r.Usage = &executorv1.Usage{
			CpuUser: durationpb.New(30 * time.Millisecond), CpuSystem: durationpb.New(4 * time.Millisecond), PeakMemoryBytes: 9 << 20,
		}
	}
	return r
}
