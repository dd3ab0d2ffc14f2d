package provision

import (
	"bytes"
	"context"
	"fmt"
	"strconv"
	"strings"

	"github.com/harvest-run/executord/internal/agent"
	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/session"
	"github.com/harvest-run/executord/internal/workspace"
	"github.com/harvest-run/executord/internal/workspace/memory"
)

// bundleDir is where work is put in a sandbox that cannot be pushed. It is kept with the
// snapshot of that.
const bundleDir = "/root/.harvest/saved/"

// Plan implements session.Workspace.
func (p *Provisioner) Plan(all []session.Repository) ([]session.Repository, error) {
	in := make([]workspace.Repository, len(all))
	for i, r := range all {
		in[i] = workspace.Repository{URL: full(r.URL), Branch: r.Branch, Depth: r.Depth, Name: r.Directory}
	}
	planned, err := workspace.Plan(in, p.cfg.Plain)
	if err != nil {
		return nil, err
	}
	out := make([]session.Repository, len(all))
	for i, r := range planned {
		out[i] = session.Repository{URL: r.URL, Branch: r.Branch, Depth: r.Depth, Directory: r.Name}
	}
	return out, nil
}

// full is the URL that the short form owner/name stands for.
func full(text string) string {
	if owner, name, ok := strings.Cut(text, "/"); ok && !strings.ContainsAny(text, ":@") && owner != "" && !strings.Contains(name, "/") {
		return "https://" + gitHub + "/" + text
	}
	return text
}

// Configure implements session.Workspace.
func (p *Provisioner) Configure(ctx context.Context, sb engine.Sandbox, id session.Identity, repositories []session.Repository) error {
	brokers, err := p.gitBrokers(repositories)
	if err != nil {
		return err
	}
	return workspace.Configure(ctx, p.guest(sb), workspace.Setup{Identity: p.identity(id), Brokers: brokers})
}

func (p *Provisioner) identity(id session.Identity) workspace.Identity {
	if id.Name == "" {
		id.Name = p.cfg.Identity.Name
	}
	if id.Email == "" {
		id.Email = p.cfg.Identity.Email
	}
	return workspace.Identity{Name: id.Name, Email: id.Email}
}

// Clone implements session.Workspace.
func (p *Provisioner) Clone(ctx context.Context, sb engine.Sandbox, r session.Repository, tell func(session.Progress)) (session.Checkout, error) {
	made, err := workspace.Clone(ctx, p.guest(sb), workspace.Root, workspace.Repository{URL: r.URL, Branch: r.Branch, Depth: r.Depth, Name: r.Directory},
		func(step workspace.Progress) {
			tell(session.Progress{Text: step.Phase, Percent: step.Percent})
		})
	return session.Checkout{URL: r.URL, Path: workspace.Root + "/" + r.Directory, Branch: made.Branch, Commit: made.Head}, err
}

// MemoryVolume implements session.Workspace.
func (p *Provisioner) MemoryVolume(r session.Repository) string {
	remote, err := workspace.ParseURL(r.URL, p.cfg.Plain)
	if err != nil {
		return "" // it was planned, and so is good
	}
	return memory.VolumeName(remote)
}

// memoryOf is the memory in a sandbox.
func (p *Provisioner) memoryOf(ctx context.Context, sb engine.Sandbox) (*memory.Memory, error) {
	return memory.Open(ctx, memory.Config{Runner: p.guest(sb), Session: sb.ID()})
}

// OpenMemory implements session.Workspace.
func (p *Provisioner) OpenMemory(ctx context.Context, sb engine.Sandbox) error {
	_, err := p.memoryOf(ctx, sb)
	return err
}

// CommitMemory implements session.Workspace.
func (p *Provisioner) CommitMemory(ctx context.Context, sb engine.Sandbox, last bool) error {
	m, err := p.memoryOf(ctx, sb)
	if err != nil {
		return err
	}
	if last {
		return m.Close(ctx)
	}
	_, err = m.Commit(ctx)
	return err
}

