# shellcheck shell=bash
# Functions that the launch scripts share: they source this file. It answers --help with the comment
# at the head of the script, and removes a leading --dry-run.
fail() { # A user's mistake, in one sentence without control characters.
  local sentence="${*//$'\e'/\\x1b}"
  echo "$(basename "$0"): ${sentence//[[:cntrl:]]/?}" >&2 && exit 2
}
quoted() { # The arguments, quoted for a shell.
  printf -v line ' %q' "$@" && echo "${line# }"
}
run() { # Runs the arguments as a command; with --dry-run prints it instead.
  if [[ $dry ]]; then quoted "$@"; else "$@"; fi
}
check_run() { # Checks the arguments of star-jax train for a config and an --out. Sets $out.
  [[ -f ${1:-} ]] || fail "the first argument is the config of the run, such as" \
    "configs/star_d16_256.py, and '${1:-}' is not a file"
  while [[ $# -gt 0 && $1 != --out && $1 != --out=* ]]; do shift; done
  if [[ ${1:-} == --out=* ]]; then out="${1#*=}"; else out="${2:-}"; fi
  [[ $out ]] || fail "a run needs --out FOLDER: it saves there and continues from there"
}
check_shared() { # Checks that every machine of the run can open $out.
  [[ $out == /* ]] || fail "--out $out is not a folder that all machines share: give the absolute" \
    "path of a folder that every one of them mounts, on a file store or a bucket"
}
dry=''
case ${1:-} in
  -h | --help) sed -n '2,/^[^#]/{/^#SBATCH/d;s/^# \{0,1\}//p;}' "$0" && exit ;;
  --dry-run) dry=yes && shift ;;
esac
