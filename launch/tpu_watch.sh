#!/usr/bin/env bash
# Runs a training on TPUs to its end: creates the queued resource, installs and starts; after a
# preemption it does so again, and the run continues from its last checkpoint. At the end, or when
# the run has failed five times, it deletes the resource. ctrl-c ends only this script; the same
# command takes over again. It checks once a minute: keep this machine awake.
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
tpu() { bash launch/tpu.sh ${dry:+--dry-run} "$1" "$name" "$zone" "${@:2}"; }
delete() { until tpu delete; do sleep 60; done; }
if [[ $dry ]]; then
  tpu create "${create[@]}" && tpu install && tpu stop && tpu start "$@" && tpu delete && exit
fi
tries=0 started='' before=''
while state=$(tpu state || echo unknown); do
  [[ $state == "$before" ]] || echo "$(date '+%F %T') $name: ${state:-absent}"
  ended="${state##* }"
  case $state in
    '') tpu create "${create[@]}"
      tries=0 started='' ;;
    SUSPENDED | FAILED) delete ;; # and create again
    'ACTIVE running') ;;
    ACTIVE*) if [[ $started$ended == yes0 ]]; then delete && exit; fi
      if [[ $started$ended == yes2 ]] || ((tries == 5)); then
        tpu last >&2 || true
        delete && fail "the run has failed (${state#ACTIVE }); the end of its log is above"
      fi
      [[ $started$ended == yesabsent ]] || # no answer at the moment
        { ((++tries)) && tpu install && tpu stop && tpu start "$@" && started=yes; } || true ;;
  esac
  before=$state && sleep 60
done
