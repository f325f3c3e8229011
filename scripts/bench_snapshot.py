"""What a snapshot costs: bytes written afterwards, and the time it takes under load.

The target is judged on the bytes that the server's process hands to write calls (`wchar` of
/proc/PID/io): log, slab, checkpoints and background copies, and the 16 bytes of each NBD reply. The
disk's own count is shown beside it; it has in it the file system's metadata and whatever else
writes to that disk meanwhile. One 4 KiB block of each 64 KiB chunk is overwritten, the worst case for
a copy of whole chunks, once before and once after a snapshot. The counts are read twice: when the
writes are flushed, and when the servers have been quiet for some seconds and the page cache is
synced; medians of rounds, judged on the second.
"""

import os
import signal
import statistics
import subprocess
import time

BLOCK_BYTES = 4096
CHUNK_BYTES = 65536
QUIET_S = 4
SETTLE_MAX_S = 90
SNAPSHOTS = 20
# Milliseconds behind a reply in which a held write may still be seen to complete.
AFTER_MS = 20
BIG_BYTES = 1 << 40
# Of the load beside the procedures: a fourth of what two cores do with fio beside three servers.
PACED_IOPS = 15_000


def settle(server):
    """Waits until the servers' processes have written nothing for QUIET_S; whether they did so."""
    last, since = server.stored_bytes(), time.monotonic()
    end = since + SETTLE_MAX_S
    while time.monotonic() < min(end, since + QUIET_S):
        time.sleep(0.2)
        now = server.stored_bytes()
        if now != last:
            last, since = now, time.monotonic()
    os.sync()
    return time.monotonic() < end


