"""The line between node and registry: loopback, or two network namespaces joined by relay.py and limited by tc.

A shaped link has
    node namespace      containerd, the snapshotters, the clients; 198.18.0.1
    registry namespace  docker-registry; 198.18.0.2
198.18.0.0/15 is reserved for benchmarks (RFC 2544). The machine's own network is not touched: both namespaces are
those of two sleeping processes and are gone when these end.
"""

import dataclasses
import os
import sys

from system import Failed, run, wait_for

NODE, REGISTRY = "198.18.0.1", "198.18.0.2"
INTERFACE = "lazurite0"


@dataclasses.dataclass(frozen=True)
class Shape:
    """How a link is to be. The round trip is the whole way there and back."""

    name: str
    label: str
    mbit: int = 0
    rtt_ms: float = 0


SHAPES = {shape.name: shape for shape in (
    Shape("loopback", "loopback"),
    Shape("1g1ms", "1 Gbit/s, 1 ms", 1000, 1),
    Shape("200m20ms", "200 Mbit/s, 20 ms", 200, 20),
    Shape("100m100ms", "100 Mbit/s, 100 ms", 100, 100),
    # Not part of the comparison: how many round trips follow one another is the slope of time over delay.
    # The rate is that of 1g1ms, so that the two differ by delay alone.
    Shape("far", "1 Gbit/s, 100 ms", 1000, 100),
)}


class Link:
    """One link that is up. `node` and `registry` are processes to whose network namespaces commands go (None: ours)."""

    count = 0

    def __init__(self, processes, directory, shape):
        # A link may be opened again, and must not find in an old log that its relay is ready.
        Link.count += 1
        self.processes, self.shape, self.name = processes, shape, shape.name
        self.node = self.registry = None
        self.host = "127.0.0.1"
        self.own = []
        if shape.mbit:
            self.host = REGISTRY
            self.open(directory)

    def start(self, name, command, directory):
        process = self.processes.start(name, command, os.path.join(directory, f"link{Link.count}-{name}.log"))
        self.own.append(process)
        return process

    def open(self, directory):
        holders = [self.start(name, ["unshare", "--net", "sleep", "infinity"], directory) for name in ("node", "registry")]
        here = os.readlink("/proc/self/ns/net")
        for holder in holders:
            wait_for("a network namespace", lambda: os.readlink(f"/proc/{holder.pid}/ns/net") != here, 10)
        self.node, self.registry = (holder.pid for holder in holders)
        relay = os.path.join(os.path.dirname(os.path.abspath(__file__)), "relay.py")
        half = str(int(self.shape.rtt_ms * 500))
        process = self.start("relay", [sys.executable, relay, str(self.node), str(self.registry), INTERFACE, half], directory)
        wait_for("the relay of packets (is /dev/net/tun there? else: modprobe tun)",
                 lambda: "ready" in process.said() or not process.alive(), 10)
        if not process.alive():
            raise Failed("the relay of packets has ended: " + process.said().strip().splitlines()[-1])
        # Segments of about a millisecond, as a network card at this rate would be given them; tbf cuts up what is larger
        # than its burst. The queue holds what is in flight on the line, and some: no router drops earlier.
        segment = max(8 << 10, min(65536, self.shape.mbit * 1000000 // 8 // 1000))
        queue = int(self.shape.mbit * 1e6 / 8 * self.shape.rtt_ms / 1e3) + (512 << 10)
        for namespace, address in ((self.node, NODE), (self.registry, REGISTRY)):
            for command in (
                ["ip", "link", "set", "lo", "up"],
                ["ip", "addr", "add", address + "/24", "dev", INTERFACE],
                ["ip", "link", "set", INTERFACE, "up", "gso_max_size", str(segment)],
                ["tc", "qdisc", "add", "dev", INTERFACE, "root", "tbf", "rate", f"{self.shape.mbit}mbit",
                 "burst", str(2 * segment), "limit", str(queue)],
            ):
                run(command, 10, network=namespace)

    def close(self):
        for process in reversed(self.own):
            self.processes.stop(process)
        self.own = []

    def check(self, port=5999):
        """What the link really does, by one connection: the median round trip in ms and the rate in Mbit/s."""
        if not self.shape.mbit:
            return {}
        program = (
            "import socket, sys, threading, time, statistics\n"
            "s = socket.create_server(('%s', %d))\n"
            "print('up', flush=True)\n"
            "while True:\n"
            "    c = s.accept()[0]\n"
            "    c.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)\n"
            "    while len(b := c.recv(9)):\n"
            "        n = int(b)\n"
            "        while n > 0: n -= c.send(bytes(min(n, 1 << 20)))\n" % (REGISTRY, port))
        client = (
            "import socket, statistics, time\n"
            "c = socket.create_connection(('%s', %d)); c.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)\n"
            "def ask(n):\n"
            "    t = time.monotonic(); c.send(b'%%09d' %% n)\n"
            "    while n > 0: n -= len(c.recv(min(n, 1 << 20)))\n"
            "    return time.monotonic() - t\n"
            "print(1000 * statistics.median(ask(1) for _ in range(15)))\n"
            "ask(%d); n = %d\n"
            "print(n * 8 / ask(n) / 1e6)\n" % (REGISTRY, port, self.shape.mbit * 62500, self.shape.mbit * 125000))
        server = self.processes.start("check", [sys.executable, "-c", program], os.devnull, network=self.registry)
        try:
            wait_for("the link", lambda: "1" in run(
                [sys.executable, "-c", f"import socket; socket.create_connection(('{REGISTRY}', {port}), 5); print(1)"],
                20, network=self.node, check=False).splitlines(), 20)
            rtt, rate = run([sys.executable, "-c", client], 60, network=self.node).split()
        finally:
            self.processes.stop(server)
        return {"rtt_ms": round(float(rtt), 2), "mbit": round(float(rate), 1)}
