#!/usr/bin/env bash
# Check and time the Triton kernels on a GPU, in less than five minutes after the environment is set up.
#
#   bash tools/gpu.sh                writes tools/results/gpu_<date>_<card>.json and prints a table
#   bash tools/gpu.sh --interpret    tiny sizes in Triton's interpreter, without a card
#   bash tools/gpu.sh --help         prints the options of tools/bench/gpu.py
# An environment with torch and pytest (see tools/_env.sh) is used unchanged; otherwise it is set up first.
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"

if ! "$PY" -c 'import torch, pytest, hypothesis, networkx' 2>/dev/null; then
  # Without a card, a download of several GB would be for nothing.
  case " $* " in
    *" --interpret "* | *" --help "* | *" -h "*) ;;
    *)
      command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1 || {
        echo "error: nvidia-smi finds no card; run it on a machine with a card, or with --interpret" >&2
        exit 2
      }
      ;;
  esac
  heading "Environment"
  make_venv
  install_torch
  install_package test
  bash tools/peers.sh
fi
exec "$PY" tools/bench/gpu.py "$@"
