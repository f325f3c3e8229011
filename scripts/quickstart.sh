#!/usr/bin/env bash
# Three servers on this machine, a volume over them, mounted, with a snapshot.
set -euo pipefail

usage() {
    cat <<'EOF'
Usage: scripts/quickstart.sh up|status|down|purge

  up      install what is missing, build, start three servers on 127.0.0.1, .2 and .3, create
          the volume demo (4 GiB, ext4), mount it, copy this repository's sources into it and
          take the snapshot demo@first; may be run again
  status  what runs
  down    unmount and stop; the state stays, and up continues with it
  purge   down, and remove the state

State, logs and sockets are under ./var of the repository, or under $BLOCKD_VAR.
EOF
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
var=${BLOCKD_VAR:-$root/var}
case $var in
    /*) ;;
    *) var=$PWD/$var ;;
esac
mnt=$var/mnt
nodes=(1 2 3)
export PATH="$HOME/.cargo/bin:$PATH:/usr/sbin:/sbin"
export BLOCKD_SERVERS=127.0.0.1,127.0.0.2,127.0.0.3
bin=${CARGO_TARGET_DIR:-$root/target}/release
ANSWER_S=60
STOP_S=30

say() { echo "quickstart: $*"; }
die() {
    echo "quickstart: $*" >&2
    exit 1
}
ctl() { "$bin/blockctl" "$@"; }

# The pid of server $1, if the process of its pid file still is that server. A zombie has no
# command line, so it does not count.
server_pid() {
    local pid
    pid=$(cat "$var/s$1/pid" 2>/dev/null) || return 1
    [ -n "$pid" ] && [ -r "/proc/$pid/cmdline" ] || return 1
    { tr '\0' ' ' <"/proc/$pid/cmdline"; } 2>/dev/null |
        grep -qF -- "--state $var/s$1/state " || return 1
    echo "$pid"
}

install_and_build() {
    if ! "$root/scripts/deps.sh" --check build run >/dev/null; then
        "$root/scripts/deps.sh" build run
    fi
    say "building (release)"
    cargo build --release --locked --quiet --manifest-path "$root/Cargo.toml" -p blockd -p fuse-fs
}

start_server() {
    local dir=$var/s$1 pid
    if pid=$(server_pid "$1"); then
        say "server $1 runs already (pid $pid)"
        return
    fi
    mkdir -p "$dir"
    # The shell writes its own pid and becomes the server: a session of its own, no terminal.
    # shellcheck disable=SC2016
    setsid bash -c 'echo $$ >"$1"; shift; exec "$@"' start "$dir/pid" \
        "$bin/blockd" serve --state "$dir/state" --listen "127.0.0.$1" \
        --nbd-unix "$dir/nbd.sock" </dev/null >>"$dir/log" 2>&1 9>&- &
    say "server $1 started: 127.0.0.$1, log in $dir/log"
}

wait_for_server() {
    local end=$((SECONDS + ANSWER_S))
    until ctl --servers "127.0.0.$1" --timeout 2s version >/dev/null 2>&1; do
        if [ "$SECONDS" -ge "$end" ] || { [ "$SECONDS" -gt $((end - ANSWER_S + 2)) ] &&
            ! server_pid "$1" >/dev/null; }; then
            tail -n 20 "$var/s$1/log" >&2
            die "server $1 does not answer; the end of $var/s$1/log is above"
        fi
        sleep 0.1
    done
}

# The node number of server $1; 0 when it belongs to no cluster.
node_of() { ctl --servers "127.0.0.$1" --json version | jq .node; }

define_cluster() {
    if [ "$(node_of 1)" -eq 0 ]; then
        ctl --servers 127.0.0.1 cluster define quickstart >/dev/null
        say "cluster quickstart defined"
    fi
    wait_until "the registry is writable" '.phase == 2'
    local n
    for n in 2 3; do
        if [ "$(node_of "$n")" -eq 0 ]; then
            ctl --servers 127.0.0.1 node define "127.0.0.$n" --online >/dev/null
            say "node 127.0.0.$n defined"
        fi
    done
    wait_until "all three nodes are reachable" \
        '.phase == 2 and (.nodes | length) == 3 and all(.nodes[]; .reachable)'
}

# Waits until the cluster's status fulfils the jq condition $2.
wait_until() {
    local end=$((SECONDS + ANSWER_S))
    until ctl --servers 127.0.0.1 --timeout 5s --json cluster status 2>/dev/null |
        jq -e "$2" >/dev/null; do
        if [ "$SECONDS" -ge "$end" ]; then
            ctl --servers 127.0.0.1 cluster status >&2 || true
            die "waited $ANSWER_S s in vain until $1; see the logs in $var/s*/log"
        fi
        sleep 0.1
    done
}

