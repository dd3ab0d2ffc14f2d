package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"
	"unicode"

	"github.com/spf13/cobra"

	"github.com/harvest-run/executord/client"
	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
)

func (a *app) imageCommand() *cobra.Command {
	return group("image", "Build, list and remove images: what sandboxes start from", []string{"images"},
		a.imageBuild(), a.imageList(), a.imageGet(), a.imageDelete())
}

// imageColumns is the table of images.
func imageColumns() columns[*executorv1.Image] {
	return columns[*executorv1.Image]{
		header: []string{"NAME", "ENGINE", "STATE", "BUILT", "SIZE", "LATEST BUILD"},
		row: func(i *executorv1.Image) []string {
			state, built, size := "none", "", ""
			if ready := i.GetReadyBuild(); ready != nil {
				state, built, size = "ready", formatTime(ready.GetEndTime()), fmt.Sprintf("%d MiB", ready.GetSizeBytes()>>20)
				if !i.GetCurrent() {
					state = "outdated"
				}
			}
			latest := i.GetLatestBuild()
			text := strings.ToLower(enumName(latest.GetState(), "STATE"))
			if f := latest.GetFailure(); f != nil {
				text += " (" + printable(f.GetDetail()) + ")"
			}
			return []string{i.GetName(), i.GetEngine(), state, built, size, text}
		},
	}
}

// engineFlag adds the flag for an engine.
func engineFlag(cmd *cobra.Command) *string {
	return cmd.Flags().String("engine", "", "engine that the image is of (default the server's first)")
}

// imageName makes a resource name of what a person writes.
func imageName(arg string) (string, error) {
	name := strings.TrimPrefix(arg, "images/")
	if name == "" || strings.Contains(name, "/") {
		return "", usagef("%q is not the name of an image, such as base", arg)
	}
	return "images/" + name, nil
}

func (a *app) imageBuild() *cobra.Command {
	var rebuild bool
	cmd := formats(&cobra.Command{
		Use:   "build IMAGE",
		Short: "Make an image unless it is there, and show how it is made",
		Long: `Make an image unless it is there and up to date, and show how it is made. Everybody
who asks meanwhile follows the same build. Ctrl-C leaves it; it goes on.

The image base is that of sessions with an agent. The first such session makes it,
too: building it before only saves that one the time.

The build's log goes to stderr, the image at the end to stdout; with -o jsonl all of
its events go to stdout.`,
		Example: `  executorctl image build base
  executorctl image build base --rebuild      # with the newest packages`,
		Args: exactly("IMAGE"),
	}, "table", "json", "yaml", "jsonl", "name")
	engine := engineFlag(cmd)
	cmd.Flags().BoolVar(&rebuild, "rebuild", false, "make it anew also when it is there")
	cmd.RunE = a.call(func(ctx context.Context, c *client.Client, args []string) error {
		name, err := imageName(args[0])
		if err != nil {
			return err
		}
		ctx, leave := context.WithCancelCause(ctx)
		defer leave(nil)
		interrupts, unsubscribe := a.signals(os.Interrupt)
		defer unsubscribe()
		stop := make(chan struct{})
		var waiter sync.WaitGroup
		waiter.Go(func() {
			select {
			case <-interrupts:
				leave(errLeft)
			case <-stop:
			}
		})
		defer waiter.Wait()
		defer close(stop)
		log := &buildLog{app: a, start: time.Now()}
		tell := log.event
		if a.format == "jsonl" {
			tell = func(e *executorv1.BuildEvent) error {
				text, err := protoJSON(e)
				if err != nil {
					return err
				}
				return a.line(text)
			}
		}
		build, err := c.BuildImage(ctx, &executorv1.BuildImageRequest{Name: name, Engine: *engine, Rebuild: rebuild}, tell)
		if errors.Is(err, errLeft) {
			a.say("left the build of %s, which goes on", name)
			fmt.Fprintf(a.stderr, "hint: executorctl image build %s follows it again\n", args[0])
			return exitStatus(exitLeft)
		}
		if err != nil {
			return err
		}
		if f := build.GetFailure(); f != nil {
			return fmt.Errorf("%s was not built: %s", name, printable(f.GetDetail()))
		}
		if a.format == "jsonl" {
			return nil
		}
		answer, err := c.Images().GetImage(ctx, &executorv1.GetImageRequest{Name: name, Engine: build.GetEngine()})
		if err != nil {
			return fmt.Errorf("get %s: %w", name, err)
		}
		return printOne(a, answer.GetImage(), imageColumns())
	})
	return cmd
}

