package cli

import (
	"context"
	"encoding/json"
	"fmt"
	"runtime"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/harvest-run/executord/client"
	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
)

func (a *app) adminCommand() *cobra.Command {
	return group("admin", "See what the server is and does", nil, a.adminInfo())
}

func (a *app) adminInfo() *cobra.Command {
	cmd := formats(&cobra.Command{
		Use:   "info",
		Short: "Show the server's version, load, defaults and engines",
		Args:  none,
	}, "table", "json", "yaml")
	cmd.RunE = a.call(func(ctx context.Context, c *client.Client, _ []string) error {
		info, err := c.Admin().GetServerInfo(ctx, &executorv1.GetServerInfoRequest{})
		if err != nil {
			return fmt.Errorf("get the server's info: %w", err)
		}
		if a.format != "table" {
			text, err := protoJSON(info)
			if err != nil {
				return err
			}
			return a.document(text)
		}
		rows := [][]string{
			{"address", a.address},
			{"version", info.GetVersion()},
			{"go", info.GetGoVersion()},
			{"started", formatTime(info.GetStartTime())},
			{"state", serving(info)},
			{"executions", fmt.Sprintf("%d running", info.GetRunningExecutions())},
			{"sessions", fmt.Sprintf("%d running", info.GetRunningSessions())},
			{"limits", formatLimits(info.GetDefaultLimits())},
			{"stored", formatStored(info)},
		}
		if a := info.GetAdmission(); a != nil { // an older server does not tell
			rows = append(rows, []string{"admission", fmt.Sprintf("%d of %d executions, %d of %d sandboxes, %d of %d waiting for at most %v",
				a.GetRunning(), a.GetMaxRunning(), a.GetSandboxes(), a.GetMaxSandboxes(), a.GetQueued(), a.GetMaxQueued(), a.GetMaxQueueWait().AsDuration())})
		}
		if p := info.GetWarmPool(); p.GetSize() > 0 {
			rows = append(rows, []string{"pool", fmt.Sprintf("%d ready, %d of each kind wanted, %d hits, %d misses", p.GetReady(), p.GetSize(), p.GetHits(), p.GetMisses())})
		}
		for _, e := range info.GetEngines() {
			rows = append(rows, []string{"engine " + e.GetName(), fmt.Sprintf("isolation %s, %d sandboxes", e.GetIsolation(), e.GetSandboxes())})
			for _, c := range e.GetCapabilities() {
				there := "yes"
				if !c.GetAvailable() {
					there = "no"
				}
				if c.GetDetail() != "" {
					there += ": " + c.GetDetail()
				}
				rows = append(rows, []string{"  " + c.GetName(), there})
			}
		}
		return a.table(rows)
	})
	return cmd
}

func serving(info *executorv1.GetServerInfoResponse) string {
	if info.GetDraining() {
		return "draining: it is stopping and takes no new work"
	}
	return "serving"
}

func (a *app) doctorCommand() *cobra.Command {
	var on string
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "Check that the server is there and can do what it should",
		Long: `Check that the server is there and what it can do on its host. Exits with 0 if
nothing essential is missing: sandboxes, the limits of memory and processes, no
network, and Python. What else is missing is refused by the server when it is asked
for.

With --engine, only of that engine; for one elsewhere also what it needs there:
credentials, app, image, secrets. The server asks its provider, which takes seconds.`,
		Args: none,
	}
	cmd.Flags().StringVar(&on, "engine", "", "check this engine, such as modal")
	completeWith(cmd, "engine", "local", "modal")
	cmd.RunE = a.call(func(ctx context.Context, c *client.Client, _ []string) error {
		info, err := c.Admin().GetServerInfo(ctx, &executorv1.GetServerInfoRequest{CheckEngine: on})
		if client.Unavailable(err) {
			hint := "run executord doctor on its host, or start it: make up, or executord serve"
			if on != "" {
				hint = "run executord doctor --engine " + on + " on its host, or start it: executord serve --engine " + on
			}
			return hinted{fmt.Errorf("no executord answers at %s: %w", a.address, err), hint}
		}
		if err != nil {
			return fmt.Errorf("get the server's info: %w", err)
		}
		if on != "" {
			info.Engines = slices.DeleteFunc(info.GetEngines(), func(e *executorv1.Engine) bool { return e.GetName() != on })
		}
		return a.diagnose(info)
	})
	return cmd
}

// essential are the capabilities without which code of strangers cannot be run as
// promised. limit.cpu is not one of them: without it a program only slows the
// others down. For the rest the server has other ways, or refuses what needs them.
func essential() []string {
	return []string{"sandbox", "limit.memory", "limit.pids", "network.none", "language.python"}
}

// needed says whether an engine is of no use without something. An engine elsewhere has no
// host of ours to protect from too many processes; what it makes itself when that is
// needed may be missing.
func needed(engine, name string, check bool) bool {
	switch {
	case check:
		return name != "app" && name != "image"
	case engine != "local" && name == "limit.pids":
		return false
	}
	return slices.Contains(essential(), name)
}

// diagnose prints what is there and what is not. The error is exit status 1 if something
// essential is missing.
func (a *app) diagnose(info *executorv1.GetServerInfoResponse) error {
	rows := [][]string{{"ok", "server", fmt.Sprintf("%s at %s, %s", info.GetVersion(), a.address, serving(info))}}
	var missing []string
	if info.GetDraining() {
		rows[0][0] = "missing"
		missing = append(missing, "server")
	}
	if len(info.GetEngines()) == 0 {
		rows = append(rows, []string{"missing", "engine", "there is none"})
		missing = append(missing, "engine")
	}
	for _, e := range info.GetEngines() {
		rows = append(rows, []string{"ok", "engine " + e.GetName(), "isolation " + e.GetIsolation()})
		for i, c := range slices.Concat(e.GetChecks(), e.GetCapabilities()) {
			state := "ok"
			if !c.GetAvailable() {
				state = "missing"
				if needed(e.GetName(), c.GetName(), i < len(e.GetChecks())) {
					missing = append(missing, c.GetName())
				}
			}
			rows = append(rows, []string{state, c.GetName(), c.GetDetail()})
			if !c.GetAvailable() && c.GetRemedy() != "" {
				rows = append(rows, []string{" ", " ", "remedy: " + c.GetRemedy()})
			}
		}
	}
	if err := a.table(rows); err != nil {
		return err
	}
	if len(missing) > 0 {
		a.say("essential and missing: %s", strings.Join(missing, ", "))
		return exitStatus(exitFailure)
	}
	return nil
}

func (a *app) versionCommand() *cobra.Command {
	cmd := formats(&cobra.Command{
		Use:   "version",
		Short: "Show the version of executorctl",
		Long:  "Show the version of executorctl. That of the server is in admin info.",
		Args:  none,
	}, "table", "json", "yaml")
	cmd.RunE = func(*cobra.Command, []string) error {
		platform := runtime.GOOS + "/" + runtime.GOARCH
		if a.format == "table" {
			return a.line(fmt.Appendf(nil, "executorctl %s %s %s", client.Version(), runtime.Version(), platform))
		}
		text, err := json.Marshal(map[string]string{"version": client.Version(), "go_version": runtime.Version(), "platform": platform})
		if err != nil {
			return fmt.Errorf("write JSON: %w", err)
		}
		return a.document(text)
	}
	return cmd
}
