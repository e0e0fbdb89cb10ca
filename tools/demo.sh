#!/usr/bin/env bash
# Set up .venv, then convert, verify, train, profile and export a small spiking network: two minutes on two cores.
#
#   bash tools/demo.sh            writes a profile page, a picture and the exported net to ./demo_output
#   bash tools/demo.sh --help     prints the options of tools/demo.py
# tools/_env.sh lists the other settings.
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"

heading "Environment"
make_venv
install_torch
install_package demo
install_dot
# OpenMP threads that spin while they wait slow a busy machine down many times; PASSIVE lets them sleep.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
exec "$PY" tools/demo.py "$@"
