// Package modaldoctor finds out what the engine modal needs at Modal, and says what to do
// about what is missing. It makes nothing there but asks for the image, whose build Modal
// begins if it never was.
package modaldoctor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	sdk "github.com/modal-labs/modal-client/go"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/harvest-run/executord/internal/engine"
)

const (
	// answerTime bounds each question but that for the image.
	answerTime = 15 * time.Second
	// imageTime is how long an image may take to be there: one that was built is at once.
	imageTime = 20 * time.Second
	// throttleTime bounds how long the SDK waits because Modal tells it to.
	throttleTime = 5 * time.Second
)

// Config says what is looked for.
type Config struct {
	// App, Environment and Image are those of modal.Config; Commands are those that Image
	// is completed with.
	App, Environment string
	Image            string
	Commands         []string
	// Secrets are the names of those that are needed.
	Secrets []string
}

// Essential says whether sandboxes cannot be had as configured without what a check looks
// for. The rest executord makes itself.
func Essential(name string) bool { return name != "app" && name != "image" }

// Check looks for everything. What cannot be known because something else is missing says
// so. Credentials are in nothing that it returns.
func Check(ctx context.Context, cfg Config) []engine.Capability {
	c := checker{cfg: cfg}
	c.credentials()
	if c.client != nil {
		defer c.client.Close()
	}
	c.workspace(ctx)
	c.image(ctx)
	for _, name := range cfg.Secrets {
		c.secret(ctx, name)
	}
	return c.found
}

type checker struct {
	cfg    Config
	client *sdk.Client
	app    *sdk.App
	// blocked says why nothing more can be asked; "" if it can.
	blocked string
	found   []engine.Capability
}

func (c *checker) ok(name, format string, args ...any) {
	c.found = append(c.found, engine.Capability{Name: name, Available: true, Detail: fmt.Sprintf(format, args...)})
}

func (c *checker) missing(name, remedy, format string, args ...any) {
	c.found = append(c.found, engine.Capability{Name: name, Detail: fmt.Sprintf(format, args...), Remedy: remedy})
}

const getToken = "run `modal token new` as the user of executord, or set MODAL_TOKEN_ID and MODAL_TOKEN_SECRET in its environment"

// source says where the SDK takes credentials from; "" if there are none.
func source() string {
	if os.Getenv("MODAL_TOKEN_ID") != "" && os.Getenv("MODAL_TOKEN_SECRET") != "" {
		return "MODAL_TOKEN_ID and MODAL_TOKEN_SECRET"
	}
	if os.Getenv("MODAL_OAUTH_REFRESH_TOKEN") != "" {
		return "MODAL_OAUTH_REFRESH_TOKEN"
	}
	if path := configFile(); path != "" {
		if _, err := os.Stat(path); err == nil {
			return path
		}
	}
	return ""
}

// configFile is where Modal's own programs keep credentials.
func configFile() string {
	if path := os.Getenv("MODAL_CONFIG_PATH"); path != "" {
		return path
	}
	home, err := os.UserHomeDir()
	if err != nil {
		return ""
	}
	return filepath.Join(home, ".modal.toml")
}

func (c *checker) credentials() {
	from := source()
	if from == "" {
		c.missing("credentials", getToken, "neither in the environment nor in %s", configFile())
		c.blocked = "there are no credentials"
		return
	}
	throttle := throttleTime
	client, err := sdk.NewClientWithOptions(&sdk.ClientParams{Environment: c.cfg.Environment, MaxThrottleWait: &throttle})
	if err != nil {
		// Its words may quote what is in the file.
		c.missing("credentials", "mend it, or "+getToken, "%s cannot be used: %s", from, kindOf(err))
		c.blocked = "the credentials cannot be used"
		return
	}
	c.client = client
	c.ok("credentials", "from %s", from)
}

// kindOf tells an error without its words.
func kindOf(err error) string {
	if _, ok := errors.AsType[sdk.InvalidError](err); ok {
		return "contradictory settings"
	}
	return "not in the form that Modal's SDK reads"
}

