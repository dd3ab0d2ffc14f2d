package cli

import (
	"github.com/spf13/cobra"

	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
)

// placementFlags say which engine makes a sandbox, and where.
type placementFlags struct {
	engine  string
	gpu     string
	regions []string
	runtime string
}

func (f *placementFlags) bind(cmd *cobra.Command) {
	flags := cmd.Flags()
	flags.StringVar(&f.engine, "engine", "", "engine of the sandbox, such as local or modal (default the server's; see admin info)")
	flags.StringVar(&f.gpu, "gpu", "", "GPU of the sandbox, such as A100 or T4:2, where the engine has them")
	flags.StringArrayVar(&f.regions, "region", nil, "region that the sandbox may run in, where the engine has them; may be repeated")
	flags.StringVar(&f.runtime, "runtime", "", "what isolates the sandbox, such as gvisor or vm, where the engine has a choice")
	completeWith(cmd, "engine", "local", "modal")
	completeWith(cmd, "runtime", "gvisor", "vm")
}

// placement is what the flags say; nil if they say nothing.
func (f *placementFlags) placement() *executorv1.Placement {
	if f.gpu == "" && len(f.regions) == 0 && f.runtime == "" {
		return nil
	}
	return &executorv1.Placement{Gpu: f.gpu, Regions: f.regions, Runtime: f.runtime}
}
