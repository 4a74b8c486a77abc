"""Section `fill`: what the background download costs, and what it costs readers.

CPU: an image is pulled lazily and nothing runs until everything is local. The daemon's CPU seconds, divided by the bytes of
files delivered, are compared with the least this machine could do it with, measured in the same run on the same blob:
inflating it member by member, hashing what comes out, copying it once. The yardstick inflates with Python's zlib, that is
with whatever zlib the machine has; Lazurite's decoder is faster than zlib, so a ratio below 1 is possible.

Latency: the model's chunks are read one byte each from the file's end backwards, where the fill, which goes forwards,
arrives last: each read is one fetch of a chunk. Idle is a daemon with `no_background_fetch`, loaded one in the midst of its
fill. Reads stop counting once the fill may have come near them.
"""

import glob
import hashlib
import os
import threading
import time
import zlib

import stand
import start
import storage
import system
from figures import percentile
from system import Failed, say, wait_for

CHUNK = 4 << 20
# Compressed bytes that the yardstick looks at.
SAMPLE = 192 << 20


def section(bench):
    quick = bench.options.quick
    model = "model-small" if quick else "model"
    result = {"cpu": [], "checked": [], "latency": [], "zlib": zlib.ZLIB_RUNTIME_VERSION}
    with bench.link("loopback") as link:
        for name in ("python", model):
            image = bench.image(name)
            limit = yardstick(image)
            for number in range(bench.options.runs):
                figures = fill(bench, link, image)
                figures.update(workload=name, run=number, yardstick=limit)
                result["cpu"].append(figures)
                say(f"fill {name}: {figures['cpu_s_per_gb']:.2f} CPU s/GB, yardstick {limit['cpu_s_per_gb']:.2f}; "
                    f"{figures['blob_requests'] / figures['blob_mib']:.2f} requests/MiB; {figures['seconds']:.2f} s")
            # What it costs to compare the blob's digest as well, which takes all of its bytes in order.
            checked = fill(bench, link, image, "[fetch]\ncheck_blob_digest = true\n")
            result["checked"].append({**checked, "workload": name})
    for name in ("loopback", "200m20ms"):
        with bench.link(name) as link:
            image = bench.image("model-small" if quick or name != "loopback" else model)
            result["latency"].append(latency(bench, link, image))
    return result


def yardstick(image):
    """CPU seconds per GB of output for inflate, SHA-256 and one copy, over the largest layer's members."""
    layer = max(storage.manifest(image, "estargz")[1]["layers"], key=lambda layer: layer["size"])
    path = storage.blob(image, layer["digest"])
    borders = storage.members(path)
    with open(path, "rb") as file:
        blob = memoryview(file.read(SAMPLE))
    seconds, out = {"inflate": 0.0, "sha256": 0.0, "copy": 0.0}, 0
    for begin, end in zip(borders, borders[1:]):
        if end > len(blob):
            break
        times = [time.thread_time()]
        data = zlib.decompress(blob[begin:end], 31)
        times.append(time.thread_time())
        hashlib.sha256(data).digest()
        times.append(time.thread_time())
        bytearray(data)
        times.append(time.thread_time())
        for name, before, after in zip(seconds, times, times[1:]):
            seconds[name] += after - before
        out += len(data)
    if not out:
        raise Failed("the yardstick found no gzip member")
    per_gb = {name: value * 1e9 / out for name, value in seconds.items()}
    return {**{name: round(value, 3) for name, value in per_gb.items()}, "cpu_s_per_gb": sum(per_gb.values())}


def fill(bench, link, image, config=""):
    with bench.registry(link, image) as registry, bench.node(link, registry, configs={"lazurite": config}) as node:
        daemon = node.snapshotters["lazurite"]
        before = start.start_clean(bench, registry, node, daemon)
        mark, begun = registry.mark(), time.monotonic()
        _, layers = node.pull_lazily(node.namespace(), "lazurite", node.reference(image, "estargz"), 300)
        digests = [layer["digest"] for layer in layers]
        wait_for("everything local", lambda: daemon.all_local(digests), 900)
        seconds = time.monotonic() - begun
        used = daemon.usage()
        graduated = graduated_s = None
        if start.graduation_key(bench):
            wait_for("graduation", daemon.graduated, 300)
            graduated_s = time.monotonic() - begun
            # Not part of delivering bytes, but of what one image costs.
            graduated = daemon.usage().cpu_s - before.cpu_s
        time.sleep(0.5)
        moved = stand.traffic([request for request in registry.since(mark)
                               if any(digest in request[1] for digest in digests)])
        # Headers and padding of the tar are inflated, too, and the yardstick counts them.
        delivered = image["tar_bytes"]
        blob = sum(layer["size"] for layer in storage.manifest(image, "estargz")[1]["layers"])
        cpu = used.cpu_s - before.cpu_s
        return {"seconds": seconds, "cpu_s": cpu, "cpu_graduated_s": graduated, "graduated_s": graduated_s,
                "cpu_s_per_gb": cpu * 1e9 / delivered, "delivered_bytes": delivered,
                "blob_mib": blob / 2**20, "peak_mib": used.peak_mib, "rss_mib": used.rss_mib, **moved}


def latency(bench, link, image):
    idle = reads(bench, link, image, "no_background_fetch = true\n", False)
    loaded = reads(bench, link, image, "", True)
    figures = {"link": link.name, "workload": image["name"], "idle_ms": idle, "loaded_ms": loaded}
    say(f"fill latency on {link.name}: idle p50 {percentile(idle, 50):.1f} p99 {percentile(idle, 99):.1f} ms, under fill "
        f"p50 {percentile(loaded, 50):.1f} p99 {percentile(loaded, 99):.1f} ms ({len(idle)}, {len(loaded)} reads)")
    return figures


def reads(bench, link, image, config, loaded):
    with bench.registry(link, image) as registry, bench.node(link, registry, configs={"lazurite": config}) as node:
        daemon = node.snapshotters["lazurite"]
        start.start_clean(bench, registry, node, daemon)
        _, layers = node.pull_lazily(node.namespace(), "lazurite", node.reference(image, "estargz"), 300)
        path = next(iter(glob.glob(os.path.join(daemon.root, "mnt/*/model.bin"))), None)
        if not path:
            raise Failed("the model is not in the lazy mount")
        file = os.open(path, os.O_RDONLY)
        try:
            # Page cache and read-ahead would answer for neighbours.
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
            chunks = os.fstat(file).st_size // CHUNK
            digests = [layer["digest"] for layer in layers]
            done = threading.Event()
            watcher = threading.Thread(target=lambda: done.wait() if not loaded else watch(daemon, digests, done), daemon=True)
            watcher.start()
            times = []
            for chunk in range(chunks - 1, chunks // 3, -1):
                if done.is_set():
                    break
                begun = time.monotonic()
                if len(os.pread(file, 1, chunk * CHUNK + CHUNK // 2)) != 1:
                    raise Failed("a read of the model came back short")
                times.append(1000 * (time.monotonic() - begun))
                if len(times) >= 200:
                    break
            done.set()
            watcher.join(10)
        finally:
            os.close(file)
        # Reads answered at once were of chunks that the fill had brought already.
        return [value for value in times if value > 0.3]


def watch(daemon, digests, done):
    while not done.is_set():
        if daemon.all_local(digests):
            done.set()
        done.wait(0.05)
