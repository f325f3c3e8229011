#!/usr/bin/env bash
# Measures our servers against their peers in one run: see scripts/bench.py.
set -euo pipefail

usage() {
    cat <<'EOF'
Usage: scripts/bench.sh [--quick] [--json FILE] [--rounds N] [--seconds N] [--only A,B]
                        [--parts A,B] [--dir DIR]
       scripts/bench.sh nbd [--rows A,B] [--rounds N] [--seconds N] [--size-mib N] [--dir DIR]
       scripts/bench.sh moves [--rounds N] [--size-mib N] [--dir DIR]
       scripts/bench.sh grow [--rounds N] [--seconds N] [--size-mib N] [--dir DIR]
       scripts/bench.sh mount [--quick] [--rows A,B] [--only A,B] [--rounds N] [--many N] [--options O] [--json FILE]

Installs what is missing, builds release and compares over unix sockets with fio's nbd engine:
  ours1     one blockd                    ours3      three, pages spread, all IO through the first
  qemu-raw  qemu-nbd, defaults            qemu-none  qemu-nbd, cache=none, aio=io_uring
  qemu-qcow2  qemu-nbd, qcow2, cache=none   nbdkit     nbdkit file
Interleaved in rounds; prints medians, ratios against the peers, and target and pass or miss.

  --quick      one round of one second on 256 MiB: does it run, not how fast is it
  --json FILE  write everything measured, default bench-results/DATE.json
  --rounds N   rounds of each workload, default 3
  --seconds N  seconds of each measurement, default 3
  --only A,B   only these of the servers above
  --parts A,B  only these: workloads (the table of all servers), and of our own servers forwarding,
               after_snapshot, speed_after, speed_many, clones, snapshot_time, procedures
  --dir DIR    put the data there (default ./var); all servers share that disk

With `nbd` it measures the NBD server instead: the library alone on memory against nbdkit memory and
null, over unix sockets and TCP, and one blockd against nbdkit file. Each row runs ours and the peer
in turn (5 rounds of 2 s). --rows takes only the rows whose names contain one of these words, as
`--rows tcp` or `--rows blockd-read-1m`.

With `moves` it measures page moves between two servers: their speed against a copy on the same disk,
and the p99 of a client's writes during them against that beside them.

With `grow` (as root) it lets a group grow from one server to four under writes, each held to a part of
a core by a control group, and prints the requests a second with each number of servers.

With `mount` (as root) it measures our own ext4 as a mount of a volume on one local server, against the
kernel's ext4 on a loop file, fuse2fs and, for streams, NBD: small files, streams, fsyncs, a tree, a directory of --many
entries (rows small, streams, fsyncs, tree, large). --options are those of the mount, as low_latency.
EOF
}

for arg in "$@"; do
    if [ "$arg" = -h ] || [ "$arg" = --help ]; then
        usage
        exit 0
    fi
done

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PATH="$HOME/.cargo/bin:$PATH:/usr/sbin:/sbin"
"$root/scripts/deps.sh" build bench >&2
if [ "${1:-}" = moves ] || [ "${1:-}" = grow ]; then
    part=$1
    shift
    cargo build --release --locked --quiet --manifest-path "$root/Cargo.toml" -p blockd
    exec python3 -B "$root/scripts/bench_$part.py" --bin "${CARGO_TARGET_DIR:-$root/target}/release" \
        --root "$root" "$@"
fi
if [ "${1:-}" = nbd ]; then
    shift
    cargo build --release --locked --quiet --manifest-path "$root/Cargo.toml" -p blockd -p nbd-server
    exec python3 -B "$root/scripts/bench_nbd.py" --bin "${CARGO_TARGET_DIR:-$root/target}/release" \
        --root "$root" "$@"
fi
if [ "${1:-}" = mount ]; then
    shift
    cargo build --release --locked --quiet --manifest-path "$root/Cargo.toml" -p blockd -p fuse-fs
    exec python3 -B "$root/scripts/bench_mount.py" --bin "${CARGO_TARGET_DIR:-$root/target}/release" \
        --root "$root" "$@"
fi
# Without our own servers (--only with peers alone) there is nothing to build.
case " $* " in
    *" --only "*ours* | *--only=*ours*) build=yes ;;
    *" --only "* | *--only=*) build=no ;;
    *) build=yes ;;
esac
if [ "$build" = yes ]; then
    cargo build --release --locked --quiet --manifest-path "$root/Cargo.toml" -p blockd
fi
exec python3 -B "$root/scripts/bench.py" --bin "${CARGO_TARGET_DIR:-$root/target}/release" \
    --root "$root" "$@"
