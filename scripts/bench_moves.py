"""Moves of pages between two servers: `scripts/bench.sh moves`.

Speed: a full volume moves from server to server while nothing else runs; against it
stands a copy of as many bytes of a file on the same disk, read cold and synced at its end, in
turn with the moves. Clients: 4 KiB writes at a fixed rate go on while the volume moves; their p99 during
moves stands against that between them. Both without `--rate`. Medians of rounds.
"""

import argparse
import contextlib
import os
import signal
import statistics
import subprocess
import sys
import time

from bench import MIB, Fio, log, table
from bench_servers import Cluster, directories
from bench_snapshot import percentile, split_latencies_ms

VOLUME = "moves"
# Seconds of the load before each move, to compare with.
BESIDE_S = 3
RATE_IOPS = 2000


class Two(Cluster):
    addresses = ("127.0.9.21", "127.0.9.22")


def parse(arguments):
    parser = argparse.ArgumentParser(prog="bench.sh moves")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--size-mib", type=int, default=1024)
    parser.add_argument("--dir")
    parser.add_argument("--bin", required=True)
    parser.add_argument("--root", required=True)
    settings = parser.parse_args(arguments)
    if settings.rounds < 1 or settings.size_mib < 64:
        parser.error("--rounds is at least 1, --size-mib at least 64")
    settings.size_bytes = settings.size_mib * MIB
    settings.dir = settings.dir or os.path.join(settings.root, "var")
    return settings


def forget_cache(path):
    """Lets the kernel drop what it has of the files below a path, after writing them."""
    os.sync()
    for directory, _, names in os.walk(path):
        for name in names:
            with contextlib.suppress(OSError):
                file = os.open(os.path.join(directory, name), os.O_RDONLY)
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(file)


def copy_speed(scratch, size_bytes):
    """MiB/s of a sequential copy on the disk."""
    source, target = (os.path.join(scratch, name) for name in ("copied", "copy"))
    if not os.path.exists(source):
        with open(source, "wb") as file:
            for _ in range(size_bytes // MIB):
                file.write(os.urandom(MIB))
    forget_cache(scratch)
    command = ["dd", f"if={source}", f"of={target}", "bs=1M", "conv=fdatasync", "status=none"]
    start = time.monotonic()
    subprocess.run(command, check=True)
    took = time.monotonic() - start
    os.remove(target)
    return size_bytes / MIB / took


def move(server, to):
    """Moves the volume; wall clock seconds of begin and end, and the bytes that were moved."""
    start = time.time()
    server.control("page", "move", VOLUME, "all", "--to", str(to))
    end = time.time()
    return start, end, server.control("move", "list", VOLUME)[0]["bytes_moved"]


def measure_speed(server, scratch, settings):
    """MiB/s of copies and of moves, in turn; the volume ends where it began."""
    copies, moves = [], []
    for round_no in range(settings.rounds):
        copies.append(copy_speed(scratch, settings.size_bytes))
        for to in (2, 1):
            forget_cache(server.data)
            start, end, moved = move(server, to)
            moves.append(moved / MIB / (end - start))
        log(f"round {round_no + 1}: copy {copies[-1]:,.0f} MiB/s, move {moves[-1]:,.0f} MiB/s")
    return copies, moves


def measure_clients(fio, server, settings):
    """p99 in ms of 4 KiB writes beside moves and during them."""
    name = os.path.join(fio.scratch, "load")
    options = ["--rw=randwrite", "--bs=4k", "--iodepth=8", f"--rate_iops={RATE_IOPS}"]
    options += ["--time_based", "--runtime=3600", f"--size={settings.size_bytes}"]
    options += [f"--write_lat_log={name}", "--log_unix_epoch=1"]
    uri = server.uri.replace("///bench?", f"///{VOLUME}?")
    load = subprocess.Popen(fio.command(uri, options), cwd=fio.scratch, stdout=subprocess.DEVNULL)
    windows = []
    try:
        time.sleep(1)
        for round_no in range(settings.rounds):
            time.sleep(BESIDE_S)
            start, end, _ = move(server, 2 if round_no % 2 == 0 else 1)
            windows.append((start * 1000, end * 1000))
            if load.poll() is not None:
                raise RuntimeError("the load ended before the moves did")
        time.sleep(BESIDE_S)
    finally:
        # fio writes its logs when it is interrupted.
        load.send_signal(signal.SIGINT)
        load.wait()
    during, beside = split_latencies_ms(f"{name}_clat.1.log", windows)
    return percentile(beside, 99), percentile(during, 99), max(during)


def report(copies, moves, clients):
    beside, during, longest = clients
    copy, moved = statistics.median(copies), statistics.median(moves)
    print(f"\ncopy of a file {copy:,.0f} MiB/s, moves {moved:,.0f} MiB/s (", end="")
    print(", ".join(f"{speed:,.0f}" for speed in moves), end=")\n")
    print(f"4 KiB writes at {RATE_IOPS}/s: p99 {beside:.2f} ms beside moves, {during:.2f} ms ", end="")
    print(f"during them, longest {longest:.1f} ms\n")
    rows = [
        ("idle move / sequential copy on the same disk", moved / copy, ">= 0.5x", moved / copy >= 0.5),
        ("client p99 during a move / beside it", during / beside, "<= 3x", during / beside <= 3),
        ("longest pause of a client in seconds", longest / 1000, "< 1", longest < 1000),
    ]
    lines = [[what, f"{v:.2f}", goal, "pass" if met else "MISS"] for what, v, goal, met in rows]
    table(["what", "measured", "target", ""], lines)


def main():
    settings = parse(sys.argv[1:])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with contextlib.ExitStack() as stack:
        data, sockets = directories(stack, settings.dir)
        scratch = os.path.join(data, "copies")
        os.makedirs(scratch)
        server = Two("two", settings, os.path.join(data, "two"), sockets)
        stack.callback(server.stop)
        server.start()
        size = str(settings.size_bytes)
        server.control("volume", "create", VOLUME, "--size", size, "--servers", "1")
        fio = Fio(data)
        log("filling")
        fill = ["--rw=write", "--bs=1m", "--iodepth=8", "--end_fsync=1", "--refill_buffers"]
        uri = server.uri.replace("///bench?", f"///{VOLUME}?")
        fio.run(uri, fill + [f"--size={settings.size_bytes}"])
        copies, moves = measure_speed(server, scratch, settings)
        clients = measure_clients(fio, server, settings)
    report(copies, moves, clients)


if __name__ == "__main__":
    main()
