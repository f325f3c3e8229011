#!/usr/bin/env bash
# Lists every requirement of tests/requirements.txt with the tests that name it.
set -euo pipefail

usage() {
    cat <<EOF
Usage: scripts/requirements.sh [--missing] [--json]

Fails if a requirement has no test and is not marked as pending.
  --missing  only those without a test
  --json     one JSON value
EOF
}

case "${1:-}" in
    -h | --help)
        usage
        exit 0
        ;;
esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec python3 -B scripts/requirements.py "$@" tests/requirements.txt .
