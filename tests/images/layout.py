#!/usr/bin/env python3
"""Makes an OCI image layout from uncompressed layer tars, lowest first.

    layout.py OUT_DIR TAG CMD_JSON LAYER.tar...

The same tars give byte-identical blobs: gzip carries no time or name, and the configuration holds a fixed date.
A tar named twice becomes two layers with one blob, as real builders produce for repeated steps.
"""

import gzip
import hashlib
import json
import os
import shutil
import sys

# GOARCH names for what uname calls the machine; others have the same name in both.
GOARCH = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "i686": "386"}
COPY_BYTES = 1 << 20


class Sink:
    """A file that counts and hashes what passes through it."""

    def __init__(self, target):
        self.target, self.hash, self.size = target, hashlib.sha256(), 0

    def write(self, data):
        self.hash.update(data)
        self.size += len(data)
        return self.target.write(data)

    def flush(self):
        self.target.flush()

    @property
    def digest(self):
        return "sha256:" + self.hash.hexdigest()


def put_layer(blobs, tar):
    """Compresses one tar into the layout; returns its descriptor and its DiffID."""
    temporary = os.path.join(blobs, "layer.tmp")
    with open(tar, "rb") as source, open(temporary, "wb") as file:
        blob = Sink(file)
        with gzip.GzipFile(filename="", mode="wb", fileobj=blob, compresslevel=6, mtime=0) as packer:
            plain = Sink(packer)
            shutil.copyfileobj(source, plain, COPY_BYTES)
    os.rename(temporary, os.path.join(blobs, blob.hash.hexdigest()))
    descriptor = {
        "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip",
        "digest": blob.digest,
        "size": blob.size,
    }
    return descriptor, plain.digest


def put_json(blobs, media_type, value):
    """Stores a JSON document; returns its descriptor."""
    data = json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
    name = hashlib.sha256(data).hexdigest()
    with open(os.path.join(blobs, name), "wb") as file:
        file.write(data)
    return {"mediaType": media_type, "digest": "sha256:" + name, "size": len(data)}


def main():
    out, tag, command, *tars = sys.argv[1:]
    blobs = os.path.join(out, "blobs", "sha256")
    os.makedirs(blobs, exist_ok=True)
    done = {}
    for tar in tars:
        if tar not in done:
            done[tar] = put_layer(blobs, tar)
    machine = os.uname().machine
    config = put_json(blobs, "application/vnd.oci.image.config.v1+json", {
        "created": "2024-01-01T00:00:00Z",
        "architecture": GOARCH.get(machine, machine),
        "os": "linux",
        "config": {"Env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"], "Cmd": json.loads(command), "WorkingDir": "/"},
        "rootfs": {"type": "layers", "diff_ids": [done[tar][1] for tar in tars]},
        "history": [{"created": "2024-01-01T00:00:00Z", "created_by": os.path.basename(tar)} for tar in tars],
    })
    manifest = put_json(blobs, "application/vnd.oci.image.manifest.v1+json", {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": config,
        "layers": [done[tar][0] for tar in tars],
    })
    manifest["annotations"] = {"org.opencontainers.image.ref.name": tag}
    with open(os.path.join(out, "index.json"), "w", encoding="utf-8") as file:
        json.dump({"schemaVersion": 2, "manifests": [manifest]}, file)
    with open(os.path.join(out, "oci-layout"), "w", encoding="utf-8") as file:
        json.dump({"imageLayoutVersion": "1.0.0"}, file)


if __name__ == "__main__":
    main()
