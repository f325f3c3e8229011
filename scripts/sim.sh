#!/usr/bin/env bash
# Simulates whole clusters under faults, a run a seed; see blockd/DESIGN.md, "The simulator".
set -euo pipefail

usage() {
    cat <<EOF
Usage: scripts/sim.sh [--seeds N] [--seed S] [--minutes M] [--jobs J] [--plant NAME] [...]

  --seeds N      seeds to run (default 100; with --minutes at the most)
  --seed S       the first seed; a fresh one unless given, and printed
  --regressions  first the seeds that once found a fault (tests/sim/src/regressions.rs)
  --minutes M    ends after so many minutes
  --jobs J       runs at a time (default 2), each in a process of its own
  --plant NAME   plants a fault in blockd: the run must find it
  --check-plants every planted fault is caught by the seed that tests/sim/src/plants.rs names
  --ops N        operations of a run (default 1000)
  --failures N   goes on after violations, up to so many
  --log FILE     writes what the seed did
  --help         all options
Prints seeds per second, the faults and states that were covered, and for a violation the seed, the
shortest run that shows it and its trace. Exit code 1: a violation.
EOF
}

if [ "${1-}" = -h ]; then
    usage
    exit 0
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PATH="$HOME/.cargo/bin:$PATH"
cargo build --profile sim -p blockd-sim --features plants --locked --quiet
exec "${CARGO_TARGET_DIR:-target}/sim/blockd-sim" "$@"
