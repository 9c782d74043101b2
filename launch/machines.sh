# shellcheck shell=bash disable=SC2034
# Names and sizes of TPUs and GPU nodes: launch/tpu.sh, tpu_watch.sh and gke.sh source this file.
parse_tpu() { # TYPE [NAME]: v5p-128, or 2xv5e-256 for two slices. Sets $type, $runtime and $size.
  [[ $1 =~ ^(([0-9]+)x)?(v5e|v5p|v6e)-([0-9]+)$ ]] ||
    fail "'$1' is not a TPU: give one such as v5p-128, v5e-256, v6e-256, or 2xv5e-256 for two slices"
  local kind="${BASH_REMATCH[3]}"
  local count="${BASH_REMATCH[2]:-1}"
  type="${kind/v5e/v5litepod}-${BASH_REMATCH[4]}" size=(--node-id="${2:-}")
  runtime="v2-alpha-tpu${kind/v5e/v5-lite}" runtime="${runtime/v5p/v5}"
  ((count == 1)) || size=(--node-count="$count" --node-prefix="${2:-}")
}
no_direct='the pods use no GPUDirect: between nodes NCCL has about 4 GB/s instead of 340 GB/s'
no_direct+=' (a3-mega); docs/launch.md lists what to add to launch/jobset.yaml'
parse_pool() { # POOL of launch/gke.sh. Sets $platform, $note and fields of launch/jobset.yaml.
  local label=cloud.google.com/gke index=batch.kubernetes.io/job-completion-index m
  if [[ $1 =~ ^(([0-9]+)x)?(v5e|v5p|v6e):(([0-9]+)x([0-9]+)(x([0-9]+))?)$ ]]; then
    m=("${BASH_REMATCH[@]}")
    platform=tpu slices="${m[2]:-1}" nodes=$((m[5] * m[6] * ${m[8]:-1} / 4)) # four chips per node
    selector="$label-tpu-accelerator: tpu-${m[3]}-slice, $label-tpu-topology: ${m[4]}"
    selector="${selector/v5e-slice/v5-lite-podslice}" resource='google.com/tpu: 4'
    env='' # JAX reads the variables that GKE sets
  elif [[ $1 =~ ^(([0-9]+)x)?(nvidia-[a-z0-9-]+):([0-9]+)$ ]]; then
    m=("${BASH_REMATCH[@]}")
    platform=gpu slices=1 nodes="${m[2]:-1}"
    ((nodes == 1)) || note="$no_direct"
    selector="$label-accelerator: ${m[3]}" resource="nvidia.com/gpu: ${m[4]}"
    # One process per node with all its GPUs; the name of the first pod is fixed.
    env="{name: STAR_JAX_COORDINATOR, value: '@name@-slice-0-0.@name@:8476'}"
    env+=", {name: STAR_JAX_PROCESSES, value: '$nodes'}, {name: STAR_JAX_PROCESS, valueFrom:"
    env+=" {fieldRef: {fieldPath: \"metadata.annotations['$index']\"}}}"
  fi
  ((${nodes:-0})) || fail "'$1' is not a pool: give one such as v5p:4x4x4, 2xv5e:16x16 or" \
    "4xnvidia-h100-80gb:8"
}
