# Everything that the agent is told it has is there, and starts.
failed=0
show() {
  name=$1
  shift
  if out=$("$@" 2>/tmp/stderr) && [ -n "$out" ]; then echo "$name: ${out%%$'\n'*}"; else
    echo "$name does not start: $(tail -c 300 /tmp/stderr)" >&2
    failed=1
  fi
}
show OpenCode opencode --version
show Node.js node --version
show npm npm --version
show pnpm pnpm --version
show corepack corepack --version
show Python python3 --version
show git git --version
show gh gh --version
show ripgrep rg --version
show fd fd --version
show jq jq --version
show make make --version
show compiler g++ --version
show Chromium chromium --headless --no-sandbox --version
for server in @modelcontextprotocol/server-memory/dist/index.js @modelcontextprotocol/server-filesystem/dist/index.js @playwright/mcp/cli.js \
  chrome-devtools-mcp/build/src/bin/chrome-devtools-mcp.js @sentry/mcp-server/dist/index.js @houtini/gemini-mcp/dist/cli.js mcp-remote/dist/proxy.js; do
  [ -e "/opt/harvest/node_modules/$server" ] || { echo "$server is missing" >&2; failed=1; }
done
# What the programs left by being started.
rm -rf /root/.cache /root/.local/share/opencode /root/.local/state/opencode /root/.npm /tmp/* /tmp/.[!.]*
exit $failed
