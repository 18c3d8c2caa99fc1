# shellcheck shell=bash
# Shared by the scripts of this folder; sourced by them, not run.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PATH="$root/build/venv/bin:$HOME/.cargo/bin:$PATH"

# One compiler cache for all presets and clones: paths under the repository are hashed relative to it. Debug information
# names files relative to the build folder then, which is what the sanitizers print.
export CCACHE_BASEDIR=$root CCACHE_NOHASHDIR=1
export CCACHE_DIR=${CCACHE_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/ccache}
export CCACHE_MAXSIZE=${CCACHE_MAXSIZE:-5G}

say() { printf '\n== %s\n' "$*"; }

die() {
  printf '%s: %s\n' "${0##*/}" "$*" >&2
  exit 1
}

# Compile jobs: one a core, but no more than one for each 2 GiB of memory that is free (the largest units take that).
parallel_jobs() {
  local cores free_kib by_memory
  cores=$(nproc)
  free_kib=$(awk '/^MemAvailable:/ {print $2}' /proc/meminfo)
  by_memory=$((free_kib / (2 * 1024 * 1024)))
  if ((by_memory < 1)); then by_memory=1; fi
  echo $((cores < by_memory ? cores : by_memory))
}

# Runs a command as root: directly, or through sudo.
as_root() {
  if ((EUID == 0)); then
    "$@"
  elif command -v sudo >/dev/null; then
    sudo "$@"
  else
    die "needs root or sudo to run: $*"
  fi
}

# Installs those of the named Debian packages that are missing. Does nothing, and needs no root, when all are there.
apt_install() {
  local package missing=()
  command -v dpkg-query >/dev/null ||
    die "no dpkg here: the packages are installed on Debian 12 (or a system made from it) only; elsewhere install the
equivalents of scripts/packages.txt and build by hand (README.md)"
  for package in "$@"; do
    [[ $(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null) == installed ]] || missing+=("$package")
  done
  if ((${#missing[@]} == 0)); then return; fi
  echo "installing ${missing[*]}"
  as_root env DEBIAN_FRONTEND=noninteractive apt-get -q -o DPkg::Lock::Timeout=300 update
  as_root env DEBIAN_FRONTEND=noninteractive \
    apt-get -qq -o DPkg::Lock::Timeout=300 install -y --no-install-recommends "${missing[@]}"
}

# Creates build/venv, the Python environment of the tools and tests.
ensure_venv() {
  [[ -x $root/build/venv/bin/pip ]] || python3 -m venv "$root/build/venv"
}
