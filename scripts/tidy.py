"""The rules of the house that no compiler checks.

Usage: scripts/tidy.py [--metadata FILE] ROOT

FILE is the output of `cargo metadata --no-deps`; without it the crates' directions are not
checked. One line a rule: `ok NAME` or `FAILED NAME` with the places above it.
"""

import json
import os
import re
import subprocess
import sys

LINES_MAX = 1000
SKIPPED_DIRS = {"target", "var", ".git", "bench-results", "node_modules"}
TEXT_SUFFIXES = (".rs", ".toml", ".sh", ".md", ".py", ".service")
CODE_SUFFIXES = (".rs", ".sh", ".py")

# Crates of the workspace that a crate may depend on; tests may use all.
CRATE_MAY_USE = {"nbd-server": set(), "blockd": {"nbd-server"}, "fuse-fs": {"blockd"}}
# Modules of blockd that a module may name behind `crate::`; None: any but the ones after `not`.
CONTROL_MAY_USE = {"id", "limits", "control", "planted"}
DATA_MUST_NOT_USE = {"control"}
IO_AND_CLOCKS = ("tokio", "std::fs", "std::net", "Instant::now", "SystemTime::now")


def files(root):
    """Paths relative to root: what git knows or would add, or all files outside a repository."""
    if os.path.exists(os.path.join(root, ".git")):
        command = ["git", "-C", root, "ls-files", "-coz", "--exclude-standard"]
        listed = subprocess.run(command, check=True, capture_output=True).stdout.decode()
        names = [name for name in listed.split("\0") if name]
        return sorted({n for n in names if os.path.isfile(os.path.join(root, n))})
    found = []
    for directory, subdirs, names in os.walk(root):
        subdirs[:] = [name for name in subdirs if name not in SKIPPED_DIRS]
        found += [os.path.relpath(os.path.join(directory, name), root) for name in names]
    return sorted(found)


class Tree:
    """The text files under a root, read once."""

    def __init__(self, root):
        self.bytes = {}
        for name in files(root):
            if name.endswith(TEXT_SUFFIXES):
                with open(os.path.join(root, name), "rb") as file:
                    self.bytes[name] = file.read()

    def names(self, *suffixes):
        return [name for name in self.bytes if name.endswith(suffixes)]

    def lines(self, name):
        return self.bytes[name].decode("utf-8", "replace").splitlines()

    def code(self, name):
        """Numbered lines without what stands behind `//`."""
        return [(n, line.split("//")[0]) for n, line in enumerate(self.lines(name), 1)]


def first_line(tree):
    for name in tree.names(".rs"):
        if os.path.basename(name) == "tests.rs":
            continue
        lines = tree.lines(name)
        if not lines or not lines[0].startswith("//! "):
            yield f"{name}:1: the first line says what the file is for, behind //!"


def file_ceiling(tree):
    for name in tree.names(*CODE_SUFFIXES):
        count = len(tree.lines(name))
        if count > LINES_MAX:
            yield f"{name}: {count} lines; split it by nouns, {LINES_MAX} is the ceiling"


def ascii_only(tree):
    for name in tree.names(*TEXT_SUFFIXES):
        for number, line in enumerate(tree.bytes[name].split(b"\n"), 1):
            if not line.isascii():
                yield f"{name}:{number}: a character that is not ASCII"
                break


def is_pure(name):
    data = "blockd/src/data/"
    return name.startswith(("blockd/src/control/", data + "router/")) or name in (
        "blockd/src/control.rs",
        data + "router.rs",
    )


def no_io_in_control(tree):
    for name in filter(is_pure, tree.names(".rs")):
        for number, line in tree.code(name):
            for word in IO_AND_CLOCKS:
                if re.search(rf"(?<![A-Za-z0-9_]){re.escape(word)}(?![A-Za-z0-9_])", line):
                    yield f"{name}:{number}: {word}; control/ and router do no IO and read no clock"


def modules_used(tree, name):
    """(line, module) for each `crate::module`, also in `crate::{a::b, c}` over several lines."""
    text = "\n".join(line for _, line in tree.code(name))
    for match in re.finditer(r"\bcrate::\s*(\{|[a-z_0-9]+)", text):
        number = text.count("\n", 0, match.start()) + 1
        if match[1] != "{":
            yield number, match[1]
            continue
        depth, item = 0, ""
        for char in text[match.end(1) - 1 :]:
            depth += (char == "{") - (char == "}")
            if depth == 0 or (depth == 1 and char == ","):
                first = re.match(r"\s*([a-z_0-9]+)", item.lstrip("{ \n"))
                if first:
                    yield number, first[1]
                item = ""
                if depth == 0:
                    break
            else:
                item += char


def module_directions(tree):
    for name in tree.names(".rs"):
        in_control = name.startswith("blockd/src/control/") or name == "blockd/src/control.rs"
        in_data = name.startswith("blockd/src/data/") or name == "blockd/src/data.rs"
        if not in_control and not in_data:
            continue
        for number, module in modules_used(tree, name):
            if in_control and module not in CONTROL_MAY_USE:
                allowed = ", ".join(sorted(CONTROL_MAY_USE))
                yield f"{name}:{number}: crate::{module}; control/ may use {allowed}"
            if in_data and module in DATA_MUST_NOT_USE:
                yield f"{name}:{number}: crate::{module}; data/ gets what it needs from node"


def todo_has_issue(tree):
    marker = re.compile(r"\b(?:TO" + "DO|FIX" + r"ME)\b")
    for name in tree.names(".rs", ".toml", ".sh", ".py"):
        for number, line in enumerate(tree.lines(name), 1):
            if marker.search(line) and not re.search(r"(issue |#)\d+", line):
                yield f"{name}:{number}: {marker.search(line)[0]} without an issue number"


def nothing_switched_off(tree):
    banned = re.compile(
        r"#\[ignore|\btodo!|\bunimplemented!|allow\([^)]*\bdead_code\b|expect\([^)]*\bdead_code\b"
    )
    for name in tree.names(".rs"):
        for number, line in tree.code(name):
            match = banned.search(line)
            if match:
                yield f"{name}:{number}: {match[0]}"


def crate_directions(metadata):
    members = {package["name"] for package in metadata["packages"]}
    for package in metadata["packages"]:
        allowed = CRATE_MAY_USE.get(package["name"])
        if allowed is None:
            continue
        used = {d["name"] for d in package["dependencies"]} & members
        for name in sorted(used - allowed):
            yield f"{package['name']} depends on {name}"


RULES = [
    first_line,
    file_ceiling,
    ascii_only,
    no_io_in_control,
    module_directions,
    todo_has_issue,
    nothing_switched_off,
]


def main(args):
    metadata = None
    if args[:1] == ["--metadata"] and len(args) > 1:
        with open(args[1], encoding="utf-8") as file:
            metadata = json.load(file)
        args = args[2:]
    if len(args) != 1 or args[0].startswith("-"):
        sys.exit(__doc__)
    tree = Tree(args[0])
    results = [(rule.__name__, list(rule(tree))) for rule in RULES]
    if metadata is not None:
        results.append(("crate_directions", list(crate_directions(metadata))))
    for name, problems in results:
        for problem in problems:
            print(f"  {problem}")
        print(f"FAILED {name}" if problems else f"ok tidy: {name}")
    return 1 if any(problems for _, problems in results) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
