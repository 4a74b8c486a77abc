#!/usr/bin/env python3
"""Builds the images that the benchmark runs, once, and prints a line of JSON about each.

    build.py LAZURITE_BINARY NAME...

Each image has a directory of its own in the cache ($LAZURITE_CACHE, else ~/.cache/lazurite), named after what decides
its contents, with
    registry/       a docker-registry storage directory: NAME:plain, NAME:estargz and, if a start of its program was
                    traced, NAME:prefetch, which has the files that start opened in front
    image.json      what is printed: where it lies, its program, its sizes
NAME:plain has ordinary gzip layers; `lazurite convert` makes the others of it. Layers that images share, and layers
that are slow to make, are cached as tars beside them.

Needs root, debootstrap, skopeo, docker-registry, strace, pip, a Debian mirror and a Python package index, as this
machine's apt and pip are configured. This is apart from ../build.sh so that the images of the tests keep their cache
when a workload changes.
"""

import contextlib
import dataclasses
import fcntl
import glob
import hashlib
import importlib.util
import json
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
IMAGES = os.path.dirname(HERE)
sys.dont_write_bytecode = True
sys.path.insert(0, IMAGES)
sys.path.insert(0, HERE)

import layers as small_layers  # noqa: E402  (../layers.py)
import recipes  # noqa: E402

TIME = 1700000000
# To be raised when a change to this script changes what an image holds.
FORMAT = 1
MINUTE = 60
TOOLS = ("debootstrap", "docker-registry", "dpkg-deb", "nice", "setpriv", "skopeo", "strace", "tar", "unshare")
# What apt writes that no image ships.
NOT_SHIPPED = ("var/cache/apt", "var/lib/apt/lists", "var/log", "tmp", "run", "dev", "proc", "sys", "etc/resolv.conf",
               "usr/sbin/policy-rc.d", "root", "var/cache/ldconfig", "var/cache/debconf", "var/lib/dpkg/info/triggers")
# What a trace shows of the tracing itself.
NOT_THE_PROGRAM = ("proc/", "dev/", "tmp/", "usr/bin/sleep", "usr/bin/grep", "usr/sbin/chroot")


class Failed(Exception):
    """A step went wrong; the message is for the user."""


def say(text):
    print(text, file=sys.stderr, flush=True)


