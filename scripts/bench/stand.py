"""The real components, privately: docker-registry on one side of a link; containerd and snapshotters on the other.

A `Node` is what one measurement runs on. Every measurement gets a new one, on a new file system, so that nothing an
earlier one left (content, snapshots that wait for garbage collection) is in it. Nothing of the machine's own containerd
is used; what runc and the shims leave outside the directory is kept apart by the namespace's name and removed.
"""

import contextlib
import glob
import json
import os
import re
import shutil
import subprocess
import time

import system
from system import Failed, Processes, Usage, run, say, wait_for

ACCESS = re.compile(r'"(GET|HEAD|POST|PUT|PATCH) (\S+) HTTP/[0-9.]+" (\d+) (\d+)')


class Registry:
    """docker-registry over the storage directory of one image, and what its access log says of the requests so far."""

    count = 0

    def __init__(self, processes, directory, link, storage):
        Registry.count += 1
        self.processes, self.storage = processes, storage
        self.log = os.path.join(directory, f"registry{Registry.count}.log")
        config = os.path.join(directory, f"registry{Registry.count}.yml")
        with open(config, "w", encoding="utf-8") as file:
            file.write("version: 0.1\nlog: {level: info, accesslog: {disabled: false}}\n"
                       f"storage: {{filesystem: {{rootdirectory: {storage}}}}}\nhttp: {{addr: '{link.host}:0'}}\n")
        with open(self.log, "wb"):
            pass
        self.process = processes.start("registry", ["docker-registry", "serve", config], self.log, network=link.registry)
        found = wait_for("docker-registry listening",
                         lambda: re.search(r"listening on ([0-9.]+:\d+)", self.process.said()), 20)
        self.address = found.group(1)

    def mark(self):
        return os.path.getsize(self.log)

    def since(self, mark):
        """The requests logged since a mark: [(method, path, status, bytes of the body)]. A request is logged when it ends."""
        with open(self.log, "rb") as file:
            file.seek(mark)
            text = file.read().decode(errors="replace")
        return [(match[1], match[2], int(match[3]), int(match[4])) for match in ACCESS.finditer(text)]

    def warm(self):
        """Brings the blobs into memory. In life the registry's disk is another machine's."""
        for path in glob.glob(os.path.join(self.storage, "docker/registry/v2/blobs/*/*/*/data")):
            system.read_through(path)

    def close(self):
        self.processes.stop(self.process)


def traffic(requests):
    """Numbers and bytes of what was fetched; `layer` are requests for content of blobs, which manifests are not."""
    fetched = [request for request in requests if request[0] == "GET"]
    return {"requests": len(requests), "blob_requests": sum("/blobs/" in request[1] for request in fetched),
            "bytes": sum(request[3] for request in fetched)}


class Snapshotter:
    """A daemon behind containerd: Lazurite, or a peer that takes the same labels."""

    def __init__(self, name, pid, root, socket):
        self.name, self.pid, self.root, self.socket = name, pid, root, socket
        # Of which layer a snapshot is, and which snapshots were found complete: an image of 40 layers is asked often.
        self.digests, self.complete = {}, set()

    def usage(self):
        return Usage.of(self.pid)

    def lazy_layers(self):
        """{snapshot: where its `fs` leads}, of the layers that are links. None is known of a peer."""
        found = {}
        for fs in glob.glob(os.path.join(self.root, "snapshots/*/fs")) if self.root else []:
            with contextlib.suppress(OSError):
                found[fs] = os.readlink(fs)
        return found

    def all_local(self, digests):
        """Whether every lazy layer is complete, as its state file says, or has left the lazy mount."""
        layers = self.lazy_layers()
        return bool(layers) and all(self.layer_is_local(fs, to, digests) for fs, to in layers.items())

    def layer_is_local(self, fs, target, digests):
        if fs in self.complete or not in_mount(target):
            return True
        for digest in [self.digests[fs]] if fs in self.digests else digests:
            with contextlib.suppress(OSError, ValueError), \
                    open(os.path.join(fs, ".stargz-snapshotter", digest + ".json"), "rb") as file:
                state = json.loads(file.read())
                self.digests[fs] = digest
                if float(state.get("fetchedPercent", 0)) >= 100:
                    self.complete.add(fs)
                return fs in self.complete
        return False

    def graduated(self):
        layers = self.lazy_layers()
        return bool(layers) and not any(in_mount(target) for target in layers.values())


