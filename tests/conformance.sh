#!/usr/bin/env bash
# POSIX and stress tests of our own ext4 as a mount, judged by the kernel's ext4 on the same machine.
# Steps are called by their names.
# shellcheck disable=SC2317
set -euo pipefail

STEPS=(pjdfstest fsx stress sqlite kill postgres)

usage() {
    cat <<END
Usage: tests/conformance.sh [--bin DIR] [--long] [STEP...]

Mounts a volume in a file (the tests' double in place of servers) and runs the steps named, or all:
  pjdfstest  the Rust pjdfstest: no test that passes on the kernel's ext4 may fail or be skipped,
             but those of tests/conformance.txt
  fsx        random operations of every kind on one file, several seeds
  stress     the filesystem class of stress-ng
  sqlite     a database under load
  kill       kill -9 of the mount while files are written: what was fsynced is there after the replay
  postgres   kill -9 of the mount under pgbench: the database recovers, with every commit that was acknowledged
After each, e2fsck -fn finds nothing and the kernel sees the tree that the mount showed.
  --bin DIR  where fuse-fs-double is (default: target/debug/examples)
  --long     fsx with 1,000,000 operations over ten seeds, kill, stress and postgres for longer
Needs root, /dev/fuse, loop devices, e2fsprogs, and for their steps: pjdfstest and fsx (cargo install),
stress-ng, sqlite3, postgresql. A tool that is missing is a failure.
END
}

cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD
bin=$root/target/debug/examples
long=no
steps=()
while [ $# -gt 0 ]; do
    case $1 in
        --bin)
            bin=$2
            shift
            ;;
        --long) long=yes ;;
        -h | --help)
            usage
            exit 0
            ;;
        pjdfstest | fsx | stress | sqlite | kill | postgres) steps+=("$1") ;;
        *)
            usage >&2
            exit 2
            ;;
    esac
    shift
