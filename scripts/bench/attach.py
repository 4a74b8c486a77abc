"""Section `attach`: many layers on one daemon. Memory, the cost of attaching what is known, a restart.

Images of small synthetic layers (many-1, many-9, many-90, many-100: 200 layers together) are pulled one after another, so
that 1, 10, 100 and 200 layers are attached. Then the same images are pulled into a second containerd namespace, whose
attaching finds every index on disk, and the daemon is restarted with all of them. `wide` is one layer of 50,000 entries.

Both pulls are of the whole: client, containerd and daemon. What the daemon alone takes for one layer is measured by calls
of Prepare on its socket, with the labels that `lazurite pull` sends, for the layers of many-100 once more.
"""

import contextlib
import time

import grpc
import storage
import system
from system import Failed, say, wait_for

IMAGES = ("many-1", "many-9", "many-90", "many-100")


def section(bench):
    result = {"images": [], "memory": {}}
    images = [bench.image(name) for name in IMAGES]
    # The registries stay until the end: at a restart nobody must ask them anything, though they could be asked.
    with bench.link("loopback") as link, contextlib.ExitStack() as stack:
        registries = [stack.enter_context(bench.registry(link, image)) for image in images]
        node = stack.enter_context(bench.node(link, registries[0]))
        first, second = node.namespace(), node.namespace()
        daemon = node.snapshotters["lazurite"]
        result["memory"]["0"] = vars(daemon.usage())
        total = 0
        for image, registry in zip(images, registries):
            reference = f"{registry.address}/{image['name']}:estargz"
            cold = pull(node, registry, daemon, first, reference)
            wait_for("everything local", lambda: daemon.all_local(cold["digests"]), 300)
            total += cold["layers"]
            time.sleep(1)
            result["memory"][str(total)] = vars(daemon.usage())
            known = pull(node, registry, daemon, second, reference)
            for figures in (cold, known):
                del figures["digests"]
            result["images"].append({"image": image["name"], "cold": cold, "known": known})
            say(f"attach {image['name']}: {cold['seconds']:.2f} s cold, {known['seconds']:.2f} s known, "
                f"{result['memory'][str(total)]['rss_mib']:.1f} MiB with {total} layers")
        result["prepare_ms"] = prepare(node, registries[-1], images[-1])
        result["restart"] = restart(bench, node, registries, total)
    with bench.link("loopback") as link:
        result["wide"] = wide(bench, link)
    return result


def pull(node, registry, daemon, namespace, reference):
    mark, cpu = registry.mark(), daemon.usage().cpu_s
    seconds, layers = node.pull_lazily(namespace, daemon.name, reference, 300)
    used = daemon.usage().cpu_s - cpu
    time.sleep(0.2)
    digests = [layer["digest"] for layer in layers]
    requests = registry.since(mark)
    # The client fetches manifest and config into each namespace; what the daemon asks for are layers.
    of_layers = [request for request in requests if any(digest in request[1] for digest in digests)]
    return {"seconds": seconds, "layers": len(layers), "lazy": sum(layer["outcome"] == "lazy" for layer in layers),
            "cpu_s": used, "requests": len(requests), "layer_requests": len(of_layers), "digests": digests}


def prepare(node, registry, image):
    """Milliseconds of each Prepare of a chain of layers whose indexes are on disk, and the requests made meanwhile."""
    daemon = node.snapshotters["lazurite"]
    digest, manifest = storage.manifest(image, "estargz")
    before, mark, times, parent = len(daemon.lazy_layers()), registry.mark(), [], ""
    client = grpc.Client(daemon.socket)
    try:
        layers = manifest["layers"]
        for number, layer in enumerate(layers):
            target = f"bench/{number}/" + layer["digest"]
            labels = {key: value for key, value in layer.get("annotations", {}).items()
                      if key.startswith("containerd.io/snapshot/")}
            labels.update({
                "containerd.io/snapshot.ref": target,
                "containerd.io/snapshot/cri.image-ref": f"{registry.address}/{image['name']}:estargz",
                "containerd.io/snapshot/cri.layer-digest": layer["digest"],
                "containerd.io/snapshot/cri.manifest-digest": digest,
                "containerd.io/snapshot/cri.image-layers": ",".join(l["digest"] for l in layers[number:number + 50]),
            })
            seconds, carried = client.prepare("bench", f"bench/extract-{number}", parent, labels)
            if carried:
                raise Failed(f"layer {number} of {image['name']} was not attached lazily")
            times.append(1000 * seconds)
            parent = target
    finally:
        client.close()
    attached = len(daemon.lazy_layers()) - before
    if attached != len(times):
        raise Failed(f"{len(times)} layers were offered to the daemon, {attached} were attached")
    time.sleep(0.2)
    say(f"attach: Prepare of a known layer, median {sorted(times)[len(times) // 2]:.2f} ms, longest {max(times):.2f} ms")
    return {"times": times, "requests": len(registry.since(mark))}


def restart(bench, node, registries, layers):
    times, requests, memory = [], 0, None
    for _ in range(bench.options.runs):
        node.stop_snapshotter("lazurite")
        system.drop_caches()
        bench.warm_tools()
        marks = [registry.mark() for registry in registries]
        times.append(node.start_lazurite("lazurite", ""))
        # Time enough for anything it might do of its own accord.
        time.sleep(1)
        requests += sum(len(registry.since(mark)) for registry, mark in zip(registries, marks))
        memory = vars(node.snapshotters["lazurite"].usage())
    # containerd tries again after a while of its own choosing when a snapshotter was away.
    listed = wait_for("containerd to see the daemon again", lambda: node.ctr(
        node.namespaces[0], "snapshots", "--snapshotter", "lazurite", "ls", check=False).splitlines()[1:], 60)
    say(f"attach: restart with {layers} layers, {', '.join(f'{1000 * seconds:.0f}' for seconds in times)} ms")
    return {"layers": layers, "seconds": times, "requests": requests, "snapshots_listed": len(listed),
            "memory": memory}


def wide(bench, link):
    """One layer of 50,000 entries, cold: CPU of the daemon until the pull has returned, with nothing fetched but the TOC."""
    image = bench.image("wide")
    runs = []
    for _ in range(bench.options.runs):
        with bench.registry(link, image) as registry, \
                bench.node(link, registry, configs={"lazurite": "no_background_fetch = true\n"}) as node:
            system.drop_caches()
            bench.warm_tools()
            registry.warm()
            daemon = node.snapshotters["lazurite"]
            figures = pull(node, registry, daemon, node.namespace(), node.reference(image, "estargz"))
            del figures["digests"]
            runs.append({**figures, "memory": vars(daemon.usage())})
    return runs
