"""The servers of the benchmark: ours and the peers, each with its own data and unix socket."""

import json
import os
import shutil
import socket
import subprocess
import tempfile
import time

START_S = 60
STOP_S = 20
VOLUME = "bench"


def accepts_tcp(address):
    with socket.socket() as client:
        return client.connect_ex(address) == 0


def directories(stack, below):
    """A new directory for data below one, and one for sockets, whose paths are limited to 107 bytes; the
    stack removes both."""
    os.makedirs(below, exist_ok=True)
    data = tempfile.mkdtemp(prefix="bench-", dir=below)
    stack.callback(shutil.rmtree, data, ignore_errors=True)
    sockets = tempfile.mkdtemp(prefix="bench-")
    stack.callback(shutil.rmtree, sockets, ignore_errors=True)
    return data, sockets


class Server:
    """Processes with logs; stopped by pid in the reverse order of their start."""

    def __init__(self, name, settings, data, sockets):
        self.name = name
        self.settings = settings
        self.data = data
        self.socket = os.path.join(sockets, f"{name}.sock")
        self.uri = f"nbd+unix:///{VOLUME}?socket={self.socket}"
        self.processes = []

    def spawn(self, command):
        os.makedirs(self.data, exist_ok=True)
        with open(os.path.join(self.data, "log"), "ab") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self.processes.append(process)
        return process

    def wait_for(self, what, is_there):
        end = time.monotonic() + START_S
        while not is_there():
            dead = any(process.poll() is not None for process in self.processes)
            if dead or time.monotonic() > end:
                with open(os.path.join(self.data, "log"), errors="replace") as log:
                    raise RuntimeError(f"{self.name}: no {what}; its log: {log.read()[-2000:]}")
            time.sleep(0.05)

    def accepts(self):
        with socket.socket(socket.AF_UNIX) as client:
            try:
                client.connect(self.socket)
            except OSError:
                return False
        return True

    def cpu_s(self):
        """CPU seconds that the processes took so far, those of ended threads included."""
        ticks = 0
        for process in self.processes:
            with open(f"/proc/{process.pid}/stat", encoding="ascii") as stat:
                ticks += sum(map(int, stat.read().rpartition(")")[2].split()[11:13]))
        return ticks / os.sysconf("SC_CLK_TCK")

    def stop(self):
        for process in reversed(self.processes):
            process.terminate()
        for process in self.processes:
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.processes.clear()


class Peer(Server):
    """A peer that serves one file."""

    def image(self):
        os.makedirs(self.data, exist_ok=True)
        path = os.path.join(self.data, "image")
        with open(path, "wb") as file:
            file.truncate(self.settings.size_bytes)
        return path

    def start(self):
        self.spawn(self.command(self.image()))
        self.wait_for("socket", self.accepts)

    def command(self, image):
        raise NotImplementedError


class QemuRaw(Peer):
    options = ["-f", "raw"]

    def command(self, image):
        common = ["qemu-nbd", "-k", self.socket, "-x", VOLUME, "-t", "-e", "16"]
        return common + self.options + [image]


class QemuNone(QemuRaw):
    options = ["-f", "raw", "--cache=none", "--aio=io_uring"]


class QemuQcow2(QemuRaw):
    options = ["-f", "qcow2", "--cache=none"]

    def image(self):
        os.makedirs(self.data, exist_ok=True)
        path = os.path.join(self.data, "image")
        size = str(self.settings.size_bytes)
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, size], check=True)
        return path


class Nbdkit(Peer):
    def command(self, image):
        return ["nbdkit", "-f", "-U", self.socket, "file", f"file={image}"]


class Cluster(Server):
    """blockd servers that form one cluster; all IO goes to the first one's unix socket."""

    addresses = ()

    def start(self):
        for number, address in enumerate(self.addresses, 1):
            nbd = self.socket if number == 1 else f"{self.socket}.{number}"
            state = os.path.join(self.data, f"s{number}")
            command = [os.path.join(self.settings.bin, "blockd"), "serve", "--state", state]
            self.spawn(command + ["--listen", address, "--nbd-unix", nbd])
        for address in self.addresses:
            self.wait_for(f"answer of {address}", lambda a=address: self.answers(a, "version"))
        self.control("cluster", "define", self.name)
        self.wait_for("writable registry", lambda: self.is_whole(1))
        for address in self.addresses[1:]:
            self.control("node", "define", address, "--online")
        self.wait_for("cluster", lambda: self.is_whole(len(self.addresses)))
        self.control("volume", "create", VOLUME, "--size", str(self.settings.size_bytes))
        self.wait_for("socket", self.accepts)

    def blockctl(self, address, *words):
        program = os.path.join(self.settings.bin, "blockctl")
        command = [program, "--servers", address, "--json", *words]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    def control(self, *words):
        """The JSON that the first server answers."""
        done = self.blockctl(self.addresses[0], *words)
        if done.returncode != 0:
            raise RuntimeError(f"blockctl {' '.join(words)}: {done.stderr.strip()}")
        return json.loads(done.stdout)

    def answers(self, address, *words):
        return self.blockctl(address, "--timeout", "2s", *words).returncode == 0

    def is_whole(self, count):
        done = self.blockctl(self.addresses[0], "--timeout", "5s", "cluster", "status")
        if done.returncode != 0:
            return False
        status = json.loads(done.stdout)
        nodes = status["nodes"]
        return (
            status["phase"] == 2 and len(nodes) == count and all(node["reachable"] for node in nodes)
        )

    def entry_node(self):
        return self.control("version")["node"]

    def pages_by_owner(self):
        """Bytes of a page, and {node: [page, ...]} of the volume."""
        route = self.control("route", "show", VOLUME)
        pages = {}
        for run in route["runs"]:
            first = run["first_page"]
            pages.setdefault(run["owner"], []).extend(range(first, first + run["page_count"]))
        return route["page_blocks"] * 512, pages

    def written_bytes(self):
        """Bytes that all the servers' processes handed to write calls, sockets included."""
        return self.io_count("wchar:")

    def stored_bytes(self):
        """Bytes that they made dirty in the page cache, in whole folios."""
        return self.io_count("write_bytes:")

    def io_count(self, name):
        total = 0
        for process in self.processes:
            with open(f"/proc/{process.pid}/io", encoding="ascii") as lines:
                total += next(int(l.split()[1]) for l in lines if l.startswith(name))
        return total


class One(Cluster):
    addresses = ("127.0.9.1",)


class Three(Cluster):
    addresses = ("127.0.9.11", "127.0.9.12", "127.0.9.13")


SERVERS = {
    "ours1": One,
    "ours3": Three,
    "qemu-raw": QemuRaw,
    "qemu-none": QemuNone,
    "qemu-qcow2": QemuQcow2,
    "nbdkit": Nbdkit,
}