done
[ ${#steps[@]} -gt 0 ] || steps=("${STEPS[@]}")

# In memory where possible: the kernel syncs often, and the bytes are not kept.
base=/dev/shm
[ -d "$base" ] || base=${TMPDIR:-/tmp}
work=$(mktemp -d "$base/blockd-conformance.XXXXXX")
chmod 755 "$work"
mkdir "$work"/{store,run,ours,kernel}
export BLOCKD_SERVERS=$work/store
volume=$work/store/v

fuse_fs() { timeout -k 5 120 "$bin/fuse-fs-double" "$@" --runtime-dir "$work/run"; }
is_mounted() { findmnt -n "$1" >/dev/null; }

clean_up() {
    local dir
    for dir in "$work/ours" "$work/kernel"; do
        is_mounted "$dir" && umount -l "$dir"
    done
    pkill_own
    pkill_postgres
    rm -rf "$work"
}
# Only the daemon that the state directory of this run names.
pkill_own() {
    local pid
    { sed -n 's/.*"pid": \([0-9]*\).*/\1/p' "$work"/run/mount-*.json 2>/dev/null || true; } |
        while read -r pid; do
            kill -9 "$pid" 2>/dev/null || true
        done
}
# A server that a failed step left: it names its process in the lock of its socket.
pkill_postgres() {
    local lock
    for lock in "$work"/pg/.s.PGSQL.*.lock; do
        if [ -f "$lock" ]; then kill -QUIT "$(head -1 "$lock")" 2>/dev/null || true; fi
    done
}
trap clean_up EXIT

make_volume() { # MIB FILE
    rm -f "$2"
    truncate -s "$1M" "$2"
    mkfs.ext4 -q -F "$2"
}
mount_ours() { fuse_fs mount v "$work/ours" --log "$work/log"; }
mount_kernel() { mount -o loop "$1" "$work/kernel"; }

# Everything that a user can see, one line a file.
listing() {
    (cd "$1" && find . -printf '%p %y %m %n %U %G %s %T@ %l\n' | sed 's/^\(.* d [0-9]* [0-9]* [0-9]* [0-9]*\) [0-9]*/\1/' | sort
        find . -type f -print0 | sort -z | xargs -0 -r sha256sum)
}

# Unmounts ours and asks e2fsck and the kernel about it.
judge() {
    listing "$work/ours" >"$work/ours.txt"
    fuse_fs umount "$work/ours"
    e2fsck -fn "$volume" >"$work/e2fsck.txt" 2>&1 || {
        cat "$work/e2fsck.txt"
        return 1
    }
    mount_kernel "$volume"
    listing "$work/kernel" >"$work/kernel.txt"
    umount "$work/kernel"
    diff "$work/ours.txt" "$work/kernel.txt"
}

need() {
    command -v "$1" >/dev/null || {
        echo "conformance.sh: $1 is missing: $2" >&2
        return 1
    }
}

verdicts() { sed -n 's/^\([a-z_0-9:]*::[a-z_0-9:]*\) *\(ok\|FAILED\|skipped\)$/\1 \2/p' "$1" | sort; }

step_pjdfstest() {
    need pjdfstest "cargo install pjdfstest (and apt-get install libacl1-dev)"
    local image=$work/image dir
    cat >"$work/pjdfstest.toml" <<'END'
[features]
posix_fallocate = {}
rename_ctime = {}
utime_now = {}
utimensat = {}
[settings]
naptime = 0.02
allow_remount = false
[dummy_auth]
entries = [["nobody", "nogroup"], ["daemon", "daemon"]]
END
    make_volume 512 "$image"
    make_volume 512 "$volume"
    mount_kernel "$image"
    mount_ours
    for dir in kernel ours; do
        chmod 755 "$work/$dir"
        (cd "$work/$dir" && timeout 600 pjdfstest -c "$work/pjdfstest.toml" -p "$work/$dir") \
            >"$work/pjdfstest.$dir" 2>/dev/null || true
        verdicts "$work/pjdfstest.$dir" >"$work/verdicts.$dir"
    done
    umount "$work/kernel"
    [ "$(wc -l <"$work/verdicts.kernel")" -gt 300 ]
    # What the kernel's ext4 passes and ours does not.
    comm -23 <(grep ' ok$' "$work/verdicts.kernel") "$work/verdicts.ours" | cut -d' ' -f1 |
        grep -vxFf <(grep -v '^#' "$root/tests/conformance.txt") >"$work/worse" || true
    if [ -s "$work/worse" ]; then
        cat "$work/worse"
        return 1
    fi
    judge
    echo "ok pjdfstest: $(grep -c ' ok$' "$work/verdicts.ours") of $(wc -l <"$work/verdicts.ours") pass, on the kernel's ext4 $(grep -c ' ok$' "$work/verdicts.kernel")"
}

step_fsx() {
    need fsx "cargo install fsx"
    local seeds=3 operations=5000 seed failed='' pids=()
    [ "$long" = no ] || seeds=10 operations=100000
    cat >"$work/fsx.toml" <<'END'
flen = 262144
[opsize]
max = 65536
min = 1
[weights]
close_open = 1.0
read = 10.0
write = 10.0
mapread = 10.0
mapwrite = 10.0
truncate = 5.0
fsync = 1.0
fdatasync = 1.0
punch_hole = 3.0
posix_fallocate = 1.0
copy_file_range = 2.0
invalidate = 1.0
END
    make_volume 512 "$volume"
    mount_ours
    # All at once, each on a file of its own.
    for ((seed = 1; seed <= seeds; seed++)); do
        (cd "$work" && fsx -q -q -f fsx.toml -N "$operations" -S "$seed" "ours/fsx$seed") \
            >"$work/fsx$seed.log" 2>&1 &
        pids[seed]=$!
    done
    for ((seed = 1; seed <= seeds; seed++)); do
        wait "${pids[seed]}" || failed="$failed $seed"
    done
    for seed in $failed; do
        echo "seed $seed:"
        tail -40 "$work/fsx$seed.log"
    done
    [ -z "$failed" ]
    judge
    echo "ok fsx: $seeds seeds of $operations operations"
}

step_stress() {
    need stress-ng "apt-get install stress-ng"
    local seconds=2 stressors
    [ "$long" = no ] || seconds=20
    make_volume 2048 "$volume"
    mount_ours
    # Of the filesystem class, those that work on files below a directory.
    stressors=(access chdir chmod chown copy-file dentry dir dirdeep dirmany dup fallocate
        fcntl fiemap file-ioctl filename flock fpunch getdent hdd iomix lease link locka lockf lockofd
        mknod open readahead rename seal seek symlink sync-file touch utime xattr)
    for stressor in "${stressors[@]}"; do
        # Some leave files in the directory that they are started in.
        (cd "$work/ours" && timeout 120 stress-ng --temp-path "$work/ours" --"$stressor" 2 \
            --timeout "$seconds" --verify --oomable --quiet) >"$work/stress.log" 2>&1 || {
            case $? in
                # Not possible on this kernel or filesystem.
                3 | 4) continue ;;
            esac
            echo "$stressor:"
            cat "$work/stress.log"
            return 1
        }
    done
    judge
    echo "ok stress: ${#stressors[@]} stressors of $seconds s"
}

step_sqlite() {
    need sqlite3 "apt-get install sqlite3"
    local rows=20000 mode
    make_volume 512 "$volume"
    mount_ours
    for mode in delete wal; do
        sqlite3 "$work/ours/$mode.db" >/dev/null <<END
PRAGMA journal_mode=$mode;
CREATE TABLE t(id INTEGER PRIMARY KEY, text TEXT);
CREATE INDEX i ON t(text);
WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x+1 FROM n WHERE x<$rows)
  INSERT INTO t SELECT x, hex(randomblob(40)) FROM n;
DELETE FROM t WHERE id%3=0;
VACUUM;
END
        [ "$(sqlite3 "$work/ours/$mode.db" 'PRAGMA integrity_check')" = ok ]
        [ "$(sqlite3 "$work/ours/$mode.db" 'SELECT count(*) FROM t')" -eq $((rows - rows / 3)) ]
    done
    judge
    echo "ok sqlite: two journal modes"
}