def in_mount(target):
    return "/mnt/" in target or target.startswith("mnt/")


class Node:
    """containerd and the snapshotters it is told of, on the node's side of a link."""

    count = 0

    def __init__(self, processes, directory, link, binary, registry, snapshotters=("lazurite",), peers=None, configs=None):
        Node.count += 1
        self.processes, self.link, self.binary, self.registry = processes, link, binary, registry
        self.root = os.path.join(directory, f"node{Node.count}")
        self.containerd_address = os.path.join(self.root, "containerd.sock")
        self.peers = peers or {}
        self.namespaces, self.own, self.snapshotters = [], [], {}
        # What the tests' host has under /run/containerd stays; a directory we caused goes.
        self.run_is_ours = not os.path.exists("/run/containerd")
        os.makedirs(self.root)
        self.disk = system.FreshDisk(self.root)
        try:
            self.start_containerd(snapshotters)
            for name in snapshotters:
                self.start_lazurite(name, (configs or {}).get(name, ""))
            for name, path in self.peers.items():
                self.snapshotters[name] = Snapshotter(name, system.peer_pid(path), None, path)
        except BaseException:
            self.close()
            raise

    def path(self, name):
        return os.path.join(self.root, name)

    def start_containerd(self, snapshotters):
        text = (f'version = 2\nroot = "{self.path("containerd/root")}"\nstate = "{self.path("containerd/state")}"\n'
                f'disabled_plugins = ["io.containerd.grpc.v1.cri"]\n[grpc]\n  address = "{self.containerd_address}"\n'
                f'[ttrpc]\n  address = "{self.containerd_address}.ttrpc"\n'
                # Content is not shared between namespaces, so that what one pull fetched spares another nothing.
                '[plugins."io.containerd.metadata.v1.bolt"]\n  content_sharing_policy = "isolated"\n')
        sockets = {**{name: self.path(name + ".sock") for name in snapshotters}, **self.peers}
        for name, path in sockets.items():
            text += f'[proxy_plugins.{name}]\n  type = "snapshot"\n  address = "{path}"\n'
        config = self.path("containerd.toml")
        with open(config, "w", encoding="utf-8") as file:
            file.write(text)
        self.containerd = self.processes.start("containerd", ["containerd", "--config", config], self.path("containerd.log"),
                                               network=self.link.node)
        self.own.append(self.containerd)
        wait_for("containerd answering", lambda: system.answers_http2(self.containerd_address), 20)

    def start_lazurite(self, name, config, root=None):
        """Starts a daemon; returns it and the seconds until it answered."""
        file_name, root, socket = self.path(name + ".toml"), root or self.path(name), self.path(name + ".sock")
        with open(file_name, "w", encoding="utf-8") as file:
            # Plain http is a matter of course for loopback only.
            file.write(config + "\n" + ("" if self.link.host.startswith("127.") else
                       f'[[resolver.host."{self.registry.address}".mirrors]]\nhost = "{self.registry.address}"\n'
                       'insecure = true\n'))
        begun = time.monotonic()
        process = self.processes.start(name, [self.binary, "serve", "--config", file_name, "--root", root, "--address",
                                              socket], self.path(name + ".log"), network=self.link.node)
        self.own.append(process)
        wait_for(f"{name} answering", lambda: system.answers_http2(socket) or not process.alive(), 60, pause=0.001)
        if not process.alive():
            raise Failed(f"{name} has ended: " + "\n".join(process.said().splitlines()[-5:]))
        self.snapshotters[name] = Snapshotter(name, process.pid, root, socket)
        self.snapshotters[name].process = process
        return time.monotonic() - begun

    def stop_snapshotter(self, name):
        process = self.snapshotters.pop(name).process
        self.processes.stop(process)
        self.own.remove(process)

    def namespace(self):
        name = f"lazurite-bench-{os.getpid()}-{Node.count}-{len(self.namespaces)}"
        self.namespaces.append(name)
        return name

    def client(self, namespace, command, **options):
        env = {"CONTAINERD_ADDRESS": self.containerd_address, "CONTAINERD_NAMESPACE": namespace}
        return run(command, network=self.link.node, env=env, **options)

    def ctr(self, namespace, *arguments, **options):
        return self.client(namespace, ["ctr", *arguments], **options)

    def reference(self, image, tag):
        return f"{self.registry.address}/{image['name']}:{tag}"

    def pull_eagerly(self, namespace, reference, deadline):
        # ctr of containerd 2 pulls through the transfer service unless told otherwise; ctr of 1.x knows no other way.
        local = ["--local"] if "--local" in self.ctr(namespace, "images", "pull", "--help") else []
        begun = time.monotonic()
        self.ctr(namespace, "images", "pull", *local, "--plain-http", "--snapshotter", "overlayfs", reference,
                 deadline=deadline)
        return time.monotonic() - begun

    def pull_lazily(self, namespace, snapshotter, reference, deadline):
        """Returns the seconds and what `lazurite pull` says of the layers."""
        begun = time.monotonic()
        output = self.path("pull.json")
        with open(output, "wb") as file:
            self.client(namespace, [self.binary, "pull", "--plain-http", "--json", "--snapshotter", snapshotter, reference],
                        deadline=deadline, output=file)
        seconds = time.monotonic() - begun
        with open(output, encoding="utf-8") as file:
            return seconds, json.load(file)["layers"]

    def run_until_ready(self, namespace, snapshotter, reference, image, deadline, at_ready=lambda: None):
        """Starts a container; returns the seconds until its program said READY and calls `at_ready` at that moment. The
        container is gone afterwards."""
        name = f"{namespace}-{time.monotonic_ns()}"
        output = self.path(name + ".out")
        command = ["ctr", "run", "--rm", "--snapshotter", snapshotter, "--log-uri", "file://" + output, reference, name]
        env = {"CONTAINERD_ADDRESS": self.containerd_address, "CONTAINERD_NAMESPACE": namespace}
        begun = time.monotonic()
        # The container's own process is the shim's child; ctr only waits for it.
        process = subprocess.Popen(system.in_network(command, self.link.node), env={**os.environ, **env},
                                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                          stderr=subprocess.STDOUT, start_new_session=True)
        try:
            ready = None
            while ready is None:
                ended = process.poll() is not None
                with contextlib.suppress(FileNotFoundError), open(output, "rb") as file:
                    if b"READY\n" in file.read():
                        ready = time.monotonic() - begun
                        at_ready()
                        break
                if ended or time.monotonic() - begun > deadline:
                    said = process.stdout.read().decode(errors="replace") if ended else "deadline passed"
                    with contextlib.suppress(OSError), open(output, "rb") as file:
                        said += file.read().decode(errors="replace")[-1000:]
                    raise Failed(f"{image['name']} under {snapshotter} was never ready: {said.strip()}")
                time.sleep(0.002)
            if image["stays"]:
                self.ctr(namespace, "tasks", "kill", "--signal", "SIGKILL", name, check=False)
            process.wait(60)
            return ready
        finally:
            if process.poll() is None:
                with contextlib.suppress(Exception):
                    self.ctr(namespace, "tasks", "delete", "--force", name, check=False, deadline=20)
                process.kill()
                process.wait()

    def create(self, namespace, snapshotter, reference):
        """Makes a container that is never started; returns the seconds."""
        name = f"{namespace}-{time.monotonic_ns()}"
        begun = time.monotonic()
        self.ctr(namespace, "containers", "create", "--snapshotter", snapshotter, reference, name)
        seconds = time.monotonic() - begun
        self.ctr(namespace, "containers", "rm", name)
        return seconds

    def close(self):
        for namespace in self.namespaces:
            with contextlib.suppress(Exception):
                if self.containerd.alive():
                    for task in self.ctr(namespace, "tasks", "ls", "-q", check=False, deadline=20).split():
                        self.ctr(namespace, "tasks", "delete", "--force", task, check=False, deadline=20)
            with contextlib.suppress(Exception):
                if self.peers and self.containerd.alive():
                    self.forget(namespace)
        for mount in reversed(system.mounts_below(self.root)):
            # Trees we mounted and those of containers; the daemon unmounts its own when it ends.
            if not any(mount == os.path.join(s.root, "mnt") for s in self.snapshotters.values() if s.root):
                run(["umount", mount], 20, check=False)
        for process in reversed(self.own):
            self.processes.stop(process)
        # Should a mount have been left to it, nobody waits for a daemon any more.
        run(["pkill", "-f", f"^lazurite-keep keep {self.root}/"], 20, check=False)
        for mount in reversed(system.mounts_below(self.root)):
            run(["umount", "--lazy", mount], 20, check=False)
        for namespace in self.namespaces:
            with contextlib.suppress(OSError):
                os.rmdir("/run/containerd/runc/" + namespace)
            for directory in glob.glob(f"/sys/fs/cgroup/**/{namespace}", recursive=True):
                with contextlib.suppress(OSError):
                    for child in os.listdir(directory):
                        if os.path.isdir(os.path.join(directory, child)):
                            os.rmdir(os.path.join(directory, child))
                    os.rmdir(directory)
        if self.run_is_ours:
            for directory, _, _ in os.walk("/run/containerd", topdown=False):
                with contextlib.suppress(OSError):
                    os.rmdir(directory)
        self.disk.close()

    def forget(self, namespace):
        """Removes what a peer, which outlives this node, has been given. What it keeps in a cache of its own is out of
        reach: a peer should be configured to keep nothing, or its later runs are not cold."""
        for image in self.ctr(namespace, "images", "ls", "-q", check=False).split():
            self.ctr(namespace, "images", "rm", "--sync", image, check=False)


