"""Plants one violation of each rule of tidy.py and deny.py and sees that exactly it is caught."""

import contextlib
import io
import json
import os
import sys
import tempfile

import deny
import tidy

HEAD = "//! A file.\n"
MARK = "TO" + "DO"
# (rule that must fail, or None; file; content)
SAMPLES = [
    (None, "blockd/src/lib.rs", HEAD),
    (None, "blockd/src/page/tests.rs", "use super::*;\n"),
    (None, "blockd/src/control/group.rs", HEAD + "// tokio is not for us\nuse crate::id::Epoch;\n"),
    (None, "blockd/src/control/group.rs", HEAD + "use crate::{control::x::{A, data}, limits};\n"),
    (None, "blockd/src/io/disk.rs", HEAD + "use std::fs::File;\nuse crate::control::A;\n"),
    (None, "blockd/src/data/forward.rs", HEAD + "use tokio::sync::mpsc;\n"),
    (None, "blockd/src/id.rs", HEAD + f"// {MARK}(#12): later\n"),
    (None, "scripts/x.sh", "line\n" * 1000),
    ("first_line", "blockd/src/lib.rs", "mod a;\n"),
    ("first_line", "blockd/src/empty.rs", ""),
    ("first_line", "blockd/src/lib.rs", "// comment\n"),
    ("file_ceiling", "blockd/src/big.rs", HEAD * 1001),
    ("file_ceiling", "blockd/src/page/tests.rs", HEAD * 1001),
    ("ascii_only", "README.md", "na\u00efve\n"),
    ("ascii_only", "blockd/src/lib.rs", HEAD + "// 5 \u00b5s\n"),
    ("ascii_only", "Cargo.toml", "# \u2026\n"),
    ("ascii_only", "scripts/x.sh", "# \u2013\n"),
    ("no_io_in_control", "blockd/src/control/mod.rs", HEAD + "use tokio::time;\n"),
    ("no_io_in_control", "blockd/src/control/a/b.rs", HEAD + "let f = std::fs::read(p);\n"),
    ("no_io_in_control", "blockd/src/data/router.rs", HEAD + "use std::net::TcpStream;\n"),
    ("no_io_in_control", "blockd/src/data/router.rs", HEAD + "let t = Instant::now();\n"),
    ("no_io_in_control", "blockd/src/control/x.rs", HEAD + "let t = SystemTime::now();\n"),
    ("module_directions", "blockd/src/control/x.rs", HEAD + "use crate::io::wire;\n"),
    ("module_directions", "blockd/src/control/x.rs", HEAD + "use crate::admin::RouteRun;\n"),
    ("module_directions", "blockd/src/control/x.rs", HEAD + "use crate::{id::A,\n  data::B};\n"),
    ("module_directions", "blockd/src/data/router.rs", HEAD + "use crate::control::registry;\n"),
    ("module_directions", "blockd/src/data/v.rs", HEAD + "fn f(x: crate::control::X) {}\n"),
    ("todo_has_issue", "blockd/src/id.rs", HEAD + f"// {MARK}: later\n"),
    ("todo_has_issue", "scripts/x.sh", "# FIX" + "ME\n"),
    ("nothing_switched_off", "blockd/src/id.rs", HEAD + "#[ignore]\nfn t() {}\n"),
    ("nothing_switched_off", "blockd/src/id.rs", HEAD + '#[ignore = "slow"]\nfn t() {}\n'),
    ("nothing_switched_off", "blockd/src/id.rs", HEAD + "fn t() { todo!() }\n"),
    ("nothing_switched_off", "blockd/src/id.rs", HEAD + "fn t() { unimplemented!() }\n"),
    ("nothing_switched_off", "blockd/src/id.rs", HEAD + "#[allow(unused, dead_code)]\nfn t() {}\n"),
]
# (crate, its workspace dependencies, whether it is a violation)
CRATES = [
    ("nbd-server", [], False),
    ("nbd-server", ["blockd"], True),
    ("blockd", ["nbd-server", "serde"], False),
    ("blockd", ["fuse-fs"], True),
    ("fuse-fs", ["blockd"], False),
    ("fuse-fs", ["blockd", "nbd-server"], True),
    ("blockd-tests", ["blockd", "fuse-fs", "nbd-server"], False),
]
LICENCES = [
    ("MIT", True),
    ("MIT OR GPL-3.0", True),
    ("GPL-3.0", False),
    ("MIT/GPL-3.0", True),
    ("MIT AND GPL-3.0", False),
    ("(MIT OR GPL-3.0) AND Unicode-3.0", True),
    ("(GPL-2.0 OR GPL-3.0) AND MIT", False),
    ("Apache-2.0 WITH LLVM-exception", False),
    ("Apache-2.0 WITH LLVM-exception OR MIT", True),
    ("no licence", False),
    ("", False),
]


