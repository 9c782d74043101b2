#!/usr/bin/env bash
# Runs a training on TPUs to its end: creates the queued resource, installs and starts; after a
# preemption it does so again, and the run continues from its last checkpoint. At the end, or after
# five failures without a new checkpoint, it deletes the resource. A slice that has no run, or does
# not answer, is replaced after ten minutes. ctrl-c ends only this script; the same command takes
# over again. It checks once a minute: keep this machine awake.
#   bash launch/tpu_watch.sh [--dry-run] NAME ZONE TYPE [--OPTION=VALUE ... of gcloud] \
#     CONFIG --out SHARED/RUN [OPTIONS OF star-jax train]
#   bash launch/tpu_watch.sh d30 us-east5-a v5p-128 --spot configs/star_d30_256.py --out /mnt/d30
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/shell.sh && source launch/machines.sh
name="${1:-}" zone="${2:-}" create=("${3:-}")
[[ $zone ]] || fail "give NAME ZONE TYPE CONFIG, such as: d30 us-east5-a v5p-128 --spot configs/..."
parse_tpu "${3:-}" && shift 3
while [[ ${1:-} == --* ]]; do create+=("$1") && shift; done
check_run "$@" && check_shared
tpu() { bash launch/tpu.sh --dry-run "$1" "$name" "$zone" "${@:2}"; }
if [[ $dry ]]; then
  tpu create "${create[@]}" && tpu install && tpu stop && tpu start "$@" && tpu delete && exit
fi
python=.venv/bin/python
[[ -x $python ]] || python="${PYTHON:-python3}"
exec "$python" -m star_jax.parallel.tpu_watch "$name" "$zone" "$out" "${create[@]}" -- "$@"
