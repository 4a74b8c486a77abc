"""The machine under the benchmark: commands with deadlines, long-lived processes, figures from /proc, the page cache.

Nothing here knows containers. Whatever is started through `Processes` is ended through it, whatever happens.
"""

import contextlib
import dataclasses
import os
import shlex
import signal
import socket
import struct
import subprocess
import sys
import time

TICKS = os.sysconf("SC_CLK_TCK")


class Failed(Exception):
    """A measurement cannot go on; the message is for the user."""


def say(text):
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def in_network(command, network):
    """The command as it runs in the network namespace of process `network` (None: this one). Not `ip netns exec`, which
    would also make a mount namespace, and what containerd mounts there would be seen by nobody else."""
    return ["nsenter", "--target", str(network), "--net", *command] if network else list(command)


def run(command, deadline=60, network=None, check=True, env=None, output=None):
    """Runs a command to its end and returns what it printed. Past its deadline the whole process group is ended."""
    process = subprocess.Popen(in_network(command, network), stdin=subprocess.DEVNULL, stdout=output or subprocess.PIPE,
                               stderr=subprocess.STDOUT if output is None else subprocess.PIPE,
                               env={**os.environ, **(env or {})}, start_new_session=True)
    try:
        said, error = process.communicate(timeout=deadline)
    except BaseException as reason:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if isinstance(reason, subprocess.TimeoutExpired):
            raise Failed(f"not finished after {deadline} s: {shlex.join(command)}") from None
        raise
    said = (said or error or b"").decode(errors="replace")
    if check and process.returncode != 0:
        raise Failed(f"{shlex.join(command)}: status {process.returncode}\n" + "\n".join(said.splitlines()[-8:]))
    return said


def wait_for(what, condition, deadline, pause=0.02):
    """Polls until the condition holds and returns its value."""
    end = time.monotonic() + deadline
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            raise Failed(f"{what}: not within {deadline} s")
        time.sleep(pause)


class Process:
    """A daemon of ours, its log, and what /proc tells of it."""

    def __init__(self, name, popen, log):
        self.name, self.popen, self.log, self.pid = name, popen, log, popen.pid

    def said(self):
        with open(self.log, encoding="utf-8", errors="replace") as file:
            return file.read()

    def alive(self):
        return self.popen.poll() is None

    def stop(self, patience=20):
        if self.alive():
            self.popen.terminate()
            try:
                self.popen.wait(patience)
            except subprocess.TimeoutExpired:
                say(f"{self.name} does not end; killing it")
                self.popen.kill()
                self.popen.wait(10)