def run(command, deadline=20 * MINUTE, **options):
    """Runs a command nicely; on failure shows the end of what it said."""
    options.setdefault("stdin", subprocess.DEVNULL)
    result = subprocess.run(["nice", *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=deadline,
                            **options)
    if result.returncode != 0:
        tail = result.stdout.decode(errors="replace").strip().splitlines()[-12:]
        raise Failed("\n".join([f"{command[0]} failed ({result.returncode}): {' '.join(command)[:300]}", *tail]))
    return result.stdout.decode(errors="replace")


def key(*parts):
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def file_key(*paths):
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            digest.update(file.read())
    return digest.hexdigest()[:12]


def machine_mirror():
    """The Debian mirror of this machine's apt, in either of its formats; None to use what the base image names."""
    for path in ["/etc/apt/sources.list", *sorted(glob.glob("/etc/apt/sources.list.d/*"))]:
        with contextlib.suppress(OSError), open(path, encoding="utf-8") as file:
            found = re.search(r"^(?:deb +(?:\[[^]]*\] +)?|URIs: *)(https?://\S+/debian)/?( .*)?$", file.read(), re.M)
            if found:
                return found.group(1)
    return None


class Tree:
    """The merged file system of an image under construction, in which programs can run."""

    def __init__(self, path, tars):
        self.path = path
        os.makedirs(path)
        for tar in tars:
            run(["tar", "--extract", "--numeric-owner", "--xattrs", "--same-permissions", "--file", tar,
                 "--directory", path])
        for directory in ("proc", "dev", "sys", "run", "tmp"):
            os.makedirs(os.path.join(path, directory), exist_ok=True)

    def shell(self, script, wrapper=(), deadline=20 * MINUTE):
        """Runs a shell script in the tree, with /proc and a small /dev that exist only meanwhile."""
        outer = (
            'set -e; mount -t proc proc "$0/proc"; mount -t tmpfs dev "$0/dev"; mkdir "$0/dev/shm"; '
            'for node in null zero full random urandom tty; do cp -a "/dev/$node" "$0/dev/"; done; '
            'ln -s /proc/self/fd "$0/dev/fd"; export HOME=/root PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C; '
            'script=$1; shift; exec "$@" chroot "$0" /bin/sh -ec "$script"')
        return run(["unshare", "--mount", "--pid", "--fork", "--kill-child", "--propagation", "private", "/bin/sh", "-c",
                    outer, self.path, script, *wrapper], deadline=deadline)

    def apt(self, arguments):
        """apt-get with this machine's mirror and name server, and no services started."""
        sources = os.path.join(self.path, "etc/apt/sources.list")
        with open(sources, encoding="utf-8") as file:
            original = file.read()
        mirror = machine_mirror()
        with open(sources, "w", encoding="utf-8") as file:
            file.write(re.sub(r"http\S+", mirror, original) if mirror else original)
        for name in ("etc/resolv.conf", "etc/hosts"):
            shutil.copyfile(f"/{name}", os.path.join(self.path, name))
        policy = os.path.join(self.path, "usr/sbin/policy-rc.d")
        with open(policy, "w", encoding="utf-8") as file:
            file.write("#!/bin/sh\nexit 101\n")
        os.chmod(policy, 0o755)
        try:
            return self.shell("export DEBIAN_FRONTEND=noninteractive; apt-get -qq update; " + arguments)
        finally:
            with open(sources, "w", encoding="utf-8") as file:
                file.write(original)
            os.unlink(policy)
            os.truncate(os.path.join(self.path, "etc/resolv.conf"), 0)

    def stamp(self):
        """A file whose time tells later changes from earlier ones: both are times of the same clock."""
        path = self.path + ".stamp"
        with open(path, "w", encoding="utf-8"):
            pass
        time.sleep(0.05)
        return path

    def pack_changes(self, stamp, out):
        """Packs what was made or changed since the stamp: whatever has a newer change time."""
        found = run(["find", ".", "-mindepth", "1", "-newercm", stamp], cwd=self.path).splitlines()
        names = [name[2:] for name in found]
        kept = sorted(name for name in names
                      if not any(name == gone or name.startswith(gone + "/") for gone in NOT_SHIPPED))
        listing = out + ".list"
        with open(listing, "w", encoding="utf-8") as file:
            file.write("".join(name + "\n" for name in kept))
        run(["tar", "--create", "--file", out, "--directory", self.path, "--no-recursion", "--numeric-owner", "--xattrs",
             "--format=posix", "--pax-option=delete=atime,delete=ctime,delete=mtime,exthdr.name=%d/PaxHeaders/%f",
             "--files-from", listing])
        os.unlink(listing)


class Builder:
    """The cache, and what is in it so far."""

    def __init__(self, cache, binary, work):
        self.cache, self.binary, self.work = cache, binary, work

    def layer(self, name, identity, make):
        """A cached tar: make(path) writes it if it is not there yet."""
        path = os.path.join(self.cache, "layers", f"{name}-{key(identity)}.tar")
        if not os.path.exists(path):
            if not name.startswith("many-"):
                say(f"  making the layer {name}")
            os.makedirs(os.path.dirname(path), exist_ok=True)
            make(path + ".tmp")
            os.rename(path + ".tmp", path)
        return path

    def base(self, recipe):
        """The tars below an image's own layers, and what identifies them."""
        if recipe.base == "none":
            return [], ""
        if recipe.base == "busybox":
            busybox = shutil.which("busybox")
            if not busybox:
                raise Failed("busybox is missing; run scripts/setup.sh test")
            def make(path):
                layer = small_layers.Layer(path)
                small_layers.busybox_tree(layer, busybox)
                layer.close()
            identity = file_key(busybox, os.path.join(IMAGES, "layers.py"))
            return [self.layer("busybox", identity, make)], identity
        # The same directory as ../build.sh uses, so that the slowest step is made once for both.
        maker = os.path.join(IMAGES, "debian.sh")
        out = os.path.join(os.path.dirname(self.cache), f"debian-{file_key(maker)}")
        if not os.path.exists(os.path.join(out, "complete")):
            say("  making Debian with Python by debootstrap")
            run([maker, out])
        return [os.path.join(out, "0-debian.tar"), os.path.join(out, "1-python.tar")], file_key(maker)

    def packages(self, recipe, tars, base_key):
        def make(path):
            tree = Tree(tempfile.mkdtemp(dir=self.work) + "/tree", tars)
            stamp = tree.stamp()
            # A PostgreSQL cluster of the package's own would only be in the way.
            hook = os.path.join(tree.path, "etc/postgresql-common/createcluster.d")
            os.makedirs(hook)
            with open(os.path.join(hook, "none.conf"), "w", encoding="utf-8") as file:
                file.write("create_main_cluster = false\n")
            os.makedirs(os.path.join(tree.path, "usr/share/man/man1"), exist_ok=True)
            tree.apt("apt-get -qq --yes --no-install-recommends install " + " ".join(recipe.packages))
            if recipe.prepare:
                tree.shell(recipe.prepare)
            tree.pack_changes(stamp, path)
            shutil.rmtree(tree.path)
        return self.layer(recipe.packages[0], [recipe.packages, recipe.prepare, base_key], make)

    def wheels(self, recipe):
        def make(path):
            root = tempfile.mkdtemp(dir=self.work)
            target = os.path.join(root, "usr/local/lib/python3.11/dist-packages")
            os.makedirs(target)
            if not importlib.util.find_spec("pip"):
                raise Failed("pip is missing; install python3-pip")
            run([sys.executable, "-m", "pip", "--quiet", "install", "--target", target, "--only-binary=:all:",
                 "--implementation=cp", "--python-version=3.11", f"--platform=manylinux2014_{platform.machine()}",
                 f"--platform=manylinux_2_17_{platform.machine()}", *recipe.wheels])
            pack(root, path)
            shutil.rmtree(root)
        return self.layer("wheels", [recipe.wheels, platform.machine()], make)

    def single(self, recipe, tars, base_key):
        """One layer a package: the package's own tar of files, uncompressed."""
        identity = [recipe.single, base_key, 2]
        directory = os.path.join(self.cache, "layers", f"packages-{key(identity)}")
        if not os.path.exists(os.path.join(directory, "complete")):
            say(f"  fetching {len(recipe.single)} packages")
            tree = Tree(tempfile.mkdtemp(dir=self.work) + "/tree", tars)
            tree.apt("mkdir /debs; chmod 777 /debs; cd /debs; apt-get -qq download " + " ".join(recipe.single))
            os.makedirs(directory, exist_ok=True)
            for package in recipe.single:
                found = glob.glob(os.path.join(tree.path, "debs", package + "_*.deb"))
                package_layer(found[0], os.path.join(directory, package + ".tar"))
            shutil.rmtree(tree.path)
            with open(os.path.join(directory, "complete"), "w", encoding="utf-8"):
                pass
        return [os.path.join(directory, package + ".tar") for package in recipe.single]

    def synthetic(self, name, count, files):
        def make(number):
            def write(path):
                layer, source = small_layers.Layer(path), random.Random(f"{name} {number}")
                # One directory for every 24 files, as in a tree of packages.
                for index in range(files):
                    if index % 24 == 0:
                        directory = f"{name}-layer-{number:03}-directory-{index // 24:05}"
                        layer.directory(directory)
                    text = (f"{source.random()} " * 8).encode() * source.randrange(1, 20)
                    layer.file(f"{directory}/module_{index:05}_{source.randrange(10 ** 6)}.py", text)
                layer.close()
            return write
        return [self.layer(f"{name}-{number}", [count, files], make(number)) for number in range(count)]

    def model(self, recipe):
        return self.layer(f"model{recipe.model >> 20}", [recipe.model, 1], lambda path: model_layer(path, recipe.model))

    def java(self, recipe, tars):
        """Compiled by the same Debian's compiler, in a tree that is thrown away."""
        name, text = recipe.java
        path = self.layer("java-classes", [recipe.java], lambda out: self.compile(name, text, tars, out))
        return path

    def compile(self, name, text, tars, out):
        tree = Tree(tempfile.mkdtemp(dir=self.work) + "/tree", tars)
        tree.apt("apt-get -qq --yes --no-install-recommends install default-jdk-headless")
        source = os.path.join(tree.path, name)
        os.makedirs(os.path.dirname(source))
        with open(source, "w", encoding="utf-8") as file:
            file.write(text)
        tree.shell(f"javac -d /{os.path.dirname(name)} /{name}")
        root = tempfile.mkdtemp(dir=self.work)
        shutil.copytree(os.path.dirname(source), os.path.join(root, os.path.dirname(name)))
        pack(root, out)
        shutil.rmtree(tree.path)

    def app(self, name, recipe, single):
        root = tempfile.mkdtemp(dir=self.work)
        files = dict(recipe.app)
        if single:
            files["app/packages.json"] = json.dumps({os.path.basename(tar)[:-4]: tar_files(tar) for tar in single}, indent=1)
        for path, text in files.items():
            full = os.path.join(root, path)
            os.makedirs(os.path.dirname(full), exist_ok=True)
            with open(full, "w", encoding="utf-8") as file:
                file.write(text)
        return self.layer(f"app-{name}", sorted(files.items()), lambda out: pack(root, out))

    def tars(self, name, recipe):
        tars, base_key = self.base(recipe)
        if recipe.packages:
            tars.append(self.packages(recipe, tars, base_key))
        if recipe.wheels:
            tars.append(self.wheels(recipe))
        if recipe.synthetic:
            tars += self.synthetic(name, *recipe.synthetic)
        single = self.single(recipe, tars, base_key) if recipe.single else []
        tars += single
        if recipe.model:
            tars.append(self.model(recipe))
        if recipe.java:
            tars.append(self.java(recipe, tars))
        if recipe.app:
            tars.append(self.app(name, recipe, single))
        return tars

    def image(self, name):
        recipe = recipes.RECIPES[name]
        # Only what differs from the defaults counts: a new field of recipes builds nothing anew.
        fields = {field.name: value for field in dataclasses.fields(recipe)
                  if (value := getattr(recipe, field.name)) != field.default}
        identity = key(fields, FORMAT, file_key(os.path.join(IMAGES, "layout.py"), os.path.join(IMAGES, "debian.sh")))
        out = os.path.join(self.cache, f"{name}-{identity}")
        described = os.path.join(out, "image.json")
        if not os.path.exists(described):
            say(f"building the image {name}")
            shutil.rmtree(out, ignore_errors=True)
            os.makedirs(out)
            self.build(name, recipe, out, described)
        with open(described, encoding="utf-8") as file:
            return {**json.load(file), "store": out}

    def build(self, name, recipe, out, described):
        tars = self.tars(name, recipe)
        say("  compressing and storing")
        layout = os.path.join(self.work, name + ".oci")
        run([sys.executable, os.path.join(IMAGES, "layout.py"), layout, "plain", json.dumps(recipe.command), *tars])
        facts = {"name": name, "command": list(recipe.command), "stays": recipe.stays, "layers": len(tars),
                 "tar_bytes": sum(os.path.getsize(tar) for tar in tars), "tags": ["plain", "estargz"]}
        with registry(os.path.join(out, "registry"), self.work) as address:
            source, place = f"docker://{address}/{name}:plain", f"docker://{address}/{name}"
            run(["skopeo", "copy", "--preserve-digests", "--dest-tls-verify=false", f"oci:{layout}:plain", source])
            shutil.rmtree(layout)
            say("  converting")
            run([self.binary, "convert", source, place + ":estargz"])
            if recipe.prefetch:
                say("  tracing one start")
                listing = os.path.join(out, "prefetch.list")
                self.trace(tars, recipe, listing)
                run([self.binary, "convert", "--force", "--tmpdir", self.work, "--prefetch-list", listing, source,
                     place + ":prefetch"])
                facts["tags"].append("prefetch")
        with open(described + ".tmp", "w", encoding="utf-8") as file:
            json.dump(facts, file, indent=1)
        os.rename(described + ".tmp", described)

    def trace(self, tars, recipe, listing):
        """Lists the regular files a start opens, in the order of their first opening."""
        tree = Tree(tempfile.mkdtemp(dir=self.work) + "/tree", tars)
        log = os.path.join(self.work, "strace")
        command = " ".join("'" + word.replace("'", "'\\''") + "'" for word in recipe.command)
        # Whatever still runs in the namespace (a server) is ended once it is ready; its files are open by then.
        script = (f"{command} >/tmp/said & until grep -q READY /tmp/said; do sleep 0.1; done; "
                  "kill -KILL -1 || true; cat /tmp/said")
        tree.shell(f"ulimit -c 0; {script}", ["strace", "-f", "-y", "-qq", "-e", "trace=open,openat,execve", "-o", log],
                   deadline=5 * MINUTE)
        opened = re.compile(r"(?:open|openat)\(.* = \d+<(/[^>]*)>$")
        executed = re.compile(r'execve\("([^"]+)".* = 0$')
        prefix = os.path.realpath(tree.path) + "/"
        found = {}
        # The kernel itself opens the dynamic loader, which no trace shows.
        for loader in glob.glob(os.path.join(prefix, "usr/lib/*/ld-linux*")):
            found[os.path.relpath(os.path.realpath(loader), prefix)] = None
        with open(log, encoding="utf-8", errors="replace") as file:
            for line in file:
                path = None
                if match := opened.search(line.rstrip()):
                    path = match.group(1)
                elif match := executed.search(line.rstrip()):
                    path = resolve(prefix, match.group(1))
                if path and path.startswith(prefix) and os.path.isfile(path):
                    found[path[len(prefix):]] = None
        ours = [path for path in found if not path.startswith(NOT_THE_PROGRAM)]
        if not ours:
            raise Failed("the trace of a start shows no opened file")
        with open(listing, "w", encoding="utf-8") as file:
            file.write("".join(glob.escape(path) + "\n" for path in ours))
        shutil.rmtree(tree.path)


def resolve(prefix, path):
    """The path in the tree of what `path` names in it, symbolic links followed there and not here."""
    seen, parts, at = 0, path.strip("/").split("/"), []
    while parts:
        part = parts.pop(0)
        full = os.path.join(prefix, *at, part)
        if os.path.islink(full) and seen < 40:
            seen += 1
            target = os.readlink(full)
            if target.startswith("/"):
                at = []
            parts = target.strip("/").split("/") + parts
        elif part == "..":
            at = at[:-1]
        elif part != ".":
            at.append(part)
    return os.path.join(prefix, *at)


def pack(root, out):
    run(["tar", "--create", "--file", out, "--directory", root, "--sort=name", "--owner=0", "--group=0", "--numeric-owner",
         f"--mtime=@{TIME}", "--mode=u=rwX,go=rX", *sorted(os.listdir(root))])


def package_layer(package, out):
    """The package's files as a layer. Where Debian has links to directories below /usr, a package may have a directory,
    which as a layer's entry would replace the link; dpkg follows the link, and so do we."""
    merged = re.compile(r"^(\./)?(bin|sbin|lib|lib32|lib64|libx32)(/|$)")
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", package], stdout=subprocess.PIPE) as process, \
            tarfile.open(fileobj=process.stdout, mode="r|") as source, tarfile.open(out, "w") as target:
        for member in source:
            if member.name == "." or merged.fullmatch(member.name + "/"):
                continue
            member.name = merged.sub(r"\1usr/\2\3", member.name)
            if member.islnk():
                member.linkname = merged.sub(r"\1usr/\2\3", member.linkname)
            target.addfile(member, source.extractfile(member) if member.isreg() else None)
    if process.returncode != 0:
        raise Failed(f"dpkg-deb cannot read {package}")


def tar_files(tar):
    with tarfile.open(tar) as archive:
        return ["/" + member.name.removeprefix("./") for member in archive if member.isfile()]


def model_layer(path, size):
    """One large file that looks to a compressor like the weights of a neural network: 16-bit floats (bfloat16) of a
    normal distribution, whose upper bytes compress and whose lower bytes do not. Pieces of one pool in random order:
    far further apart than the window of gzip."""
    source = random.Random(15)
    floats = 1 << 22
    # A bfloat16 is the upper half of a float; little endian, so the byte with the exponent comes second.
    import array
    values = array.array("f", (source.gauss(0, 0.02) for _ in range(floats)))
    raw = values.tobytes()
    pool = bytearray(2 * floats)
    pool[0::2], pool[1::2] = raw[2::4], raw[3::4]
    pool = bytes(pool)

    class Content:
        left = size

        def read(self, wanted):
            wanted = min(wanted, self.left)
            self.left -= wanted
            at = source.randrange((len(pool) - wanted) // 2) * 2
            return pool[at:at + wanted]

    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        entry = tarfile.TarInfo("model.bin")
        entry.size, entry.mtime, entry.mode = size, TIME, 0o644
        tar.copybufsize = 1 << 20
        tar.addfile(entry, Content())


@contextlib.contextmanager
def registry(storage, work):
    """docker-registry on loopback over a storage directory; yields its address."""
    os.makedirs(storage, exist_ok=True)
    config, log = os.path.join(work, "registry.yml"), os.path.join(work, "registry.log")
    with open(config, "w", encoding="utf-8") as file:
        file.write("version: 0.1\nlog: {level: info, accesslog: {disabled: true}}\n"
                   f"storage: {{filesystem: {{rootdirectory: {storage}}}}}\nhttp: {{addr: '127.0.0.1:0'}}\n")
    with open(log, "wb") as out:
        process = subprocess.Popen(["setpriv", "--pdeathsig", "TERM", "docker-registry", "serve", config], stdout=out,
                                   stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 20
        while True:
            with open(log, encoding="utf-8", errors="replace") as file:
                found = re.search(r"listening on ([0-9.:]+)", file.read())
            if found:
                break
            if time.monotonic() > deadline or process.poll() is not None:
                raise Failed("docker-registry does not listen")
            time.sleep(0.05)
        yield found.group(1)
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def main():
    if len(sys.argv) < 3:
        raise Failed("usage: build.py LAZURITE_BINARY NAME...\nnames: " + " ".join(recipes.RECIPES))
    binary, names = os.path.realpath(sys.argv[1]), sys.argv[2:]
    unknown = [name for name in names if name not in recipes.RECIPES]
    if unknown:
        raise Failed(f"no image is called {unknown[0]}; there are {', '.join(recipes.RECIPES)}")
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    missing = [tool for tool in TOOLS if not shutil.which(tool)]
    if missing:
        raise Failed(f"missing: {', '.join(missing)}; install the packages of these names")
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    cache = os.path.join(os.environ.get("LAZURITE_CACHE") or os.path.join(home, "lazurite"), "bench")
    os.makedirs(cache, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    # Callers may run at the same time; one builds, the others wait.
    with open(os.path.join(cache, "lock"), "w", encoding="utf-8") as lock, \
            tempfile.TemporaryDirectory(prefix="lazurite-workloads.", dir=os.environ.get("TMPDIR")) as work:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for name in names:
            print(json.dumps(Builder(cache, binary, work).image(name)), flush=True)


if __name__ == "__main__":
    try:
        main()
    except Failed as error:
        sys.exit(f"build.py: error: {error}")
    except subprocess.TimeoutExpired as error:
        sys.exit(f"build.py: error: {error.cmd[1]} did not end in time")
    except KeyboardInterrupt:
        sys.exit(130)
