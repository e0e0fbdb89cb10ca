#!/usr/bin/env bash
# The whole story in a few minutes: set up .venv, then convert, verify, draw, train and time a small spiking network.
#
#   bash tools/demo.sh            pictures go to ./demo_output
#   bash tools/demo.sh --help     the options of tools/demo.py
# tools/_env.sh lists what else can be set.
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"

heading "Environment"
make_venv
install_torch
install_package demo
install_dot
# OpenMP threads that spin while they wait make a busy machine many times slower; let them sleep.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
exec "$PY" tools/demo.py "$@"