# Rows that were acknowledged before the kill are in the database after the replay. The removal of the journal is
# what commits. EXTRA makes it durable, but takes a directory that cannot be opened, as that of a mount that was
# killed, for one that needs no fsync: so it is asked for once more.
step_kill() {
    need sqlite3 "apt-get install sqlite3"
    local rounds=4 round writer churn acknowledged found
    [ "$long" = no ] || rounds=40
    make_volume 512 "$volume"
    mount_ours
    sqlite3 "$work/ours/kill.db" 'PRAGMA synchronous=EXTRA; CREATE TABLE t(id INTEGER PRIMARY KEY)'
    sync "$work/ours/kill.db" "$work/ours"
    : >"$work/acknowledged"
    for ((round = 1; round <= rounds; round++)); do
        (
            id=$((round * 100000))
            while sqlite3 "$work/ours/kill.db" "PRAGMA synchronous=EXTRA; INSERT INTO t VALUES($id)" 2>/dev/null &&
                sync "$work/ours" 2>/dev/null; do
                echo "$id" >>"$work/acknowledged"
                id=$((id + 1))
            done
        ) &
        writer=$!
        (while cp -r "$root/scripts" "$work/ours/copy-$round" && rm -rf "$work/ours/copy-$round"; do :; done) 2>/dev/null &
        churn=$!
        sleep "1.$((RANDOM % 10))"
        pkill_own
        wait "$writer" "$churn" || true
        umount -l "$work/ours"
        rm -f "$work"/run/mount-*.json
        mount_ours
    done
    acknowledged=$(wc -l <"$work/acknowledged")
    [ "$acknowledged" -gt "$rounds" ]
    sqlite3 "$work/ours/kill.db" 'SELECT id FROM t ORDER BY id' >"$work/found"
    [ "$(sqlite3 "$work/ours/kill.db" 'PRAGMA integrity_check')" = ok ]
    found=$(comm -12 <(sort "$work/acknowledged") <(sort "$work/found") | wc -l)
    if [ "$found" -ne "$acknowledged" ]; then
        echo "$acknowledged rows were acknowledged, $found are there"
        return 1
    fi
    judge
    echo "ok kill: $rounds kills, all $acknowledged acknowledged rows are there"
}

