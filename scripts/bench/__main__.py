"""The benchmark: `make bench`, or scripts/bench.sh. Parses the command line, runs the sections, writes the results.

    system.py   processes, /proc, page cache        start.py    pull + run of every workload on every link
    link.py     loopback and shaped links           warm.py     mounted trees: overlayfs, lazy, graduated
    relay.py    the delay of a shaped link          attach.py   many layers: memory, attach, restart
    stand.py    registry, containerd, daemons       fill.py     the background download: CPU, requests, latency
    report.py   results.md, results.json            convert.py  making eStargz images, beside ctr-remote
    plot.py     results.svg                         targets.py  what must be reached, met or missed
"""

import argparse
import hashlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time

sys.dont_write_bytecode = True

import link  # noqa: E402
import stand  # noqa: E402
import system  # noqa: E402
from system import Failed, say  # noqa: E402

SECTIONS = ("start", "warm", "attach", "fill", "convert")


def parse(arguments):
    here = os.path.dirname(os.path.abspath(__file__))
    root = os.path.dirname(os.path.dirname(here))
    parser = argparse.ArgumentParser(prog="bench.sh", description="Measures Lazurite beside containerd's overlayfs.")
    parser.add_argument("binary", metavar="BINARY", help="the program to measure")
    parser.add_argument("sections", metavar="SECTION", nargs="*", help=f"{', '.join(SECTIONS)}; all if none is named")
    parser.add_argument("--quick", action="store_true",
                        help="one run each, loopback and one shaped link, python and a small model only")
    parser.add_argument("--runs", type=int, help="runs of each measurement, of which the median counts (default 3)")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=SOCKET",
                        help="also measure a snapshotter that listens there and takes the same labels; loopback only")
    parser.add_argument("--workload", action="append", dest="workloads", metavar="W", help="only this one; may be repeated")
    parser.add_argument("--link", action="append", dest="links", metavar="L",
                        help="only this one of " + ", ".join(name for name in link.SHAPES if name != "far"))
    parser.add_argument("--out", default=os.path.join(root, "bench"), help="where the results go (default bench/)")
    options = parser.parse_intermixed_args(arguments)
    options.root = root
    options.binary = os.path.realpath(options.binary)
    options.peers = dict(peer.split("=", 1) for peer in options.peer if "=" in peer)
    options.sections = options.sections or list(SECTIONS)
    for kind, given, known in (("section", options.sections, SECTIONS), ("link", options.links or [], link.SHAPES)):
        for name in given:
            if name not in known:
                parser.error(f"no {kind} is called {name}; there are {', '.join(known)}")
    if len(options.peers) != len(options.peer):
        parser.error("a peer is NAME=SOCKET, with a name of its own")
    for name, path in options.peers.items():
        # Also the names of containerd's own snapshotters: it panics if a proxy plugin takes one.
        if name in ("lazurite", "prefetch", "overlayfs", "native", "btrfs", "zfs", "devmapper", "blockfile", "erofs"):
            parser.error(f"a peer cannot be called {name}")
        if not os.path.exists(path):
            parser.error(f"nothing listens at {path}")
    if not os.access(options.binary, os.X_OK):
        parser.error(f"there is no program {options.binary}; build it with 'make build'")
    if options.quick:
        options.runs = options.runs or 1
        options.links = options.links or ["loopback", "200m20ms"]
        options.workloads = options.workloads or ["python", "model-small"]
    options.runs = options.runs or 3
    return options


def commit(root):
    try:
        return system.run(["git", "-C", root, "describe", "--always", "--dirty", "--abbrev=12"], 20).strip()
    except (Failed, OSError):
        return "unknown"


def check_tools():
    needed = ("containerd", "ctr", "runc", "docker-registry", "nsenter", "unshare", "setpriv", "ip", "tc", "losetup", "mkfs.ext4")
    missing = [tool for tool in needed if not shutil.which(tool)]
    if missing:
        raise Failed(f"missing: {', '.join(missing)}; run scripts/setup.sh test, and install iproute2 and util-linux")


def main():
    options = parse(sys.argv[1:])
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    # A shell that runs us in the background has it ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    check_tools()
    os.makedirs(options.out, exist_ok=True)
    bench = stand.Bench(options, tempfile.mkdtemp(prefix="lazurite-bench."))
    # The tree's commit says nothing of a program that was built before or after it: its own digest is told as well.
    with open(options.binary, "rb") as file:
        program = hashlib.sha256(file.read()).hexdigest()[:12]
    result = {"commit": commit(options.root), "program": program, "machine": system.describe_machine(), "runs": options.runs,
              "quick": options.quick, "links": bench.links, "notes": bench.notes, "sections": {}}
    status, begun = 0, time.monotonic()

    def save(name, figures):
        result["sections"][name] = figures
        result["seconds"] = round(time.monotonic() - begun)
        write(options, result)

    bench.save = save
    # Without sections, in case the first has nothing to show.
    result["seconds"] = 0
    try:
        for name in options.sections:
            say(f"section {name}")
            try:
                save(name, __import__(name).section(bench))
            except (Failed, OSError) as error:
                # The other sections' figures are not lost for this one's trouble; the exit status tells.
                say(f"section {name} failed: {error}")
                bench.note(f"section {name} failed: {str(error).splitlines()[0]}")
                status = 1
                write(options, result)
    finally:
        # Once more Ctrl-C would leave mounts and daemons behind.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        bench.close()
    with open(os.path.join(options.out, "results.md"), encoding="utf-8") as file:
        print(file.read())
    return status


def write(options, result):
    """Written after every section: what a long run has measured survives its being interrupted."""
    import plot
    import report
    with open(os.path.join(options.out, "results.json"), "w", encoding="utf-8") as file:
        json.dump(result, file, indent=1)
        file.write("\n")
    drawn = plot.draw(result)
    if drawn:
        with open(os.path.join(options.out, "results.svg"), "w", encoding="utf-8") as file:
            file.write(drawn)
    with open(os.path.join(options.out, "results.md"), "w", encoding="utf-8") as file:
        file.write(report.write(result, plotted=bool(drawn)))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Failed as error:
        sys.exit(f"bench.sh: error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
