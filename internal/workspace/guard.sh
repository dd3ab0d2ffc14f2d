#!/bin/sh
# git, but for "pull" and "stash", by which agents lose work. Made by executord. It is a
# reminder and no lock: whoever wants to gets around it, by the path of the real git.
real=
IFS=:
for dir in $PATH; do
	if [ -x "$dir/git" ] && ! [ "$dir/git" -ef "$0" ]; then
		real=$dir/git
		break
	fi
done
unset IFS
if [ -z "$real" ]; then
	echo "git: not found" >&2
	exit 127
fi

refuse() {
	cat >&2 <<EOF
git $1 is refused here: it can lose work. Carry your work forward safely instead:
  1. git add -A && git commit -m "wip: snapshot before sync" --no-verify
  2. git fetch origin
  3. git rebase origin/<branch>     (first make a checkpoint: git branch checkpoint-<branch>-\$(date +%s))
Commits are permanent, a stash is not. Squash the "wip:" snapshots before the last push.
EOF
	exit 1
}

# stash tells apart what puts work away and what gets it back.
stash() {
	case "${1-}" in
	list | show | apply | pop | branch | -h | --help) ;;
	*) refuse stash ;;
	esac
}

skip=0
n=0
for argument; do
	n=$((n + 1))
	if [ "$skip" = 1 ]; then
		skip=0
		continue
	fi
	case "$argument" in
	-C | -c | --git-dir | --work-tree | --namespace | --super-prefix | --config-env | --attr-source) skip=1 ;;
	-*) ;;
	*) break ;;
	esac
	argument=
done
if [ -n "${argument-}" ]; then
	eval "next=\${$((n + 1))-}"
	case "$argument" in
	pull) case "$next" in -h | --help) ;; *) refuse pull ;; esac ;;
	stash) stash "$next" ;;
	add | am | apply | blame | branch | checkout | cherry-pick | clean | clone | commit | config | diff | fetch | grep | init | log | ls-files | merge | mv | push | rebase | remote | reset | restore | rev-list | rev-parse | revert | rm | show | status | submodule | switch | tag | worktree) ;;
	*)
		# It may be an alias. Only the one that git itself would use is asked for.
		alias=$("$real" config --get "alias.$argument" 2>/dev/null)
		case "$alias" in
		pull | pull[!a-z-]* | *'git pull'*) refuse pull ;;
		*'git stash'*) refuse stash ;;
		'stash list'* | 'stash show'* | 'stash apply'* | 'stash pop'* | 'stash branch'*) ;;
		stash | stash[!a-z-]*) refuse stash ;;
		esac
		;;
	esac
fi
exec "$real" "$@"
