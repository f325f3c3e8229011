#!/usr/bin/env bash
# Installs the Debian packages that are missing for building, running, testing or measuring.
set -euo pipefail

usage() {
    cat <<'EOF'
Usage: scripts/deps.sh [--check] SET...

Installs what is missing of the sets, with apt-get (as root, or through sudo):
  build   to compile the workspace
  run     for scripts/quickstart.sh: filesystems, mounts and the NBD clients it shows
  test    for scripts/test.sh
  bench   for scripts/bench.sh
Does nothing when all is there. --check only says what is missing (exit code 1 if anything is).
The Rust toolchain is not a Debian package of the version needed: it must be there already.
EOF
}

# Lines "PACKAGE COMMAND...": the package is missing when none of the commands is found. By command
# and not by package state, so that a newer build of a tool from elsewhere is left alone.
packages_of() {
    case $1 in
        build) printf '%s\n' 'gcc cc' 'libc6-dev /usr/include/stdio.h' 'pkg-config pkg-config' \
            'libssl-dev /usr/include/openssl/ssl.h' 'git git' 'jq jq' ;;
        run) printf '%s\n' 'fuse3 fusermount3' 'e2fsprogs mkfs.ext4' 'util-linux losetup' \
            'mount mount' 'jq jq' 'libnbd-bin nbdinfo' 'qemu-utils qemu-img' ;;
        test) printf '%s\n' 'fio fio' 'nbdkit nbdkit' 'libnbd-bin nbdinfo' 'nbd-client nbd-client' \
            'python3-libnbd python:nbd' 'qemu-utils qemu-nbd' 'fuse3 fusermount3' \
            'gnutls-bin certtool' 'xfsprogs mkfs.xfs' 'e2fsprogs mkfs.ext4' 'util-linux losetup' 'mount mount' \
            'jq jq' 'python3 python3' 'shellcheck shellcheck' 'ceph-common rbd' \
            'qemu-system-x86 qemu-system-x86_64' 'busybox-static busybox' 'cpio cpio' 'acl setfacl' \
            'libacl1-dev /usr/include/acl/libacl.h' 'stress-ng stress-ng' 'sqlite3 sqlite3' \
            'postgresql pg_lsclusters' 'iproute2 ip' 'curl curl' 'prometheus promtool' ;;
        bench) printf '%s\n' 'fio fio' 'nbdkit nbdkit' 'qemu-utils qemu-nbd' 'python3 python3' 'fuse2fs fuse2fs' ;;
        *)
            echo "deps.sh: unknown set '$1'; the sets are build, run, test, bench" >&2
            exit 2
            ;;
    esac
}

is_there() {
    case $1 in
        python:*) /usr/bin/python3 -c "import ${1#python:}" 2>/dev/null ;;
        /*) [ -e "$1" ] ;;
        *) command -v "$1" >/dev/null || [ -x "/usr/sbin/$1" ] || [ -x "/sbin/$1" ] ;;
    esac
}

require_rust() {
    if ! command -v cargo >/dev/null && [ ! -x "$HOME/.cargo/bin/cargo" ]; then
        echo "deps.sh: cargo is missing; install Rust 1.95 or later (rustup), it is no Debian package" >&2
        exit 1
    fi
}

check_only=no
sets=()
for arg in "$@"; do
    case $arg in
        -h | --help)
            usage
            exit 0
            ;;
        --check) check_only=yes ;;
        *) sets+=("$arg") ;;
    esac
done
if [ ${#sets[@]} -eq 0 ]; then
    usage >&2
    exit 2
fi

missing=()
for set in "${sets[@]}"; do
    [ "$set" != build ] || require_rust
    wanted=$(packages_of "$set")
    while read -r package command; do
        if ! is_there "$command" && [[ " ${missing[*]-} " != *" $package "* ]]; then
            missing+=("$package")
        fi
    done <<<"$wanted"
done

if [ ${#missing[@]} -eq 0 ]; then
    echo "deps.sh: everything for '${sets[*]}' is installed"
    exit 0
fi
echo "deps.sh: missing: ${missing[*]}"
[ "$check_only" = no ] || exit 1

as_root=()
if [ "$(id -u)" -ne 0 ]; then
    if ! command -v sudo >/dev/null; then
        echo "deps.sh: not root and no sudo; as root: apt-get install ${missing[*]}" >&2
        exit 1
    fi
    as_root=(sudo)
fi

# QEMU's packages must all be of one version: with a qemu-utils of the backports the others come
# from there too, or apt would remove it.
release=()
choose_release() {
    local codename source=/etc/apt/sources.list.d/blockd-backports.list
    case $(dpkg-query -W -f '${Version}' qemu-utils 2>/dev/null) in
        *~bpo*) ;;
        *) return 0 ;;
    esac
    codename=$(sed -n "s/^VERSION_CODENAME=//p" /etc/os-release)-backports
    release=(-t "$codename")
    if ! apt-cache policy | grep -q "a=[a-z]*-backports\|n=$codename"; then
        echo "deb http://deb.debian.org/debian $codename main" |
            "${as_root[@]}" tee "$source" >/dev/null
    fi
}

install() {
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
        apt-get install -y -q --no-install-recommends --no-remove "$@" </dev/null
}

qemu=()
others=()
for package in "${missing[@]}"; do
    case $package in
        qemu-*) qemu+=("$package") ;;
        *) others+=("$package") ;;
    esac
done
[ ${#qemu[@]} -eq 0 ] || choose_release
"${as_root[@]}" apt-get update -q </dev/null
[ ${#others[@]} -eq 0 ] || install "${others[@]}"
[ ${#qemu[@]} -eq 0 ] || install "${release[@]}" "${qemu[@]}"
# Only promtool is wanted of it, and Debian starts what it installs.
if [[ " ${missing[*]} " == *" prometheus "* ]] && [ -d /run/systemd/system ]; then
    "${as_root[@]}" systemctl disable --now prometheus
fi
echo "deps.sh: installed: ${missing[*]}"
