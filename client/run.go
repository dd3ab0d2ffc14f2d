package client

import (
	"context"
	"errors"
	"fmt"
	"io"

	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
)

// Run executes a command, writes its output to stdout and stderr as it comes, and
// returns its result. Either writer may be nil to drop that output. Any end of the
// program is a result and not an error, a non-zero exit and a time-out included.
//
// An error is one of Execute or Recv, or a writer's; the execution then goes on on
// the server. When output was lost to retention, or does not match the result, the
// result is returned together with an ErrIncomplete.
func (c *Client) Run(ctx context.Context, request *executorv1.ExecuteRequest, stdout, stderr io.Writer) (*executorv1.Result, error) {
	s, err := c.Execute(ctx, request)
	if err != nil {
		return nil, err
	}
	defer s.Close()
	writers := [2]io.Writer{stdout, stderr}
	for {
		e, err := s.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return s.Result(), err
		}
		chunk := e.GetOutput()
		i := index(chunk.GetStream())
		if i < 0 || writers[i] == nil {
			continue
		}
		if _, err := writers[i].Write(chunk.GetData()); err != nil {
			return nil, fmt.Errorf("write %s of %s: %w", streamName(i), s.Name(), err)
		}
	}
	if !s.Whole() {
		return s.Result(), fmt.Errorf("run %s: %w: the oldest of it was dropped before it could be read", s.Name(), ErrIncomplete)
	}
	return s.Result(), nil
}