def disk_bytes(path):
    """Bytes written to the disk below `path` so far; None if no block device is below it."""
    device = os.stat(path).st_dev
    try:
        with open(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/stat") as stat:
            return int(stat.read().split()[6]) * 512
    except FileNotFoundError:
        return None


def counts(server):
    """(bytes of the disk, bytes of the servers' processes) so far."""
    return disk_bytes(server.data), server.written_bytes()


def per_write(before, after, writes):
    return [(late - early) / writes for early, late in zip(before, after)]


def overwrite(fio, server, settings):
    """Overwrites a block of every chunk; bytes per write: flushed by the disk's count and by the
    server's, settled by the disk's count and by the server's."""
    writes = settings.size_bytes // CHUNK_BYTES
    settle(server)
    before = counts(server)
    # `write:60k` leaves 60 KiB out behind each write; the IO size counts what is written.
    options = [f"--rw=write:{(CHUNK_BYTES - BLOCK_BYTES) // 1024}k", "--bs=4k", "--iodepth=8"]
    options += [f"--size={settings.size_bytes}", f"--io_size={writes * BLOCK_BYTES}"]
    job = fio.run(server.uri, options + ["--end_fsync=1", "--refill_buffers"])
    flushed = counts(server)
    settle(server)
    settled = counts(server)
    done = job["write"]["total_ios"]
    return per_write(before, flushed, done) + per_write(before, settled, done)


def bytes_written(fio, server, settings):
    if disk_bytes(server.data) is None:
        return {"notes": ["no block device below the data: bytes after a snapshot not measured"]}
    rounds = {"before": [], "after": []}
    for number in range(settings.rounds):
        rounds["before"].append(overwrite(fio, server, settings))
        server.control("snapshot", "create", f"bench@cost{number}")
        rounds["after"].append(overwrite(fio, server, settings))
        server.control("snapshot", "delete", f"bench@cost{number}")
    medians = {
        when: [statistics.median(column) for column in zip(*pairs)]
        for when, pairs in rounds.items()
    }
    (_, before_flushed, before_disk, before_settled) = medians["before"]
    (_, after_flushed, after_disk, after_settled) = medians["after"]
    note = (
        "bytes written per 4 KiB write, one write per chunk: before a snapshot "
        f"{before_flushed:,.0f} at the flush, {before_settled:,.0f} settled (the disk counts "
        f"{before_disk:,.0f}); after it {after_flushed:,.0f} and {after_settled:,.0f} "
        f"({after_disk:,.0f})"
    )
    return {
        "rounds": rounds,
        "ratio_flushed": after_flushed / before_flushed,
        "ratio_settled": after_settled / before_settled,
        "notes": [note],
    }


def times(fio, server, settings):
    """SNAPSHOTS snapshots of a thin volume of 1 TiB while it is written at random."""
    server.control("volume", "create", "big", "--size", str(BIG_BYTES))
    log = os.path.join(fio.scratch, "load")
    options = ["--rw=randwrite", "--bs=4k", "--iodepth=8", "--time_based", "--runtime=600"]
    # At random over the whole volume at a fixed rate: the load is the requests, not the space.
    options += [f"--size={BIG_BYTES}", "--rate_iops=5000"]
    options += [f"--write_lat_log={log}", "--log_unix_epoch=1"]
    uri = server.uri.replace("///bench?", "///big?")
    load = subprocess.Popen(
        fio.command(uri, options), cwd=fio.scratch, stdout=subprocess.DEVNULL
    )
    took, windows = [], []
    try:
        time.sleep(2)
        for number in range(SNAPSHOTS):
            start = time.time()
            took.append(server.control("snapshot", "create", f"big@s{number}")["took_ms"])
            windows.append((start * 1000, time.time() * 1000))
            if load.poll() is not None:
                raise RuntimeError("the load on the 1 TiB volume ended before the snapshots did")
            time.sleep(0.2)
    finally:
        # fio writes its logs when it is interrupted.
        load.send_signal(signal.SIGINT)
        load.wait()
    server.control("volume", "delete", "big", "--force")
    held = longest_writes_ms(f"{log}_clat.1.log", windows)
    command = [end - start for start, end in windows]
    note = (
        f"{SNAPSHOTS} snapshots of 1 TiB thin over three servers under 5,000 4 KiB writes/s: "
        f"request to reply median {statistics.median(took):.1f} ms, max {max(took):.1f} ms; "
        f"whole command median {statistics.median(command):.1f} ms; longest write around a "
        f"snapshot median {statistics.median(held):.1f} ms, max {max(held):.1f} ms"
    )
    return {
        "took_ms": took,
        "command_ms": command,
        "longest_write_ms": held,
        "median_ms": statistics.median(took),
        "max_ms": max(took),
        "hold_max_ms": max(held),
        "notes": [note],
    }


def procedures(fio, server, settings):
    """SNAPSHOTS snapshots of one and of three thin volumes of 1 TiB by each procedure, while the
    first one is written in blocks of 4 KiB at queue depth 32: at PACED_IOPS, which leaves the cores
    some idle time, and by `barrier` also as fast as the servers go, when every step waits for a core.
    `nothing` is a command that takes no snapshot: what a process that starts costs the writes beside it."""
    volumes = ["wide", "wide2", "wide3"]
    for volume in volumes:
        server.control("volume", "create", volume, "--size", str(BIG_BYTES))
    result = {"notes": []}
    runs = [(name, count, PACED_IOPS) for name in ("barrier", "hold", "stamp") for count in (1, 3)]
    runs += [("nothing", 1, PACED_IOPS), ("nothing", 1, None), ("barrier", 1, None)]
    for procedure, count, iops in runs:
        measured = by_procedure(fio, server, procedure, volumes[:count], iops)
        load = "paced" if iops else "flat_out"
        result.update({f"{procedure}{count}_{load}_{key}": v for key, v in measured.items()})
        result["notes"].append(
            f"{procedure}, {count} x 1 TiB at QD32 {load.replace('_', ' ')}: took median "
            f"{measured['took_ms']:.1f} ms; a write's p99 {measured['p99_ms']:.2f} ms beside "
            f"snapshots, during them {measured['added_ms']:+.2f} ms, longest "
            f"{measured['longest_ms']:.1f} ms"
        )
    for volume in volumes:
        server.control("volume", "delete", volume, "--force")
    for run in ("barrier1_paced", "barrier3_paced", "stamp1_paced", "barrier1_flat_out"):
        nothing = "nothing1_flat_out" if run.endswith("flat_out") else "nothing1_paced"
        result[f"{run}_own_ms"] = result[f"{run}_added_ms"] - result[f"{nothing}_added_ms"]
    return result


def by_procedure(fio, server, procedure, volumes, iops):
    run = f"{procedure}{len(volumes)}-{iops}"
    log = os.path.join(fio.scratch, run)
    options = ["--rw=randwrite", "--bs=4k", "--iodepth=32", "--time_based", "--runtime=600"]
    options += [f"--size={BIG_BYTES}", f"--write_lat_log={log}", "--log_unix_epoch=1"]
    options += [f"--rate_iops={iops}"] if iops else []
    uri = server.uri.replace("///bench?", f"///{volumes[0]}?")
    load = subprocess.Popen(
        fio.command(uri, options), cwd=fio.scratch, stdout=subprocess.DEVNULL
    )
    took, windows = [], []
    try:
        time.sleep(1)
        for number in range(SNAPSHOTS):
            names = [f"{volume}@{run}-{number}" for volume in volumes]
            command = ["snapshot", "create", *names, "--procedure", procedure]
            if procedure == "nothing":
                command = ["version"]
            start = time.time()
            took.append(server.control(*command).get("took_ms", 0))
            windows.append((start * 1000, time.time() * 1000))
            time.sleep(0.2)
    finally:
        load.send_signal(signal.SIGINT)
        load.wait()
    inside, outside = split_latencies_ms(f"{log}_clat.1.log", windows)
    p99 = percentile(outside, 99)
    return {
        "took_ms": statistics.median(took),
        "took_max_ms": max(took),
        "p99_ms": p99,
        "added_ms": percentile(inside, 99) - p99,
        "longest_ms": max(inside),
    }


def split_latencies_ms(path, windows):
    """Completion latencies within the windows of wall clock ms, and those beside them."""
    inside, outside = [], []
    with open(path, encoding="ascii") as lines:
        for line in lines:
            at, ns = (int(field) for field in line.split(",")[:2])
            within = any(start <= at <= end + 1 for start, end in windows)
            (inside if within else outside).append(ns / 1e6)
    return inside, outside


def percentile(values, percent):
    return sorted(values)[min(len(values) - 1, len(values) * percent // 100)]


def longest_writes_ms(path, windows):
    """For each window of wall clock ms, the longest completion latency of fio's log in it.

    A write that is held completes when the hold ends, within the window or right behind it, so
    the longest one is the hold at most, plus what that write would have taken anyway.
    """
    with open(path, encoding="ascii") as lines:
        entries = [[int(field) for field in line.split(",")[:2]] for line in lines]
    longest = []
    for start, end in windows:
        inside = [ns / 1e6 for at, ns in entries if start <= at <= end + AFTER_MS]
        if not inside:
            raise RuntimeError("no write completed around a snapshot: the hold cannot be told")
        longest.append(max(inside))
    return longest
