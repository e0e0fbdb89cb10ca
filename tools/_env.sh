# Sourced by the scripts of this folder: the virtual environment, its packages, and progress messages.
#
#   SNNFX_VENV    the virtual environment (default: .venv in the repository)
#   SNNFX_PYTHON  the Python that creates it (default: the first of python3, python3.13 ... that is 3.11 or later)
#   SNNFX_TORCH   the arguments of pip that install PyTorch. On Linux without a GPU, the CPU build saves several GB:
#                 SNNFX_TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
#
# A second run takes seconds: each step leaves a stamp with a hash of its inputs and is skipped while the hash matches.

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

# quietly LABEL COMMAND...: print one line with the time it took; show the command's output only if it fails.
quietly() {
  local label=$1 log start status=0
  shift
  log=$(mktemp)
  start=$SECONDS
  if [ -t 1 ]; then
    "$@" >"$log" 2>&1 &
    local pid=$!
    # A background command of a script does not receive Ctrl-C.
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

# once NAME HASH LABEL COMMAND...: run the command unless its stamp contains the same hash.
once() {
  local stamp=$VENV/.snnfx-$1 hash=$2 label=$3
  shift 3
  if [ "$(cat "$stamp" 2>/dev/null)" = "$hash" ]; then
    note "$label: already installed"
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
    note "environment $VENV: exists"
    return
  fi
  local python
  python=$(find_python)
  # Debian packages ensurepip separately from venv.
  if ! "$python" -c 'import ensurepip' 2>/dev/null; then
    may_use_apt && quietly "python3-venv" apt_install python3-venv ||
      die "$python cannot make virtual environments; on Debian and Ubuntu: apt-get install python3-venv"
  fi
  quietly "environment $VENV ($("$python" --version))" "$python" -m venv --clear "$VENV"
  # The package is built in this environment (no build isolation), which needs a recent setuptools.
  quietly "pip, setuptools" "$PY" -m pip install -q --upgrade pip "setuptools>=77"
}

# torch_version: the installed release of torch, without the label of the build ("2.13.0", not "2.13.0+cpu").
torch_version() { "$PY" -c 'import torch; print(torch.__version__.split("+")[0])' 2>/dev/null; }

# has_torch: whether an acceptable torch is installed: the release that test.sh --torch names, or any from 2.11.
has_torch() {
  local version
  version=$(torch_version) || return
  if [ -n "${torch_release:-}" ]; then
    [ "$version" = "$torch_release" ]
  else
    "$PY" -c 'import sys; sys.exit(tuple(map(int, sys.argv[1].split(".")[:2])) < (2, 11))' "$version"
  fi
}

install_torch() {
  if has_torch; then
    note "torch $(torch_version): already installed"
    return
  fi
  if [ -n "${SNNFX_TORCH:-}" ]; then
    # Unquoted on purpose: it may contain options of pip.
    # shellcheck disable=SC2086
    quietly "$SNNFX_TORCH" "$PY" -m pip install -q $SNNFX_TORCH
    return
  fi
  note "PyTorch is the largest download; SNNFX_TORCH chooses the build (see tools/_env.sh)"
  quietly "torch 2.13.0" "$PY" -m pip install -q torch==2.13.0 ||
    quietly "torch 2.13.0 for the CPU, from pytorch.org" \
      "$PY" -m pip install -q torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu ||
    quietly "torch, any version from 2.11" "$PY" -m pip install -q "torch>=2.11"
}

# install_package EXTRAS: an editable install of this checkout with the given extras.
install_package() {
  once "package-$1" "$(hash_of pyproject.toml)" "snnfx[$1]" \
    "$PY" -m pip install -q --no-build-isolation -e ".[$1]"
}

install_dot() {
  if command -v dot >/dev/null; then
    note "graphviz: already installed"
  elif may_use_apt && quietly "graphviz, for the pictures" apt_install graphviz; then
    :
  else
    warn "the program \`dot\` is missing: pictures are written as .dot files only"
    warn "install graphviz: apt-get install graphviz, dnf install graphviz, or brew install graphviz"
  fi
}

# typecheck: run mypy on the layout of the installed package. In a checkout, passes/ lies beside snnfx/, where mypy does
# not find snnfx.passes; a folder of links puts it inside. The messages name the real files.
typecheck() {
  local layout=$ROOT/build/mypy entry
  rm -rf "$layout"
  mkdir -p "$layout/snnfx"
  for entry in snnfx/*; do
    [ "$(basename "$entry")" = __pycache__ ] || ln -s "$ROOT/$entry" "$layout/$entry"
  done
  ln -s "$ROOT/passes" "$layout/snnfx/passes"
  local mypy=("$PY" -m mypy --config-file "$ROOT/pyproject.toml" --cache-dir "$ROOT/.mypy_cache")
  local places=.
  for name in "" /docs/site /bench /fuzz /gallery; do places+=:$ROOT/tools$name; done
  (cd "$layout" && "${mypy[@]}" -p snnfx && MYPYPATH=$places "${mypy[@]}" "$ROOT"/tools/*.py "$ROOT"/tools/docs/site/*.py "$ROOT"/tools/bench/*.py "$ROOT"/tools/fuzz/fuzz*.py "$ROOT"/tools/gallery/[gm]*.py) | sed 's#^snnfx/passes/#passes/#'
}

# check_layers: run import-linter (the contracts in pyproject.toml) on an installed wheel, because in a checkout it does
# not find snnfx.passes either. build/lib is removed first: setuptools would pack modules left from an earlier build.
check_layers() {
  local target=$ROOT/build/layers
  rm -rf "$target" "$ROOT/build/lib"
  "$PY" -m pip install -q --no-deps --no-build-isolation --target "$target" "$ROOT" &&
    (cd "$target" && PYTHONPATH=$target "$VENV/bin/lint-imports" --no-cache --no-logo "$ROOT/pyproject.toml")
}
