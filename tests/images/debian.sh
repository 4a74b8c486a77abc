#!/bin/bash
# Makes the two layers of Debian with Python 3 that the image `python` stands on.
#
#   debian.sh OUT_DIR       writes 0-debian.tar (the minimal system), 1-python.tar and, last, the mark `complete`
#
# Needs root and a Debian mirror; takes about a minute and a half. The same state of the mirror gives the same tars:
# names sorted, owners by number, whole seconds, and times that the build itself made are clamped to the date of the
# archive's release. Files from packages keep the times they have.
set -euo pipefail

# shellcheck source=mirror.sh
. "$(dirname "$0")/mirror.sh"

SUITE=bookworm
KEYRING=/usr/share/keyrings/debian-archive-keyring.gpg
PATH=$PATH:/usr/sbin:/sbin

die() { printf 'debian.sh: error: %s\n' "$*" >&2; exit 1; }

pack() {
    local tar=$1
    shift
    tar --create --file="$tar" --directory="$tree" --sort=name --numeric-owner --xattrs \
        --format=posix --pax-option=delete=atime,delete=ctime,delete=mtime,exthdr.name=%d/PaxHeaders/%f \
        --clamp-mtime --mtime="@$released" "$@"
}

[ $# = 1 ] || die "usage: debian.sh OUT_DIR"
[ "$(id -u)" = 0 ] || die "debootstrap needs root"
out=$1
mkdir -p "$out"
work=$(mktemp -d "${TMPDIR:-/tmp}/lazurite-debian.XXXXXX")
trap 'rm -rf --one-file-system "$work"' EXIT
tree=$work/tree

echo "building Debian $SUITE with Python 3 by debootstrap; this happens once" >&2
# A mount namespace of its own: what debootstrap mounts inside the tree cannot outlive it.
unshare --mount nice debootstrap --variant=minbase --include=python3 --keyring="$KEYRING" \
    "$SUITE" "$tree" "$(mirror)" >"$work/log" 2>&1 ||
    { tail -n 5 "$work/log" >&2; die "debootstrap failed, see the lines above"; }
released=$(date -d "$(sed -n 's/^Date: //p' "$tree"/var/lib/apt/lists/*Release | head -n 1)" +%s)

# What debootstrap copied from this machine, and caches no image ships.
: >"$tree/etc/resolv.conf"
echo debian >"$tree/etc/hostname"
echo "deb $DEFAULT_MIRROR $SUITE main" >"$tree/etc/apt/sources.list"
sed -i -E 's/^([^:]*:[^:]*:)[0-9]+/\119000/' "$tree/etc/shadow"
find "$tree"/{dev,proc,sys,run,tmp,var/cache/apt,var/cache/ldconfig,var/lib/apt/lists,var/log} -mindepth 1 -delete
rm -f "$tree"/etc/{shadow-,passwd-,group-,gshadow-,machine-id}

# The upper layer first; what it holds is then missing from the lower one.
(cd "$tree" && ls -d usr/bin/{python3,py3,pydoc3}* usr/lib/python3* usr/share/python3) >"$work/python"
pack "$out/1-python.tar" --files-from="$work/python"
(cd "$tree" && xargs rm -r) <"$work/python"
pack "$out/0-debian.tar" .
touch "$out/complete"
