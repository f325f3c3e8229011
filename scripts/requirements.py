"""Which test shows which requirement.

Usage: scripts/requirements.py [--json] [--missing] LIST ROOT

LIST has an id a line, and behind it `pending WHO` where the test is still to come. A test names an id
in the doc comment above it, or in that of its file (//!). `S003-22, 25, 35 to 37` and `S003-04 to
S003-06` name them all. Prints each id with its tests, and fails if one that is not pending has none.
"""

import json
import os
import re
import subprocess
import sys

PREFIX = r"(?:S\d{3}|U|X)"
# An id and the numbers that follow it: `S003-22, 25 and 35 to 37`.
GROUP = re.compile(rf"\b({PREFIX})-(\d+)((?:(?:,? and |, ?| to )(?:{PREFIX}-)?\d{{2}}\b(?!-))*)")
MORE = re.compile(rf"(,? and |, ?| to )(?:({PREFIX})-)?(\d{{2}})")
TEST = re.compile(r"^\s*#\[(?:tokio::)?test\b")
NAME = re.compile(r"\bfn\s+(\w+)")


def ids_in(text):
    """Every id that a text names, ranges and lists expanded."""
    found = set()
    for match in GROUP.finditer(text):
        prefix, last = match[1], int(match[2])
        found.add((prefix, last))
        for more in MORE.finditer(match[3]):
            prefix, number = more[2] or prefix, int(more[3])
            first = last + 1 if more[1] == " to " else number
            found.update((prefix, n) for n in range(first, number + 1))
            last = number
    return {f"{prefix}-{number:02}" for prefix, number in found}


def tests_in(lines):
    """(name, doc comment) of each test of a file, and the comment of the file itself."""
    head, doc, tests, is_test = [], [], [], False
    for line in lines:
        text = line.strip()
        if text.startswith("//!"):
            head.append(text[3:])
        elif text.startswith("///"):
            doc.append(text[3:])
        elif TEST.match(line):
            is_test = True
        elif text.startswith(("#[", "//")) or (is_test and not NAME.search(text)):
            continue
        else:
            name = NAME.search(text)
            if is_test and name:
                tests.append((name[1], " ".join(doc)))
            doc, is_test = [], False
    return tests, " ".join(head)


def is_test_file(name):
    return "/tests/" in name or name.endswith(("tests.rs", "enumeration.rs"))


def files(root):
    listed = subprocess.run(
        ["git", "-C", root, "ls-files", "-coz", "--exclude-standard", "*.rs"],
        check=True,
        capture_output=True,
    )
    names = listed.stdout.decode().split("\0")
    return sorted(name for name in names if name and os.path.isfile(os.path.join(root, name)))


def shown(root):
    """Tests by the id that they name."""
    by_id = {}
    for name in files(root):
        with open(os.path.join(root, name), encoding="utf-8") as file:
            tests, head = tests_in(file.read().splitlines())
        for test, doc in tests:
            for found in ids_in(doc):
                by_id.setdefault(found, []).append(f"{name}: {test}")
        if tests and is_test_file(name):
            for found in ids_in(head):
                by_id.setdefault(found, []).append(f"{name}: all")
    return by_id


def wanted(path):
    """(id, who it waits for, or an empty text) of each line."""
    with open(path, encoding="utf-8") as file:
        lines = [line.split("#")[0].split() for line in file]
    return [(words[0], " ".join(words[2:])) for words in lines if words]


def main(args):
    flags = {arg for arg in args if arg.startswith("--")}
    paths = [arg for arg in args if not arg.startswith("--")]
    if len(paths) != 2 or flags - {"--json", "--missing"}:
        sys.exit(__doc__)
    by_id = shown(paths[1])
    rows = [(name, by_id.get(name, []), pending) for name, pending in wanted(paths[0])]
    missing = [name for name, tests, pending in rows if not tests and not pending]
    if "--json" in flags:
        value = {name: {"tests": tests, "pending": pending} for name, tests, pending in rows}
        print(json.dumps(value, indent=1))
        return 1 if missing else 0
    for name, tests, pending in rows:
        if not tests:
            print(f"{name}: {f'pending ({pending})' if pending else 'NO TEST'}")
        elif "--missing" not in flags:
            print(f"{name}: {'; '.join(tests)}")
    count = sum(1 for _, tests, _ in rows if tests)
    print(f"{count} of {len(rows)} requirements have a test, {len(missing)} are missing")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
