#!/usr/bin/env bash
# Every check of the repository; all run, the exit code tells.
set -euo pipefail

STEPS=(fmt clippy doc build test conformance sim deny tidy tidytest requirements shell)

usage() {
    cat <<EOF
Usage: scripts/check.sh [STEP...]

Runs the steps named, or these: ${STEPS[*]}
  fmt       cargo fmt --check
  clippy    cargo clippy, all targets, warnings are errors
  doc       cargo doc with private items, warnings are errors
  build     cargo build
  test      cargo test (unit, system and doc tests)
  conformance  our own ext4 as a mount against pjdfstest, fsx, stress-ng, sqlite, postgres and kill -9; the
            first two are not Debian's and are built here
  deny      licences and duplicate versions (scripts/deny.txt)
  tidy      the rules of the house (scripts/tidy.py)
  tidytest  plants one violation of each rule and sees that it is caught
  requirements  each requirement of tests/requirements.txt has a test that names it
  sim       the simulator: fixed seeds, the planted faults, and two minutes of fresh seeds, which are told
  shell     shellcheck, if it is installed, and bash -n
The last line counts tests and steps: 'N passed, N failed'.
EOF
}

cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PATH="$HOME/.cargo/bin:$PATH"
export CARGO_TERM_COLOR=never
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
passed=0
failed=0

step_fmt() { cargo fmt --all --check; }
step_clippy() { cargo clippy --workspace --all-targets --locked --quiet -- -D warnings; }
step_doc() {
    RUSTDOCFLAGS="-D warnings" \
        cargo doc --workspace --no-deps --document-private-items --locked --quiet
}
step_build() { cargo build --workspace --locked --quiet; }

# The fixed seeds must be clean. Fresh ones are told and do not fail the check: one in some thousands
# still finds something (blockd/DESIGN.md, "The simulator"), which is not the fault of the change at hand.
step_sim() {
    scripts/sim.sh --regressions --seed 1 --seeds 300 --failures 20 --no-shrink --quiet
    scripts/sim.sh --check-plants
    scripts/sim.sh --minutes 2 --seeds 1000000 --failures 1000 --no-shrink --quiet >"$scratch/seeds.log" || true
    grep -E '^([0-9]+ seeds from|VIOLATION)' "$scratch/seeds.log" | sed 's/^/ok sim: /'
}

step_conformance() {
    local target tools
    target=$(realpath "${CARGO_TARGET_DIR:-target}")
    tools=$target/tools
    if [ ! -x "$tools/bin/pjdfstest" ] || [ ! -x "$tools/bin/fsx" ]; then
        cargo install --quiet --debug --locked --root "$tools" pjdfstest@0.2.2 fsx@0.3.2
    fi
    cargo build --workspace --example fuse-fs-double --locked --quiet
    PATH="$tools/bin:$PATH" tests/conformance.sh --bin "$target/debug/examples"
}

metadata() {
    local host
    host=$(rustc -vV | sed -n 's/^host: //p')
    cargo metadata --locked --offline --filter-platform "$host" --format-version 1
}
step_deny() {
    metadata >"$scratch/metadata.json"
    python3 -B scripts/deny.py scripts/deny.txt <"$scratch/metadata.json"
}
step_tidy() {
    cargo metadata --locked --offline --no-deps --format-version 1 >"$scratch/members.json"
    python3 -B scripts/tidy.py --metadata "$scratch/members.json" .
}
step_tidytest() { python3 -B scripts/tidy_test.py; }
step_requirements() { scripts/requirements.sh; }

step_shell() {
    local scripts
    mapfile -t scripts < <(find scripts tests .ci -type f \( -name '*.sh' -o -path .ci/run \) | sort)
    bash -n "${scripts[@]}"
    if command -v shellcheck >/dev/null; then
        shellcheck "${scripts[@]}"
    else
        echo "shellcheck is not installed: only the syntax was checked"
    fi
}

# Counts the tests by cargo's own summaries; a run that could not start counts as one failure.
step_test() {
    local status=0 counts
    cargo test --workspace --locked --no-fail-fast 2>&1 | tee "$scratch/tests.log" || status=$?
    counts=$(awk '/^test result: / { passed += $4; failed += $6 } END { print passed + 0, failed + 0 }' \
        "$scratch/tests.log")
    passed=$((passed + ${counts% *}))
    failed=$((failed + ${counts#* }))
    if [ "$status" -ne 0 ] && [ "${counts#* }" -eq 0 ]; then
        failed=$((failed + 1))
    fi
    return "$status"
}

# Runs a step that is one check; its output is shown only if it fails.
check() {
    local step=$1 start=$SECONDS
    # In a subshell of its own, so that -e holds inside the step.
    set +e
    (
        set -e
        "step_$step"
    ) >"$scratch/$step.log" 2>&1
    local status=$?
    set -e
    if [ "$status" -eq 0 ]; then
        passed=$((passed + 1))
        grep -E '^ok ' "$scratch/$step.log" || true
        echo "$step: ok ($((SECONDS - start)) s)"
    else
        failed=$((failed + 1))
        cat "$scratch/$step.log"
        echo "$step: FAILED"
    fi
}

run_tests() {
    local start=$SECONDS
    if step_test; then
        echo "test: ok ($((SECONDS - start)) s)"
    else
        echo "test: FAILED"
    fi
}

for arg in "$@"; do
    case " ${STEPS[*]} " in
        *" $arg "*) ;;
        *)
            case $arg in
                -h | --help)
                    usage
                    exit 0
                    ;;
            esac
            echo "check.sh: unknown step '$arg'; the steps are ${STEPS[*]}" >&2
            exit 2
            ;;
    esac
done

for step in "${@:-${STEPS[@]}}"; do
    if [ "$step" = test ]; then
        run_tests
    else
        check "$step"
    fi
done

# Once more at the end, as the end is what is kept of a long output: what each failed test said.
if [ -f "$scratch/tests.log" ]; then
    awk '/^failures:$/ { told = !told } /^test result: / { told = 0 } told' "$scratch/tests.log" | cut -c1-2000
fi
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
