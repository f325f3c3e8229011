"""Speed of the NBD server: called by `scripts/bench.sh nbd`, whose --help describes it.

Each row runs ours and the peer in turn, the first of them changing from round to round, and compares
the medians. Beside the speed stands the CPU time that the server's process took for one operation:
it moves far less than speed does when other work shares the machine.
"""

import argparse
import contextlib
import os
import shutil
import signal
import statistics
import sys
import tempfile

import bench_servers
from bench import MIB, WORKLOADS, Fio, fill, log, side, table

# (name, workload, ours, peer, least ratio)
ROWS = [
    ("unix-read-4k", "randread-4k-qd32", "lib-unix", "nbdkit-memory", 1.0),
    ("unix-write-4k", "randwrite-4k-qd32", "lib-unix", "nbdkit-memory", 1.0),
    ("unix-read-1m", "seqread-1m-qd8", "lib-unix", "nbdkit-memory", 1.0),
    ("tcp-read-4k", "randread-4k-qd32", "lib-tcp", "nbdkit-memory-tcp", 1.0),
    ("tcp-write-4k", "randwrite-4k-qd32", "lib-tcp", "nbdkit-memory-tcp", 1.0),
    ("tcp-read-1m", "seqread-1m-qd8", "lib-tcp", "nbdkit-memory-tcp", 1.0),
    ("unix-holes", "seqread-1m-qd8", "lib-thin", "nbdkit-null", 3.0),
    ("blockd-read-4k", "randread-4k-qd32", "ours1", "nbdkit", 0.8),
    ("blockd-write-4k", "randwrite-4k-qd32", "ours1", "nbdkit", 0.7),
    ("blockd-read-1m", "seqread-1m-qd8", "ours1", "nbdkit", 0.9),
    ("blockd-write-1m", "seqwrite-1m-qd8", "ours1", "nbdkit", 0.9),
    ("blockd-flush-4x8", "write-flush-4k-4x8", "ours1", "nbdkit", 2.0),
    ("blockd-holes", "seqread-1m-qd8", "blockd-thin", "nbdkit-null", 3.0),
]
# Servers whose data is not written first: their reads are reads of holes.
THIN = {"lib-thin", "nbdkit-null", "blockd-thin"}


class Memory(bench_servers.Server):
    """A server of memory, on a unix socket."""

    def start(self):
        self.spawn(self.command() + self.sockets())
        self.wait_for("socket", self.accepts)

    def size(self):
        return str(self.settings.size_bytes)


class Library(Memory):
    def command(self):
        program = os.path.join(self.settings.bin, "nbd-server")
        return [program, "--memory", self.size(), "--name", bench_servers.VOLUME]

    def sockets(self):
        return ["--unix", self.socket]


class NbdkitMemory(Memory):
    plugin = "memory"

    def command(self):
        return ["nbdkit", "-f", self.plugin, f"size={self.size()}"]

    def sockets(self):
        return ["-U", self.socket]


class NbdkitNull(NbdkitMemory):
    plugin = "null"


class OverTcp:
    """Puts a memory server on a port of the loopback device."""

    address = ()

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.uri = "nbd://{}:{}/{}".format(*self.address, bench_servers.VOLUME)

    def accepts(self):
        return bench_servers.accepts_tcp(self.address)


class LibraryTcp(OverTcp, Library):
    address = ("127.0.9.21", 10810)

    def sockets(self):
        return ["--listen", "{}:{}".format(*self.address)]


class NbdkitMemoryTcp(OverTcp, NbdkitMemory):
    address = ("127.0.9.22", 10811)

    def sockets(self):
        return ["-i", self.address[0], "-p", str(self.address[1])]


class Thin(bench_servers.Cluster):
    addresses = ("127.0.9.2",)


