"""Our own ext4 as a mount, against the kernel's ext4 on a loop file, fuse2fs, and for streams a volume over NBD.

Each has a filesystem of mke2fs on the same disk: ours on a volume of one local server, the others in a
file. Rows run on each in turn, in rounds; medians are shown, with the ratio of ours to each peer.
Creates, stats, renames and unlinks are of empty files in one directory, by one process of C-like system
calls (Python's os); tar and reading are of a tree that is made once.
"""

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

from bench_servers import One, VOLUME

MIB = 1 << 20
ENTRIES = 2000
CHUNK = b"\xa5" * MIB


def run(*words, **more):
    return subprocess.run(words, check=True, capture_output=True, text=True, **more)


def fio(*options):
    done = run("fio", "--name=bench", "--output-format=json", "--group_reporting", *options)
    return json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]


def drop_caches():
    with contextlib.suppress(OSError), open("/proc/sys/vm/drop_caches", "w") as file:
        file.write("3")


class Mount:
    """A place to mount; every row gets a mount of an empty directory."""

    def __init__(self, settings, base):
        self.settings = settings
        self.base = os.path.join(base, self.name)
        self.dir = os.path.join(self.base, "mnt")
        os.makedirs(self.dir)

    def image(self):
        path = os.path.join(self.base, "image")
        with open(path, "wb") as file:
            file.truncate(self.settings.size_bytes)
        run("mkfs.ext4", "-q", "-F", path)
        return path

    def stop(self):
        subprocess.run(["umount", self.dir], check=False, capture_output=True)


class Kernel(Mount):
    name = "kernel"

    def start(self):
        run("mount", "-o", "loop", self.image(), self.dir)


class Fuse2fs(Mount):
    name = "fuse2fs"

    def start(self):
        run("fuse2fs", "-o", "fakeroot", self.image(), self.dir)


class NbdServer(One):
    addresses = ("127.0.9.5",)


class Nbd(Mount):
    """A volume of a server like that of ours, without a filesystem, through fio's nbd engine and TCP."""

    name = "nbd"

    def start(self):
        sockets = tempfile.mkdtemp(prefix="bench-")
        self.server = NbdServer("nbd", self.settings, os.path.join(self.base, "server"), sockets)
        self.server.start()

    def stop(self):
        self.server.stop()

    def fio(self, *options):
        uri = f"nbd://{NbdServer.addresses[0]}/{VOLUME}"
        size = f"--size={self.settings.stream_mib}m"
        return fio("--ioengine=nbd", f"--uri={uri}", size, *options)

    def streams(self):
        found = {}
        for row, rw in (("write 1M", "write"), ("read 1M", "read")):
            drop_caches()
            done = self.fio(f"--rw={rw}", "--bs=1m", "--iodepth=8", "--end_fsync=1")
            found[row] = done[rw]["bw_bytes"] / MIB
        timed = ["--time_based", f"--runtime={self.settings.seconds}"]
        done = self.fio("--rw=randread", "--bs=4k", "--iodepth=1", "--numjobs=4", *timed)
        found["randread 4k direct x4"] = done["read"]["iops"]
        return found


class Ours(Mount):
    name = "ours"

    def start(self):
        sockets = tempfile.mkdtemp(prefix="bench-")
        self.server = One("one", self.settings, os.path.join(self.base, "server"), sockets)
        self.server.start()
        self.fuse_fs("mkfs", VOLUME, "--force")
        self.fuse_fs("mount", VOLUME, self.dir, "--runtime-dir", self.base, "-o", self.settings.options)

    def fuse_fs(self, *words):
        program = os.path.join(self.settings.bin, "fuse-fs")
        environment = dict(os.environ, BLOCKD_SERVERS=One.addresses[0])
        run(program, *words, env=environment)

    def stop(self):
        with contextlib.suppress(subprocess.CalledProcessError):
            self.fuse_fs("umount", self.dir, "--runtime-dir", self.base)
        super().stop()
        self.server.stop()