class Processes:
    """Every daemon of this run. They get no signals from the terminal, so that Ctrl-C ends them in order through
    `close`, and they end by themselves should this process be killed."""

    def __init__(self):
        self.all = []

    def start(self, name, command, log, network=None):
        # Appended to: a daemon that is started again adds to what it said before.
        with open(log, "ab") as out:
            popen = subprocess.Popen(["setpriv", "--pdeathsig", "TERM", *in_network(command, network)],
                                     stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
        process = Process(name, popen, log)
        self.all.append(process)
        return process

    def stop(self, process):
        process.stop()
        if process in self.all:
            self.all.remove(process)

    def close(self):
        for process in reversed(self.all):
            with contextlib.suppress(Exception):
                process.stop()
        self.all = []


@dataclasses.dataclass
class Usage:
    """What one process has used up to now."""

    cpu_s: float
    rss_mib: float
    peak_mib: float
    # Of the resident bytes those that are not pages of files (the mapped indexes of layers are such pages).
    private_mib: float

    @classmethod
    def of(cls, pid):
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            fields = file.read().rpartition(")")[2].split()
        values = {}
        with open(f"/proc/{pid}/status", encoding="utf-8") as file:
            for line in file:
                name, _, value = line.partition(":")
                if name in ("VmRSS", "VmHWM", "RssAnon"):
                    values[name] = int(value.split()[0]) / 1024
        return cls((int(fields[11]) + int(fields[12])) / TICKS, values["VmRSS"], values["VmHWM"], values["RssAnon"])

    @staticmethod
    def forget_peak(pid):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/clear_refs", "w", encoding="utf-8") as file:
            file.write("5")


def peer_pid(path):
    """The process that listens on a unix socket."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(5)
        client.connect(path)
        return struct.unpack("3i", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]


def answers_http2(path):
    """Whether a gRPC server answers on a unix socket: the preface of HTTP/2 is sent, its settings are awaited."""
    try:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(2)
            client.connect(path)
            client.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0)))
            return len(client.recv(9)) > 0
    except OSError:
        return False


def drop_caches():
    os.sync()
    with open("/proc/sys/vm/drop_caches", "w", encoding="utf-8") as file:
        file.write("3")


def read_through(path):
    """Brings a file, or all files below a directory, into the page cache."""
    buffer = bytearray(1 << 20)
    for directory, _, files in os.walk(path) if os.path.isdir(path) else [(os.path.dirname(path), [], [path])]:
        for name in files:
            with contextlib.suppress(OSError), open(os.path.join(directory, name), "rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass


def disk_used(path):
    """Bytes of blocks below a directory, hard links once, other file systems (the lazy mount) left out."""
    total, seen = 0, set()
    device = os.lstat(path).st_dev
    todo = [path]
    while todo:
        with contextlib.suppress(OSError), os.scandir(todo.pop()) as entries:
            for entry in entries:
                status = entry.stat(follow_symlinks=False)
                if status.st_dev != device or (status.st_dev, status.st_ino) in seen:
                    continue
                if status.st_nlink > 1 and not entry.is_dir(follow_symlinks=False):
                    seen.add((status.st_dev, status.st_ino))
                total += status.st_blocks * 512
                if entry.is_dir(follow_symlinks=False):
                    todo.append(entry.path)
    return total


class FreshDisk:
    """A new ext4, mounted on an empty directory. ext4 does not reuse an inode for minutes after its file was removed, and
    walks over all of these whenever a file is created: on one file system each measurement would pay for those before it."""

    # Sparse: what is never written takes nothing.
    SIZE = 32 << 30

    def __init__(self, directory):
        self.directory, self.image, self.device = directory, directory + ".disk", None
        try:
            with open(self.image, "wb") as file:
                file.truncate(self.SIZE)
            run(["mkfs.ext4", "-q", "-E", "lazy_itable_init=1,lazy_journal_init=1,nodiscard", self.image])
            # Past the page cache of the file, or everything would be in memory twice.
            self.device = run(["losetup", "--find", "--show", "--direct-io=on", self.image]).strip()
            run(["mount", "-o", "noinit_itable", self.device, directory])
        except BaseException:
            self.close()
            raise

    def close(self):
        run(["umount", self.directory], check=False)
        if os.path.ismount(self.directory):
            run(["umount", "--lazy", self.directory], check=False)
        if self.device:
            run(["losetup", "--detach", self.device], check=False)
        with contextlib.suppress(OSError):
            os.unlink(self.image)
        with contextlib.suppress(OSError):
            os.rmdir(self.directory)


def detach_below(path):
    """Detaches the loop devices whose files are below a directory."""
    for line in run(["losetup", "--list", "--noheadings", "--output", "NAME,BACK-FILE"], check=False).splitlines():
        name, _, file = line.partition(" ")
        if file.strip().startswith(path + "/"):
            run(["losetup", "--detach", name], check=False)


def mounts_below(path):
    with open("/proc/self/mountinfo", encoding="utf-8") as file:
        return [fields[4] for fields in map(str.split, file) if fields[4].startswith(path + "/")]


def describe_machine():
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        cpu = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), "unknown processor")
    with open("/proc/meminfo", encoding="utf-8") as file:
        memory = int(file.readline().split()[1]) >> 20
    return f"{os.cpu_count()} cores ({cpu}), {memory} GiB, Linux {os.uname().release.split('-')[0]}"