SERVERS = {
    **bench_servers.SERVERS,
    "lib-unix": Library,
    "lib-thin": Library,
    "lib-tcp": LibraryTcp,
    "nbdkit-memory": NbdkitMemory,
    "nbdkit-memory-tcp": NbdkitMemoryTcp,
    "nbdkit-null": NbdkitNull,
    "blockd-thin": Thin,
}


def parse(arguments):
    parser = argparse.ArgumentParser(prog="bench.sh nbd")
    parser.add_argument("--rows", default="")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=2)
    parser.add_argument("--size-mib", type=int, default=1024)
    parser.add_argument("--dir")
    parser.add_argument("--bin", required=True)
    parser.add_argument("--root", required=True)
    settings = parser.parse_args(arguments)
    if settings.rounds < 1 or settings.seconds < 1 or settings.size_mib < 1:
        parser.error("--rounds, --seconds and --size-mib are at least 1")
    wanted = settings.rows.split(",")
    settings.rows = [row for row in ROWS if any(word in row[0] for word in wanted)]
    if not settings.rows:
        parser.error(f"no such row; there are {', '.join(row[0] for row in ROWS)}")
    settings.size_bytes = settings.size_mib * MIB
    settings.dir = settings.dir or os.path.join(settings.root, "var")
    return settings


def run_once(fio, server, workload, settings):
    """(speed, CPU microseconds of the server for one operation)"""
    options, unit = WORKLOADS[workload]
    timing = ["--time_based", f"--runtime={settings.seconds}", f"--size={settings.size_bytes}"]
    os.sync()
    before_s = server.cpu_s()
    half = side(fio.run(server.uri, options + timing))
    return half[unit], (server.cpu_s() - before_s) * 1e6 / (half["iops"] * settings.seconds)


def measure_row(fio, servers, row, settings):
    """The line of the table of one row, with medians."""
    name, workload, ours, peer, least = row
    runs = {ours: [], peer: []}
    for round_no in range(settings.rounds):
        for which in (ours, peer) if round_no % 2 == 0 else (peer, ours):
            runs[which].append(run_once(fio, servers[which], workload, settings))
    speed = {which: statistics.median(run[0] for run in runs[which]) for which in runs}
    cpu_us = {which: statistics.median(run[1] for run in runs[which]) for which in runs}
    ratio = speed[ours] / speed[peer]
    verdict = "pass" if ratio >= least else "MISS"
    log(f"{name}: {ratio:.2f}x of {peer}, {verdict}")
    spread = "-".join(f"{f(r[0] for r in runs[ours]):,.0f}" for f in (min, max))
    return [
        *(name, WORKLOADS[workload][1], f"{speed[ours]:,.0f}", f"{speed[peer]:,.0f}", spread),
        *(f"{cpu_us[ours]:.1f}", f"{cpu_us[peer]:.1f}", f"{ratio:.2f}", f">= {least}", verdict),
    ]


def main():
    settings = parse(sys.argv[1:])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    os.makedirs(settings.dir, exist_ok=True)
    names = dict.fromkeys(name for row in settings.rows for name in row[2:4])
    with contextlib.ExitStack() as stack:
        data = tempfile.mkdtemp(prefix="bench-", dir=settings.dir)
        stack.callback(shutil.rmtree, data, ignore_errors=True)
        # Unix socket paths are limited to 107 bytes.
        sockets = tempfile.mkdtemp(prefix="bench-")
        stack.callback(shutil.rmtree, sockets, ignore_errors=True)
        servers = {}
        for name in names:
            servers[name] = SERVERS[name](name, settings, os.path.join(data, name), sockets)
            stack.callback(servers[name].stop)
            servers[name].start()
        fio = Fio(data)
        fill(fio, [server for name, server in servers.items() if name not in THIN], settings)
        lines = [measure_row(fio, servers, row, settings) for row in settings.rows]
    header = ["row", "unit", "ours", "peer", "ours min-max", "cpu us/op", "peer's", "ratio", "target"]
    table(header + [""], lines)


if __name__ == "__main__":
    main()