postgres() { # COMMAND ARGUMENT...
    local command=$1
    shift
    runuser -u postgres -- env PGHOST="$work/pg" PGDATA="$work/ours/pg" LC_ALL=C "$pg/$command" "$@"
}
query() { postgres psql -X -A -t -q -d postgres -c "$1"; }
start_postgres() {
    postgres pg_ctl -w -t 100 -s -l "$work/pg/log" start 2>"$work/pg/start" || {
        tail -30 "$work/pg/log"
        return 1
    }
}

# Ends the server without its directory, which is gone; its pid was noted before.
end_postgres() { # PID
    local tries
    kill -QUIT "$1" 2>/dev/null || true
    for ((tries = 0; tries < 200; tries++)); do
        kill -0 "$1" 2>/dev/null || return 0
        sleep 0.1
    done
    echo "postgres does not end"
    return 1
}

# A row of the history for each commit that was acknowledged, and at most one more for each client and round;
# the sums of the bank agree; pg_amcheck finds nothing.
step_postgres() {
    pg=$(find /usr/lib/postgresql -maxdepth 2 -name bin 2>/dev/null | sort -V | tail -1)
    need "${pg:-/none}/postgres" "apt-get install postgresql"
    local rounds=2 seconds=4 clients=4 round pid commits rows sums
    [ "$long" = no ] || rounds=12 seconds=10
    make_volume 1024 "$volume"
    mount_ours
    install -d -o postgres "$work/pg"
    install -d -o postgres -m 700 "$work/ours/pg"
    postgres initdb -k -A trust >/dev/null
    cat >>"$work/ours/pg/postgresql.conf" <<END
listen_addresses = ''
unix_socket_directories = '$work/pg'
shared_buffers = 16MB
max_wal_size = 48MB
min_wal_size = 32MB
END
    sync "$work/ours/pg/postgresql.conf" "$work/ours/pg"
    start_postgres
    postgres pgbench -i -q -s 3 postgres >"$work/pg/init" 2>&1
    query 'CREATE EXTENSION amcheck'
    for ((round = 1; round <= rounds; round++)); do
        pid=$(head -1 "$work/ours/pg/postmaster.pid")
        (cd "$work/pg" && postgres pgbench -n -c "$clients" -j 2 -T 600 -l --log-prefix="acknowledged$round" postgres) \
            >"$work/pg/bench" 2>&1 &
        sleep "$seconds.$((RANDOM % 10))"
        pkill_own
        wait $! || true
        end_postgres "$pid"
        umount -l "$work/ours"
        rm -f "$work"/run/mount-*.json
        mount_ours
        start_postgres
        commits=$(cat "$work"/pg/acknowledged* | wc -l)
        rows=$(query 'SELECT count(*) FROM pgbench_history')
        if [ "$commits" -lt "$round" ] || [ "$rows" -lt "$commits" ] || [ "$rows" -gt $((commits + round * clients)) ]; then
            echo "$commits commits were acknowledged, $rows are there"
            return 1
        fi
        sums=$(query 'SELECT count(DISTINCT sum) FROM (SELECT sum(abalance) FROM pgbench_accounts
            UNION ALL SELECT sum(bbalance) FROM pgbench_branches
            UNION ALL SELECT sum(tbalance) FROM pgbench_tellers
            UNION ALL SELECT sum(delta) FROM pgbench_history) sums')
        [ "$sums" -eq 1 ]
    done
    postgres pg_amcheck -d postgres --heapallindexed
    postgres pg_ctl -w -s -m fast stop
    postgres pg_checksums -c >/dev/null
    judge
    echo "ok postgres: $rounds kills, all $commits acknowledged commits are there"
}

failed=0
for step in "${steps[@]}"; do
    # In a subshell of its own, so that -e holds inside the step.
    set +e
    (
        set -e
        "step_$step"
    )
    status=$?
    set -e
    if [ "$status" -ne 0 ]; then
        echo "$step: FAILED"
        failed=1
        pkill_own
        pkill_postgres
        for dir in "$work/ours" "$work/kernel"; do
            if is_mounted "$dir"; then umount -l "$dir"; fi
        done
        rm -f "$work"/run/mount-*.json
    fi
done
exit "$failed"
