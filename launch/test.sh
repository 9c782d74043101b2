#!/usr/bin/env bash
# The tests: makes .venv, installs, then lint, format and pytest on all cores of this machine.
#   bash launch/test.sh [PYTEST OPTIONS]      such as -k sampler, or -m slow for the slow ones
# STAR_JAX_GOLDEN names another folder of recorded cases to verify (by default tests/golden).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/install.sh test,emoji
.venv/bin/ruff check .
.venv/bin/ruff format --check .
exec .venv/bin/python -m pytest -n auto --maxprocesses 8 --dist loadfile "$@"
