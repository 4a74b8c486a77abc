"""Section `warm`: what a mounted tree costs once its bytes are there, in ratios to overlayfs in the same round.

Ways
    overlayfs     the ordinary image, unpacked by containerd
    lazy          Lazurite with every byte local, but graduation disabled by configuration: every first touch goes
                  through FUSE. Where the program cannot graduate at all, this is all there is of it
    graduated     Lazurite with its layers replaced by native directories

The image `python` is mounted by each at the same time, as containerd mounts it for a container, and
the image of a model for reads of one large file. Every operation is timed on each way in turn, in rounds; before each
measurement that is called cold the page cache is dropped, also dentries and inodes. Medians of the rounds.
"""

import os
import random
import subprocess
import time

import start
import storage
import system
from system import Failed, run, say, wait_for

# Rounds for each of --runs: a round is short, and the noise between them is shown.
ROUNDS = 3
READS = 20000
READERS = 4


class Tree:
    """One mounted image, and what is done with it."""

    def __init__(self, way, root, model):
        self.way, self.root, self.model = way, root, model
        self.paths = []

    def list_paths(self):
        for directory, directories, files in os.walk(self.root):
            self.paths += [os.path.join(directory, name) for name in directories + files]
        # The same order on every way.
        self.paths.sort()

    def shell(self, command):
        begun = time.monotonic()
        run(["/bin/sh", "-c", f"cd '{self.root}' && {command}"], 300)
        return time.monotonic() - begun

    def tar(self):
        # Not to /dev/null itself: tar would notice and read nothing.
        return self.shell("tar cf - --one-file-system . | cat >/dev/null")

    def find(self):
        return self.shell("find . -ls >/dev/null")

    def stat_storm(self):
        """What `git status` does: lstat of every path, and of names beside them that do not exist."""
        begun = time.monotonic()
        for _ in range(5):
            for path in self.paths:
                os.lstat(path)
                try:
                    os.lstat(path + ".lock")
                except (FileNotFoundError, NotADirectoryError):
                    pass
        return time.monotonic() - begun

    def random_reads(self):
        file = os.open(os.path.join(self.model, "model.bin"), os.O_RDONLY)
        try:
            places = random.Random(7)
            blocks = os.fstat(file).st_size // 4096
            begun = time.monotonic()
            for _ in range(READS):
                os.pread(file, 4096, places.randrange(blocks) * 4096)
            return time.monotonic() - begun
        finally:
            os.close(file)

    def sequential(self):
        begun = time.monotonic()
        system.read_through(os.path.join(self.model, "model.bin"))
        return time.monotonic() - begun

    def parallel_readers(self):
        """Several processes read all files, each from another point of the list on."""
        program = (
            "import os, sys\n"
            "paths = [path for path in sys.stdin.read().split('\\0') if os.path.isfile(path) and not os.path.islink(path)]\n"
            f"children = []\n"
            f"for number in range({READERS}):\n"
            "    pid = os.fork()\n"
            "    if pid == 0:\n"
            f"        at = len(paths) * number // {READERS}\n"
            "        for path in paths[at:] + paths[:at]:\n"
            "            with open(path, 'rb', buffering=0) as file:\n"
            "                while file.read(1 << 17): pass\n"
            "        os._exit(0)\n"
            "    children.append(pid)\n"
            "sys.exit(any(os.waitpid(pid, 0)[1] for pid in children))\n")
        begun = time.monotonic()
        result = subprocess.run([system.sys.executable, "-c", program], input="\0".join(self.paths).encode(), timeout=300)
        if result.returncode != 0:
            raise Failed(f"a reader of the tree of {self.way} failed")
        return time.monotonic() - begun


