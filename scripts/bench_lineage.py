"""What a volume's past costs: speed right after a snapshot and with many, clone and rollback.

Speeds are of 4 KiB random IO at queue depth 32 over the same volume; each measurement with snapshots
stands beside one without, of the same run, on a volume that was filled and written before in the
same way. Clone and rollback are timed on a thin volume of 100 GiB of which FILLED_GIB are full, and
on the same with an eighth of that: what is O(1) in data takes the same on both.
"""

import signal
import statistics
import subprocess
import time

import bench_snapshot

MANY_SNAPSHOTS = 1000
# Between the snapshots, so that each differs from the next in some blocks.
WRITES_PER_S = 1000
THIN_BYTES = 100 << 30
FILLED_GIB = 8
TIMES = 5


def speed(fio, uri, pattern, settings):
    options = [f"--rw={pattern}", "--bs=4k", "--iodepth=32", "--time_based"]
    options += [f"--runtime={settings.seconds}", f"--size={settings.size_bytes}"]
    job = fio.run(uri, options)
    return job["read" if pattern == "randread" else "write"]["iops"]


def filled(fio, server, volume, size_bytes, fill_bytes):
    """A new volume with its first bytes written; its URI."""
    server.control("volume", "create", volume, "--size", str(size_bytes))
    uri = server.uri.replace("///bench?", f"///{volume}?")
    options = ["--rw=write", "--bs=1m", "--iodepth=8", "--end_fsync=1", "--refill_buffers"]
    fio.run(uri, options + [f"--size={fill_bytes}"])
    return uri


def after_snapshot(fio, server, settings):
    """Random writes and reads right before and right after a snapshot, rounds interleaved."""
    uri = filled(fio, server, "after", settings.size_bytes, settings.size_bytes)
    rounds = {name: [] for name in ("write_before", "write_after", "read_before", "read_after")}
    for number in range(max(settings.rounds, 3)):
        # What the deletion of the last one and the writes before left to do is nobody's burden here.
        bench_snapshot.settle(server)
        rounds["write_before"].append(speed(fio, uri, "randwrite", settings))
        rounds["read_before"].append(speed(fio, uri, "randread", settings))
        bench_snapshot.settle(server)
        server.control("snapshot", "create", f"after@s{number}")
        rounds["write_after"].append(speed(fio, uri, "randwrite", settings))
        rounds["read_after"].append(speed(fio, uri, "randread", settings))
        server.control("snapshot", "delete", f"after@s{number}")
    server.control("volume", "delete", "after", "--force")
    return compared("right after a snapshot", rounds, "before", "after")


def many_snapshots(fio, server, settings):
    """Random writes and reads of a volume of MANY_SNAPSHOTS snapshots, written between them, and
    of one without, in turn."""
    uris = {}
    for volume in ("plain", "many"):
        uris[volume] = filled(fio, server, volume, settings.size_bytes, settings.size_bytes)
    snapshots_under_writes(fio, server, uris["many"], settings)
    rounds = {name: [] for name in ("write_plain", "write_many", "read_plain", "read_many")}
    for _ in range(max(settings.rounds, 3)):
        for volume in ("plain", "many"):
            rounds[f"read_{volume}"].append(speed(fio, uris[volume], "randread", settings))
        for volume in ("plain", "many"):
            rounds[f"write_{volume}"].append(speed(fio, uris[volume], "randwrite", settings))
    for volume in uris:
        server.control("volume", "delete", volume, "--force")
    return compared(f"with {MANY_SNAPSHOTS:,} snapshots", rounds, "plain", "many")


def snapshots_under_writes(fio, server, uri, settings):
    options = ["--rw=randwrite", "--bs=4k", "--iodepth=4", "--time_based", "--runtime=3600"]
    options += [f"--size={settings.size_bytes}", f"--rate_iops={WRITES_PER_S}"]
    load = subprocess.Popen(
        fio.command(uri, options), cwd=fio.scratch, stdout=subprocess.DEVNULL
    )
    try:
        for number in range(MANY_SNAPSHOTS):
            server.control("snapshot", "create", f"many@s{number}")
    finally:
        load.send_signal(signal.SIGINT)
        load.wait()


def compared(what, rounds, without, having):
    medians = {name: statistics.median(values) for name, values in rounds.items()}
    ratios = {
        f"{kind}_ratio": medians[f"{kind}_{having}"] / medians[f"{kind}_{without}"]
        for kind in ("write", "read")
    }
    note = (
        f"4 KiB QD32 {what}, IOPS: write {medians[f'write_{without}']:,.0f} -> "
        f"{medians[f'write_{having}']:,.0f}, read {medians[f'read_{without}']:,.0f} -> "
        f"{medians[f'read_{having}']:,.0f}"
    )
    return {"rounds": rounds, **ratios, "notes": [note]}


def clones(fio, server, settings):
    """Milliseconds of whole commands: clone and rollback of a thin volume, more and less full."""
    most = min(FILLED_GIB << 30, 8 * settings.size_bytes)
    result = {"notes": []}
    for name, fill_bytes in (("less", most // 8), ("full", most)):
        filled(fio, server, name, THIN_BYTES, fill_bytes)
        server.control("snapshot", "create", f"{name}@base")
        took = {"clone": [], "rollback": []}
        for number in range(TIMES):
            clone = ["volume", "clone", f"{name}@base", f"{name}-clone{number}"]
            took["clone"].append(timed_ms(server, clone))
            took["rollback"].append(timed_ms(server, ["snapshot", "rollback", f"{name}@base"]))
        medians = {verb: statistics.median(values) for verb, values in took.items()}
        result.update({f"{name}_{verb}_ms": value for verb, value in medians.items()})
        result["notes"].append(
            f"100 GiB thin with {fill_bytes / (1 << 30):.1f} GiB written: clone {medians['clone']:.1f} ms, "
            f"rollback {medians['rollback']:.1f} ms (whole commands)"
        )
        for number in range(TIMES):
            server.control("volume", "delete", f"{name}-clone{number}", "--force")
        server.control("volume", "delete", name, "--force")
    for verb in ("clone", "rollback"):
        result[f"{verb}_growth"] = result[f"full_{verb}_ms"] / result[f"less_{verb}_ms"]
    return result


def timed_ms(server, command):
    start = time.monotonic()
    server.control(*command)
    return (time.monotonic() - start) * 1000
