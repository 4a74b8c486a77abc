#!/usr/bin/env python3
"""Writes the layer tars of the small test images. Needs no privileges: nothing is created outside the tars.

    layers.py busybox OUT_DIR BUSYBOX     one layer: a static /bin/busybox with its applets, /etc, /tmp
    layers.py torture OUT_DIR BUSYBOX     the same and what layers may hold but tidy images rarely do

Prints the tars in image order, one a line; a layer that is to appear twice is printed twice.
Everything is deterministic: fixed times, fixed owners, contents from a seeded generator.
"""

import io
import os
import random
import struct
import subprocess
import sys
import tarfile

TIME = 1700000000
# eStargz writers cut files into chunks of this size unless told otherwise.
CHUNK = 4 << 20


class Layer:
    """A tar under construction. Names are bytes: layers do not promise UTF-8."""

    def __init__(self, path):
        self.path = path
        self.tar = tarfile.open(path, "w", format=tarfile.GNU_FORMAT, encoding="utf-8", errors="surrogateescape")

    def add(self, name, kind, mode, data=None, target="", owner=(0, 0), device=(0, 0), xattrs=None, time=TIME):
        info = tarfile.TarInfo(os.fsdecode(name))
        info.type, info.mode, info.mtime = kind, mode, time
        info.uid, info.gid = owner
        info.linkname = os.fsdecode(target)
        info.devmajor, info.devminor = device
        info.size = len(data) if data is not None else 0
        # GNU headers carry any byte in a name but no attributes; only the entries that need them use pax.
        self.tar.format = tarfile.PAX_FORMAT if xattrs else tarfile.GNU_FORMAT
        info.pax_headers = {"SCHILY.xattr." + key: value for key, value in (xattrs or {}).items()}
        self.tar.addfile(info, io.BytesIO(data) if data is not None else None)

    def directory(self, name, mode=0o755, **rest):
        self.add(name, tarfile.DIRTYPE, mode, **rest)

    def file(self, name, data=b"", mode=0o644, **rest):
        self.add(name, tarfile.REGTYPE, mode, data=data, **rest)

    def symlink(self, name, target):
        self.add(name, tarfile.SYMTYPE, 0o777, target=target)

    def hardlink(self, name, target, mode, owner):
        # An unpacker applies a link entry's mode and owner to the shared file, so they repeat the file's.
        self.add(name, tarfile.LNKTYPE, mode, target=target, owner=owner)

    def whiteout(self, name):
        head, _, tail = name.rpartition("/")
        self.file(f"{head}/.wh.{tail}" if head else f".wh.{tail}", mode=0)

    def opaque(self, directory):
        self.file(f"{directory}/.wh..wh..opq", mode=0)

    def close(self):
        self.tar.close()
        return self.path


def noise(seed, size):
    """Bytes that do not compress, the same on every run."""
    return random.Random(seed).randbytes(size)


def capability():
    """The value of security.capability for cap_net_raw+ep: VFS_CAP_REVISION_2 with the effective flag,
    then permitted and inheritable words (include/uapi/linux/capability.h). Bit 13 is CAP_NET_RAW."""
    return struct.pack("<5I", 0x02000001, 1 << 13, 0, 0, 0)


def raw_attribute(value):
    """An attribute value as tarfile wants it: text that its pax writer turns back into the same bytes."""
    return value.decode("utf-8", "surrogateescape")


def busybox_tree(layer, busybox):
    for name in ("bin", "etc", "proc", "sys", "dev"):
        layer.directory(name)
    layer.directory("tmp", 0o1777)
    with open(busybox, "rb") as file:
        layer.file("bin/busybox", file.read(), 0o755)
    applets = subprocess.run([busybox, "--list"], check=True, capture_output=True, text=True).stdout.split()
    for applet in sorted(set(applets) - {"busybox"}):
        layer.symlink(f"bin/{applet}", "busybox")
    layer.file("etc/passwd", b"root:x:0:0:root:/:/bin/sh\nguest:x:1000:1000::/tmp:/bin/sh\n")
    layer.file("etc/group", b"root:x:0:\nguest:x:1000:\n")


def busybox_image(out, busybox):
    layer = Layer(f"{out}/0-busybox.tar")
    busybox_tree(layer, busybox)
    return [layer.close()]


