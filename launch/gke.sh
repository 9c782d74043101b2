#!/usr/bin/env bash
# Trains on TPU or GPU node pools of Google Kubernetes Engine, as a JobSet (launch/jobset.yaml).
# After a preemption the JobSet restarts, and the run continues from its last checkpoint.
#   bash launch/gke.sh [--dry-run] start NAME IMAGE POOL CLAIM CONFIG --out /shared/RUN [...]
#   bash launch/gke.sh [--dry-run] logs | stop NAME       stop saves, start continues
# POOL: v5p:4x4x4 is one slice, 2xv5e:16x16 two; 4xnvidia-h100-80gb:8 is four nodes of eight GPUs.
# CLAIM: the persistent volume claim that every pod mounts as /shared.
# For example (docs/launch.md shows how to build the image):
#   bash launch/gke.sh start d30 REGISTRY/star_jax:tpu v5p:4x4x4 runs \
#     configs/star_d30_256.py --out /shared/d30
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/shell.sh && source launch/machines.sh
name="${2:-}" label=jobset.sigs.k8s.io
[[ $name ]] || fail "give an action and a name, such as: start d30 IMAGE v5p:4x4x4 CLAIM ..."
first="$label/jobset-name=$name,$label/job-index=0,batch.kubernetes.io/job-completion-index=0"
case $1 in
  logs) run kubectl logs --follow --selector="$first" ;;
  stop) run kubectl delete jobset "$name" ;;
  start) parse_pool "${4:-}" && check_run "${@:6}" && check_shared ;;
  *) fail "'$1' is not an action: give start, logs or stop" ;;
esac
[[ $1 == start ]] || exit 0
# shellcheck disable=SC2034,SC2154 # read by name below
image="$3" claim="$5" command="\"bash\", \"launch/node.sh\", \"$platform\""
for word in "${@:6}"; do # as JSON; Kubernetes itself would expand $(...)
  word=${word//\\/\\\\} word=${word//\"/\\\"} word=${word//$'\n'/\\n} word=${word//\$(/\$\$(}
  command+=", \"$word\""
done
[[ ! ${note:-} ]] || echo "gke.sh: note: $note" >&2
manifest=$(<launch/jobset.yaml)
for field in slices nodes selector resource env name image claim command; do
  manifest=${manifest//@$field@/"${!field}"}
done
if [[ $dry ]]; then
  printf "kubectl apply --filename=- <<'END'\n%s\nEND\n" "$manifest"
else
  kubectl apply --filename=- <<<"$manifest"
fi