def failed_rules(name, content, metadata):
    with tempfile.TemporaryDirectory() as root:
        path = os.path.join(root, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w", encoding="utf-8") as file:
            file.write(content)
        described = os.path.join(root, "metadata.json")
        with open(described, "w", encoding="utf-8") as file:
            json.dump(metadata, file)
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            status = tidy.main(["--metadata", described, root])
    lines = output.getvalue().splitlines()
    failed = [line.removeprefix("FAILED ") for line in lines if line.startswith("FAILED ")]
    assert (status == 1) == bool(failed), (status, lines)
    return failed


def crates(name, dependencies):
    members = {"nbd-server", "blockd", "fuse-fs", "blockd-tests"}
    packages = [{"name": member, "dependencies": []} for member in members - {name}]
    packages.append({"name": name, "dependencies": [{"name": d} for d in dependencies]})
    return {"packages": packages}


def dependency(name, version, licence="MIT"):
    return {"id": name + version, "name": name, "version": version, "license": licence, "source": "r"}


def denied(*packages, duplicates=()):
    metadata = {"packages": packages, "resolve": {"nodes": [{"id": p["id"]} for p in packages]}}
    rules = {"licence": {"MIT", "Unicode-3.0"}, "duplicate": set(duplicates)}
    return [problem.split(":")[0] for problem in deny.problems(metadata, rules)]


def failures():
    for rule, name, content in SAMPLES:
        failed = failed_rules(name, content, {"packages": []})
        if failed != ([rule] if rule else []):
            yield f"{name} {content[:60]!r}: expected {rule}, failed {failed}"
    for name, dependencies, wrong in CRATES:
        failed = failed_rules("a.toml", "", crates(name, dependencies))
        if failed != (["crate_directions"] if wrong else []):
            yield f"{name} on {dependencies}: failed {failed}"
    for licence, allowed in LICENCES:
        if deny.licence_allowed(licence, {"MIT", "Unicode-3.0"}) != allowed:
            yield f"licence {licence!r} should be {'allowed' if allowed else 'refused'}"
    one, two = dependency("a", "1.0"), dependency("a", "2.0")
    gpl = dependency("b", "1.0", "GPL-3.0")
    for packages, duplicates, expected in [
        ([one], [], []),
        ([one, two], [], ["duplicate"]),
        ([one, two], ["a"], []),
        ([one], ["a"], ["duplicate a is allowed but is no duplicate any more"]),
        ([gpl], [], ["licence of b 1.0"]),
    ]:
        found = denied(*packages, duplicates=duplicates)
        if found != expected:
            yield f"deny {[p['id'] for p in packages]} {duplicates}: {found}"
    caught = {rule for rule, _, _ in SAMPLES if rule}
    for rule in tidy.RULES:
        if rule.__name__ not in caught:
            yield f"no sample violates {rule.__name__}"


def main():
    found = list(failures())
    for failure in found:
        print(f"FAILED tidytest: {failure}")
    if not found:
        count = len(SAMPLES) + len(CRATES) + len(LICENCES) + 5
        print(f"ok tidytest: {count} samples judged as expected")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