def rate(count, work):
    start = time.perf_counter()
    work()
    return count / (time.perf_counter() - start)


def names(directory, count, prefix="f"):
    return [os.path.join(directory, f"{prefix}{number}") for number in range(count)]


def create(paths):
    for path in paths:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))


def small_files(mount, _settings):
    """Creates, stats, renames and unlinks per second in a directory of ENTRIES."""
    directory = os.path.join(mount.dir, "small")
    os.mkdir(directory)
    old, new = names(directory, ENTRIES), names(directory, ENTRIES, "g")
    found = {"create 2k": rate(ENTRIES, lambda: create(old))}
    for path in old:  # closing a file makes the kernel forget how many blocks it has
        os.stat(path)
    found["stat 2k"] = rate(ENTRIES * 5, lambda: [os.stat(p) for _ in range(5) for p in old])
    found["rename 2k"] = rate(ENTRIES, lambda: [os.rename(*pair) for pair in zip(old, new)])
    found["unlink 2k"] = rate(ENTRIES, lambda: [os.unlink(path) for path in new])
    os.rmdir(directory)
    return found


def large_directory(mount, settings):
    """The last ENTRIES creates of a directory that then has settings.many."""
    if mount.name == "fuse2fs":
        return {}
    directory = os.path.join(mount.dir, "large")
    os.mkdir(directory)
    create(names(directory, settings.many - ENTRIES))
    found = {"create at many": rate(ENTRIES, lambda: create(names(directory, ENTRIES, "g")))}
    shutil.rmtree(directory)
    return found


def tree(mount, settings):
    """Seconds of tar x, of reading all, and of removing it, as rates of files."""
    directory = os.path.join(mount.dir, "tree")
    os.mkdir(directory)
    count = settings.tree_files
    found = {"tar x": rate(count, lambda: run("tar", "-xf", settings.tar, "-C", directory))}
    os.sync()
    drop_caches()
    read = ["tar", "-cf", "-", "-C", directory, "."]
    found["read tree"] = rate(count, lambda: subprocess.run(read, check=True, stdout=subprocess.PIPE))
    found["rm -rf"] = rate(count, lambda: run("rm", "-rf", directory))
    return found


def streams(mount, settings):
    """MiB per second of sequential 1 MiB writes with fsync, and of reads, buffered."""
    if mount.name == "nbd":
        return mount.streams()
    path = os.path.join(mount.dir, "stream")
    mib = settings.stream_mib

    def write():
        with open(path, "wb", buffering=0) as file:
            for _ in range(mib):
                file.write(CHUNK)
            os.fsync(file.fileno())

    def read():
        with open(path, "rb", buffering=0) as file:
            while file.read(MIB):
                pass

    found = {"write 1M": rate(mib, write)}
    drop_caches()
    found["read 1M"] = rate(mib, read)
    options = [f"--filename={path}", "--rw=randread", "--bs=4k", "--direct=1", "--iodepth=1"]
    options += ["--numjobs=4", "--ioengine=psync", "--time_based", f"--runtime={settings.seconds}"]
    found["randread 4k direct x4"] = fio(*options)["read"]["iops"]
    os.unlink(path)
    return found


def fsyncs(mount, settings):
    """Appends of 4 KiB with fsync per second, of one writer and of 16."""
    found = {}
    for writers in (1, 16):
        options = [f"--directory={mount.dir}", "--rw=write", "--bs=4k", "--size=64m", "--fsync=1"]
        options += [f"--numjobs={writers}", "--ioengine=psync", "--time_based", "--fallocate=none"]
        options += [f"--runtime={settings.seconds}", "--unlink=1"]
        found[f"append+fsync x{writers}"] = fio(*options)["write"]["iops"]
    return found


ROWS = {
    "small": small_files,
    "streams": streams,
    "fsyncs": fsyncs,
    "tree": tree,
    "large": large_directory,
}


