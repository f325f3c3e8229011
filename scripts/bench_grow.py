"""A group that grows: `scripts/bench.sh grow` (S003-13).

One server has a whole volume; a second one joins and the volume is rebalanced, then a third and a
fourth. Each server is held to SHARE of a core by a control group, as if it were a machine of its own:
without that four servers on two cores are no more than one. A client on each server reads and
writes 4 KiB blocks over the whole volume, so with N servers (N-1)/N of the requests are forwarded. Writes
through the first server go on during each rebalance, and none may fail.
"""

import argparse
import concurrent.futures
import contextlib
import os
import signal
import statistics
import subprocess
import sys
import time

from bench import MIB, Fio, log, table
from bench_servers import Cluster, directories

VOLUME = "grow"
# Of a core, for each server.
SHARE = 0.1
PERIOD_US = 10_000
V1 = "/sys/fs/cgroup/cpu"
V2 = "/sys/fs/cgroup"


class Four(Cluster):
    addresses = tuple(f"127.0.9.{number}" for number in range(31, 35))

    def start(self):
        """All four run; only the first is of the cluster."""
        for number, address in enumerate(self.addresses, 1):
            state = os.path.join(self.data, f"s{number}")
            command = [os.path.join(self.settings.bin, "blockd"), "serve", "--state", state]
            self.spawn(command + ["--listen", address, "--nbd-unix", self.socket_of(number)])
        for address in self.addresses:
            self.wait_for(f"answer of {address}", lambda a=address: self.answers(a, "version"))
        self.control("cluster", "define", self.name)
        self.wait_for("writable registry", lambda: self.is_whole(1))

    def socket_of(self, number):
        return f"{self.socket}.{number}"

    def uri_of(self, number):
        return f"nbd+unix:///{VOLUME}?socket={self.socket_of(number)}"

    def join(self, number):
        self.control("node", "define", self.addresses[number - 1], "--online")
        self.wait_for("cluster", lambda: self.is_whole(number))


def parse(arguments):
    parser = argparse.ArgumentParser(prog="bench.sh grow")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=3)
    parser.add_argument("--size-mib", type=int, default=256)
    parser.add_argument("--dir")
    parser.add_argument("--bin", required=True)
    parser.add_argument("--root", required=True)
    settings = parser.parse_args(arguments)
    if settings.rounds < 1 or settings.seconds < 1 or settings.size_mib < 64:
        parser.error("--rounds and --seconds are at least 1, --size-mib at least 64")
    settings.size_bytes = settings.size_mib * MIB
    settings.dir = settings.dir or os.path.join(settings.root, "var")
    return settings


def write(path, text):
    with open(path, "w", encoding="ascii") as file:
        file.write(text)


def hold_to_share(stack, process):
    """Puts a process into a control group of its own that has SHARE of a core."""
    name = f"blockd-bench-{process.pid}"
    quota = round(SHARE * PERIOD_US)
    is_v1 = os.path.isdir(V1)
    group = os.path.join(V1 if is_v1 else V2, name)
    try:
        os.mkdir(group)
        stack.callback(os.rmdir, group)
        if is_v1:
            write(os.path.join(group, "cpu.cfs_period_us"), str(PERIOD_US))
            write(os.path.join(group, "cpu.cfs_quota_us"), str(quota))
        else:
            write(os.path.join(group, "cpu.max"), f"{quota} {PERIOD_US}")
        write(os.path.join(group, "cgroup.procs"), str(process.pid))
    except OSError as error:
        sys.exit(f"bench.sh grow: no control group for the CPU ({error}); it needs root and cgroups")


def iops(fio, server, count, settings):
    """Requests a second of one client on each of the first `count` servers, all at a time."""
    options = ["--rw=randrw", "--rwmixread=70", "--bs=4k", "--iodepth=64", "--time_based"]
    options += [f"--runtime={settings.seconds}", f"--size={settings.size_bytes}"]
    uris = [server.uri_of(number) for number in range(1, count + 1)]
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        jobs = list(pool.map(lambda uri: fio.run(uri, options), uris))
    return sum(job["read"]["iops"] + job["write"]["iops"] for job in jobs)


def rebalance_under_writes(fio, server, settings):
    """Seconds that it takes, beside writes that must not fail."""
    options = ["--rw=randwrite", "--bs=4k", "--iodepth=4", "--time_based", "--runtime=3600"]
    options += [f"--size={settings.size_bytes}", "--rate_iops=200"]
    command = fio.command(server.uri_of(1), options)
    load = subprocess.Popen(command, cwd=fio.scratch, stdout=subprocess.DEVNULL)
    try:
        time.sleep(1)
        start = time.monotonic()
        server.control("volume", "rebalance", VOLUME)
        took = time.monotonic() - start
        if load.poll() is not None:
            raise RuntimeError("a write failed while the volume was rebalanced")
    finally:
        load.send_signal(signal.SIGINT)
        load.wait()
    return took


def grow(fio, server, settings):
    """{servers: requests a second}"""
    speeds = {}
    for count in range(1, len(server.addresses) + 1):
        if count > 1:
            server.join(count)
            log(f"{count} servers: rebalanced in {rebalance_under_writes(fio, server, settings):.1f} s")
        rounds = [iops(fio, server, count, settings) for _ in range(settings.rounds)]
        speeds[count] = statistics.median(rounds)
        log(f"{count} servers: {speeds[count]:,.0f} requests/s")
    return speeds


def report(speeds):
    print(f"\neach server has {SHARE:.0%} of a core; 4 KiB, 70 % reads, a client on each server\n")
    rows, before = [], 0
    for count, speed in speeds.items():
        verdict = "pass" if speed > before else "MISS"
        rows.append([str(count), f"{speed:,.0f}", f"{speed / speeds[1]:.2f}x", "more than before", verdict])
        before = speed
    table(["servers", "requests/s", "of one", "target", ""], rows)


def main():
    settings = parse(sys.argv[1:])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with contextlib.ExitStack() as stack:
        data, sockets = directories(stack, settings.dir)
        server = Four("four", settings, os.path.join(data, "four"), sockets)
        groups = stack.enter_context(contextlib.ExitStack())
        stack.callback(server.stop)
        server.start()
        size = str(settings.size_bytes)
        server.control("volume", "create", VOLUME, "--size", size, "--servers", "1")
        fio = Fio(data)
        fill = ["--rw=write", "--bs=1m", "--iodepth=8", "--end_fsync=1", "--refill_buffers"]
        fio.run(server.uri_of(1), fill + [f"--size={size}"])
        for process in server.processes:
            hold_to_share(groups, process)
        speeds = grow(fio, server, settings)
    report(speeds)


if __name__ == "__main__":
    main()
