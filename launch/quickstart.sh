#!/usr/bin/env bash
# The first ten minutes, on two cores without an accelerator: installs, samples from the shipped
# weights, trains a small transformer for some minutes, samples from it.
#   bash launch/quickstart.sh [OUT]      default: runs/quickstart
# Run it again after an interruption and it continues. PYTHON selects the interpreter (3.11+).
# For an accelerator afterwards: .venv/bin/pip install -e '.[gpu]' (or '.[tpu]').
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out="${1:-runs/quickstart}"
prompts=(
  "a large red circle on a white background"
  "a small blue star on a gray background"
  "a green triangle on a black background"
  "a yellow ring on a white background"
  "a purple cross on a white background"
  "an orange square on a black background"
  "a pink circle at the top left on a white background"
  "a black star at the bottom on a white background"
  "a small red circle to the left of a large blue square on a white background"
  "a green ring to the right of a purple triangle on a white background"
  "a yellow star above a blue circle on a black background"
  "a gray square below an orange cross on a white background"
)
bash launch/install.sh
echo "1/3 sampling from the shipped weights"
.venv/bin/star-jax sample "${prompts[@]}" --out "$out/samples_shipped"
echo "2/3 training a small transformer"
.venv/bin/star-jax train configs/quickstart.py --out "$out/train"
echo "3/3 sampling from it"
.venv/bin/star-jax sample "${prompts[@]}" --model "$out/train/model" --out "$out/samples_trained"
cat <<END

samples of the shipped weights      $out/samples_shipped/grid.png
samples of the new model            $out/samples_trained/grid.png
the new model                       $out/train/model
loss curves                         $out/train/metrics.jsonl, or: pip install tensorboard; tensorboard --logdir $out/train
END