def torture_image(out, busybox):
    base = Layer(f"{out}/0-base.tar")
    busybox_tree(base, busybox)
    for name in ("data", "links", "modes", "devices", "xattrs", "doomed", "doomed/inner", "covered", "covered/inner"):
        base.directory(name)
    # Contents: empty, one byte, around a chunk border, several chunks, holes, a name with spaces.
    base.file("data/empty")
    base.file("data/one", b"1")
    base.file("data/chunk-minus-one", noise(1, CHUNK - 1))
    base.file("data/chunk", noise(2, CHUNK))
    base.file("data/chunk-plus-one", noise(3, CHUNK + 1))
    base.file("data/chunks", noise(4, 3 * CHUNK + 12345))
    base.file("data/holes", noise(5, 4096) + bytes(2 * CHUNK) + noise(6, 4096) + bytes(CHUNK + 17))
    base.file("data/name with spaces and 'quotes'", b"spaces\n")
    base.file("data/name-in-ünïcödé-✓", b"unicode\n")
    base.file("data/" + "n" * 255, b"the longest name\n")
    base.file("data/before-epoch", b"old\n", time=-86400)
    base.file("data/year-2100", b"new\n", time=4102444800)
    # A path of more than 300 bytes, which no plain tar header can hold.
    deep = "deep"
    base.directory(deep)
    for level in range(12):
        deep += f"/directory-number-{level:02}-of-twelve"
        base.directory(deep)
    base.file(f"{deep}/bottom", b"bottom\n")
    # Links: three names of one file across directories, dangling and absolute symbolic links.
    base.file("links/first", noise(7, 70000), 0o640, owner=(1000, 1000))
    base.hardlink("links/second", "links/first", 0o640, (1000, 1000))
    base.hardlink("deep/third", "links/first", 0o640, (1000, 1000))
    base.symlink("links/relative", "../data/one")
    base.symlink("links/absolute", "/data/one")
    base.symlink("links/dangling", "nowhere")
    base.symlink("links/long", "x/" * 1000 + "end")
    # Modes and owners.
    base.file("modes/setuid", b"#!/bin/sh\nid\n", 0o4755)
    base.file("modes/setgid", b"#!/bin/sh\nid\n", 0o2755, owner=(0, 1000))
    base.file("modes/unreadable", b"secret\n", 0o000)
    base.file("modes/big-owner", b"owner\n", 0o600, owner=(1234567, 7654321))
    base.directory("modes/sticky", 0o1777)
    base.directory("modes/setgid-directory", 0o2775, owner=(0, 1000))
    # Everything mknod can make.
    base.add("devices/null", tarfile.CHRTYPE, 0o666, device=(1, 3))
    base.add("devices/loop", tarfile.BLKTYPE, 0o660, device=(7, 0))
    base.add("devices/big", tarfile.CHRTYPE, 0o600, device=(511, 1048575))
    base.add("devices/fifo", tarfile.FIFOTYPE, 0o644)
    # Extended attributes, text and binary, on files and directories.
    base.file("xattrs/ping", b"#!/bin/sh\n", 0o755,
              xattrs={"security.capability": raw_attribute(capability()), "user.note": "hello"})
    base.file("xattrs/empty-value", b"", xattrs={"user.empty": ""})
    base.directory("xattrs/directory", xattrs={"user.kind": "directory", "trusted.kept": "yes"})
    # What the next layer removes, hides and replaces.
    base.file("doomed/file", b"removed by layer 1\n")
    base.file("doomed/inner/file", b"removed with its directory\n")
    base.file("covered/below", b"hidden by an opaque directory\n")
    base.file("covered/inner/below", b"hidden as well\n")
    base.file("replaced-by-directory", b"file\n")
    base.directory("replaced-by-file")
    base.file("replaced-by-file/inside", b"gone\n")

    changes = Layer(f"{out}/1-whiteouts.tar")
    for name in ("doomed", "covered"):
        changes.directory(name)
    changes.whiteout("doomed/file")
    changes.whiteout("doomed/inner")
    changes.opaque("covered")
    changes.file("covered/above", b"the only file here\n")
    changes.directory("replaced-by-directory")
    changes.file("replaced-by-directory/inside", b"directory\n")
    changes.file("replaced-by-file", b"file\n")
    changes.whiteout("never-existed")

    again = Layer(f"{out}/2-repeated.tar")
    again.directory("repeated")
    again.file("repeated/file", noise(8, 50000))

    removal = Layer(f"{out}/3-removal.tar")
    removal.whiteout("repeated")

    # Names that are not UTF-8 have a layer of their own: no eStargz TOC can spell them, so this layer cannot be lazy.
    bytes_layer = Layer(f"{out}/4-not-utf8.tar")
    bytes_layer.directory("bytes")
    bytes_layer.file(b"bytes/latin1-\xe9\xff", b"latin1\n")
    bytes_layer.add(b"bytes/link-\xfe", tarfile.SYMTYPE, 0o777, target=b"latin1-\xe9\xff")

    repeated = again.close()
    return [base.close(), changes.close(), repeated, removal.close(), repeated, bytes_layer.close()]


def main():
    image, out, busybox = sys.argv[1:]
    makers = {"busybox": busybox_image, "torture": torture_image}
    print("\n".join(makers[image](out, busybox)))


if __name__ == "__main__":
    main()