# name, method, whether the caches are dropped before. A warm one follows another of its kind.
OPERATIONS = (
    ("tar, cold", "tar", True), ("tar, warm", "tar", False),
    ("find -ls, cold", "find", True), ("find -ls, warm", "find", False),
    ("stat storm, cold", "stat_storm", True), ("stat storm, warm", "stat_storm", False),
    ("parallel readers, cold", "parallel_readers", True), ("parallel readers, warm", "parallel_readers", False),
    ("sequential read, cold", "sequential", True), ("sequential read, warm", "sequential", False),
    ("random 4 KiB reads, warm", "random_reads", False),
)


def section(bench):
    graduation = start.graduation_key(bench)
    snapshotters, configs = ["lazurite"], {}
    if graduation:
        section_name, name, value = graduation
        snapshotters.append("lazy")
        configs["lazy"] = f"{section_name}\n{name} = {value}\n"
    else:
        bench.note("warm: the program has no configuration key for graduation, so only the lazy way is measured")
    python, model = bench.image("python"), bench.image("model-small")
    results = []
    with bench.link("loopback") as link, bench.registry(link, python) as registry, \
            bench.node(link, registry, snapshotters=snapshotters, configs=configs) as node:
        trees = {}
        for way in ["overlayfs", *snapshotters]:
            shown = way if way == "overlayfs" or way == "lazy" or not graduation else "graduated"
            shown = "lazy" if way == "lazurite" and not graduation else shown
            say(f"warm: mounting for {shown}")
            root = mount(bench, node, registry, python, way, shown)
            with bench.registry(link, model) as other:
                node.registry = other
                tree = Tree(shown, root, mount(bench, node, other, model, way, shown))
            node.registry = registry
            tree.list_paths()
            trees[shown] = tree
        lengths = {way: len(tree.paths) for way, tree in trees.items()}
        if len(set(lengths.values())) != 1:
            bench.note(f"warm: the trees differ in their number of entries: {lengths}")
        for number in range(ROUNDS * bench.options.runs):
            for operation, method, cold in OPERATIONS:
                order = list(trees.values())
                for tree in order if number % 2 == 0 else reversed(order):
                    if cold:
                        system.drop_caches()
                        bench.warm_tools()
                        for tool in ("/usr/bin/tar", "/usr/bin/find", "/usr/bin/cat", "/bin/sh", system.sys.executable):
                            system.read_through(os.path.realpath(tool))
                    else:
                        # The warm one is the second of two in a row, whatever came between.
                        getattr(tree, method)()
                    results.append({"way": tree.way, "operation": operation, "round": number,
                                    "seconds": getattr(tree, method)()})
            say(f"warm: round {number + 1} of {ROUNDS * bench.options.runs}")
    return results


def mount(bench, node, registry, image, way, shown):
    """Pulls, waits until everything is as local as this way gets, and mounts; returns where."""
    namespace, target = node.namespace(), node.path(f"tree-{image['name']}-{way}")
    os.makedirs(target)
    reference = node.reference(image, "plain" if way == "overlayfs" else "estargz")
    if way == "overlayfs":
        node.pull_eagerly(namespace, reference, 300)
    else:
        daemon = node.snapshotters[way]
        _, layers = node.pull_lazily(namespace, way, reference, 300)
        digests = [layer["digest"] for layer in layers]
        wait_for(f"everything local of {image['name']}", lambda: daemon.all_local(digests), 300)
        if shown == "graduated":
            wait_for("graduation", daemon.graduated, 120)
    # A view, as a container that cannot write gets; `ctr images mount` of some versions insists on the layers' blobs.
    key = "view-" + image["name"]
    node.ctr(namespace, "snapshots", "--snapshotter", way, "view", key,
             storage.chain_id(image, "plain" if way == "overlayfs" else "estargz"))
    command = node.ctr(namespace, "snapshots", "--snapshotter", way, "mounts", target, key).strip()
    if not command.startswith("mount "):
        raise Failed(f"ctr printed no mount command for {image['name']} under {way}: {command}")
    run(["/bin/sh", "-c", command], 30)
    return target
