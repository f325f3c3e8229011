#!/usr/bin/env bash
# Installs what is missing and runs every check: what CI runs.
set -euo pipefail

if [ "${1-}" = -h ] || [ "${1-}" = --help ]; then
    echo "Usage: scripts/test.sh [STEP...]"
    echo "Installs the packages that are missing (scripts/deps.sh), then runs scripts/check.sh."
    exit 0
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/deps.sh build test
exec scripts/check.sh "$@"
