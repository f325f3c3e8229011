"""The benchmark driver: called by scripts/bench.sh, whose --help describes it.

Noise between runs on one machine is up to 2x, so every workload visits all servers in turn
within a round, in an order that moves on with each round, and only medians of rounds are
compared. Each server has its own data on the same disk, filled with the same random bytes.
"""

import argparse
import contextlib
import datetime
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time

import bench_lineage
import bench_snapshot
from bench_servers import SERVERS, Cluster, directories

MIB = 1 << 20
# name: (fio options, how the result is counted)
WORKLOADS = {
    "randread-4k-qd1": (["--rw=randread", "--bs=4k", "--iodepth=1"], "iops"),
    "randread-4k-qd32": (["--rw=randread", "--bs=4k", "--iodepth=32"], "iops"),
    "randwrite-4k-qd1": (["--rw=randwrite", "--bs=4k", "--iodepth=1"], "iops"),
    "randwrite-4k-qd32": (["--rw=randwrite", "--bs=4k", "--iodepth=32"], "iops"),
    "write-flush-4k-qd1": (["--rw=randwrite", "--bs=4k", "--iodepth=1", "--fsync=1"], "iops"),
    "write-flush-4k-4x8": (
        ["--rw=randwrite", "--bs=4k", "--iodepth=8", "--numjobs=4", "--fsync=1"],
        "iops",
    ),
    "seqread-1m-qd8": (["--rw=read", "--bs=1m", "--iodepth=8"], "mib_s"),
    "seqwrite-1m-qd8": (["--rw=write", "--bs=1m", "--iodepth=8"], "mib_s"),
}
# (workload, ours, peer, least ratio): the "Speed to reach".
TARGETS = [
    ("randread-4k-qd32", "ours1", "qemu-raw", 1.5),
    ("randread-4k-qd32", "ours1", "qemu-none", 1.5),
    ("randread-4k-qd32", "ours1", "nbdkit", 0.6),
    ("randwrite-4k-qd32", "ours1", "qemu-raw", 1.0),
    ("randwrite-4k-qd32", "ours1", "qemu-qcow2", 2.0),
    ("write-flush-4k-qd1", "ours1", "qemu-raw", 0.9),
    ("write-flush-4k-qd1", "ours1", "qemu-none", 0.9),
    ("write-flush-4k-4x8", "ours1", "qemu-raw", 2.0),
    ("write-flush-4k-4x8", "ours1", "qemu-none", 2.0),
    ("seqread-1m-qd8", "ours1", "qemu-raw", 0.8),
    ("seqread-1m-qd8", "ours1", "qemu-none", 0.8),
    ("seqwrite-1m-qd8", "ours1", "qemu-raw", 0.8),
    ("seqwrite-1m-qd8", "ours1", "qemu-none", 0.8),
    ("randread-4k-qd32", "ours3", "qemu-raw", 1.0),
    ("randread-4k-qd32", "ours3", "qemu-none", 1.0),
]


def log(text):
    print(f"bench: {text}", file=sys.stderr, flush=True)


