"""Licences and duplicate versions of the dependencies, from `cargo metadata` on stdin.

Usage: cargo metadata ... | scripts/deny.py scripts/deny.txt
"""

import json
import re
import sys


def read_rules(path):
    """The allowed names by kind: {"licence": {...}, "duplicate": {...}}."""
    rules = {"licence": set(), "duplicate": set()}
    with open(path, encoding="ascii") as lines:
        for number, line in enumerate(lines, 1):
            entry, _, reason = line.partition("#")
            if not entry.strip():
                continue
            words = entry.split()
            if len(words) != 2 or words[0] not in rules or not reason.strip():
                sys.exit(f"{path}:{number}: expected 'licence|duplicate NAME  # reason'")
            rules[words[0]].add(words[1])
    return rules


def licence_allowed(expression, allowed):
    """Evaluates an SPDX expression; `A WITH B` is a name of its own, `/` is an old OR."""
    tokens = re.findall(r"\(|\)|[^\s()]+", expression.replace("/", " OR "))

    def disjunction():
        value = conjunction()
        while tokens and tokens[0] == "OR":
            tokens.pop(0)
            value = conjunction() or value
        return value

    def conjunction():
        value = term()
        while tokens and tokens[0] == "AND":
            tokens.pop(0)
            value = term() and value
        return value

    def term():
        if not tokens:
            return False
        if tokens[0] == "(":
            tokens.pop(0)
            value = disjunction()
            if tokens:
                tokens.pop(0)
            return value
        name = tokens.pop(0)
        if tokens and tokens[0] == "WITH":
            tokens.pop(0)
            name = f"{name} WITH {tokens.pop(0) if tokens else ''}"
        return name in allowed

    return disjunction() and not tokens


def problems(metadata, rules):
    built = {node["id"] for node in metadata["resolve"]["nodes"]}
    packages = [p for p in metadata["packages"] if p["id"] in built]
    versions = {}
    for package in packages:
        versions.setdefault(package["name"], set()).add(package["version"])
        if package["source"] is None:
            continue
        licence = package["license"] or "no licence"
        if not licence_allowed(licence, rules["licence"]):
            yield f"licence of {package['name']} {package['version']}: {licence}"
    twice = {name for name, found in versions.items() if len(found) > 1}
    for name in sorted(twice - rules["duplicate"]):
        yield f"duplicate: {name} {', '.join(sorted(versions[name]))}; see `cargo tree -d`"
    for name in sorted(rules["duplicate"] - twice):
        yield f"duplicate {name} is allowed but is no duplicate any more: take the line out"


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    found = list(problems(json.load(sys.stdin), read_rules(sys.argv[1])))
    for problem in found:
        print(f"FAILED deny: {problem}")
    if not found:
        print("ok deny: licences and duplicate versions")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
