#!/usr/bin/python3
"""Copies what changed since a snapshot from an NBD export into an image with a backing file.

    qemu-img create -f qcow2 -F qcow2 -b full.qcow2 changes.qcow2
    scripts/backup_changes.py nbd://10.0.0.2/data@tuesday monday changes.qcow2

The image must have the size of the export and, through its backing file, the content that the
export had at the snapshot. Works with any NBD server that has qemu:dirty-bitmap. Prints one line
of JSON with the bytes read and the bytes that became zeros. Needs python3-libnbd and qemu-nbd.
"""

import json
import sys

import nbd

STATUS_BYTES = 1 << 30
COPY_BYTES = 4 << 20
DIRTY = 1
ZERO = 2


def connect(uri, contexts):
    handle = nbd.NBD()
    for context in contexts:
        handle.add_meta_context(context)
    handle.connect_uri(uri)
    for context in contexts:
        if not handle.can_meta_context(context):
            sys.exit(f"{uri} has no {context}: is the snapshot there, and older than the export?")
    return handle


def extents(source, context, offset, end):
    """(length, flags) of one answer about a range."""
    found = []

    def take(name, _offset, entries, _error):
        if name == context:
            found.extend(zip(entries[::2], entries[1::2]))

    source.block_status(end - offset, offset, take)
    return found


def runs(source, context, offset, end):
    """(offset, length, flags) of a whole range, however many answers that takes."""
    while offset < end:
        for length, flags in extents(source, context, offset, min(end, offset + STATUS_BYTES)):
            length = min(length, end - offset)
            yield offset, length, flags
            offset += length


def main():
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    uri, snapshot, image = sys.argv[1:]
    bitmap = f"qemu:dirty-bitmap:{snapshot}"
    source = connect(uri, [bitmap, "base:allocation"])
    target = nbd.NBD()
    target.connect_systemd_socket_activation(["qemu-nbd", "-f", "qcow2", image])
    if target.get_size() != source.get_size():
        sys.exit(f"{image} has {target.get_size()} bytes, {uri} {source.get_size()}")
    copied, zeroed = 0, 0
    for start, length, dirty in runs(source, bitmap, 0, source.get_size()):
        if not dirty & DIRTY:
            continue
        for offset, length, flags in runs(source, "base:allocation", start, start + length):
            if flags & ZERO:
                target.zero(length, offset)
                zeroed += length
                continue
            for at in range(offset, offset + length, COPY_BYTES):
                part = min(COPY_BYTES, offset + length - at)
                target.pwrite(source.pread(part, at), at)
                copied += part
    target.flush()
    target.shutdown()
    print(json.dumps({"copied_bytes": copied, "zeroed_bytes": zeroed}))


main()
