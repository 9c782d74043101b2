#!/usr/bin/env bash
# Trains on one machine with all its accelerators. The other scripts run this on every machine.
#   bash launch/node.sh [--dry-run] PLATFORM CONFIG --out FOLDER [OPTIONS OF star-jax train]
# For example, on a node of GPUs (install once: bash launch/install.sh gpu):
#   bash launch/node.sh gpu configs/star_d16_256.py --out runs/d16 --data.path sets/captioned
# PLATFORM is gpu, tpu or cpu and selects the XLA flags: star_jax/parallel/flags.py lists them.
# SIGTERM or ctrl-c: the run saves and stops; the same command continues it. Relative paths start at
# this project's folder.
# Exit status: 0 if the run is complete, 143 if it was stopped and has saved, 2 for a mistake in the
# arguments, 1 for a failure.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/shell.sh
platform="${1:-}"
[[ $platform =~ ^(gpu|tpu|cpu)$ ]] || fail "'$platform' is not a platform: give gpu, tpu or cpu"
shift
check_run "$@"
python=.venv/bin/python
[[ -x $python ]] || python=python3 # in an image with star_jax installed
command=("$python" -m star_jax.parallel.flags "$platform" train "$@")
if [[ $dry ]]; then run "${command[@]}" && exit; fi
"${command[@]}" &
child=$! status=0
trap 'kill -TERM "$child" 2>/dev/null || true' TERM INT # containers signal this shell
wait "$child" || status=$?
while kill -0 "$child" 2>/dev/null; do # a signal interrupted the wait
  status=0
  wait "$child" || status=$?
done
# A run writes its model last. Listing the folder refreshes an NFS cache, a test of the file does not.
if ((status == 0)) && [[ -z $(find "$out" -maxdepth 1 -name model 2>/dev/null) ]]; then status=143; fi
if ((status == 134)); then # JAX aborts a process that has lost process 0, without a sentence
  echo "node.sh: the run was aborted (the log above says where): if it has several processes," \
    "process 0 or its machine is probably lost. Start all of them again with the same command:" \
    "the run continues from its last checkpoint" >&2
  status=1
fi
exit "$status"
