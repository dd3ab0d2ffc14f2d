package testmodel

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// dialect is a provider's protocol.
type dialect interface {
	// parse reads a request's body.
	parse(body []byte) (Request, error)
	// failed is the body of an HTTP error, broken the event of an error within a stream.
	failed(status int, message string) any
	broken(message string) event
	// open, part and close make the events of an answer. Those of a part with text or
	// reasoning have its pieces.
	open(r Request, u Usage) []event
	part(index int, p Part, call string) []event
	close(stop string, u Usage) []event
}

// event is one of a stream.
type event struct {
	name string
	data any
	// piece is what it has of a text; it counts as one for Failure.After and Step.Pace.
	piece string
}

func (s *Server) serve(w http.ResponseWriter, req *http.Request, d dialect) {
	body, err := io.ReadAll(req.Body)
	if err != nil {
		return
	}
	r, err := d.parse(body)
	if err != nil {
		answer(w, http.StatusBadRequest, d.failed(http.StatusBadRequest, err.Error()))
		return
	}
	r.Path, r.Header, r.Time, r.Body = req.URL.Path, req.Header.Clone(), time.Now(), body
	step, failure, ok := s.take(&r)
	if !ok {
		answer(w, http.StatusBadRequest, d.failed(http.StatusBadRequest, fmt.Sprintf("testmodel: no step %d of script %q", r.Step, r.Script)))
		return
	}
	if failure != nil && failure.Status != 0 {
		if failure.RetryAfter > 0 {
			w.Header().Set("Retry-After", strconv.FormatFloat(failure.RetryAfter.Seconds(), 'f', -1, 64))
		}
		answer(w, failure.Status, d.failed(failure.Status, failure.Message))
		return
	}
	if step.Gate != nil {
		select {
		case <-step.Gate:
		case <-req.Context().Done():
			return
		}
	}
	s.stream(w, req, d, r, step, failure)
}

func (s *Server) stream(w http.ResponseWriter, req *http.Request, d dialect, r Request, step Step, failure *Failure) {
	w.Header().Set("Content-Type", "text/event-stream")
	w.WriteHeader(http.StatusOK)
	usage := step.Usage
	if usage == (Usage{}) {
		usage = Usage{Input: 100, Output: 10, CacheRead: 5, CacheWrite: 7}
	}
	events := d.open(r, usage)
	stop := step.Stop
	for i, p := range step.Parts {
		call := ""
		if p.Call != nil {
			call = fmt.Sprintf("call_%d", s.callID())
			if step.Stop == "" {
				stop = "tool_use"
			}
		}
		events = append(events, d.part(i, p, call)...)
	}
	if stop == "" {
		stop = "end_turn"
	}
	events = append(events, d.close(stop, usage)...)

	pieces := 0
	for _, e := range events {
		if e.piece != "" {
			if failure != nil && pieces == failure.After {
				s.breakOff(w, req, d, failure)
				return
			}
			if pieces++; pieces > 1 && !pause(req, step.Pace) {
				return
			}
			if s.Sent != nil && !r.Title {
				s.Sent(r.Script, e.piece)
			}
		}
		if !send(w, e) {
			return
		}
	}
	if failure != nil {
		s.breakOff(w, req, d, failure)
	}
}

// breakOff ends a stream that is not over.
func (s *Server) breakOff(w http.ResponseWriter, req *http.Request, d dialect, f *Failure) {
	switch {
	case f.Stall:
		<-req.Context().Done()
	case f.Event:
		send(w, d.broken(f.Message))
	default:
		// The connection is cut without the end of the stream.
		panic(http.ErrAbortHandler)
	}
}

func pause(req *http.Request, d time.Duration) bool {
	if d == 0 {
		return true
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-req.Context().Done():
		return false
	}
}

func answer(w http.ResponseWriter, status int, body any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	// A client that is gone needs no answer.
	_ = json.NewEncoder(w).Encode(body)
}

func send(w http.ResponseWriter, e event) bool {
	var b bytes.Buffer
	if e.name != "" {
		fmt.Fprintf(&b, "event: %s\n", e.name)
	}
	if text, ok := e.data.(string); ok {
		fmt.Fprintf(&b, "data: %s\n\n", text)
	} else {
		data, err := json.Marshal(e.data)
		if err != nil {
			return false
		}
		fmt.Fprintf(&b, "data: %s\n\n", data)
	}
	if _, err := w.Write(b.Bytes()); err != nil {
		return false
	}
	return http.NewResponseController(w).Flush() == nil
}

// pieces are the words of a text, each with the space behind it.
func pieces(text string) []string { return strings.SplitAfter(text, " ") }
