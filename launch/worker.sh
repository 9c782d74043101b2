#!/usr/bin/env bash
# On one TPU VM: a run that outlives the connection. launch/tpu.sh calls this on every VM.
#   bash launch/worker.sh install | start CONFIG --out FOLDER [...] | stop | state [FOLDER]
#   bash launch/worker.sh start configs/star_d30_256.py --out /mnt/shared/d30
# state prints absent (not installed), nothing (no run), running, or "ended N" with the exit status
# of launch/node.sh; then "step N" if FOLDER has a checkpoint. The output of the run is in run.log.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/shell.sh
state() {
  if [[ ! -f .venv/installed-tpu ]]; then echo absent
  elif [[ -s run.status ]]; then echo "ended $(<run.status)"
  elif [[ -s run.pid ]] && kill -0 "$(<run.pid)" 2>/dev/null; then echo running
  else echo nothing; fi
}
newest() { # of the steps that are complete
  find "$1/checkpoints" -name '[0-9]*' ! -name '*[!0-9]*' -prune -printf ' step %f\n' 2>/dev/null |
    sort -V | tail -n 1
}
action="${1:-}"
case $action in
  install) # the VMs come with Python 3.10
    python3 -m pip install --quiet --user uv
    python3 -m uv python install --quiet 3.12
    PYTHON="$(python3 -m uv python find 3.12)" bash launch/install.sh tpu ;;
  start)
    [[ $(state) != running ]] || fail "a run is active on this machine: stop it first"
    rm -f run.pid run.status
    export STAR_JAX_NOTICE=30 # seconds from SIGTERM to the end of a spot VM
    # shellcheck disable=SC2016 # the inner shell expands them
    nohup bash -c 'bash launch/node.sh tpu "$@" & echo $! >run.pid; wait $!; echo $? >run.status' \
      run "${@:2}" >run.log 2>&1 </dev/null &
    until [[ -s run.pid ]]; do sleep 0.1; done ;;
  stop)
    if [[ $(state) == running ]]; then kill -TERM "$(<run.pid)"; fi
    while [[ $(state) == running ]]; do sleep 1; done ;;
  state) echo "$(state)$([[ ! ${2:-} ]] || newest "$2")" ;;
  *) fail "'$action' is not an action: give install, start, stop or state" ;;
esac
