#!/bin/bash
# Starts one program from one image three ways and compares: eagerly with overlayfs, lazily with Lazurite fetching
# only what is read, and lazily with Lazurite as it is configured by default (the rest arrives in the background).
#
#   demo.sh LAZURITE_BINARY
#
# Everything is real and private: containerd, runc, docker-registry and Debian with Python as an eStargz image, under a
# temporary directory that is removed at the end. All three ways pull the same image from the same registry into
# separate namespaces, with the page cache dropped before each. Bytes are counted in the registry's access log.
set -euo pipefail

[ $# = 1 ] || { echo "usage: demo.sh LAZURITE_BINARY" >&2; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
binary=$(realpath "$1")
[ "$(id -u)" = 0 ] || exec sudo --preserve-env=LAZURITE_CACHE "$0" "$binary"
# shellcheck source=stand.sh
. "$here/stand.sh"
PATH=$PATH:/usr/sbin:/sbin

[ -x "$binary" ] || die "there is no program $binary; build it with 'make build'"
[ -c /dev/fuse ] || die "/dev/fuse is missing: load the kernel module fuse ('modprobe fuse')"

PROGRAM='import json, ssl, sqlite3, asyncio, sys
print(json.dumps({"python": sys.version.split()[0], "ssl": ssl.OPENSSL_VERSION, "sqlite": sqlite3.sqlite_version}))'

images=$("$here/../tests/images/build.sh" python)
stand_open "$(mktemp -d "${TMPDIR:-/tmp}/lazurite-demo.XXXXXX")"
cp -r --reflink=auto "$images/registry" "$STAND/storage"
stand_registry "$STAND/storage"
stand_containerd lazurite ondemand
echo 'no_background_fetch = true' >"$STAND/ondemand.toml"
stand_lazurite lazurite "$binary"
stand_lazurite ondemand "$binary" --config "$STAND/ondemand.toml"
image=$REGISTRY/python:estargz

now() { echo "${EPOCHREALTIME/[.,]/}"; } # microseconds
seconds() { awk -v us="$1" 'BEGIN { printf "%.2f s", us / 1e6 }'; }

pull_overlayfs() { stand_pull_eagerly "$image"; }
pull_lazurite() { pull_lazily lazurite; }
pull_ondemand() { pull_lazily ondemand; }
pull_lazily() {
    "$binary" pull --plain-http --json --snapshotter "$1" "$image" >"$STAND/$1.json" 2>"$STAND/pull.log" ||
        { cat "$STAND/pull.log" >&2; die "lazurite pull failed"; }
}

# measure SNAPSHOTTER: sets pulled, ran (microseconds) and the registry's byte count before.
measure() {
    local start
    stand_namespace "$1"
    sync
    echo 3 2>/dev/null >/proc/sys/vm/drop_caches || say "cannot drop the page cache: the comparison favours later runs"
    before=$(registry_bytes)
    start=$(now)
    "pull_$1"
    pulled=$(($(now) - start))
    # The shim writes the output to a file; through ctr the last line can get lost on a busy machine.
    ctr run --rm --snapshotter "$1" --log-uri "file://$STAND/$1.out" "$image" "demo-$1" \
        /usr/bin/python3 -c "$PROGRAM" || die "the container failed: $(cat "$STAND/$1.out")"
    ran=$(($(now) - start - pulled))
    finished=$(now)
}

row() {
    local fetched=$(($(registry_bytes) - before))
    printf '%-28s %8s %8s %8s %14s %5d %%%s\n' "$1" "$(seconds "$pulled")" "$(seconds "$ran")" \
        "$(seconds $((pulled + ran)))" "$(mib "$fetched")" $((100 * fetched / image_bytes)) "${2:-}"
}

# The blobs of the image's layers that containerd holds in the current namespace.
layer_blobs() { ctr content ls -q | grep -cFf "$STAND/layers" || true; }

# Whether every layer is on disk. A lazy layer's link leads into the mount, where a file says how much of it is here;
# a link that leads elsewhere leads to a complete one.
all_local() {
    local fs digest state
    for fs in "$STAND"/lazurite/snapshots/*/fs; do
        case $(readlink "$fs") in */mnt/*) ;; *) continue ;; esac
        state=
        while read -r digest; do
            state+=$(cat "$fs/.stargz-snapshotter/$digest.json" 2>/dev/null || true)
        done <"$STAND/layers"
        [[ $state =~ \"fetchedPercent\":\ *100(\.0)?[,}] ]] || return 1
    done
}

measure overlayfs
ctr content get "$(ctr images ls "name==$image" | awk 'NR == 2 { print $3 }')" >"$STAND/manifest.json"
python3 - "$STAND/manifest.json" >"$STAND/sizes" 3>"$STAND/layers" <<'PYTHON'
import json, os, sys
with open(sys.argv[1], "rb") as file:
    data = file.read()
manifest = json.loads(data)
print(len(data) + manifest["config"]["size"] + sum(layer["size"] for layer in manifest["layers"]))
with os.fdopen(3, "w") as layers:
    print("\n".join(layer["digest"] for layer in manifest["layers"]), file=layers)
PYTHON
image_bytes=$(cat "$STAND/sizes")
[ "$(layer_blobs)" != 0 ] || die "the eager pull has left no layer in the content store; the check for lazy ones is void"

mib() { awk -v bytes="$1" 'BEGIN { printf "%.1f MiB", bytes / 1048576 }'; }
echo
echo "Debian with Python: $(wc -l <"$STAND/layers") layers, $(mib "$image_bytes") compressed, in a registry on this machine."
echo "The program imports a few modules and prints a line."
echo
printf '%-28s %8s %8s %8s %14s %7s\n' '' pull run total 'from registry' 'of all'
row 'eager, overlayfs'
measure ondemand
row 'lazy, only what is read'
[ "$(layer_blobs)" = 0 ] || die "a layer was downloaded whole by a lazy pull"
measure lazurite
[ "$(layer_blobs)" = 0 ] || die "a layer was downloaded whole by a lazy pull"
wait_until 60 "the background download" all_local
row 'lazy, rest in background' ", all local $(seconds $(($(now) - finished))) later"
for way in ondemand lazurite; do
    cmp -s "$STAND/overlayfs.out" "$STAND/$way.out" || die "the container printed something else under $way"
done
echo
echo "the container said $(cat "$STAND/overlayfs.out")"
python3 - "$STAND/lazurite.json" <<'PYTHON'
import json, sys
with open(sys.argv[1], "rb") as file:
    layers = json.load(file)["layers"]
for layer in layers:
    reason = f" ({layer['reason']})" if layer.get("reason") else ""
    print(f"layer {layer['digest'][:19]}  {layer['size'] / 1024:8.1f} KiB  {layer['outcome']}{reason}")
if any(layer["outcome"] != "lazy" for layer in layers):
    sys.exit("demo.sh: error: not every layer was taken lazily")
PYTHON
