"""Section `start`: from nothing to a program that is ready, for each workload, link and way.

Ways
    overlayfs     containerd's own: `ctr images pull` of the ordinary image, unpacked, then run
    lazurite      `lazurite pull` of the eStargz image on the daemon's default configuration, then run
    prefetch      the same with the image whose layers have the files of a start in front, behind a landmark
    NAME          a peer's socket, as `lazurite`; loopback only, for a peer does not live behind the shaped links
and of each a second start (`again`): a fresh container once everything is local, with the page cache dropped, and the
making of one more (`create`). For
counting round trips there is also `ondemand`: `lazurite` without its fill.

The clock runs from the start of the pull to the line READY of the program. What `lazurite` does in the background (the
fill) goes on meanwhile, as it does in life. Requests and bytes are those in the registry's access log, where a request
appears when it ends.
"""

import threading
import time

import link as link_module
import stand
import system
from figures import median, order, select
from system import Failed, Usage, say

WORKLOADS = ("python", "numpy", "node", "postgres", "java", "layers40", "model")
LINKS = ("loopback", "1g1ms", "200m20ms", "100m100ms")
# Also without the fill, which takes the line's capacity and opens TCP's windows.
TRIPS = ["lazurite", "prefetch", "ondemand"]
TAGS = {"overlayfs": "plain", "prefetch": "prefetch"}


def ways_of(bench, image, link):
    ways = ["overlayfs", "lazurite"]
    if "prefetch" in image["tags"]:
        ways.append("prefetch")
    return ways + (list(bench.options.peers) if link.node is None else [])


def deadline_of(image, link):
    """Generous: three times what the uncompressed bytes take on the link."""
    return 300 + (3 * image["tar_bytes"] * 8 / (link.shape.mbit * 1e6) if link.shape.mbit else 0)


def section(bench):
    results = []
    links = bench.options.links or LINKS
    for name in links:
        with bench.link(name) as link:
            checked = link.check()
            if checked:
                say(f"link {name}: measured {checked['rtt_ms']} ms, {checked['mbit']} Mbit/s")
            bench.links[name] = {"label": link.shape.label, **checked}
            for workload in bench.options.workloads or WORKLOADS:
                results += one_workload(bench, link, workload)
                # This section takes long: what it has is written as it goes.
                bench.save("start", {"rows": results, "round_trips": None})
    return {"rows": results, "round_trips": round_trips(bench, results)}


def round_trips(bench, rows):
    """How many round trips follow one another until the program is ready: how much later it is when each takes 100 ms
    longer, at the same rate. Counted so, those that overlap count once, and handshakes and slow start are in it."""
    near, far = link_module.SHAPES["1g1ms"], link_module.SHAPES["far"]
    base = select(rows, workload="python", link=near.name)
    delay = (far.rtt_ms - near.rtt_ms) / 1000
    if not base:
        return None
    with bench.link("far") as link:
        bench.links["far"] = {"label": far.label, **link.check()}
        beyond = one_workload(bench, link, "python", TRIPS)
    with bench.link(near.name) as link:
        base = base + one_workload(bench, link, "python", ["ondemand"])
    return {way: {part: (median(select(beyond, way=way), part + "_s") - median(select(base, way=way), part + "_s")) / delay
                  for part in ("pull", "run", "total")} for way in order(beyond, "way")}


def one_workload(bench, link, workload, ways=None):
    image = bench.image(workload)
    results = []
    runs = bench.options.runs
    if image["tar_bytes"] > 1 << 30 and 0 < link.shape.mbit < 1000:
        # Minutes each, and nearly all of it is the line's rate, which does not vary.
        runs = 1
    for number in range(runs):
        # Interleaved, and in turn from the other end: what changes on the machine over time hits all ways alike.
        ways = ways or ways_of(bench, image, link)
        for way in ways if number % 2 == 0 else reversed(ways):
            with bench.registry(link, image) as registry:
                try:
                    figures = one_start(bench, link, registry, image, way)
                except Failed as error:
                    if way not in bench.options.peers:
                        raise
                    bench.note(f"{way} could not do {workload}: {error}")
                    continue
            figures.update(workload=workload, link=link.name, way=way, run=number)
            results.append(figures)
            say(f"start {workload} {link.name} {way} #{number + 1}: pull {figures['pull_s']:.2f} run {figures['run_s']:.2f} "
                f"total {figures['total_s']:.2f} local {figures['local_s'] or -1:.2f} again {figures['again_s']:.2f} s, "
                f"{figures['before_ready']['bytes'] / 2**20:.1f} MiB in {figures['before_ready']['requests']} requests")
    return results


