#!/usr/bin/env bash
# Set up .venv, then build the documentation site with Sphinx: about three minutes. Warnings are errors.
#
#   bash tools/docs.sh                writes build/docs/html/index.html; each example runs
#   bash tools/docs.sh --no-execute   does not run the examples (half a minute)
# tools/_env.sh lists the other settings.
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"

heading "Environment"
make_venv
install_torch
install_package docs
install_dot
# The pages on other libraries run them, and the tutorial on export runs ONNX Runtime.
bash tools/peers.sh

heading "Site"
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
exec "$PY" tools/docs/site/build.py "$@"
