#!/bin/bash
# Builds the images that tests and the demonstration run, once, and prints where they are.
#
#   build.sh IMAGE...       busybox: one small layer                                             (seconds)
#                           torture: whiteouts, links, devices, attributes, strange names, ...   (seconds)
#                           python:  Debian with Python 3, by debootstrap                        (about two minutes)
#
# The printed directory holds
#   registry/               a docker-registry storage directory with IMAGE:plain and IMAGE:estargz
#   IMAGE/layers            the image's layers as uncompressed tars, lowest first, one absolute path a line
# It lies in $LAZURITE_CACHE (default: ~/.cache/lazurite) under a name derived from what decides its contents, so a
# change to these scripts builds anew. Callers may run at the same time; one builds, the others wait.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=../../scripts/stand.sh
. "$here/../../scripts/stand.sh"

cache=${LAZURITE_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/lazurite}
mkdir -p "$cache"
cache=$(cd "$cache" && pwd)

key() { sha256sum | cut -c1-12; }

busybox=$(command -v busybox) || die "busybox is missing; run scripts/setup.sh test"

# Debian's layers are the slow part; they are built anew only when the script that makes them changes.
debian_layers() {
    local out
    out=$cache/debian-$(key <"$here/debian.sh")
    [ -e "$out/complete" ] || "$here/debian.sh" "$out" || exit 1
    printf '%s\n' "$out/0-debian.tar" "$out/1-python.tar"
}

# An application on top, so that the image has a layer of its author's own.
python_layers() {
    local tree=$STAND/app
    mkdir -p "$tree/app"
    cat >"$tree/app/hello.py" <<'PYTHON'
import json, ssl, sqlite3, sys
print(json.dumps({"python": sys.version.split()[0], "ssl": ssl.OPENSSL_VERSION, "sqlite": sqlite3.sqlite_version}))
PYTHON
    tar --create --file="$1/2-app.tar" --directory="$tree" --sort=name --owner=0 --group=0 --numeric-owner \
        --mtime=@1700000000 --mode=u=rwX,go=rX app
    debian_layers
    echo "$1/2-app.tar"
}

image_layers() {
    case $1 in
    busybox | torture) python3 "$here/layers.py" "$1" "$2" "$busybox" ;;
    python) python_layers "$2" ;;
    *) die "no image is called $1; there are busybox, torture and python" ;;
    esac
}

# Conversion needs an image in a containerd, so plain goes registry -> containerd -> ctr-remote -> registry.
build() {
    local image=$1 out=$store/$1 command='["/bin/sh"]'
    say "building the image $image"
    rm -rf "$out"
    mkdir -p "$out"
    image_layers "$image" "$out" >"$STAND/$image.layers"
    [ "$image" != python ] || command='["/usr/bin/python3","/app/hello.py"]'
    mapfile -t tars <"$STAND/$image.layers"
    python3 "$here/layout.py" "$STAND/$image.oci" plain "$command" "${tars[@]}"
    {
        skopeo copy --preserve-digests --dest-tls-verify=false \
            "oci:$STAND/$image.oci:plain" "docker://$REGISTRY/$image:plain" &&
            ctr content fetch --plain-http "$REGISTRY/$image:plain" &&
            nice ctr-remote image convert --estargz --oci "$REGISTRY/$image:plain" "$REGISTRY/$image:estargz" &&
            ctr images push --plain-http "$REGISTRY/$image:estargz"
    } >"$STAND/convert.log" 2>&1 || { tail -n 5 "$STAND/convert.log" >&2; die "cannot make the image $image"; }
    mv "$STAND/$image.layers" "$out/layers"
}

[ $# -gt 0 ] || die "usage: build.sh busybox|torture|python ..."
store=$cache/images-$(cat "$here"/*.sh "$here"/*.py "$busybox" | key)
missing=()
exec 9>"$cache/lock"
flock --timeout 1200 9 || die "another build holds $cache/lock for 20 minutes"
for image in "$@"; do
    [ -e "$store/$image/layers" ] || missing+=("$image")
done
if [ ${#missing[@]} -gt 0 ]; then
    stand_open "$(mktemp -d "${TMPDIR:-/tmp}/lazurite-images.XXXXXX")"
    stand_registry "$store/registry"
    stand_containerd lazurite
    stand_namespace images
    for image in "${missing[@]}"; do build "$image"; done
fi
echo "$store"
