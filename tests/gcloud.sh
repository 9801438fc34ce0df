#!/usr/bin/env bash
# A stand-in for Google's cloud: the folder $CLOUD. Its workers are home folders on this machine.
#
#   calls                  every command line that gcloud was given: words end with \0, lines with \1\0
#   states/KIND.NAME       the states of a tpu-vm or of queued-resources, one a line; `describe` takes the
#                          first, and leaves the last; at OFFLINE it cannot say how the slice is
#   home/NAME/WORKER       the home folder of a worker, gone with its slice
#   bucket/                what gs:// stands for
#   offline                while it is there, gcloud cannot say how a slice is; once, if it is not empty
#   refuse                 what the next `create`s say instead of making something, one a line
#   plan                   what `streamsynth` does on worker 0, one run a line: an exit code; `preempt`;
#                          `vanish`; `hang` until there is a file `go`; `lose` the connection, and hang;
#                          `terminate` (SIGTERM to all that runs, as on a VM that is taken away); `reboot`;
#                          `offline`: it fails, and gcloud is offline once. Otherwise it ends well
#   others                 the exit code of the other workers, 0 unless written
#   ran                    what `streamsynth` was started with, on every worker
#   slept                  how long the script has waited
#
# The name that it is called by says what it stands for.
set -euo pipefail