class Fio:
    """Runs fio against a server's unix socket; returns its first (grouped) job."""

    def __init__(self, scratch):
        self.scratch = scratch

    def command(self, uri, options):
        command = ["fio", "--name=bench", "--ioengine=nbd", f"--uri={uri}", "--output-format=json"]
        return command + ["--group_reporting", "--randrepeat=0", "--norandommap=1"] + options

    def run(self, uri, options):
        command = self.command(uri, options)
        done = subprocess.run(command, cwd=self.scratch, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
        # fio prints notes in front of its JSON.
        job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
        if job["error"]:
            raise RuntimeError(f"{' '.join(command)}: error {job['error']}")
        return job


def side(job):
    """The half of a fio job that did something, with its completion latencies in us."""
    half = job["read"] if job["read"]["total_ios"] else job["write"]
    percentiles = half["clat_ns"].get("percentile", {})
    return {
        "iops": half["iops"],
        "mib_s": half["bw_bytes"] / MIB,
        "mean_us": half["clat_ns"]["mean"] / 1000,
        "p50_us": percentiles.get("50.000000", 0) / 1000,
        "p99_us": percentiles.get("99.000000", 0) / 1000,
    }


def measure(fio, servers, settings):
    """{workload: {server: [result of each round]}}"""
    results = {name: {server.name: [] for server in servers} for name in WORKLOADS}
    timing = ["--time_based", f"--runtime={settings.seconds}", f"--size={settings.size_bytes}"]
    for round_no in range(settings.rounds):
        for name, (options, unit) in WORKLOADS.items():
            for at in range(len(servers)):
                server = servers[(at + round_no) % len(servers)]
                # What the one before left dirty in the page cache is not this one's burden.
                os.sync()
                result = side(fio.run(server.uri, options + timing))
                results[name][server.name].append(result)
            seen = ", ".join(f"{s.name} {results[name][s.name][-1][unit]:,.0f}" for s in servers)
            log(f"round {round_no + 1}/{settings.rounds} {name} ({unit}): {seen}")
    return results


def measure_forwarding(fio, cluster, settings):
    """Median latency of 4 KiB QD1 reads through server 1, of its own and of others' pages."""
    page_bytes, pages = cluster.pages_by_owner()
    rounds = {"local": [], "forwarded": []}
    spots = {"local": pages[cluster.entry_node()][0]}
    spots["forwarded"] = next(p[0] for node, p in pages.items() if node != cluster.entry_node())
    for round_no in range(max(settings.rounds, 3)):
        order = list(spots) if round_no % 2 == 0 else list(spots)[::-1]
        for kind in order:
            options = ["--rw=randread", "--bs=4k", "--iodepth=1", "--time_based"]
            options += [f"--runtime={settings.seconds}", f"--size={page_bytes}"]
            options += [f"--offset={spots[kind] * page_bytes}"]
            rounds[kind].append(side(fio.run(cluster.uri, options))["p50_us"])
    medians = {kind: statistics.median(values) for kind, values in rounds.items()}
    extra_us = medians["forwarded"] - medians["local"]
    return {"rounds_p50_us": rounds, "medians_us": medians, "extra_us": extra_us}


def summarize(results):
    """Medians of the unit of each workload: {workload: {server: value}}."""
    return {
        name: {
            server: statistics.median(result[WORKLOADS[name][1]] for result in rounds)
            for server, rounds in by_server.items()
        }
        for name, by_server in results.items()
    }


def judge(medians, extras):
    """Rows (what, measured, target, met) for each target whose servers were measured."""
    rows = []
    for workload, ours, peer, least in TARGETS:
        values = medians.get(workload, {})
        if ours in values and peer in values:
            ratio = values[ours] / values[peer]
            rows.append((f"{workload}: {ours} / {peer}", ratio, f">= {least}x", ratio >= least))
    limits = [
        ("forwarding", "extra_us", "forwarded QD1 read, us more than local", 60),
        ("after_snapshot", "ratio_settled", "bytes per first write after a snapshot / before", 1.2),
        ("snapshot_time", "median_ms", "snapshot of 1 TiB over 3 servers, median ms", 20),
        ("snapshot_time", "max_ms", "snapshot of 1 TiB over 3 servers, max ms", 50),
        ("procedures", "barrier1_paced_took_ms", "barrier, 1 TiB at QD32, median ms", 20),
        ("procedures", "barrier3_paced_took_ms", "barrier, 3 x 1 TiB at QD32, median ms", 20),
        ("procedures", "barrier1_paced_added_ms", "added to a write's p99 by a barrier and its command, ms", 2),
        ("procedures", "barrier1_paced_own_ms", "the same without what a command costs that does nothing, ms", 2),
        ("procedures", "barrier3_paced_own_ms", "the same of three volumes, ms", 2),
        ("procedures", "barrier1_flat_out_own_ms", "the same flat out, ms", 2),
        ("procedures", "stamp1_paced_own_ms", "the same by stamp, ms", 2),
        ("clones", "full_clone_ms", "clone of a 100 GiB thin volume with up to 8 GiB of data, ms", 100),
        ("clones", "full_rollback_ms", "rollback of the same, ms", 100),
        ("clones", "clone_growth", "clone with 8 times the data / with one", 1.5),
        ("clones", "rollback_growth", "rollback with 8 times the data / with one", 1.5),
        ("snapshot_time", "hold_max_ms", "longest write around a snapshot (bounds the hold), ms", 20),
    ]
    for part, key, text, most in limits:
        value = extras.get(part, {}).get(key)
        if value is not None:
            rows.append((text, value, f"<= {most}", value <= most))
    least = [
        ("speed_after", "write_ratio", "4k QD32 write right after a snapshot / before", 0.9),
        ("speed_after", "read_ratio", "4k QD32 read right after a snapshot / before", 0.9),
        ("speed_many", "write_ratio", "4k QD32 write with 1,000 snapshots / without", 0.8),
        ("speed_many", "read_ratio", "4k QD32 read with 1,000 snapshots / without", 0.8),
    ]
    for part, key, text, bound in least:
        value = extras.get(part, {}).get(key)
        if value is not None:
            rows.append((text, value, f">= {bound}x", value >= bound))
    return rows


def table(header, rows):
    rows = [header] + rows
    widths = [max(len(row[at]) for row in rows) for at in range(len(header))]
    for row in rows:
        cells = [row[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(row[1:], widths[1:])]
        print("  ".join(cells).rstrip())
    print()


def report(medians, names, extras, verdicts):
    if medians:
        print("\nMedians (IOPS; MiB/s for the 1m rows)")
        table(
            ["workload"] + names,
            [[w] + [f"{values[n]:,.0f}" for n in names] for w, values in medians.items()],
        )
    peers = [name for name in names if not name.startswith("ours")]
    for ours in [name for name in names if name.startswith("ours")]:
        if not peers or not medians:
            continue
        print(f"Ratios: {ours} / peer")
        rows = [[w] + [f"{v[ours] / v[p]:.2f}" for p in peers] for w, v in medians.items()]
        table(["workload"] + peers, rows)
    for part in extras.values():
        for note in part.get("notes", []):
            print(f"Note: {note}")
    if verdicts:
        print("\nTargets")
        rows = [
            [what, f"{value:.2f}", target, "pass" if met else "MISS"]
            for what, value, target, met in verdicts
        ]
        table(["what", "measured", "target", ""], rows)


def parse(arguments):
    parser = argparse.ArgumentParser(prog="bench.sh")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--seconds", type=int)
    parser.add_argument("--only", default=",".join(SERVERS))
    parser.add_argument("--parts", default=",".join(["workloads", *EXTRAS]))
    parser.add_argument("--dir")
    parser.add_argument("--bin", required=True)
    parser.add_argument("--root", required=True)
    settings = parser.parse_args(arguments)
    settings.rounds = settings.rounds or (1 if settings.quick else 3)
    settings.seconds = settings.seconds or (1 if settings.quick else 3)
    settings.size_bytes = (256 if settings.quick else 1024) * MIB
    settings.only = settings.only.split(",")
    if settings.rounds < 1 or settings.seconds < 1:
        parser.error("--rounds and --seconds are at least 1")
    unknown = [name for name in settings.only if name not in SERVERS]
    if unknown:
        parser.error(f"unknown server {unknown[0]}; there are {', '.join(SERVERS)}")
    settings.parts = settings.parts.split(",")
    unknown = [part for part in settings.parts if part not in ("workloads", *EXTRAS)]
    if unknown:
        parser.error(f"unknown part {unknown[0]}; there are workloads, {', '.join(EXTRAS)}")
    settings.dir = os.path.abspath(settings.dir or os.path.join(settings.root, "var"))
    stamp = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%dT%H%M%SZ")
    results = os.path.join(settings.root, "bench-results")
    settings.json = settings.json or os.path.join(results, f"{stamp}.json")
    return settings


def start_servers(stack, settings, data, sockets):
    """The servers, started and filled; the stack stops them in the end."""
    servers = []
    for name in settings.only:
        server = SERVERS[name](name, settings, os.path.join(data, name), sockets)
        stack.callback(server.stop)
        server.start()
        servers.append(server)
    return servers


def fill(fio, servers, settings):
    for server in servers:
        log(f"filling {server.name}")
        options = ["--rw=write", "--bs=1m", "--iodepth=8", "--end_fsync=1", "--refill_buffers"]
        fio.run(server.uri, options + [f"--size={settings.size_bytes}"])


# What only our own servers have: {part: (server, function, what it is)}.
EXTRAS = {
    "forwarding": ("ours3", measure_forwarding, "forwarded against local reads"),
    "after_snapshot": ("ours1", bench_snapshot.bytes_written, "bytes written after a snapshot"),
    "speed_after": ("ours1", bench_lineage.after_snapshot, "speed right after a snapshot"),
    "speed_many": ("ours1", bench_lineage.many_snapshots, "speed with many snapshots"),
    "clones": ("ours1", bench_lineage.clones, "clone and rollback"),
    "snapshot_time": ("ours3", bench_snapshot.times, "snapshots over three servers under load"),
    "procedures": ("ours3", bench_snapshot.procedures, "each procedure under load"),
}


def measure_extras(fio, servers, settings):
    extras = {}
    by_name = {server.name: server for server in servers}
    for part, (name, function, what) in EXTRAS.items():
        if part in settings.parts and name in by_name:
            log(what)
            extras[part] = function(fio, by_name[name], settings)
    return extras


def main():
    settings = parse(sys.argv[1:])
    # A signal ends the run like an exception, so that what was started is stopped.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with contextlib.ExitStack() as stack:
        data, sockets = directories(stack, settings.dir)
        fio = Fio(data)
        servers = start_servers(stack, settings, data, sockets)
        fill(fio, servers, settings)
        results = measure(fio, servers, settings) if "workloads" in settings.parts else {}
        extras = measure_extras(fio, servers, settings)
    medians = summarize(results)
    verdicts = judge(medians, extras)
    report(medians, settings.only, extras, verdicts)
    document = {
        "when_unix_s": int(time.time()),
        "host": {"kernel": platform.release(), "cores": os.cpu_count()},
        "rounds": settings.rounds,
        "seconds": settings.seconds,
        "size_bytes": settings.size_bytes,
        "medians": medians,
        "results": results,
        "extras": extras,
        "targets": [
            {"what": what, "measured": value, "target": target, "met": met}
            for what, value, target, met in verdicts
        ],
    }
    os.makedirs(os.path.dirname(os.path.abspath(settings.json)), exist_ok=True)
    with open(settings.json, "w", encoding="ascii") as file:
        json.dump(document, file, indent=1)
    print(f"Everything measured: {settings.json}")


if __name__ == "__main__":
    main()
