#!/usr/bin/env bash
# Runs the tests: creates .venv, installs, then lint, format and pytest on all cores.
# libtpu, which compiles for TPUs on any machine, goes to .cache: beside JAX it would search for TPUs.
#   bash launch/test.sh [PYTEST OPTIONS]      such as -k sampler, or -m slow for the slow tests
# STAR_JAX_GOLDEN names another folder of recorded cases to verify (default: tests/golden).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/install.sh test,emoji
libtpu='next(name for name in importlib.metadata.requires("jax") if name.startswith("libtpu"))'
[[ -d .cache/libtpu ]] || .venv/bin/pip install --quiet --no-deps --target .cache/libtpu \
  "$(.venv/bin/python -c "import importlib.metadata; print($libtpu.split(';')[0])")" ||
  echo "there is no libtpu for this machine: compilation for TPUs is not tested" >&2
.venv/bin/ruff check .
.venv/bin/ruff format --check .
exec .venv/bin/python -m pytest -n auto --maxprocesses 8 --dist loadfile "$@"
