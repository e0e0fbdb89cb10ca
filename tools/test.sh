#!/usr/bin/env bash
# Set up the test environment (.venv), then run every check: ruff, mypy, pytest. CI runs this file.
#
#   bash tools/test.sh                  everything
#   bash tools/test.sh -k neuron -x     arguments go to pytest
#   SNNFX_TEST_WORKERS=8                processes of pytest (default 2)
# tools/_env.sh lists what else can be set.
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"

heading "Environment"
make_venv
install_torch
install_package test,dev,draw
install_dot
bash tools/peers.sh

failed=()
# check NAME COMMAND...: run a checker, remember whether it failed.
check() {
  local name=$1
  shift
  if QUIETLY_TAIL=60 quietly "$name" "$@"; then return 0; fi
  failed+=("$name")
}

heading "Checks"
check "ruff check" "$PY" -m ruff check .
check "ruff format" "$PY" -m ruff format --check .
check "mypy" typecheck

heading "Tests"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
# One thread a process: the workers would fight for the cores otherwise.
export OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1
color=no
[ -z "$BOLD" ] || color=yes
start=$SECONDS
if ! "$PY" -m pytest -q -ra --color="$color" -n "${SNNFX_TEST_WORKERS:-2}" --dist loadgroup --durations 10 "$@" 2>&1 | tee "$log"; then
  failed+=("pytest")
fi

heading "Summary"
if [ ${#failed[@]} = 0 ]; then
  printf '  %sall checks passed%s in %d s (tests: %d s)\n' "$GREEN" "$RESET" "$SECONDS" $((SECONDS - start))
else
  printf '  %sfailed: %s%s\n' "$RED" "$(IFS=,; printf '%s' "${failed[*]}" | sed 's/,/, /g')" "$RESET"
fi
# The last line is pytest's own closing line, without its frame and colours.
closing=$(sed 's/\x1b\[[0-9;]*m//g' "$log" | grep -E '(passed|failed|error|no tests ran).* in [0-9.]+s' | tail -n 1 |
  sed -E 's/^=+ //; s/ =+$//' || true)
printf '%s\n' "${closing:-0 passed, 1 failed (pytest did not finish)}"
[ ${#failed[@]} = 0 ]
