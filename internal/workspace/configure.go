package workspace

import (
	"context"
	_ "embed" // the guard
	"fmt"
	"path"
	"strings"

	"github.com/harvest-run/executord/internal/fault"
)

//go:embed guard.sh
var guard string

// GuardDir is where the guard lies, as git: the first directory of PATH, for a login
// shell too.
const GuardDir = "/usr/local/sbin"

// Harvest is behind the name of everybody on whose behalf the agent commits.
const Harvest = "(Harvest)"

// Identity is whose work it is.
type Identity struct {
	// Name without "(Harvest)", which is added, and Email.
	Name, Email string
}

// Setup is what git in a sandbox is told.
type Setup struct {
	Identity Identity
	// Brokers are, by host such as github.com, the URLs in the sandbox that take its place, each with a
	// slash at its end: broker.URL of broker.Git and "/".
	Brokers map[string]string
	// ConfigFile and GuardDir are for tests; "" is git's own for the system, and GuardDir.
	ConfigFile, GuardDir string
}

// author returns the name and the address, without what git would take for something
// else.
func (i Identity) author() (name, email string, err error) {
	clean := func(text string) string {
		return strings.Join(strings.Fields(strings.Map(func(r rune) rune {
			if r < ' ' || r == '<' || r == '>' || r == 0x7f {
				return ' '
			}
			return r
		}, strings.ToValidUTF8(text, ""))), " ")
	}
	name, email = clean(i.Name), clean(i.Email)
	name = strings.TrimSpace(strings.TrimSuffix(name, Harvest))
	if name == "" || email == "" || len(name) > 200 || len(email) > 320 || strings.Contains(email, " ") {
		return "", "", fault.InvalidField("IDENTITY", "identity", "needs a name and an email address")
	}
	return name + " " + Harvest, email, nil
}

// environment makes a command's commits those of an identity.
func (i Identity) environment() (map[string]string, error) {
	name, email, err := i.author()
	if err != nil {
		return nil, err
	}
	return map[string]string{"GIT_AUTHOR_NAME": name, "GIT_AUTHOR_EMAIL": email, "GIT_COMMITTER_NAME": name, "GIT_COMMITTER_EMAIL": email}, nil
}

// Configure sets git up for everybody in the sandbox: the identity, defaults that suit
// an agent, the broker in the place of hosts, and the guard. It may be repeated. Faults: Invalid.
func Configure(ctx context.Context, r Runner, s Setup) error {
	name, email, err := s.Identity.author()
	if err != nil {
		return err
	}
	scope := []string{"--system"}
	if s.ConfigFile != "" {
		scope = []string{"--file", s.ConfigFile}
	}
	settings := [][2]string{
		{"user.name", name}, {"user.email", email}, {"push.autoSetupRemote", "true"}, {"init.defaultBranch", "main"},
		// What asks somebody, or leaves work where nobody looks.
		{"rebase.autoStash", "false"}, {"pull.ff", "only"}, {"gc.auto", "0"}, {"advice.detachedHead", "false"},
		// Nobody else is in the sandbox.
		{"safe.directory", "*"},
	}
	for host, address := range s.Brokers {
		if !strings.HasSuffix(address, "/") {
			return fmt.Errorf("the broker's address for %s has no slash at its end", host)
		}
		settings = append(settings, [2]string{"url." + address + ".insteadOf", "https://" + host + "/"})
	}
	script := strings.Builder{}
	script.WriteString("set -e\n")
	args := []string{"sh", "-c", "", "sh"}
	argument := func(text string) string {
		args = append(args, text)
		return fmt.Sprintf(`"${%d}"`, len(args)-4)
	}
	for _, setting := range settings {
		script.WriteString("git config")
		for _, part := range scope {
			script.WriteString(" " + argument(part))
		}
		fmt.Fprintf(&script, " --replace-all %s %s\n", argument(setting[0]), argument(setting[1]))
	}
	for host, address := range s.Brokers { // ssh forms come to the same place
		for _, form := range []string{"git@" + host + ":", "ssh://git@" + host + "/"} {
			script.WriteString("git config")
			for _, part := range scope {
				script.WriteString(" " + argument(part))
			}
			fmt.Fprintf(&script, " --add %s %s\n", argument("url."+address+".insteadOf"), argument(form))
		}
	}
	dir := s.GuardDir
	if dir == "" {
		dir = GuardDir
	}
	// The guard's place is ours unless somebody's own git lies there.
	fmt.Fprintf(&script, "d=%s\nmkdir -p \"$d\"\nif [ -e \"$d/git\" ] && ! grep -q 'Made by executord' \"$d/git\"; then echo \"$d/git is another one\" >&2; exit 1; fi\n", argument(dir))
	script.WriteString("cat > \"$d/.git.new\"\nchmod 755 \"$d/.git.new\"\nmv -f \"$d/.git.new\" \"$d/git\"\n")
	args[2] = script.String()
	out, err := run(ctx, r, "", commandTime, nil, []byte(guard), args...)
	if err != nil {
		return fmt.Errorf("set git up: %w", err)
	}
	if out.code != 0 {
		return out.failed("set git up in " + path.Dir(dir))
	}
	return nil
}
