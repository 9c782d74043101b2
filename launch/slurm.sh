#!/usr/bin/env bash
#SBATCH --job-name=star_jax --open-mode=append --requeue --signal=TERM@300 --exclusive
#SBATCH --gpus-per-node=8 --ntasks-per-node=8 --cpus-per-task=8
# Trains on nodes of A100 or H100 by SLURM. When the job is preempted, or five minutes before its
# time limit, the run saves and the job is queued again, until the run is complete.
#   bash launch/slurm.sh [--dry-run] [--OPTION=VALUE ... of sbatch] CONFIG --out DIR \
#     [OPTIONS OF star-jax train]
# For example, on four nodes of eight GPUs (install once: bash launch/install.sh gpu):
#   bash launch/slurm.sh --nodes=4 --partition=gpu --time=24:00:00 \
#     configs/star_d30_256.py --out /shared/runs/d30 --mesh.fsdp 8
# Nodes of four GPUs: --gpus-per-node=4 --ntasks-per-node=4. To end it: scancel JOB.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}" # a job runs a copy of this file
source launch/shell.sh
options=()
while [[ ${1:-} == --* ]]; do options+=("$1") && shift; done
check_run "$@" && check_shared
if [[ -z ${SLURM_JOB_ID:-} ]]; then
  run sbatch "${options[@]}" launch/slurm.sh "$@"
  [[ $dry ]] || exit 0
fi
# One process per GPU: under SLURM, JAX selects the device with the local number of the process, so
# every process needs access to all of them. srun does not inherit cpus-per-task from sbatch.
status=0
run srun --kill-on-bad-exit=1 --gpu-bind=none --cpus-per-task="${SLURM_CPUS_PER_TASK:-8}" \
  bash launch/node.sh gpu "$@" || status=$?
if ((status == 143)); then scontrol requeue "$SLURM_JOB_ID"; fi # stopped, has saved
exit "$status"