func (c *checker) workspace(ctx context.Context) {
	if c.blocked != "" {
		c.missing("workspace", "", "not asked: %s", c.blocked)
		c.missing("app", "", "not asked: %s", c.blocked)
		return
	}
	ctx, cancel := context.WithTimeoutCause(ctx, answerTime, fmt.Errorf("no answer within %v", answerTime))
	defer cancel()
	app, err := c.client.Apps.FromName(ctx, c.cfg.App, &sdk.AppFromNameParams{Environment: c.cfg.Environment})
	_, absent := errors.AsType[sdk.NotFoundError](err)
	switch {
	case err == nil:
		c.app = app
		c.ok("workspace", "answers%s", inEnvironment(c.cfg.Environment))
		c.ok("app", "%s is %s", c.cfg.App, app.AppID)
		return
	case absent && strings.Contains(strings.ToLower(err.Error()), "environment"):
		c.missing("workspace", "make it with `modal environment create "+c.cfg.Environment+"`, or set modal.environment", "it has no environment %q", c.cfg.Environment)
	case absent:
		c.ok("workspace", "answers%s", inEnvironment(c.cfg.Environment))
		c.missing("app", "nothing to do: `executord serve` makes it", "there is no app %s yet", c.cfg.App)
		return
	case strings.Contains(err.Error(), "missing credentials"):
		c.found[len(c.found)-1] = engine.Capability{Name: "credentials", Detail: "there are none in " + source() + " for the profile in use", Remedy: getToken}
		c.missing("workspace", "", "not asked: there are no credentials")
	case refused(err):
		c.missing("workspace", "the token was revoked, or belongs to another workspace: "+getToken, "Modal refuses the credentials")
	default:
		c.missing("workspace", "see whether this host reaches api.modal.com, port 443, or what MODAL_SERVER_URL names", "no answer: %v", err)
	}
	c.blocked = "the workspace does not answer"
	c.missing("app", "", "not asked: %s", c.blocked)
}

func refused(err error) bool {
	code := status.Code(err)
	return code == codes.Unauthenticated || code == codes.PermissionDenied
}

func inEnvironment(name string) string {
	if name == "" {
		return ""
	}
	return ", in environment " + name
}

func (c *checker) image(ctx context.Context) {
	switch {
	case c.blocked != "":
		c.missing("image", "", "not asked: %s", c.blocked)
		return
	case c.app == nil:
		c.missing("image", "nothing to do: the first sandbox has it built, which takes minutes; after `executord serve` this doctor begins that too",
			"not asked: there is no app to ask with")
		return
	}
	ctx, cancel := context.WithTimeoutCause(ctx, imageTime, fmt.Errorf("not there within %v", imageTime))
	defer cancel()
	image := c.client.Images.FromRegistry(c.cfg.Image, nil)
	if len(c.cfg.Commands) > 0 {
		image = image.DockerfileCommands(c.cfg.Commands, nil)
	}
	built, err := image.Build(ctx, c.app, nil)
	switch {
	case err == nil:
		c.ok("image", "%s with %d commands is %s", c.cfg.Image, len(c.cfg.Commands), built.ImageID)
	case ctx.Err() != nil:
		c.missing("image", "nothing to do: Modal builds it now; ask again in some minutes", "%s is not built yet", c.cfg.Image)
	default:
		c.missing("image", "mend modal.image and modal.dockerfile; what Modal says of the build is in its dashboard", "%s cannot be built: %v", c.cfg.Image, err)
	}
}

func (c *checker) secret(ctx context.Context, secret string) {
	name := "secret " + secret
	if c.blocked != "" {
		c.missing(name, "", "not asked: %s", c.blocked)
		return
	}
	ctx, cancel := context.WithTimeoutCause(ctx, answerTime, fmt.Errorf("no answer within %v", answerTime))
	defer cancel()
	_, err := c.client.Secrets.FromName(ctx, secret, &sdk.SecretFromNameParams{Environment: c.cfg.Environment})
	_, absent := errors.AsType[sdk.NotFoundError](err)
	switch {
	case err == nil:
		c.ok(name, "is there")
	case absent || status.Code(err) == codes.NotFound:
		c.missing(name, "make it with `modal secret create "+secret+" GITHUB_TOKEN=...`, or leave it out of modal.secrets", "Modal has no such secret")
	default:
		c.missing(name, "", "no answer: %v", err)
	}
}
