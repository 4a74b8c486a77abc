#!/bin/bash
# Measures what is claimed, beside a peer in the same run, and writes bench/results.md and bench/results.json.
#
#   bench.sh LAZURITE_BINARY [SECTION...]      sections: convert (all if none is named)
#
# convert: an image of Debian with Python to eStargz, out of a containerd's content store and into it, by this program and
#          by ctr-remote; and one layer of 4 GiB, for the memory it takes. The peer runs once, for it takes long; this
#          program runs three times and the median counts.
set -euo pipefail

[ $# -ge 1 ] || { echo "usage: bench.sh LAZURITE_BINARY [SECTION...]" >&2; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
binary=$(realpath "$1")
shift
[ "$(id -u)" = 0 ] || exec sudo --preserve-env=LAZURITE_CACHE "$0" "$binary" "$@"
# shellcheck source=stand.sh
. "$here/stand.sh"
PATH=$PATH:/usr/sbin:/sbin
[ -x "$binary" ] || die "there is no program $binary; build it with 'make build'"
sections=("$@")
[ ${#sections[@]} -gt 0 ] || sections=(convert)

out=$here/../bench
mkdir -p "$out"
images=$("$here/../tests/images/build.sh" python)
stand_open "$(mktemp -d "${TMPDIR:-/tmp}/lazurite-bench.XXXXXX")"

# measured NAME COMMAND...: runs it and appends its figures, wall and CPU seconds and the peak of memory, as one line of JSON.
measured() {
    say "running $1"
    python3 - "$@" 3>>"$STAND/figures" >"$STAND/command.log" 2>&1 <<'PYTHON' || { tail -n 20 "$STAND/command.log" >&2; die "$1 failed"; }
import json, os, resource, subprocess, sys, time
name, command = sys.argv[1], sys.argv[2:]
begun = time.monotonic()
status = subprocess.run(command, stdin=subprocess.DEVNULL).returncode
used = resource.getrusage(resource.RUSAGE_CHILDREN)
figures = {"name": name, "wall_s": round(time.monotonic() - begun, 3), "cpu_s": round(used.ru_utime + used.ru_stime, 3),
           "peak_mib": round(used.ru_maxrss / 1024, 1)}
if status == 0:
    with os.fdopen(3, "w") as out:
        out.write(json.dumps(figures) + "\n")
sys.exit(status)
PYTHON
}

# The sum of the sizes of an image's layers, from the manifest in the content store.
layer_bytes() {
    ctr content get "$(ctr images ls "name==$1" | awk 'NR == 2 { print $3 }')" |
        python3 -c 'import json, sys; print(sum(layer["size"] for layer in json.load(sys.stdin)["layers"]))'
}

# One file of 4 GiB, a plain tar, half of it from real programs and half noise, in an OCI layout.
big_image() {
    python3 - "$1" "$2" <<'PYTHON'
import hashlib, io, json, os, random, sys, tarfile
root, sample = sys.argv[1:]
blobs = os.path.join(root, "blobs", "sha256")
os.makedirs(blobs)
with open(sample, "rb") as file:
    text = file.read(64 << 20)
class Content(io.RawIOBase):
    """Pieces of the sample and of noise in turn, never the same piece at the same distance twice."""
    def __init__(self, size):
        self.left, self.random = size, random.Random(4)
    def read(self, size=-1):
        size = min(size, self.left)
        self.left -= size
        if self.random.random() < 0.5:
            return self.random.randbytes(size)
        at = self.random.randrange(len(text) - size)
        return text[at:at + size]
class Hashing:
    def __init__(self, file):
        self.file, self.hash, self.size = file, hashlib.sha256(), 0
    def write(self, data):
        self.hash.update(data)
        self.size += len(data)
        return self.file.write(data)
def put(data):
    digest = hashlib.sha256(data).hexdigest()
    with open(os.path.join(blobs, digest), "wb") as file:
        file.write(data)
    return {"digest": "sha256:" + digest, "size": len(data)}
path = os.path.join(blobs, "layer")
with open(path, "wb") as file:
    layer = Hashing(file)
    with tarfile.open(fileobj=layer, mode="w|", format=tarfile.PAX_FORMAT) as tar:
        entry = tarfile.TarInfo("model.bin")
        entry.size = 4 << 30
        tar.addfile(entry, Content(entry.size))
digest = layer.hash.hexdigest()
os.rename(path, os.path.join(blobs, digest))
config = put(json.dumps({"architecture": "amd64", "os": "linux", "config": {},
                         "rootfs": {"type": "layers", "diff_ids": ["sha256:" + digest]}}).encode())
manifest = put(json.dumps({
    "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
    "config": {"mediaType": "application/vnd.oci.image.config.v1+json", **config},
    "layers": [{"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": "sha256:" + digest, "size": layer.size}],
}).encode())
with open(os.path.join(root, "index.json"), "w") as file:
    json.dump({"schemaVersion": 2, "manifests": [{"mediaType": "application/vnd.oci.image.manifest.v1+json", **manifest,
               "annotations": {"org.opencontainers.image.ref.name": "big"}}]}, file)
with open(os.path.join(root, "oci-layout"), "w") as file:
    file.write('{"imageLayoutVersion":"1.0.0"}')
PYTHON
}

convert() {
    local plain run
    cp -r --reflink=auto "$images/registry" "$STAND/storage"
    stand_registry "$STAND/storage"
    stand_containerd
    stand_namespace convert
    plain=$REGISTRY/python:plain
    ctr content fetch --plain-http "$plain" >"$STAND/fetch.log" 2>&1 || die "cannot fetch $plain"
    for run in 1 2 3; do
        measured convert.ours "$binary" convert --force "containerd:$plain" "containerd:$plain-ours$run"
    done
    measured convert.theirs ctr-remote image convert --estargz --oci "$plain" "$plain-theirs"
    echo "{\"name\": \"convert.bytes\", \"plain\": $(layer_bytes "$plain"), \"ours\": $(layer_bytes "$plain-ours1")," \
        "\"theirs\": $(layer_bytes "$plain-theirs")}" >>"$STAND/figures"
    say "making a layer of 4 GiB"
    big_image "$STAND/big" "$(sed -n 2p "$images/python/layers")"
    measured convert.big "$binary" convert "oci:$STAND/big:big" "oci:$STAND/big-converted:big"
}

for section in "${sections[@]}"; do
    case $section in
    convert) convert ;;
    *) die "no section is called $section; there is convert" ;;
    esac
done

commit=$(git -C "$here" describe --always --dirty --abbrev=12 2>/dev/null || echo unknown)
python3 - "$STAND/figures" "$out" "$commit" <<'PYTHON'
import json, os, platform, statistics, sys
figures, out, commit = sys.argv[1:]
with open(figures) as file:
    rows = [json.loads(line) for line in file]
def of(name):
    return [row for row in rows if row["name"] == name]
def median(name, key):
    return statistics.median(row[key] for row in of(name))
with open("/proc/cpuinfo") as file:
    cpu = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), "unknown")
