"""What lies in the registry's storage directory of a workload image, read without a registry."""

import gzip
import hashlib
import json
import os
import struct


def root(image):
    return os.path.join(image["store"], "registry/docker/registry/v2")


def blob(image, digest):
    algorithm, _, value = digest.partition(":")
    return os.path.join(root(image), "blobs", algorithm, value[:2], value, "data")


def manifest(image, tag):
    """The digest and the content of a tag's manifest."""
    with open(f"{root(image)}/repositories/{image['name']}/_manifests/tags/{tag}/current/link", encoding="utf-8") as file:
        digest = file.read().strip()
    with open(blob(image, digest), "rb") as file:
        return digest, json.load(file)


def chain_id(image, tag):
    """The name of the topmost layer's snapshot (OCI image specification, "Layer ChainID")."""
    with open(blob(image, manifest(image, tag)[1]["config"]["digest"]), "rb") as file:
        diff_ids = json.load(file)["rootfs"]["diff_ids"]
    chain = diff_ids[0]
    for diff_id in diff_ids[1:]:
        chain = "sha256:" + hashlib.sha256(f"{chain} {diff_id}".encode()).hexdigest()
    return chain


def members(path):
    """Where the gzip members of an eStargz blob begin, by its table of contents, and last where that begins."""
    with open(path, "rb") as file:
        # The footer: an empty gzip member whose extra field holds the table's offset in 16 hex digits, then STARGZ.
        file.seek(-51, os.SEEK_END)
        footer = file.read(51)
        length = struct.unpack("<H", footer[14:16])[0]
        extra = footer[16:16 + length]
        if extra[16:22] != b"STARGZ":
            raise ValueError(f"{path} is not eStargz")
        toc_at = int(extra[:16], 16)
        file.seek(toc_at)
        toc = gzip.GzipFile(fileobj=file).read()
    # The table is a tar with one file.
    size = int(toc[124:135].rstrip(b"\0 ") or b"0", 8)
    entries = json.loads(toc[512:512 + size])["entries"]
    return sorted({entry["offset"] for entry in entries if entry.get("offset")} | {0, toc_at})
