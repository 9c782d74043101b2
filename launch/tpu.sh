#!/usr/bin/env bash
# Trains on a TPU pod slice, or on several slices (multislice), by queued resources of Google Cloud.
#   bash launch/tpu.sh [--dry-run] ACTION NAME ZONE [...]
#   create NAME ZONE TYPE [--OPTION=VALUE ... of gcloud]   v5p-128 is 64 chips, 2xv5e-256 two slices
#   install NAME ZONE                                      copies this project to all VMs, installs
#   start NAME ZONE CONFIG --out SHARED/RUN [...]          runs star-jax train on all VMs
#   state NAME ZONE [SHARED/RUN]                           with a folder: also its newest checkpoint
#   states | logs | last | stop | delete NAME ZONE         logs and last are those of the first VM
# For example:
#   bash launch/tpu.sh create d30 us-east5-a v5p-128 --spot       until `state` prints ACTIVE, then
#   bash launch/tpu.sh install d30 us-east5-a
#   bash launch/tpu.sh start d30 us-east5-a configs/star_d30_256.py --out /mnt/shared/d30
# You pay from ACTIVE to delete. launch/tpu_watch.sh does all of this, again after each preemption.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/shell.sh && source launch/machines.sh
action="${1:-}" name="${2:-}" zone="${3:-}"
[[ $zone ]] || fail "give ACTION NAME ZONE, such as: create d30 us-east5-a v5p-128 --spot"
tpus() { run gcloud compute tpus queued-resources "$@" --zone="$zone"; }
on() { tpus ssh "$name" --node="$1" --worker="$1" --command="$2"; } # on all VMs, or the first (0)
worker() { on "$1" "bash star_jax/launch/worker.sh $(quoted "${@:2}")"; }
case $action in
  create) parse_tpu "${4:-}" "$name" && tpus create "$name" --accelerator-type="$type" \
    --runtime-version="$runtime" "${size[@]}" "${@:5}" ;;
  install) archive=$(mktemp) && trap 'rm -f "$archive"' EXIT # git lists deleted files twice
    git ls-files -cod --exclude-standard ':!tests' ':!docs' | sort | uniq -u | tar -czf "$archive" -T-
    tpus scp "$archive" "$name:star_jax.tar.gz" --node=all --worker=all
    on all "mkdir -p star_jax && tar -xzf star_jax.tar.gz -C star_jax" && worker all install ;;
  start) check_run "${@:4}" && check_shared && worker all start "${@:4}" ;;
  state) state=$(tpus list --filter="name~/$name\$" --format="value(state.state)")
    printf '%s' "$state" # before it asks a VM, which may take too long
    ask="bash star_jax/launch/worker.sh state $(quoted "${@:4}") || echo absent"
    [[ $state != ACTIVE ]] || printf ' %s' "$({ on 0 "$ask" || true; } | grep . || echo unreachable)"
    echo ;;
  logs | last) on 0 "tail -n 50 $([[ $action == last ]] || echo -F) star_jax/run.log" ;;
  stop | states) worker all "${action%s}" ;;
  delete) tpus delete "$name" --force --quiet ;;
  *) fail "'$action' is not an action: --help lists the actions" ;;
esac