with open("/proc/meminfo") as file:
    memory = int(file.readline().split()[1]) >> 20
machine = f"{os.cpu_count()} cores ({cpu}), {memory} GiB, Linux {platform.release().split('-')[0]}"
text = ["# Measured", "", f"By `make bench` at commit {commit} on {machine}.", ""]
result = {"commit": commit, "machine": machine, "figures": rows}
if of("convert.ours"):
    ours, theirs, size = median("convert.ours", "wall_s"), median("convert.theirs", "wall_s"), of("convert.bytes")[0]
    big = of("convert.big")[0]
    result["convert"] = {"speed_ratio": round(theirs / ours, 1), "size_ratio": round(size["ours"] / size["theirs"], 4),
                         "peak_mib_4gib": big["peak_mib"]}
    text += [
        "## Converting an image to eStargz", "",
        f"Debian with Python, {size['plain'] / 2**20:.1f} MiB of layers, from a containerd's content store into it.", "",
        "| | `lazurite convert` (median of 3) | `ctr-remote image convert --estargz` | ratio |", "|---|---|---|---|",
        f"| time | {ours:.2f} s | {theirs:.2f} s | {theirs / ours:.1f} times faster |",
        f"| CPU | {median('convert.ours', 'cpu_s'):.2f} s | {median('convert.theirs', 'cpu_s'):.2f} s of the client | |",
        f"| layers | {size['ours'] / 2**20:.2f} MiB | {size['theirs'] / 2**20:.2f} MiB | {100 * (size['ours'] / size['theirs'] - 1):+.2f} % |",
        "", f"A layer of 4 GiB, from an OCI layout into another: {big['wall_s']:.1f} s, {big['cpu_s']:.1f} CPU seconds, "
        f"{big['peak_mib']:.0f} MiB of memory at the peak.", ""]
with open(os.path.join(out, "results.md"), "w") as file:
    file.write("\n".join(text))
with open(os.path.join(out, "results.json"), "w") as file:
    json.dump(result, file, indent=1)
    file.write("\n")
print("\n".join(text))
PYTHON