make_vms() { # as many hosts as the type $2 has
  local hosts=1 chips=8
  case "$2" in v5litepod-* | v6e-*) chips=4 ;; esac
  ((${2##*-} <= 8)) || hosts=$((${2##*-} / chips))
  for ((host = 0; host < hosts; host++)); do
    mkdir -p "$CLOUD/home/$1/$host/.local/bin"
    ln -s "$CLOUD/bin/uv" "$CLOUD/home/$1/$host/.local/bin/uv"
  done
  echo READY >"$CLOUD/states/tpu-vm.$1"
}

option() { # the value of --$1 among the other words
  local word
  for word in "${@:2}"; do
    [[ "$word" != "--$1="* ]] || { echo "${word#*=}" && return; }
  done
  echo "stand-in: --$1 is missing" >&2
  return 9
}

describe() {
  local file="$CLOUD/states/$1.$2" format="value(state)"
  [[ "$1" == tpu-vm ]] || format="value(state.state)"
  [[ "$(option format "$@")" == "$format" ]]
  if [[ -e "$CLOUD/offline" || "$(head -n 1 "$file" 2>/dev/null)" == OFFLINE ]]; then
    echo "ERROR: (gcloud) There was a problem refreshing your current auth tokens." >&2
    if [[ ! -e "$CLOUD/offline" ]]; then
      sed -i 1d "$file"
    elif [[ -s "$CLOUD/offline" ]]; then
      rm "$CLOUD/offline"
    fi
    return 1
  elif [[ ! -e "$file" ]]; then
    echo "ERROR: (gcloud.compute.tpus.$1.describe) NOT_FOUND: Resource 'projects/p/$2' was not found" >&2
    return 1
  fi
  head -n 1 "$file"
  [[ "$(wc -l <"$file")" -gt 1 ]] || return 0
  sed -i 1d "$file"
  [[ "$(head -n 1 "$file")" != ACTIVE ]] || make_vms "$2" "$(cat "$CLOUD/type.$2")"
}

create() {
  option zone "$@" >/dev/null
  if [[ -s "$CLOUD/refuse" ]]; then
    echo "ERROR: (gcloud.compute.tpus.$1.create) $(head -n 1 "$CLOUD/refuse")" >&2
    sed -i 1d "$CLOUD/refuse"
    return 1
  elif [[ -e "$CLOUD/states/$1.$2" ]]; then
    echo "ERROR: (gcloud.compute.tpus.$1.create) ALREADY_EXISTS" >&2
    return 1
  elif [[ "$1" == tpu-vm ]]; then
    option version "$@" >/dev/null
    make_vms "$2" "$(option accelerator-type "$@")"
  else
    option runtime-version "$@" >/dev/null
    [[ "$(option node-id "$@")" == "$2" ]]
    option accelerator-type "$@" >"$CLOUD/type.$2"
    printf '%s\n' WAITING_FOR_RESOURCES WAITING_FOR_RESOURCES PROVISIONING ACTIVE >"$CLOUD/states/$1.$2"
  fi
}

delete() {
  [[ " $* " == *" --quiet "* && ("$1" == tpu-vm || " $* " == *" --force "*) ]]
  [[ "$1" != queued-resources || "$(cat "$CLOUD/states/$1.$2")" != SUSPENDED ]] || # it has no VMs any more
    { rm "$CLOUD/states/$1.$2" && return; }
  rm "$CLOUD/states/$1.$2"
  rm -rf "$CLOUD/states/tpu-vm.${2:?}" "$CLOUD/home/${2:?}"
}

ssh() { # all workers at the same time; the exit code is the first above 0, as gcloud's
  trap 'exit 255' INT # gcloud takes Ctrl-C for itself
  local which command workers=() pids=() status=0 code
  which=$(option worker "$@")
  command=$(option command "$@")
  [[ "$which" != all ]] || which="*"
  # shellcheck disable=SC2206 # it may be a pattern
  workers=("$CLOUD/home/$2/"$which)
  for home in "${workers[@]}"; do
    (cd "$home" && HOME="$home" WORKER="${home##*/}" SLICE="$2" exec setsid bash -c "$command" 3>&-) &
    pids+=($!)
  done
  while [[ -e "$CLOUD/plan" ]] && kill -0 "${pids[0]}" 2>/dev/null; do
    if [[ -e "$CLOUD/lose" ]]; then # what the workers run goes on
      rm "$CLOUD/lose"
      for pid in "${pids[@]}"; do kill -KILL -- "-$pid"; done
      return 255
    fi
    command -p sleep 0.05
  done
  for pid in "${pids[@]}"; do
    code=0
    wait "$pid" || code=$?
    ((status > 0)) || status=$code
  done
  return "$status"
}

gcloud() {
  printf '%s\0' "$@" $'\1' >>"$CLOUD/calls"
  case "$*" in
    "storage cp - gs://"*)
      mkdir -p "$(dirname "$CLOUD/bucket/${4#gs://}")"
      cat >"$CLOUD/bucket/${4#gs://}"
      ;;
    "storage cat gs://"*)
      if ! cat "$CLOUD/bucket/${3#gs://}" 2>/dev/null; then
        echo "ERROR: (gcloud.storage.cat) The following URLs matched no objects or files: $3" >&2
        return 1
      fi
      ;;
    "storage rsync --recursive gs://"*) cp -r "$CLOUD/bucket/${4#gs://}/." "$5" ;;
    "compute tpus tpu-vm scp "*)
      for home in "$CLOUD/home/${6%%:*}"/*; do cp "$5" "$home/${6#*:}"; done
      ;;
    "compute tpus "*) "$4" "$3" "${@:5}" ;;
    *) echo "stand-in: $*" >&2 && return 9 ;;
  esac
}

uv() { # makes an environment that has only `streamsynth`
  [[ "$1" == venv ]] || return 0
  mkdir -p ~/environment/bin
  ln -s "$CLOUD/bin/python3" ~/environment/bin/python
  ln -s "$CLOUD/bin/streamsynth" ~/environment/bin/streamsynth
}

streamsynth() {
  local workdir="${!#}" step=""
  { printf '%s' "$SLICE/$WORKER" && printf ' %q' "$@" && echo; } >>"$CLOUD/ran"
  if [[ "$WORKER" != 0 ]]; then
    echo "the message of worker $WORKER"
    exit "$(cat "$CLOUD/others" 2>/dev/null || echo 0)"
  fi
  workdir="$CLOUD/bucket/${workdir#--workdir=gs://}"
  mkdir -p "$workdir"
  echo turn >>"$workdir/journal"
  echo "turn $(wc -l <"$workdir/journal") of $workdir"
  if [[ -s "$CLOUD/plan" ]]; then
    step=$(head -n 1 "$CLOUD/plan")
    sed -i 1d "$CLOUD/plan"
  fi
  case "$step" in
    "") ;;
    preempt)
      [[ ! -e "$CLOUD/states/queued-resources.$SLICE" ]] ||
        printf '%s\n' SUSPENDING SUSPENDED >"$CLOUD/states/queued-resources.$SLICE"
      echo PREEMPTED >"$CLOUD/states/tpu-vm.$SLICE"
      exit 1
      ;;
    vanish) rm -r "$CLOUD/states/tpu-vm.$SLICE" "$HOME" ;;
    lose | hang)
      [[ "$step" == hang ]] || touch "$CLOUD/lose"
      until [[ -e "$CLOUD/go" ]]; do command -p sleep 0.05; done
      ;;
    reboot) kill -KILL "$PPID" ;; # nothing says how it ended
    offline)
      echo once >"$CLOUD/offline"
      exit 1
      ;;
    terminate)
      trap 'echo saved && exit 75' TERM
      kill -TERM 0
      ;;
    *)
      echo "the message of exit code $step"
      exit "$step"
      ;;
  esac
}

case "${0##*/}" in
  curl) echo "$WORKER" ;; # the metadata server, asked which worker this is
  python3) ;;             # uv is there already
  sleep) echo "$1" >>"$CLOUD/slept" ;;
  *) "${0##*/}" "$@" ;;
esac
