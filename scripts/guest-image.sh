#!/usr/bin/env bash
# Makes what the guest of the kernel tests boots from: Debian's kernel and an initrd.
set -euo pipefail

usage() {
    cat <<'EOF'
Usage: scripts/guest-image.sh DIR

Leaves DIR/vmlinuz and DIR/initrd. The kernel is the one that Debian's linux-image-amd64 depends
on, fetched with `apt-get download` and unpacked into DIR, never installed. The initrd holds
busybox, the modules that the guest needs and tests/guest/init. What is there already stays.
EOF
}

if [ $# -ne 1 ] || [ "$1" = -h ] || [ "$1" = --help ]; then
    usage
    exit $(($# != 1))
fi
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
mkdir -p "$1"
cd "$1"
exec 9>lock
flock 9

# The non-cloud kernel: the cloud one has no 9p.
kernel_package() {
    apt-cache depends linux-image-amd64 2>/dev/null |
        sed -n 's/.*Depends: \(linux-image-[0-9].*-amd64\)$/\1/p' | head -n 1
}

fetch_kernel() {
    local package
    package=$(kernel_package)
    if [ -z "$package" ] && [ "$(id -u)" -eq 0 ]; then
        apt-get update -q >/dev/null
        package=$(kernel_package)
    fi
    if [ -z "$package" ]; then
        echo "guest-image.sh: no linux-image-amd64 in the package lists; run apt-get update" >&2
        exit 1
    fi
    rm -rf deb root && mkdir deb
    (cd deb && apt-get download -q "$package" >/dev/null)
    dpkg -x deb/*.deb root.new
    rm -rf deb
    mv root.new root
    cp root/boot/vmlinuz-* vmlinuz
}

# In the order that they are loaded in; one that is built in or renamed is left out.
BOOT_MODULES="virtio_ring virtio virtio_pci_legacy_dev virtio_pci_modern_dev virtio_pci
    failover net_failover virtio_net netfs fscache 9pnet 9pnet_virtio 9p overlay
    crc16 crc32c_generic libcrc32c mbcache jbd2 ext4"

unpack_module() {
    local file
    file=$(find root -name "$1.ko*" | head -n 1)
    case $file in
        '') return ;;
        *.xz) xz -dc "$file" >"$2/$1.ko" ;;
        *.zst) zstd -dcq "$file" >"$2/$1.ko" ;;
        *) cp "$file" "$2/$1.ko" ;;
    esac
}

make_initrd() {
    local release module later
    release=$(basename root/boot/vmlinuz-*)
    release=${release#vmlinuz-}
    later=tree/later/$release
    rm -rf tree
    mkdir -p tree/{bin,dev,proc,sys,modules,overlay,host} "$later"
    cp "$(command -v busybox)" tree/bin/busybox
    for module in $BOOT_MODULES; do
        unpack_module "$module" tree/modules
        [ ! -e "tree/modules/$module.ko" ] || echo "$module" >>tree/modules/order
    done
    # For the guest's own `modprobe nbd`, and for disks that QEMU gives it.
    for module in nbd virtio_blk; do
        unpack_module "$module" "$later"
        echo "$module.ko:" >>"$later/modules.dep"
    done
    cp "$here"/tests/guest/init tree/init
    cp "$here"/tests/guest/agent tree/agent
    chmod +x tree/init tree/agent
    (cd tree && find . | cpio -o -H newc --quiet) >initrd.new
    mv initrd.new initrd
    rm -rf tree
}

[ -e vmlinuz ] || fetch_kernel
make_initrd
