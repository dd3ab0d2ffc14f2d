# Installs from Debian what the sandbox does not have already. On the local engine that is the
# host's own /usr, so little is missing on a host with developers' tools.

missing=()
need() { command -v "$1" >/dev/null || missing+=("$2"); }
need git git
need curl curl
need python3 python3
need npm npm
need node nodejs
need rg ripgrep
need fdfind fd-find
need jq jq
need gh gh
need make build-essential
need g++ build-essential
need chromium chromium
need ps procps
need less less
need patch patch
need file file
need xz xz-utils
need unzip unzip
[ -e /usr/share/fonts/truetype/liberation ] || [ -e /usr/share/fonts/truetype/dejavu ] || missing+=(fonts-liberation)
[ -e /etc/ssl/certs/ca-certificates.crt ] || missing+=(ca-certificates)

read -ra more <<<"$PACKAGES"
missing+=("${more[@]}")

. /etc/os-release
if ! command -v apt-get >/dev/null || [ "${ID:-}" != debian ]; then
  if [ ${#missing[@]} -gt 0 ]; then
    echo "This is ${PRETTY_NAME:-no Debian}, for which executord installs no packages. On the local engine, install these" >&2
    echo "on the host (Debian's names): ${missing[*]}" >&2
    exit 1
  fi
  exit 0
fi

# apt and dpkg are the host's; what they keep in /var and /etc is made here. Nobody else is
# in the sandbox that downloads would have to be kept apart from.
mkdir -p /var/lib/dpkg/info /var/lib/dpkg/updates /var/lib/dpkg/triggers /var/lib/dpkg/alternatives /var/lib/dpkg/parts \
  /etc/apt/apt.conf.d /etc/apt/preferences.d /etc/apt/trusted.gpg.d /var/cache/apt/archives/partial /var/lib/apt/lists/partial /var/log/apt
[ -e /var/lib/dpkg/status ] || : >/var/lib/dpkg/status
cat >/etc/apt/apt.conf.d/10executord <<'EOF'
APT::Sandbox::User "root";
APT::Install-Recommends "false";
Acquire::Languages "none";
Acquire::Retries "3";
EOF
if [ ! -e /etc/apt/sources.list ] && [ ! -e /etc/apt/sources.list.d/debian.sources ]; then
  for suite in "debian $VERSION_CODENAME" "debian $VERSION_CODENAME-updates" "debian-security $VERSION_CODENAME-security"; do
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $DEBIAN_MIRROR/$suite main"
  done >/etc/apt/sources.list
fi
# Of packages of the host only the names are known: dpkg warns of each that has no list of its
# files.
dpkg-query -W -f '${Package} ${Architecture} ${Multi-Arch}\n' | while read -r package arch multi; do
  list=/var/lib/dpkg/info/$package.list
  [ "$multi" = same ] && list=/var/lib/dpkg/info/$package:$arch.list
  [ -e "$list" ] || : >"$list"
done

export DEBIAN_FRONTEND=noninteractive
if [ ${#missing[@]} -gt 0 ]; then
  echo "installing: ${missing[*]}"
  if [ -n "$CACHE" ]; then
    apt-get install -y --no-install-recommends --no-download "$CACHE"/apt/*.deb
  else
    apt-get update
    apt-get install -y --no-install-recommends "${missing[@]}"
  fi
fi
# What the triggers of the host's packages would do.
ldconfig
if command -v fc-cache >/dev/null; then fc-cache; fi
rm -rf /var/cache/apt/archives/*.deb /var/cache/apt/*.bin /var/lib/apt/lists/*
mkdir -p /var/lib/apt/lists/partial