create_volume() {
    if ctl --json volume list | jq -e 'any(.[]; .name == "demo")' >/dev/null; then
        say "volume demo is there"
    else
        ctl volume create demo --size 4GiB --format ext4 >/dev/null
        say "volume demo created: 4 GiB, ext4, spread over three servers"
    fi
}

# What is missing for a mount, one reason a line.
missing_for_mount() {
    [ "$(id -u)" -eq 0 ] || echo "root (mounting a loop device needs it)"
    [ -c /dev/fuse ] || echo "/dev/fuse (the FUSE driver of the kernel)"
    [ -c /dev/loop-control ] || echo "/dev/loop-control (the loop driver of the kernel)"
}

is_mounted() { mountpoint -q "$1" 2>/dev/null; }

mount_volume() {
    if is_mounted "$mnt"; then
        say "mounted at $mnt already"
        return
    fi
    mkdir -p "$mnt"
    setsid "$bin/blockctl" mount demo "$mnt" --kernel </dev/null >>"$var/mount.log" 2>&1 9>&- &
    local mounter=$! end=$((SECONDS + ANSWER_S))
    until is_mounted "$mnt"; do
        if [ ! -d "/proc/$mounter" ] && ! is_mounted "$mnt"; then
            tail -n 20 "$var/mount.log" >&2
            die "the mount command has ended without a mount; the end of $var/mount.log is above"
        fi
        [ "$SECONDS" -lt "$end" ] || die "the mount did not appear; see $var/mount.log"
        sleep 0.1
    done
    say "mounted at $mnt"
}

has_first_snapshot() {
    ctl --json snapshot list demo | jq -e 'any(.[]; .name == "first")' >/dev/null
}

copy_sources() {
    mkdir -p "$mnt/blockd"
    local list=$var/sources
    if ! git -C "$root" ls-files -z >"$list" 2>/dev/null || [ ! -s "$list" ]; then
        (cd "$root" && find . -type f -not -path './target/*' -not -path './var/*' \
            -not -path './.git/*' -print0) >"$list"
    fi
    tar -C "$root" --null --verbatim-files-from --files-from="$list" --ignore-failed-read -cf - |
        tar -C "$mnt/blockd" -xf -
    say "$(find "$mnt/blockd" -type f | wc -l) source files copied to $mnt/blockd"
}

# Frozen, the filesystem is complete on the volume, so the snapshot mounts without a recovery.
snapshot_frozen() {
    trap 'fsfreeze --unfreeze "$mnt" 2>/dev/null || true' EXIT
    fsfreeze --freeze "$mnt"
    local status=0
    ctl snapshot create demo@first >/dev/null || status=$?
    fsfreeze --unfreeze "$mnt"
    trap - EXIT
    return "$status"
}

take_snapshot() {
    if has_first_snapshot; then
        say "demo@first is there; the sources are not copied again"
        return
    fi
    if is_mounted "$mnt"; then
        copy_sources
        snapshot_frozen
    else
        ctl snapshot create demo@first >/dev/null
    fi
    say "snapshot demo@first taken"
}