def one_start(bench, link, registry, image, way):
    deadline = deadline_of(image, link)
    eager = way == "overlayfs"
    snapshotter = {"overlayfs": "overlayfs", "prefetch": "lazurite", "ondemand": "lazurite"}.get(way, way)
    configs = {"lazurite": "no_background_fetch = true\n"} if way == "ondemand" else {}
    with bench.node(link, registry, snapshotters=() if eager else ("lazurite",), configs=configs) as node:
        daemon = node.containerd if eager else node.snapshotters[snapshotter]
        reference = node.reference(image, TAGS.get(way, "estargz"))
        namespace = node.namespace()
        digests = []
        before = start_clean(bench, registry, node, daemon)
        mark, begun = registry.mark(), time.monotonic()
        if eager:
            pulled = node.pull_eagerly(namespace, reference, deadline)
            local = pulled
        else:
            pulled, layers = node.pull_lazily(namespace, snapshotter, reference, deadline)
            digests = [layer["digest"] for layer in layers]
            lazy = [layer["outcome"] for layer in layers]
            if any(outcome != "lazy" for outcome in lazy):
                bench.note(f"{image['name']} ({way}): only {lazy.count('lazy')} of {len(lazy)} layers are lazy: " + ", ".join(
                    sorted({layer.get("reason") or layer["outcome"] for layer in layers if layer["outcome"] != "lazy"})))
            local = None
        at_pull = stand.traffic(registry.since(mark))
        watcher = None
        if not eager and not configs and daemon.root:
            watcher = LocalWatch(daemon, digests, begun, graduation_key(bench) is not None)
        ready = {}

        def at_ready():
            ready.update(traffic=stand.traffic(registry.since(mark)), cpu_s=Usage.of(daemon.pid).cpu_s - before.cpu_s)

        try:
            ran = node.run_until_ready(namespace, snapshotter, reference, image, deadline, at_ready)
            if watcher:
                local = watcher.wait(deadline)
        finally:
            if watcher:
                watcher.stop()
        # A request that ended with the last byte may not be in the log yet.
        time.sleep(0.3)
        used = Usage.of(daemon.pid)
        figures = {
            "pull_s": pulled, "run_s": ran, "total_s": pulled + ran, "local_s": local,
            "graduated_s": watcher.graduated_at if watcher else None, "at_pull": at_pull,
            "before_ready": ready["traffic"], "in_total": stand.traffic(registry.since(mark)),
            "cpu_ready_s": ready["cpu_s"], "cpu_s": used.cpu_s - before.cpu_s, "rss_mib": used.rss_mib,
            "peak_mib": used.peak_mib, "private_mib": used.private_mib, **disk(node, daemon, eager),
        }
        system.drop_caches()
        bench.warm_tools()
        figures["again_s"] = node.run_until_ready(namespace, snapshotter, reference, image, deadline)
        figures["create_s"] = node.create(namespace, snapshotter, reference)
        return figures


def start_clean(bench, registry, node, daemon):
    """Everybody cold but for the programs and the registry's disk; returns what the daemon has used before."""
    system.drop_caches()
    bench.warm_tools()
    registry.warm()
    Usage.forget_peak(daemon.pid)
    return Usage.of(daemon.pid)


def disk(node, daemon, eager):
    """What the snapshots take. containerd keeps the compressed blobs beside them when it pulls eagerly."""
    if eager:
        return {"disk_bytes": system.disk_used(node.path("containerd/root/io.containerd.snapshotter.v1.overlayfs")),
                "content_bytes": system.disk_used(node.path("containerd/root/io.containerd.content.v1.content"))}
    return {"disk_bytes": system.disk_used(daemon.root) if daemon.root else None, "content_bytes": None}


def graduation_key(bench):
    """The section and name of the configuration key that disables graduation, with its disabling value, or None."""
    if bench.graduation is None:
        section = ""
        bench.graduation = ()
        for line in system.run([bench.options.binary, "config", "example"], 10).splitlines():
            line = line.lstrip("# ").strip()
            if line.startswith("[") and line.endswith("]"):
                section = line
            name, equals, value = (part.strip() for part in line.partition("="))
            if equals and "graduat" in name and value in ("true", "false"):
                bench.graduation = (section, name, "false" if value == "true" else "true")
    return bench.graduation or None


class LocalWatch:
    """Notes, beside the run, when everything was local and, if there is such a thing, when the last layer was graduated:
    with a small image both are before its program is ready."""

    def __init__(self, daemon, digests, begun, graduates):
        self.daemon, self.digests, self.begun, self.graduates = daemon, digests, begun, graduates
        self.local_at = self.graduated_at = self.trouble = None
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()

    def watch(self):
        try:
            while not self.ended.is_set():
                if self.local_at is None and self.daemon.all_local(self.digests):
                    self.local_at = time.monotonic() - self.begun
                if self.local_at is not None and self.graduates and self.daemon.graduated():
                    self.graduated_at = time.monotonic() - self.begun
                if self.graduated_at is not None or (self.local_at is not None and not self.graduates):
                    return
                self.ended.wait(0.02)
        except OSError as error:
            self.trouble = error

    def wait(self, deadline):
        self.thread.join(deadline)
        if self.local_at is None:
            raise Failed(f"not everything was local after {deadline:.0f} s" + (f": {self.trouble}" if self.trouble else ""))
        if self.graduates and self.graduated_at is None:
            raise Failed(f"not every layer was graduated after {deadline:.0f} s")
        return self.local_at

    def stop(self):
        self.ended.set()
        # A read of a state file in a mount whose daemon has gone returns an error at once; the join cannot hang.
        self.thread.join(10)
