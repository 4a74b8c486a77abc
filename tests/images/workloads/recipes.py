"""What the workload images contain: data only. build.py makes them, the benchmark in scripts/bench/ runs them.

Every program prints a line READY when it has reached what its user waits for; that is when the clock stops.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One image: layers from the lowest to the topmost, and the program that is its command."""

    # "debian": Debian and Python in two layers, shared by all images that name it. "busybox": one small layer.
    base: str
    # Debian packages that make one layer together, with what they depend on.
    packages: tuple = ()
    # A shell script run as root in the tree before that layer is packed.
    prepare: str = ""
    # Wheels that make one layer.
    wheels: tuple = ()
    # Debian packages that make one layer each, without what they depend on: only their files matter.
    single: tuple = ()
    # Made up: (layers, files in each). With many layers they are named alike, as the layers of one builder are.
    synthetic: tuple = ()
    # Bytes of a file /model.bin in a layer of its own.
    model: int = 0
    # Files of the topmost layer: path -> text.
    app: tuple = ()
    # A Java source to compile into the topmost layer: (path of the class file, text).
    java: tuple = ()
    command: tuple = ()
    # Whether the program goes on after READY and has to be ended.
    stays: bool = False
    # Whether an image with a prefetch landmark is made: not for a program that reads everything anyway.
    prefetch: bool = True


def script(text):
    return text.lstrip("\n")


SWEEP = script("""
import json, os
# Stats every file of every package and reads the beginning of one in twenty, as a program with many plug-ins does.
stats = reads = total = 0
for paths in json.load(open("/app/packages.json")).values():
    for number, path in enumerate(paths):
        status = os.lstat(path)
        stats += 1
        if number % 20 == 0:
            with open(path, "rb") as file:
                total += len(file.read(65536))
            reads += 1
print(stats, "stats", reads, "reads", total, "bytes")
print("READY", flush=True)
""")

RECIPES = {
    "python": Recipe(
        base="debian",
        app=(("app/hello.py", script("""
import asyncio, json, sqlite3, ssl, sys
print(json.dumps({"python": sys.version.split()[0], "ssl": ssl.OPENSSL_VERSION, "sqlite": sqlite3.sqlite_version}))
print("READY", flush=True)
""")),),
        command=("/usr/bin/python3", "/app/hello.py"),
    ),
    "numpy": Recipe(
        base="debian",
        wheels=("numpy==1.26.4", "scipy==1.11.4"),
        app=(("app/hello.py", script("""
import numpy, scipy.linalg, scipy.optimize, scipy.sparse, scipy.stats
matrix = numpy.arange(16.0).reshape(4, 4) + 10 * numpy.eye(4)
print(scipy.linalg.solve(matrix, numpy.ones(4)))
print("READY", flush=True)
""")),),
        command=("/usr/bin/python3", "/app/hello.py"),
    ),
    "node": Recipe(
        base="debian",
        packages=("nodejs",),
        app=(("app/hello.js", script("""
const crypto = require('crypto'), http = require('http'), zlib = require('zlib');
http.createServer((request, response) => response.end()).listen(0, '127.0.0.1', function () {
  console.log(crypto.createHash('sha256').update(process.version).digest('hex'), zlib.gzipSync('x').length);
  console.log('READY');
  this.close();
});
""")),),
        command=("/usr/bin/node", "/app/hello.js"),
    ),
    "postgres": Recipe(
        base="debian",
        packages=("postgresql",),
        prepare=script("""
install -d -o postgres -g postgres -m 700 /data
setpriv --reuid=postgres --regid=postgres --clear-groups /usr/lib/postgresql/*/bin/initdb \\
    --pgdata=/data --locale=C.UTF-8 --auth=trust >/dev/null
"""),
        app=(("app/start.sh", script("""
#!/bin/sh
# Starts the server and waits until it answers a query.
setpriv --reuid=postgres --regid=postgres --clear-groups /usr/lib/postgresql/15/bin/postgres -D /data -k /tmp &
until /usr/lib/postgresql/15/bin/psql -h /tmp -U postgres -Atc 'select version()' 2>/dev/null; do sleep 0.02; done
echo READY
wait
""")),),
        command=("/bin/sh", "/app/start.sh"),
        stays=True,
    ),
    "java": Recipe(
        base="debian",
        packages=("default-jre-headless",),
        java=("app/Hello.java", script("""
import java.util.stream.*;

public class Hello {
    public static void main(String[] arguments) {
        System.out.println(IntStream.range(0, 10).mapToObj(Integer::toString).collect(Collectors.joining(",")));
        System.out.println("READY");
    }
}
""")),
        command=("/usr/bin/java", "-cp", "/app", "Hello"),
    ),
    "model": Recipe(
        base="busybox",
        model=1536 << 20,
        command=("/bin/sh", "-c", "cat /model.bin >/dev/null && echo READY"),
        prefetch=False,
    ),
    "model-small": Recipe(
        base="busybox",
        model=256 << 20,
        command=("/bin/sh", "-c", "cat /model.bin >/dev/null && echo READY"),
        prefetch=False,
    ),
    "layers40": Recipe(
        base="debian",
        single=(
            "autoconf", "automake", "bash-completion", "binutils-common", "bison", "ca-certificates", "cmake-data", "curl",
            "file", "flex", "gettext", "git", "groff-base", "iso-codes", "less", "libc6-dev", "libicu72", "libmagic-mgc",
            "libperl5.36", "libruby3.1", "libssl-dev", "libstdc++-12-dev", "libtcl8.6", "linux-libc-dev", "m4", "make",
            "man-db", "nano", "openssh-client", "patch", "perl-modules-5.36", "python3-pip", "rsync", "tmux", "vim-runtime",
            "wget", "zsh-common",
        ),
        app=(("app/sweep.py", SWEEP),),
        command=("/usr/bin/python3", "/app/sweep.py"),
    ),
    # For the cost of layers as such: 1, 10, 100 and 200 of them attached.
    **{f"many-{layers}": Recipe(base="none", synthetic=(layers, 40), command=("/none",), prefetch=False)
       for layers in (1, 9, 90, 100)},
    # For the cost of opening a large one.
    "wide": Recipe(base="none", synthetic=(1, 48000), command=("/none",), prefetch=False),
}
