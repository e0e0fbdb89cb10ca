#!/usr/bin/env bash
# Set up the test environment (.venv), then run every check: ruff, mypy, import-linter, pytest. CI runs this file.
#
#   bash tools/test.sh                      all checks and all tests
#   bash tools/test.sh -k neuron -x         the arguments are passed to pytest
#   bash tools/test.sh --torch 2.11.0 ...   the tests only, with that release of PyTorch, in .venv-torch-2.11.0
#   SNNFX_TEST_WORKERS=8                    number of pytest processes (default 2)
# tools/_env.sh lists the other settings.
torch_release=
if [ "${1:-}" = --torch ]; then
  [ $# -ge 2 ] || { echo "error: --torch needs a version, for example --torch 2.11.0" >&2 && exit 1; }
  torch_release=$2
  shift 2
  # Options for pip in SNNFX_TORCH (an index) apply to this release as well.
  case ${SNNFX_TORCH:-} in
    *' '*) SNNFX_TORCH="torch==$torch_release ${SNNFX_TORCH#* }" ;;
    *) SNNFX_TORCH="torch==$torch_release" ;;
  esac
  export SNNFX_VENV=${SNNFX_VENV:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv-torch-$torch_release}
fi
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"

heading "Environment"
make_venv
install_torch
install_package test,dev,docs
[ -z "$torch_release" ] || [ "$(torch_version)" = "$torch_release" ] ||
  die "torch $(torch_version) is installed, not $torch_release: is $torch_release outside the range in pyproject.toml?"
install_dot
bash tools/peers.sh

failed=()
# check NAME COMMAND...: run a checker and record a failure.
check() {
  local name=$1
  shift
  if QUIETLY_TAIL=60 quietly "$name" "$@"; then return 0; fi
  failed+=("$name")
}

if [ -z "$torch_release" ]; then
  heading "Checks"
  check "ruff check" "$PY" -m ruff check .
  check "ruff format" "$PY" -m ruff format --check .
  check "mypy" typecheck
  check "layers" check_layers
fi

heading "Tests"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
# One thread per process: several workers with several threads each would compete for the cores.
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
