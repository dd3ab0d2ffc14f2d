package api

import (
	"context"
	"errors"
	"io"
	"strings"
	"time"

	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
	"github.com/harvest-run/executord/internal/fault"
	"github.com/harvest-run/executord/internal/idempotency"
	"github.com/harvest-run/executord/internal/image"
	"github.com/harvest-run/executord/internal/journal"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// Images makes what sandboxes start from. image.Service is meant.
type Images interface {
	// Build begins to make one, unless it is being made or is there, and returns the build
	// that makes or made it. A repeat of the request returns the first one's.
	Build(ctx context.Context, r image.Request) (image.Build, error)
	// GetBuild reads a build.
	GetBuild(ctx context.Context, id string) (image.Build, error)
	// Watch reads the log of a build behind after, from the start if that is nil.
	Watch(ctx context.Context, build string, after *journal.Cursor) (BuildWatcher, error)
	// Get reads one; an engine "" is the default one.
	Get(ctx context.Context, engine, name string) (image.Image, error)
	// List reads all, by name and engine.
	List(ctx context.Context) ([]image.Image, error)
	// Delete removes one with all its builds.
	Delete(ctx context.Context, engine, name string, key idempotency.Key) error
}

// BuildWatcher reads the events of one build. It is used by one goroutine.
type BuildWatcher interface {
	// Next waits for the next event. It returns io.EOF after the result, and the cause
	// of ctx when that ends; then it can be called again.
	Next(ctx context.Context) (image.Event, error)
	// Cursor is that of the last event told.
	Cursor() journal.Cursor
	// LastEventTime is when something was last added to the log.
	LastEventTime() time.Time
	// Close releases it.
	Close()
}

// imageService implements the ImageService.
type imageService struct {
	executorv1.UnimplementedImageServiceServer
	images  Images
	tokens  *pageTokens
	keys    *requestKeys
	senders *senders
}

const (
	imagePrefix = "images/"
	buildInfix  = "/builds/"
)

// BuildImage implements executorv1.ImageServiceServer.
func (s *imageService) BuildImage(req *executorv1.BuildImageRequest, stream grpc.ServerStreamingServer[executorv1.BuildImageResponse]) error {
	ctx := stream.Context()
	interval, err := heartbeatInterval(req.GetHeartbeatInterval())
	if err != nil {
		return err
	}
	key, err := s.keys.of(ctx, req)
	if err != nil {
		return err
	}
	build, err := s.images.Build(ctx, image.Request{
		Name: strings.TrimPrefix(req.GetName(), imagePrefix), Engine: req.GetEngine(), Rebuild: req.GetRebuild(), Key: key,
	})
	if err != nil {
		return err
	}
	return s.follow(ctx, build, nil, interval, func(e *executorv1.BuildEvent) error {
		return stream.Send(&executorv1.BuildImageResponse{Event: e})
	})
}

// WatchBuild implements executorv1.ImageServiceServer.
func (s *imageService) WatchBuild(req *executorv1.WatchBuildRequest, stream grpc.ServerStreamingServer[executorv1.WatchBuildResponse]) error {
	ctx := stream.Context()
	interval, err := heartbeatInterval(req.GetHeartbeatInterval())
	if err != nil {
		return err
	}
	name, id, _ := strings.Cut(strings.TrimPrefix(req.GetName(), imagePrefix), buildInfix)
	build, err := s.images.GetBuild(ctx, id)
	if err == nil && build.Image != name {
		err = fault.New(fault.NotFound, "BUILD_NOT_FOUND", "image %q has no build %q", name, id)
	}
	if err != nil {
		return err
	}
	var after *journal.Cursor
	if c := req.GetAfter(); c.GetEpoch() != "" || c.GetSequence() != 0 {
		after = &journal.Cursor{Epoch: c.GetEpoch(), Sequence: c.GetSequence()}
	}
	return s.follow(ctx, build, after, interval, func(e *executorv1.BuildEvent) error {
		return stream.Send(&executorv1.WatchBuildResponse{Event: e})
	})
}

// follow sends the events of a build until the result.
func (s *imageService) follow(ctx context.Context, build image.Build, after *journal.Cursor, interval time.Duration, send func(*executorv1.BuildEvent) error) error {
	watcher, err := s.images.Watch(ctx, build.ID, after)
	if err != nil {
		return err
	}
	return s.senders.run(ctx, func(p *pace) error {
		defer watcher.Close()
		tell := func(e *executorv1.BuildEvent) error {
			p.begin()
			defer p.end()
			return send(e)
		}
		for {
			silent, cancel := context.WithTimeoutCause(ctx, interval, errSilent)
			event, err := watcher.Next(silent)
			cancel()
			switch {
			case errors.Is(err, io.EOF):
				return nil
			case errors.Is(err, errSilent):
				err = tell(&executorv1.BuildEvent{
					Cursor: placeProto(watcher.Cursor()), EventTime: timestamppb.Now(),
					Kind: &executorv1.BuildEvent_Heartbeat{Heartbeat: &executorv1.Heartbeat{LastEventTime: timestamp(watcher.LastEventTime())}},
				})
			case err == nil:
				err = tell(buildEventProto(event))
			}
			if err != nil {
				return err
			}
		}
	})
}

// GetImage implements executorv1.ImageServiceServer.
func (s *imageService) GetImage(ctx context.Context, req *executorv1.GetImageRequest) (*executorv1.GetImageResponse, error) {
	found, err := s.images.Get(ctx, req.GetEngine(), strings.TrimPrefix(req.GetName(), imagePrefix))
	if err != nil {
		return nil, err
	}
	return &executorv1.GetImageResponse{Image: imageProto(found)}, nil
}

// ListImages implements executorv1.ImageServiceServer. There are few, so all are read and
// the page is cut out of them.
func (s *imageService) ListImages(ctx context.Context, req *executorv1.ListImagesRequest) (*executorv1.ListImagesResponse, error) {
	list := listing(ctx, "ListImages", "", "", true)
	before, err := s.tokens.decode(list, req.GetPageToken())
	if err != nil {
		return nil, err
	}
	all, err := s.images.List(ctx)
	if err != nil {
		return nil, err
	}
	place := func(i image.Image) string { return i.Name + "/" + i.Engine }
	for len(all) > 0 && place(all[0]) <= before {
		all = all[1:]
	}
	page, next := cutPage(all, pageSize(req.GetPageSize()), func(last image.Image) string {
		return s.tokens.encode(list, place(last))
	})
	resp := &executorv1.ListImagesResponse{NextPageToken: next}
	for _, each := range page {
		resp.Images = append(resp.Images, imageProto(each))
	}
	return resp, nil
}

// DeleteImage implements executorv1.ImageServiceServer.
func (s *imageService) DeleteImage(ctx context.Context, req *executorv1.DeleteImageRequest) (*executorv1.DeleteImageResponse, error) {
	key, err := s.keys.of(ctx, req)
	if err != nil {
		return nil, err
	}
	if err := s.images.Delete(ctx, req.GetEngine(), strings.TrimPrefix(req.GetName(), imagePrefix), key); err != nil {
		return nil, err
	}
	return &executorv1.DeleteImageResponse{}, nil
}

func buildName(image, id string) string { return imagePrefix + image + buildInfix + id }

func imageProto(i image.Image) *executorv1.Image {
	converted := &executorv1.Image{
		Name: imagePrefix + i.Name, Engine: i.Engine, LatestBuild: buildProto(i.Latest), Current: i.Current,
	}
	if i.Ready != nil {
		converted.ReadyBuild = buildProto(*i.Ready)
	}
	return converted
}

func buildProto(b image.Build) *executorv1.Build {
	converted := &executorv1.Build{
		Name: buildName(b.Image, b.ID), Engine: b.Engine, Recipe: b.Recipe, SizeBytes: b.SizeBytes,
		State: executorv1.Build_State(b.State), CreateTime: timestamp(b.CreateTime), EndTime: timestamp(b.EndTime),
	}
	if f := b.Failure; f != nil {
		converted.Failure = &executorv1.BuildFailure{
			Step: f.Step, ExitCode: f.ExitCode, Signal: f.Signal, TimedOut: f.TimedOut, Output: text(f.Output), Detail: text(f.Detail),
		}
	}
	return converted
}

func placeProto(c journal.Cursor) *executorv1.Cursor {
	return &executorv1.Cursor{Epoch: c.Epoch, Sequence: c.Sequence}
}

// buildEventProto converts an event. One of a kind that this executord does not know has
// no kind.
func buildEventProto(e image.Event) *executorv1.BuildEvent {
	converted := &executorv1.BuildEvent{Cursor: placeProto(e.Cursor), EventTime: timestamp(e.Time)}
	switch {
	case e.Gap != nil:
		reason := executorv1.Gap_Reason(executorv1.Gap_Reason_value["REASON_"+string(e.Gap.Reason)])
		converted.Kind = &executorv1.BuildEvent_Gap{Gap: &executorv1.Gap{Reason: reason, MissingEvents: e.Gap.MissingEvents}}
	case e.Started != nil:
		converted.Kind = &executorv1.BuildEvent_Started{Started: &executorv1.BuildStarted{
			Build: buildName(e.Started.Image, e.Started.Build), Engine: e.Started.Engine, Steps: e.Started.Steps,
		}}
	case e.Step != nil:
		converted.Kind = &executorv1.BuildEvent_StepStarted{StepStarted: &executorv1.BuildStepStarted{
			Index: int32(e.Step.Index), Name: e.Step.Name,
		}}
	case e.Output != nil:
		stream := executorv1.Stream_STREAM_STDOUT
		if e.Output.Stderr {
			stream = executorv1.Stream_STREAM_STDERR
		}
		converted.Kind = &executorv1.BuildEvent_Output{Output: &executorv1.BuildOutput{Stream: stream, Data: e.Output.Data}}
	case e.StepEnded != nil:
		converted.Kind = &executorv1.BuildEvent_StepEnded{StepEnded: &executorv1.BuildStepEnded{
			Index: int32(e.StepEnded.Index), Duration: durationpb.New(e.StepEnded.Duration),
		}}
	case e.Result != nil:
		converted.Kind = &executorv1.BuildEvent_Result{Result: buildProto(*e.Result)}
	}
	return converted
}
