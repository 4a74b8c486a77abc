"""Section `convert`: making an eStargz image, beside ctr-remote if that is installed.

An image of Debian with Python out of a containerd's content store and into it, by each; and one layer of 4 GiB from an OCI
layout into another, for the memory it takes. The peer runs once, for it takes long.
"""

import io
import json
import os
import random
import shutil
import sys
import tarfile
import zlib

import storage
from system import Failed, say

sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), "../../tests/images"))
import layout  # noqa: E402

# Runs a command and prints its figures: wall and CPU seconds of it and its children, and the peak of memory. A process of
# its own, because only the usage of all ended children together can be asked for.
MEASURE = """
import json, resource, subprocess, sys, time
begun = time.monotonic()
status = subprocess.run(sys.argv[2:], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                        stderr=open(sys.argv[1], "wb")).returncode
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps({"wall_s": round(time.monotonic() - begun, 3), "cpu_s": round(used.ru_utime + used.ru_stime, 3),
                  "peak_mib": round(used.ru_maxrss / 1024, 1)}))
sys.exit(status)
"""


def section(bench):
    image = bench.image("python")
    result = {"ours": [], "theirs": []}
    with bench.link("loopback") as link, bench.registry(link, image) as registry, \
            bench.node(link, registry, snapshotters=()) as node:
        namespace = node.namespace()
        plain = node.reference(image, "plain")
        node.ctr(namespace, "content", "fetch", "--plain-http", plain, deadline=300)

        def measured(name, *command):
            say(f"convert: running {name}")
            log = node.path("command.log")
            said = node.client(namespace, [sys.executable, "-c", MEASURE, log, *command], deadline=1800, check=False)
            try:
                return json.loads(said)
            except ValueError:
                with open(log, encoding="utf-8", errors="replace") as file:
                    raise Failed(f"{name} failed: " + " ".join(file.read().splitlines()[-3:])) from None

        for run in range(bench.options.runs):
            result["ours"].append(measured("lazurite", bench.options.binary, "convert", "--force", f"containerd:{plain}",
                                           f"containerd:{plain}-ours{run}"))
        sizes = {"plain": layer_bytes(node, namespace, plain), "ours": layer_bytes(node, namespace, plain + "-ours0")}
        if not shutil.which("ctr-remote"):
            bench.note("convert: ctr-remote is not installed, so nothing is compared")
        elif not bench.options.quick:
            result["theirs"].append(measured("ctr-remote", "ctr-remote", "image", "convert", "--estargz", "--oci", plain,
                                             plain + "-theirs"))
            sizes["theirs"] = layer_bytes(node, namespace, plain + "-theirs")
        result["bytes"] = sizes
        if not bench.options.quick:
            say("convert: making a layer of 4 GiB")
            source, target = node.path("big"), node.path("big-converted")
            big_image(source, real_bytes(image))
            result["big"] = measured("lazurite, 4 GiB", bench.options.binary, "convert", f"oci:{source}:big",
                                     f"oci:{target}:big")
    return result


def layer_bytes(node, namespace, reference):
    """The sum of the sizes of an image's layers, from the manifest in the content store."""
    line = node.ctr(namespace, "images", "ls", "name==" + reference).splitlines()[1]
    manifest = json.loads(node.ctr(namespace, "content", "get", line.split()[2]))
    return sum(layer["size"] for layer in manifest["layers"])


def real_bytes(image, size=64 << 20):
    """The beginning of the tar of the image's largest layer: programs and their texts."""
    layer = max(storage.manifest(image, "plain")[1]["layers"], key=lambda layer: layer["size"])
    inflater = zlib.decompressobj(31)
    with open(storage.blob(image, layer["digest"]), "rb") as file:
        return inflater.decompress(file.read(), size)


class Content(io.RawIOBase):
    """Pieces of the sample and of noise in turn, never the same piece at the same distance twice."""

    def __init__(self, text, size):
        self.text, self.left, self.random = text, size, random.Random(4)

    def read(self, size=-1):
        size = min(size, self.left)
        self.left -= size
        if self.random.random() < 0.5:
            return self.random.randbytes(size)
        at = self.random.randrange(len(self.text) - size)
        return self.text[at:at + size]


def big_image(root, text, size=4 << 30):
    """One file of 4 GiB, a plain tar, half of it from real programs and half noise, in an OCI layout."""
    blobs = os.path.join(root, "blobs", "sha256")
    os.makedirs(blobs)

    path = os.path.join(blobs, "layer")
    with open(path, "wb") as file:
        layer = layout.Sink(file)
        with tarfile.open(fileobj=layer, mode="w|", format=tarfile.PAX_FORMAT) as tar:
            entry = tarfile.TarInfo("model.bin")
            entry.size = size
            tar.addfile(entry, Content(text, entry.size))
    os.rename(path, os.path.join(blobs, layer.hash.hexdigest()))
    kind = "application/vnd.oci.image."
    config = layout.put_json(blobs, kind + "config.v1+json", {
        "architecture": "amd64", "os": "linux", "config": {},
        "rootfs": {"type": "layers", "diff_ids": [layer.digest]}})
    manifest = layout.put_json(blobs, kind + "manifest.v1+json", {
        "schemaVersion": 2, "mediaType": kind + "manifest.v1+json", "config": config,
        "layers": [{"mediaType": kind + "layer.v1.tar", "digest": layer.digest, "size": layer.size}]})
    with open(os.path.join(root, "index.json"), "w", encoding="utf-8") as file:
        json.dump({"schemaVersion": 2, "manifests": [{**manifest, "annotations": {
            "org.opencontainers.image.ref.name": "big"}}]}, file)
    with open(os.path.join(root, "oci-layout"), "w", encoding="utf-8") as file:
        file.write('{"imageLayoutVersion":"1.0.0"}')
