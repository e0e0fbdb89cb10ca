#!/usr/bin/env bash
# Install the libraries that the tests and benchmarks compare with, into the environment of tools/test.sh.
# They are never dependencies of snnfx, and come without their own: those would replace a CPU build of PyTorch.
# What cannot be installed prints a line, and the tests that need it are skipped.
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
[ -x "$PY" ] || die "no environment in $VENV yet: bash tools/test.sh makes it"

# peer NAME ARGUMENTS-OF-PIP...
peer() {
  local name=$1
  shift
  QUIETLY_TAIL=3 once "peer-${name%% *}" "$(hash_of tools/peers.sh)" "$name" "$PY" -m pip install -q "$@" ||
    warn "$name is not there: its tests are skipped"
}

peer "requirements of the peers" numpy scipy h5py matplotlib tqdm requests tensorboard SciencePlots packaging loguru pillow
peer "spikingjelly 2.0.0" --no-deps spikingjelly==2.0.0
peer "snntorch 1.0.0" --no-deps snntorch==1.0.0
peer "norse 1.1.0" --no-deps norse==1.1.0 nir nirtorch
# SpikingJelly's model zoo imports torchvision, whose releases go with those of torch: 0.28 with 2.13.
minor=$("$PY" -c 'import torch; print(int(torch.__version__.split(".")[1]) + 15)')
peer "torchvision 0.$minor" --no-deps "torchvision==0.$minor.*"
