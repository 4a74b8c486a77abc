#!/bin/bash
# Unpacks Debian trixie's podman (5.4.2) with all it needs into a root, once, and prints where that is.
#
#   podman5.sh              about ten seconds, 75 MB of downloads, 200 MB of disk; needs apt-get and a Debian mirror
#
# The root has /usr and /etc of a system that nobody has configured; to be mounted over a machine's own. It lies in
# $LAZURITE_CACHE (default: ~/.cache/lazurite) under a name derived from this script. Callers may run at the same time;
# one makes it, the others wait.
set -euo pipefail

SUITE=trixie
KEYRING=/usr/share/keyrings/debian-archive-keyring.gpg
# dash and coreutils: for the scripts that podman is told to run.
PACKAGES=(podman crun dash coreutils)

# shellcheck source=../images/mirror.sh
. "$(dirname "$0")/../images/mirror.sh"

die() { printf 'podman5.sh: error: %s\n' "$*" >&2; exit 1; }

cache=${LAZURITE_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/lazurite}
mkdir -p "$cache"
cache=$(cd "$cache" && pwd)
root=$cache/podman5-$(sha256sum <"$0" | cut -c1-12)

exec 9>"$cache/podman5.lock"
flock --timeout 600 9 || die "another one holds $cache/podman5.lock for 10 minutes"
if [ -e "$root/complete" ]; then
    echo "$root"
    exit
fi

echo "unpacking podman of Debian $SUITE; this happens once" >&2
work=$(mktemp -d "${TMPDIR:-/tmp}/lazurite-podman5.XXXXXX")
trap 'rm -rf --one-file-system "$work"' EXIT

# An apt of its own: it knows nothing to be installed, so it names everything that podman needs, libc included.
mkdir -p "$work"/{state/lists/partial,archives/partial}
touch "$work/status"
echo "deb [signed-by=$KEYRING] $(mirror) $SUITE main" >"$work/sources.list"
cat >"$work/apt.conf" <<APT
Dir::State "$work/state";
Dir::State::status "$work/status";
Dir::Cache "$work";
Dir::Cache::archives "archives";
Dir::Etc::SourceList "$work/sources.list";
Dir::Etc::SourceParts "/dev/null";
Dir::Etc::Preferences "/dev/null";
Dir::Etc::PreferencesParts "/dev/null";
APT::Install-Recommends "false";
APT::Sandbox::User "root";
Acquire::Languages "none";
Acquire::IndexTargets::deb::DEP-11::DefaultEnabled "false";
APT
apt() { APT_CONFIG="$work/apt.conf" apt-get -c "$work/apt.conf" --quiet --yes "$@" >"$work/log" 2>&1 ||
    { tail -n 5 "$work/log" >&2; die "apt-get $1 failed, see the lines above"; }; }
apt update
apt install --download-only "${PACKAGES[@]}"

rm -rf --one-file-system "$root"
mkdir -p "$root"/{etc,usr/{bin,sbin,lib,lib64}}
for dir in bin sbin lib lib64; do ln -s "usr/$dir" "$root/$dir"; done
for package in "$work"/archives/*.deb; do
    dpkg-deb --fsys-tarfile "$package" | tar --extract --directory="$root" --no-same-owner \
        --exclude='./usr/share/doc/*' --exclude='./usr/share/man/*' --exclude='./usr/share/locale/*' \
        --exclude='./usr/share/i18n/*'
done
ln -sf dash "$root/usr/bin/sh"
touch "$root/complete"
echo "$root"
