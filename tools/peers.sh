#!/usr/bin/env bash
# Install the libraries that the tests and benchmarks compare with, in the environment of tools/test.sh.
# snnfx does not depend on them. They are installed without their dependencies, which would replace a CPU build of
# PyTorch. A library that cannot be installed gives a warning, and its tests are skipped.
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
[ -x "$PY" ] || die "$VENV does not exist: run bash tools/test.sh first"

# peer NAME ARGUMENTS-OF-PIP...
peer() {
  local name=$1
  shift
  QUIETLY_TAIL=3 once "peer-${name%% *}" "$(hash_of tools/peers.sh)" "$name" "$PY" -m pip install -q "$@" ||
    warn "$name is not installed: its tests are skipped"
}

peer "requirements of the peers" numpy scipy h5py matplotlib tqdm requests tensorboard SciencePlots packaging loguru pillow
peer "spikingjelly 2.0.0" --no-deps spikingjelly==2.0.0
peer "snntorch 1.0.0" --no-deps snntorch==1.0.0
peer "norse 1.1.0" --no-deps norse==1.1.0
# The extra `nir`, and the package with which the other libraries read and write NIR.
peer "nir 1.0.8" --no-deps nir==1.0.8 nirtorch==2.6
# The extra `onnx`, for the tests of the export.
peer "onnx 1.23.2" onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.*
# SpikingJelly's model zoo imports torchvision, whose releases match those of torch: 0.28 matches 2.13.
minor=$("$PY" -c 'import torch; print(int(torch.__version__.split(".")[1]) + 15)')
peer "torchvision 0.$minor" --no-deps "torchvision==0.$minor.*"
