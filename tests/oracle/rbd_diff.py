"""Applies RBD diffs to a raw file: written from Ceph's document "RBD Incremental Backup" alone, as an
independent reader of what blockctl writes.

Usage: rbd_diff.py RAW DIFF...

Prints for each diff: version, from, to, size, records of data, records of zeros.
"""

import os
import struct
import sys


def exactly(stream, count):
    data = stream.read(count)
    assert len(data) == count, f"ends at {stream.tell()}"
    return data


def number(stream, form):
    return struct.unpack(form, exactly(stream, struct.calcsize(form)))[0]


def apply(stream, raw):
    banner = exactly(stream, 12)
    version = {b"rbd diff v1\n": 1, b"rbd diff v2\n": 2}[banner]
    names, size, data, zeros, body = {"f": "-", "t": "-"}, None, 0, 0, False
    while True:
        tag = exactly(stream, 1).decode("ascii")
        if tag == "e":
            assert stream.read(1) == b""
            return version, names["f"], names["t"], size, data, zeros
        length = number(stream, "<Q") if version == 2 else None
        start = stream.tell()
        if tag in names:
            assert not body
            names[tag] = exactly(stream, number(stream, "<I")).decode("utf-8")
        elif tag == "s":
            assert not body
            size = number(stream, "<Q")
            raw.truncate(size)
        elif tag in "wz":
            body = True
            offset, count = number(stream, "<Q"), number(stream, "<Q")
            assert offset + count <= size
            raw.seek(offset)
            if tag == "w":
                data += 1
                raw.write(exactly(stream, count))
            else:
                zeros += 1
                raw.write(bytes(count))
        else:
            assert version == 2, tag
            exactly(stream, length)
        assert length is None or stream.tell() - start == length, tag


def main():
    raw_path, *diffs = sys.argv[1:]
    mode = "r+b" if os.path.exists(raw_path) else "w+b"
    with open(raw_path, mode) as raw:
        for path in diffs:
            with open(path, "rb") as stream:
                print(*apply(stream, raw))


if __name__ == "__main__":
    main()
