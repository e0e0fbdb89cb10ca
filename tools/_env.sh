# Sourced by the scripts of this folder: the virtual environment, what goes into it, and how progress is shown.
#
#   SNNFX_VENV    where the environment is (default: .venv in the repository)
#   SNNFX_PYTHON  the Python that makes it (default: the newest of python3, python3.13 ... that is 3.11 or later)
#   SNNFX_TORCH   what pip is told to install as PyTorch. On Linux without a GPU, the CPU build saves several GB:
#                 SNNFX_TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
#
# A second run finds everything in place and takes seconds: each step leaves a stamp with a hash of what it depends on.

set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${SNNFX_VENV:-$ROOT/.venv}
PY=$VENV/bin/python
cd "$ROOT"
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1

if [ -t 1 ] && [ -z "${NO_COLOR:-}" ] && [ "${TERM:-dumb}" != dumb ]; then
  BOLD=$'\e[1m' DIM=$'\e[2m' RED=$'\e[31m' GREEN=$'\e[32m' YELLOW=$'\e[33m' RESET=$'\e[0m'
else
  BOLD='' DIM='' RED='' GREEN='' YELLOW='' RESET=''
fi

heading() { printf '\n%s%s%s\n' "$BOLD" "$1" "$RESET"; }
note() { printf '  %s%s%s\n' "$DIM" "$1" "$RESET"; }
warn() { printf '  %s! %s%s\n' "$YELLOW" "$1" "$RESET"; }
die() {
  printf '%serror:%s %s\n' "$RED" "$RESET" "$1" >&2
  exit 1
}

# quietly LABEL COMMAND...: one line with the seconds it takes; the command's output only when it fails.
quietly() {
  local label=$1 log start status=0
  shift
  log=$(mktemp)
  start=$SECONDS
  if [ -t 1 ]; then
    "$@" >"$log" 2>&1 &
    local pid=$!
    # A command in the background of a script does not hear of Ctrl-C.
    trap 'kill "$pid" 2>/dev/null; echo; exit 130' INT
    while kill -0 "$pid" 2>/dev/null; do
      printf '\r  . %s %s%ds%s ' "$label" "$DIM" $((SECONDS - start)) "$RESET"
      sleep 0.5
    done
    wait "$pid" || status=$?
    trap - INT
    printf '\r'
  else
    printf '  . %s ...\n' "$label"
    "$@" >"$log" 2>&1 || status=$?
  fi
  if [ "$status" = 0 ]; then
    printf '  %s+%s %s %s(%ds)%s \n' "$GREEN" "$RESET" "$label" "$DIM" $((SECONDS - start)) "$RESET"
  else
    printf '  %s- %s: failed%s\n' "$RED" "$label" "$RESET"
    tail -n "${QUIETLY_TAIL:-25}" "$log" | sed 's/^/      /'
  fi
  rm -f "$log"
  return "$status"
}

# once NAME HASH LABEL COMMAND...: run the command unless a stamp says that it was done with the same hash.
once() {
  local stamp=$VENV/.snnfx-$1 hash=$2 label=$3
  shift 3
  if [ "$(cat "$stamp" 2>/dev/null)" = "$hash" ]; then
    note "$label: in place"
    return 0
  fi
  quietly "$label" "$@" || return
  printf '%s\n' "$hash" >"$stamp"
}

hash_of() { cat "$@" | cksum | tr ' ' '-'; }

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
  local candidate
  for candidate in ${SNNFX_PYTHON:-python3 python3.13 python3.12 python3.11 python3.14 python}; do
    if is_new_enough "$candidate"; then
      printf '%s\n' "$candidate"
      return
    fi
  done
  die "no Python 3.11 or later was found; install one, or name it: SNNFX_PYTHON=/path/to/python3.12 bash $0"
}

may_use_apt() { [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; }

apt_install() {
  DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "$@" ||
    { apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "$@"; }
}

make_venv() {
  if is_new_enough "$PY" && "$PY" -m pip --version >/dev/null 2>&1; then
    note "environment $VENV: in place"
    return
  fi
  local python
  python=$(find_python)
  # Debian ships venv without ensurepip, in a package of its own.
  if ! "$python" -c 'import ensurepip' 2>/dev/null; then
    may_use_apt && quietly "python3-venv" apt_install python3-venv ||
      die "$python cannot make virtual environments; on Debian and Ubuntu: apt-get install python3-venv"
  fi
  quietly "environment $VENV ($("$python" --version))" "$python" -m venv --clear "$VENV"
  # The package is built in this environment (no isolation), which needs a setuptools of today.
  quietly "pip, setuptools" "$PY" -m pip install -q --upgrade pip "setuptools>=77"
}

has_torch() { "$PY" -c 'import torch, sys; sys.exit(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11))' 2>/dev/null; }

install_torch() {
  if has_torch; then
    note "torch $("$PY" -c 'import torch; print(torch.__version__)'): in place"
    return
  fi
  if [ -n "${SNNFX_TORCH:-}" ]; then
    # Unquoted on purpose: it may bring options of pip along.
    # shellcheck disable=SC2086
    quietly "$SNNFX_TORCH" "$PY" -m pip install -q $SNNFX_TORCH
    return
  fi
  note "PyTorch is the large part; SNNFX_TORCH chooses the build (see tools/_env.sh)"
  quietly "torch 2.13.0" "$PY" -m pip install -q torch==2.13.0 ||
    quietly "torch 2.13.0 for the CPU, from pytorch.org" \
      "$PY" -m pip install -q torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu ||
    quietly "torch, any version from 2.11" "$PY" -m pip install -q "torch>=2.11"
}

# install_package EXTRAS: this checkout, editable, with the given extras.
install_package() {
  once "package-$1" "$(hash_of pyproject.toml)" "snnfx[$1]" \
    "$PY" -m pip install -q --no-build-isolation -e ".[$1]"
}

install_dot() {
  if command -v dot >/dev/null; then
    note "graphviz: in place"
  elif may_use_apt && quietly "graphviz, for the pictures" apt_install graphviz; then
    :
  else
    warn "the program \`dot\` is missing: pictures are written as .dot files only"
    warn "install graphviz: apt-get install graphviz, dnf install graphviz, or brew install graphviz"
  fi
}

# typecheck: mypy over the package as it is when installed. In a checkout snnfx.passes lies beside snnfx, where mypy
# cannot know it; so a folder of links puts it in its place (the messages name the real files).
typecheck() {
  local layout=$ROOT/build/mypy entry
  rm -rf "$layout"
  mkdir -p "$layout/snnfx"
  for entry in snnfx/*; do
    [ "$(basename "$entry")" = __pycache__ ] || ln -s "$ROOT/$entry" "$layout/$entry"
  done
  ln -s "$ROOT/passes" "$layout/snnfx/passes"
  local mypy=("$PY" -m mypy --config-file "$ROOT/pyproject.toml" --cache-dir "$ROOT/.mypy_cache")
  (cd "$layout" && "${mypy[@]}" -p snnfx && MYPYPATH=.:$ROOT/tools:$ROOT/tools/bench:$ROOT/tools/fuzz "${mypy[@]}" "$ROOT"/tools/*.py "$ROOT"/tools/bench/*.py "$ROOT"/tools/fuzz/fuzz*.py) | sed 's#^snnfx/passes/#passes/#'
}