// buildLog shows the log of a build to a person.
type buildLog struct {
	*app
	start time.Time
	steps int
	step  string
	// midLine is whether the last output did not end its line.
	midLine bool
}

func (l *buildLog) event(e *executorv1.BuildEvent) error {
	switch {
	case e.GetStarted() != nil:
		l.steps = len(e.GetStarted().GetSteps())
	case e.GetStepStarted() != nil:
		s := e.GetStepStarted()
		l.step = printable(s.GetName())
		l.say("[%d/%d] %s", s.GetIndex()+1, max(l.steps, int(s.GetIndex())+1), l.step)
	case e.GetOutput() != nil:
		data := shown(e.GetOutput().GetData())
		l.midLine = len(data) > 0 && data[len(data)-1] != '\n'
		if _, err := l.stderr.Write(data); err != nil {
			return fmt.Errorf("write the build's log: %w", err)
		}
	case e.GetStepEnded() != nil:
		l.endLine()
		l.say("      %s: done in %v", l.step, e.GetStepEnded().GetDuration().AsDuration().Round(100*time.Millisecond))
	case e.GetGap() != nil:
		l.endLine()
		l.say("%d events are missing here", e.GetGap().GetMissingEvents())
	case e.GetResult() != nil:
		l.endLine()
	}
	return nil
}

// endLine begins a new line if the last one was not ended.
func (l *buildLog) endLine() {
	if l.midLine {
		_, _ = io.WriteString(l.stderr, "\n")
		l.midLine = false
	}
}

// shown is output without what could do something to a terminal: control characters but
// for tabs and the ends of lines.
func shown(data []byte) []byte {
	return bytes.Map(func(r rune) rune {
		switch {
		case r == '\n' || r == '\r' || r == '\t':
			return r
		case unicode.IsControl(r):
			return -1
		}
		return r
	}, data)
}

func (a *app) imageList() *cobra.Command {
	var limit int
	cmd := formats(&cobra.Command{
		Use:     "list",
		Short:   "List images",
		Aliases: []string{"ls"},
		Args:    none,
	}, "table", "json", "yaml", "jsonl", "name")
	cmd.Flags().IntVar(&limit, "limit", 100, "the most to list; 0 for all")
	cmd.RunE = a.call(func(ctx context.Context, c *client.Client, _ []string) error {
		images, more, err := pages(limit, func(size int32, token string) ([]*executorv1.Image, string, error) {
			answer, err := c.Images().ListImages(ctx, &executorv1.ListImagesRequest{PageSize: size, PageToken: token})
			return answer.GetImages(), answer.GetNextPageToken(), err
		})
		if err != nil {
			return fmt.Errorf("list images: %w", err)
		}
		if more && !cmd.Flags().Changed("limit") {
			defer a.say("there are more; --limit 0 lists all")
		}
		return printAll(a, images, imageColumns())
	})
	return cmd
}

func (a *app) imageGet() *cobra.Command {
	cmd := formats(&cobra.Command{
		Use:   "get IMAGE",
		Short: "Show an image",
		Args:  exactly("IMAGE"),
	}, "table", "json", "yaml", "jsonl", "name")
	engine := engineFlag(cmd)
	cmd.RunE = a.call(func(ctx context.Context, c *client.Client, args []string) error {
		name, err := imageName(args[0])
		if err != nil {
			return err
		}
		answer, err := c.Images().GetImage(ctx, &executorv1.GetImageRequest{Name: name, Engine: *engine})
		if err != nil {
			return fmt.Errorf("get %s: %w", name, err)
		}
		return printOne(a, answer.GetImage(), imageColumns())
	})
	return cmd
}

func (a *app) imageDelete() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "delete IMAGE",
		Short:   "Remove an image with all its builds; sandboxes made of it go on",
		Aliases: []string{"rm"},
		Args:    exactly("IMAGE"),
	}
	engine := engineFlag(cmd)
	cmd.RunE = a.call(func(ctx context.Context, c *client.Client, args []string) error {
		name, err := imageName(args[0])
		if err != nil {
			return err
		}
		return c.DeleteImage(ctx, &executorv1.DeleteImageRequest{Name: name, Engine: *engine})
	})
	return cmd
}