def make_tar(settings, base):
    """Files of 0 to 40 KiB in directories of 50."""
    source, settings.tar = os.path.join(base, "source"), os.path.join(base, "tree.tar")
    for number in range(settings.tree_files):
        directory = os.path.join(source, f"d{number // 50 % 40}", f"e{number // 50}")
        os.makedirs(directory, exist_ok=True)
        with open(os.path.join(directory, f"file{number}"), "wb") as file:
            file.write(os.urandom(number * 7919 % 40960))
    run("tar", "-cf", settings.tar, "-C", source, ".")
    shutil.rmtree(source)


def parse(arguments):
    parser = argparse.ArgumentParser(prog="bench.sh mount")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--seconds", type=int, default=3)
    parser.add_argument("--many", type=int, help="entries of the large directory")
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--only", default="kernel,fuse2fs,nbd,ours")
    parser.add_argument("--options", default="defaults", help="how ours is mounted, such as low_latency")
    parser.add_argument("--json")
    parser.add_argument("--dir")
    parser.add_argument("--bin", required=True)
    parser.add_argument("--root", required=True)
    settings = parser.parse_args(arguments)
    settings.rounds = settings.rounds or (1 if settings.quick else 3)
    settings.many = settings.many or (20_000 if settings.quick else 1_000_000)
    settings.tree_files = 2000 if settings.quick else 40_000
    settings.stream_mib = 256 if settings.quick else 1024
    # An inode for every 16 KiB: a million of them need 16 GiB.
    settings.size_bytes = 32 << 30
    settings.dir = settings.dir or os.path.join(settings.root, "var")
    settings.rows, settings.only = settings.rows.split(","), settings.only.split(",")
    unknown = set(settings.rows) - set(ROWS)
    if unknown:
        parser.error(f"unknown row {unknown.pop()}; there are {', '.join(ROWS)}")
    return settings


def measure(settings, mounts):
    """{row: {mount: [rate, ...]}}"""
    results = {}
    for number in range(settings.rounds):
        for row in settings.rows:
            # A directory of a million entries is made once.
            if row == "large" and number > 0:
                continue
            for mount in mounts:
                if mount.name == "nbd" and row != "streams":
                    continue
                print(f"round {number + 1}: {row} on {mount.name}", file=sys.stderr)
                for name, value in ROWS[row](mount, settings).items():
                    results.setdefault(name, {}).setdefault(mount.name, []).append(value)
    return results


def report(results, only):
    peers = [name for name in only if name != "ours"]
    print("| per second | " + " | ".join(only + [f"ours/{peer}" for peer in peers]) + " |")
    print("|---" * (1 + len(only) + len(peers)) + "|")
    for row, by_mount in results.items():
        medians = {name: statistics.median(values) for name, values in by_mount.items()}
        cells = [f"{medians[name]:,.0f}" if name in medians else "-" for name in only]
        for peer in peers:
            both = "ours" in medians and peer in medians
            cells.append(f"{medians['ours'] / medians[peer]:.2f}" if both else "-")
        print(f"| {row} | " + " | ".join(cells) + " |")


def main():
    settings = parse(sys.argv[1:])
    os.makedirs(settings.dir, exist_ok=True)
    kinds = {kind.name: kind for kind in (Kernel, Fuse2fs, Nbd, Ours)}
    with contextlib.ExitStack() as stack:
        base = stack.enter_context(tempfile.TemporaryDirectory(prefix="mount-", dir=settings.dir))
        make_tar(settings, base)
        mounts = []
        for name in settings.only:
            mount = kinds[name](settings, base)
            stack.callback(mount.stop)
            mount.start()
            mounts.append(mount)
        results = measure(settings, mounts)
    report(results, settings.only)
    if settings.json:
        with open(settings.json, "w", encoding="ascii") as file:
            json.dump({"arguments": vars(settings), "results": results}, file, indent=1)


if __name__ == "__main__":
    main()
