package api

import (
	"context"

	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
	"github.com/harvest-run/executord/internal/execution"
	"github.com/harvest-run/executord/internal/fault"
)

// WriteInput implements executorv1.ExecutorServiceServer.
func (s *executorService) WriteInput(ctx context.Context, req *executorv1.WriteInputRequest) (*executorv1.WriteInputResponse, error) {
	ref, err := parseExecutionName(ctx, req.GetName())
	if err != nil {
		return nil, err
	}
	state, err := s.executions.WriteInput(ctx, ref, execution.Input{Offset: req.Offset, Data: req.GetData(), Close: req.GetClose()})
	if err != nil {
		return nil, err
	}
	return &executorv1.WriteInputResponse{CommittedOffset: state.Committed, Closed: state.Closed}, nil
}

// SignalExecution implements executorv1.ExecutorServiceServer.
func (s *executorService) SignalExecution(ctx context.Context, req *executorv1.SignalExecutionRequest) (*executorv1.SignalExecutionResponse, error) {
	ref, err := parseExecutionName(ctx, req.GetName())
	if err != nil {
		return nil, err
	}
	scope, err := scopeOf(req.GetScope())
	if err != nil {
		return nil, err
	}
	key, err := s.keys.of(ctx, req)
	if err != nil {
		return nil, err
	}
	if err := s.executions.Signal(ctx, ref, req.GetSignal(), scope, key); err != nil {
		return nil, err
	}
	return &executorv1.SignalExecutionResponse{}, nil
}

func scopeOf(s executorv1.SignalScope) (execution.Scope, error) {
	switch s {
	case executorv1.SignalScope_SIGNAL_SCOPE_UNSPECIFIED, executorv1.SignalScope_SIGNAL_SCOPE_PROCESS:
		return execution.ScopeProcess, nil
	case executorv1.SignalScope_SIGNAL_SCOPE_GROUP:
		return execution.ScopeGroup, nil
	case executorv1.SignalScope_SIGNAL_SCOPE_TREE:
		return execution.ScopeTree, nil
	default:
		return 0, fault.InvalidField(reasonInvalidField, "scope", "must be one of the scopes")
	}
}

func sizeOf(s *executorv1.TerminalSize) execution.TerminalSize {
	return execution.TerminalSize{Rows: int(s.GetRows()), Columns: int(s.GetColumns())}
}