class Bench:
    """What all sections share: the options, the work directory, the links that are up, the images."""

    def __init__(self, options, directory):
        self.options, self.directory = options, directory
        self.processes = Processes()
        self.images = {}
        self.notes, self.links, self.graduation = [], {}, None

    def note(self, text):
        if text not in self.notes:
            say("note: " + text)
            self.notes.append(text)

    def image(self, name):
        if name not in self.images:
            say(f"looking for the image {name} in the cache")
            builder = os.path.join(self.options.root, "tests/images/workloads/build.py")
            # Standard error goes to ours: building takes minutes, and says what it does.
            with subprocess.Popen([builder, self.options.binary, name], stdout=subprocess.PIPE) as process:
                try:
                    said, _ = process.communicate(timeout=3600)
                except BaseException:
                    process.terminate()
                    process.wait(30)
                    raise
            if process.returncode != 0:
                raise Failed(f"cannot build the image {name}")
            self.images[name] = json.loads(said)
        return self.images[name]

    @contextlib.contextmanager
    def link(self, name):
        import link
        one = link.Link(self.processes, self.directory, link.SHAPES[name])
        try:
            yield one
        finally:
            one.close()

    @contextlib.contextmanager
    def registry(self, link, image):
        one = Registry(self.processes, self.directory, link, os.path.join(image["store"], "registry"))
        try:
            yield one
        finally:
            one.close()

    @contextlib.contextmanager
    def node(self, link, registry, **options):
        peers = self.options.peers if link.node is None else {}
        node = Node(self.processes, self.directory, link, self.options.binary, registry, peers=peers, **options)
        try:
            yield node
        except BaseException:
            self.keep_logs(node)
            raise
        finally:
            node.close()

    def keep_logs(self, node):
        for log in glob.glob(os.path.join(node.root, "*.log")):
            with contextlib.suppress(OSError):
                with open(log, encoding="utf-8", errors="replace") as file:
                    tail = file.read().splitlines()[-8:]
                say(f"--- end of {os.path.basename(log)}")
                for line in tail:
                    say(line[:400])

    def warm_tools(self):
        """The programs themselves are on every node's disk and in its memory; the image is what is measured."""
        for tool in ("ctr", "runc", "containerd", "containerd-shim-runc-v2", "nsenter", "setpriv"):
            path = shutil.which(tool)
            if path:
                system.read_through(os.path.realpath(path))
        system.read_through(self.options.binary)

    def close(self):
        self.processes.close()
        for mount in reversed(system.mounts_below(self.directory)):
            run(["umount", "--lazy", mount], 20, check=False)
        system.detach_below(self.directory)
        run(["rm", "-rf", "--one-file-system", self.directory], 300, check=False)
