#!/usr/bin/env python3
"""The delay of a shaped link: carries packets between two network namespaces and holds each back for half a round trip.

    relay.py NODE_PID REGISTRY_PID INTERFACE DELAY_MICROSECONDS

A program of its own, started by link.py. It makes one TUN interface in the network namespace of each of the two
processes, prints `ready` and moves whole packets until it is ended. Because packets are delayed and not the bytes of
relayed connections, everything that costs round trips on a real line costs them here: handshakes, slow start, ACKs. The
rate is not its business: tc(8) limits it at both interfaces.

Kernels without netem are common in small virtual machines; TUN is what container hosts have. Segmentation is left to
the receiving kernel (as virtio does between a host and its guests), so that one read moves up to 64 KiB and the relay
keeps up with more than 1 Gbit/s. Both interfaces vanish with the process.
"""

import collections
import ctypes
import fcntl
import os
import select
import struct
import sys
import time

TUNSETIFF = 0x400454CA
TUNSETOFFLOAD = 0x400454D0
TUNSETVNETHDRSZ = 0x400454D8
IFF_TUN, IFF_NO_PI, IFF_VNET_HDR = 0x0001, 0x1000, 0x4000
# Checksums and TCP segmentation (v4, v6) are done by nobody: the packets never leave the machine.
OFFLOAD = 0x01 | 0x02 | 0x04
VNET_HEADER = 10
CLONE_NEWNET = 0x40000000
# A packet of 64 KiB, its virtio header and some slack.
LARGEST = (64 << 10) + 4096
# The kernel may otherwise add 50 us to each sleep, which would show on a link of 1 ms.
PR_SET_TIMERSLACK = 29


def open_in(pid, interface, libc):
    """A TUN interface in the network namespace of process `pid`."""
    with open(f"/proc/{pid}/ns/net", "rb") as namespace:
        if libc.setns(namespace.fileno(), CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), "setns")
    tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH22x", interface.encode(), IFF_TUN | IFF_NO_PI | IFF_VNET_HDR))
    fcntl.ioctl(tun, TUNSETVNETHDRSZ, struct.pack("i", VNET_HEADER))
    fcntl.ioctl(tun, TUNSETOFFLOAD, OFFLOAD)
    return tun


class Direction:
    """Packets on their way from one interface to the other, in order, each with the time it is due."""

    def __init__(self, source, target, delay):
        self.source, self.target, self.delay = source, target, delay
        self.packets = collections.deque()

    def take(self):
        try:
            # A bounded burst, so that a flood in one direction does not make the other late.
            for _ in range(16):
                packet = os.read(self.source, LARGEST)
                self.packets.append((time.monotonic() + self.delay, packet))
        except BlockingIOError:
            pass

    def deliver(self):
        """Hands on what is due; returns the seconds until the next packet is, or None."""
        while self.packets:
            wait = self.packets[0][0] - time.monotonic()
            if wait > 0:
                return wait
            try:
                os.write(self.target, self.packets.popleft()[1])
            except OSError:
                # What a full or absent receiver loses, TCP sends again, as on any line.
                pass
        return None


def main():
    node_pid, registry_pid, interface, delay = sys.argv[1:]
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_TIMERSLACK, 1000, 0, 0, 0)
    try:
        # A line does not become slower because the machine at its end is busy.
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(10))
    except PermissionError:
        os.nice(-20)
    node, registry = (open_in(pid, interface, libc) for pid in (node_pid, registry_pid))
    directions = [Direction(node, registry, int(delay) / 1e6), Direction(registry, node, int(delay) / 1e6)]
    by_source = {direction.source: direction for direction in directions}
    print("ready", flush=True)
    while True:
        waits = [wait for wait in (direction.deliver() for direction in directions) if wait is not None]
        readable, _, _ = select.select(list(by_source), [], [], min(waits, default=None))
        for source in readable:
            by_source[source].take()


if __name__ == "__main__":
    main()
