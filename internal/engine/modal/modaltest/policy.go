package modaltest

import (
	"context"

	pb "github.com/modal-labs/modal-client/go/proto/modal_proto"
)

// TaskSetNetworkAccess records what a sandbox may reach from now on. Of the policies only
// the blocked one is enforced, by a network without anybody else.
func (r *router) TaskSetNetworkAccess(ctx context.Context, q *pb.TaskSetNetworkAccessRequest) (*pb.TaskSetNetworkAccessResponse, error) {
	s, err := r.task(ctx, q.GetTaskId())
	if err != nil {
		return nil, err
	}
	r.fake.mu.Lock()
	defer r.fake.mu.Unlock()
	s.access = q.GetNetworkAccess()
	return &pb.TaskSetNetworkAccessResponse{}, nil
}

// TaskSetOutboundPolicy records which headers are added to a sandbox's requests.
func (r *router) TaskSetOutboundPolicy(ctx context.Context, q *pb.TaskSetExperimentalOutboundPolicyRequest) (*pb.TaskSetExperimentalOutboundPolicyResponse, error) {
	s, err := r.task(ctx, q.GetTaskId())
	if err != nil {
		return nil, err
	}
	r.fake.mu.Lock()
	defer r.fake.mu.Unlock()
	s.outbound = q.GetExperimentalOutboundPolicy()
	return &pb.TaskSetExperimentalOutboundPolicyResponse{}, nil
}