// Save implements session.Workspace.
func (p *Provisioner) Save(ctx context.Context, sb engine.Sandbox, c session.Checkout, ref string, id session.Identity) (session.SavedWork, bool, error) {
	tree := workspace.Tree{Runner: p.guest(sb), Dir: c.Path}
	name := ref[strings.LastIndex(ref, "/")+1:]
	saved, err := tree.SaveWork(ctx, workspace.SaveOptions{
		Session: name, Who: p.identity(id), Bundle: bundleDir + strings.ReplaceAll(strings.TrimPrefix(c.Path, "/"), "/", "-") + ".bundle",
	})
	if err != nil {
		return session.SavedWork{}, false, err
	}
	work := session.SavedWork{}
	if len(saved.Refs) > 0 {
		work.Commit = saved.Refs[0].Commit
	}
	if saved.Remote != "" {
		work.Ref = ref
	}
	work.Detail = savedDetail(saved)
	return work, saved.Bundle == "" && saved.LeftCount == 0, nil
}

// savedDetail tells what was saved, and what was not.
func savedDetail(s workspace.Saved) string {
	var text []string
	if n := len(s.Refs); n > 1 {
		text = append(text, fmt.Sprintf("%d branches", n))
	}
	if s.PushError != "" {
		text = append(text, "it could not be pushed: "+s.PushError)
	}
	if s.Bundle != "" {
		text = append(text, "it is in the sandbox's "+s.Bundle)
	}
	if s.LeftCount > 0 {
		text = append(text, fmt.Sprintf("%d files were not saved by git, the first is %s (%s)", s.LeftCount, s.Left[0].Path, s.Left[0].Reason))
	}
	return strings.Join(text, "; ")
}

// maxDiff bounds the patches of a diff, in bytes.
const maxDiff = 1 << 20

// Diff implements session.Workspace.
func (p *Provisioner) Diff(ctx context.Context, sb engine.Sandbox, c session.Checkout) (session.RepositoryDiff, error) {
	tree := workspace.Tree{Runner: p.guest(sb), Dir: c.Path}
	status, err := tree.Status(ctx)
	if err != nil {
		return session.RepositoryDiff{}, err
	}
	out := session.RepositoryDiff{Path: c.Path, Branch: status.Branch}
	for _, u := range status.Unpushed {
		out.Unpushed += u.Commits
	}
	patch, err := tree.Diff(ctx, c.Commit)
	if err != nil {
		return session.RepositoryDiff{}, err
	}
	out.Truncated = len(patch) > maxDiff
	out.Files = splitPatch(patch[:min(len(patch), maxDiff)])
	return out, nil
}

// splitPatch makes a patch into those of its files.
func splitPatch(patch []byte) []agent.FileDiff {
	var files []agent.FileDiff
	for len(patch) > 0 {
		next := bytes.Index(patch[1:], []byte("\ndiff --git "))
		piece := patch
		if next >= 0 {
			piece, patch = patch[:next+2], patch[next+2:]
		} else {
			patch = nil
		}
		files = append(files, filePatch(string(piece)))
	}
	return files
}

// filePatch reads what git says of one file.
func filePatch(text string) agent.FileDiff {
	f := agent.FileDiff{Change: agent.FileModified, Patch: strings.ToValidUTF8(text, "\uFFFD")}
	inHunk := false
	for line := range strings.SplitSeq(text, "\n") {
		switch {
		case strings.HasPrefix(line, "@@"):
			inHunk = true
		case inHunk && strings.HasPrefix(line, "+"):
			f.Additions++
		case inHunk && strings.HasPrefix(line, "-"):
			f.Deletions++
		case inHunk:
		case strings.HasPrefix(line, "new file mode"):
			f.Change = agent.FileAdded
		case strings.HasPrefix(line, "deleted file mode"):
			f.Change = agent.FileDeleted
		case strings.HasPrefix(line, "+++ ") || strings.HasPrefix(line, "--- ") && f.Path == "":
			if name := gitName(line[4:]); name != "" {
				f.Path = name
			}
		case strings.HasPrefix(line, "rename to "):
			f.Path = gitName("b/" + line[len("rename to "):])
		case strings.HasPrefix(line, "diff --git ") && f.Path == "":
			if i := strings.LastIndex(line, " b/"); i > 0 {
				f.Path = line[i+3:]
			}
		}
	}
	return f
}

// gitName reads a name as git writes it in a patch; "" for /dev/null.
func gitName(text string) string {
	text = strings.TrimSuffix(text, "\t")
	if strings.HasPrefix(text, `"`) {
		if plain, err := strconv.Unquote(text); err == nil {
			text = plain
		}
	}
	if text == "/dev/null" {
		return ""
	}
	_, name, _ := strings.Cut(text, "/")
	return name
}