what_next() {
    local again=$root/scripts/quickstart.sh
    [ -z "${BLOCKD_VAR-}" ] || again="BLOCKD_VAR=$var $again"
    cat <<EOF

Three servers, one volume. Try next:

  export BLOCKD_SERVERS=$BLOCKD_SERVERS
  $bin/blockctl cluster status
  $bin/blockctl volume list
  $bin/blockctl snapshot list demo
  $bin/blockctl route show demo --json
EOF
    if is_mounted "$mnt"; then
        cat <<EOF
  ls $mnt/blockd
  mkdir -p $var/first && $bin/blockctl mount demo@first $var/first
  diff -r $mnt/blockd $var/first/blockd && echo the same as in the snapshot
  $bin/blockctl umount $var/first
EOF
    fi
    cat <<EOF

The same volume by NBD, through any server:

  nbdinfo --list nbd://127.0.0.2
  nbdinfo "nbd+unix:///demo@first?socket=$var/s1/nbd.sock"
  qemu-img compare -f raw -F raw nbd://127.0.0.1/demo@first nbd://127.0.0.3/demo@first

Stop (purge instead of down removes the data, too):

  $again down
EOF
}

up() {
    [[ $var != *[[:space:]]* ]] || die "'$var' has a space in it; set BLOCKD_VAR to another path"
    [ ${#var} -le 90 ] || die "$var is too long for a unix socket's path; set BLOCKD_VAR"
    mkdir -p "$var"
    exec 9>"$var/lock"
    flock -n 9 || die "another quickstart.sh is at work in $var"
    install_and_build
    local n missing
    for n in "${nodes[@]}"; do start_server "$n"; done
    for n in "${nodes[@]}"; do wait_for_server "$n"; done
    define_cluster
    create_volume
    missing=$(missing_for_mount)
    if [ -z "$missing" ]; then
        mount_volume
    else
        say "no mount, because this is missing:"
        printf '  - %s\n' "${missing//$'\n'/$'\n  - '}"
        say "the volume is served by NBD all the same"
    fi
    take_snapshot
    what_next
}

status() {
    local n pid
    for n in "${nodes[@]}"; do
        if pid=$(server_pid "$n"); then
            echo "server $n: 127.0.0.$n, pid $pid, NBD at 127.0.0.$n:10809 and $var/s$n/nbd.sock"
        else
            echo "server $n: stopped"
        fi
    done
    if is_mounted "$mnt"; then echo "mount:    $mnt"; else echo "mount:    none"; fi
    if [ -x "$bin/blockctl" ] && server_pid 1 >/dev/null; then
        echo
        ctl --timeout 5s cluster status || true
        echo
        ctl --timeout 5s volume list || true
        echo
        ctl --timeout 5s snapshot list || true
    fi
}

unmount_all() {
    local dir
    # Whatever lies below the state directory, the newest mount first.
    while read -r dir; do
        is_mounted "$dir" || continue
        say "unmounting $dir"
        ctl umount "$dir" || umount "$dir" || die "$dir is busy; close what uses it (fuser -vm $dir)"
    done < <(awk -v var="$var/" 'index($5, var) == 1 { print $5 }' /proc/self/mountinfo | tac)
}

stop_servers() {
    local n pid end
    for n in "${nodes[@]}"; do
        if pid=$(server_pid "$n"); then kill -TERM "$pid"; fi
    done
    end=$((SECONDS + STOP_S))
    for n in "${nodes[@]}"; do
        while pid=$(server_pid "$n"); do
            [ "$SECONDS" -lt "$end" ] || die "server $n (pid $pid) does not stop; see $var/s$n/log"
            sleep 0.1
        done
        rm -f "$var/s$n/pid"
    done
    say "the servers are stopped"
}

down() {
    unmount_all
    stop_servers
}

purge() {
    [ -d "$var" ] || return 0
    down
    local n
    for n in "${nodes[@]}"; do rm -rf --one-file-system "$var/s$n"; done
    rm -f "$var/lock" "$var/sources" "$var/mount.log"
    rmdir "$mnt" "$var/first" 2>/dev/null || true
    rmdir "$var" 2>/dev/null || true
    say "the state in $var is removed"
}

case ${1-} in
    up | status | down | purge) "$1" ;;
    -h | --help) usage ;;
    *)
        usage >&2
        exit 2
        ;;
esac
