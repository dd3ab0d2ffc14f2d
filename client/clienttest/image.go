package clienttest

import (
	"context"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
)

// buildTime is when every build begins; each takes an hour.
func buildTime() time.Time { return time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC) }

// buildLog is the log of the one build that each image has. The image bad fails; the
// others are made. Its output tries to do something to a terminal.
func buildLog(image string) []*executorv1.BuildEvent {
	build := finishedBuild(image)
	events := []*executorv1.BuildEvent{
		{Kind: &executorv1.BuildEvent_Started{Started: &executorv1.BuildStarted{Build: build.GetName(), Engine: "fake", Steps: []string{"packages", "check"}}}},
		{Kind: &executorv1.BuildEvent_StepStarted{StepStarted: &executorv1.BuildStepStarted{Index: 0, Name: "packages"}}},
		{Kind: &executorv1.BuildEvent_Output{Output: &executorv1.BuildOutput{Stream: executorv1.Stream_STREAM_STDOUT, Data: []byte("Get:1 chromium\n\x1b[2Jhalf a line")}}},
		{Kind: &executorv1.BuildEvent_StepEnded{StepEnded: &executorv1.BuildStepEnded{Index: 0, Duration: durationpb.New(9780 * time.Millisecond)}}},
		{Kind: &executorv1.BuildEvent_StepStarted{StepStarted: &executorv1.BuildStepStarted{Index: 1, Name: "check"}}},
		{Kind: &executorv1.BuildEvent_Result{Result: build}},
	}
	for i, e := range events {
		e.Cursor = &executorv1.Cursor{Epoch: Epoch, Sequence: uint64(i + 1)}
		e.EventTime = timestamppb.New(buildTime().Add(time.Duration(i) * time.Second))
	}
	return events
}

func finishedBuild(image string) *executorv1.Build {
	b := &executorv1.Build{
		Name: image + "/builds/b1", Engine: "fake", State: executorv1.Build_STATE_READY, Recipe: "abc", SizeBytes: 600 << 20,
		CreateTime: timestamppb.New(buildTime()), EndTime: timestamppb.New(buildTime().Add(time.Hour)),
	}
	if image == "images/bad" {
		b.State, b.SizeBytes = executorv1.Build_STATE_FAILED, 0
		b.Failure = &executorv1.BuildFailure{Step: "check", ExitCode: proto.Int32(1), Output: "no Chromium\n", Detail: "step 2 (check): exited with 1"}
	}
	return b
}

// BuildImage implements ImageService. The stream of the image cut breaks after half of
// its events.
func (s *Server) BuildImage(r *executorv1.BuildImageRequest, stream grpc.ServerStreamingServer[executorv1.BuildImageResponse]) error {
	if r.GetName() == "images/none" {
		return Error(codes.NotFound, "IMAGE_NOT_FOUND", nil, "there is no image \"none\"")
	}
	s.mu.Lock()
	if !slices.Contains(s.built, r.GetName()) {
		s.built = append(s.built, r.GetName())
	}
	s.mu.Unlock()
	for i, e := range buildLog(r.GetName()) {
		if r.GetName() == "images/cut" && i == 3 {
			return Error(codes.Unavailable, "SERVER_DRAINING", nil, "the server is stopping")
		}
		if err := stream.Send(&executorv1.BuildImageResponse{Event: e}); err != nil {
			return err
		}
	}
	return nil
}

// WatchBuild implements ImageService.
func (s *Server) WatchBuild(r *executorv1.WatchBuildRequest, stream grpc.ServerStreamingServer[executorv1.WatchBuildResponse]) error {
	image, _, _ := strings.Cut(r.GetName(), "/builds/")
	for _, e := range buildLog(image) {
		if e.GetCursor().GetSequence() <= r.GetAfter().GetSequence() {
			continue
		}
		if err := stream.Send(&executorv1.WatchBuildResponse{Event: e}); err != nil {
			return err
		}
	}
	return nil
}

// GetImage implements ImageService.
func (s *Server) GetImage(ctx context.Context, r *executorv1.GetImageRequest) (*executorv1.GetImageResponse, error) {
	all, err := s.ListImages(ctx, &executorv1.ListImagesRequest{})
	if err != nil {
		return nil, err
	}
	for _, i := range all.GetImages() {
		if i.GetName() == r.GetName() {
			return &executorv1.GetImageResponse{Image: i}, nil
		}
	}
	return nil, Error(codes.NotFound, "IMAGE_NOT_FOUND", nil, "there is no "+r.GetName())
}

// ListImages implements ImageService.
func (s *Server) ListImages(context.Context, *executorv1.ListImagesRequest) (*executorv1.ListImagesResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	resp := &executorv1.ListImagesResponse{}
	for _, name := range s.built {
		i := &executorv1.Image{Name: name, Engine: "fake", LatestBuild: finishedBuild(name)}
		if i.GetLatestBuild().GetFailure() == nil {
			i.ReadyBuild, i.Current = i.GetLatestBuild(), name != "images/old"
		}
		resp.Images = append(resp.Images, i)
	}
	return resp, nil
}

// DeleteImage implements ImageService.
func (s *Server) DeleteImage(_ context.Context, r *executorv1.DeleteImageRequest) (*executorv1.DeleteImageResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !slices.Contains(s.built, r.GetName()) {
		return nil, Error(codes.NotFound, "IMAGE_NOT_FOUND", nil, "there is no "+r.GetName())
	}
	s.built = slices.DeleteFunc(s.built, func(name string) bool { return name == r.GetName() })
	return &executorv1.DeleteImageResponse{}, nil
}
