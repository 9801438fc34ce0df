#!/usr/bin/env bash
# streamsynth on Cloud TPU: makes a slice, runs a command on all its workers, goes on after a preemption.
#
#   ./launch_tpu.sh run --name=synth --zone=us-west4-a --type=v5litepod-16 --spot --workdir=gs://BUCKET/RUN \
#       -- train --config=configs/quickstart.py
#
#   create   makes the slice where there is none, and waits until it is ready
#   setup    copies this working tree to every worker (what git ignores stays here) and installs it there
#   run      create, setup, then the streamsynth command behind -- on every worker; shows worker 0's output
#   resume   the run in --workdir again, as it was last started; other options given here replace its own
#   logs     what the last run printed on --worker=N (0 unless named, or all); --follow waits until it ends
#   sweep    runs the streamsynth commands that standard input has, one a line
#   delete   deletes the slice and its place in the queue
#
#   --name=N       the slice                        --zone=Z      where it is
#   --type=T       its accelerator, as v5p-16       --project=P   gcloud's own unless named
#   --spot         cheaper, may be taken away       --image=I     found from --type unless named
#   --queued       waits in Google's queue for room, as the queued resource of the slice's name
#   --workdir=DIR  a folder in a bucket, gs://BUCKET/RUN; the --workdir of a sweep's lines is a folder in it
#   --fetch=DIR    a folder in a bucket that setup copies to every worker, into the working tree, under
#                  the last part of its name (weights, data); may be given several times
#   --slices=N     create, setup, sweep and delete: the slices NAME-1 to NAME-N
#   --restarts=N   how often a run may be started again: 100 times with --spot, else 0
#   --dry-run      prints the gcloud commands and runs none
#
# What runs on the workers does not need this connection: it goes on when that is lost, and after Ctrl-C, and
# the same line joins it again (of a sweep with the same commands in any order). A run starts again when its
# slice is gone, when its machine went down, or when it ends with exit code 75 (it was told to stop, and has
# saved); any other failure ends it. Slices stay, and cost, until `delete`.
# For slices of several hosts gcloud wants the ssh key in the agent: ssh-add ~/.ssh/google_compute_engine
# shellcheck disable=SC2329 # functions that are called by their name in a variable
set -euo pipefail
export CLOUDSDK_CORE_DISABLE_PROMPTS=1
exec 3>&1 # a dry run prints here, also from within $(...)

readonly again=75         # EX_TEMPFAIL: stopped, and has saved
readonly gcloud_failed=74 # its own fault or the user's: ends a run the first time
readonly failed=100       # exit code 1 of what ran on a worker; 1 itself means that gcloud found no way there
root="$(cd "$(dirname "$0")" && pwd)"

say() { echo "launch_tpu.sh: $1" >&2; }

fail() {
  say "error: $1"
  exit 2
}

quoted() { (($# == 0)) || printf ' %q' "$@"; }

call() {
  if [[ -z "$dry_run" ]]; then gcloud "$@"; else echo "gcloud$(quoted "$@")" >&3; fi
}

# Prints the state of a tpu-vm or of queued-resources, MISSING where there is none of the slice's name.
describe() {
  local command=(compute tpus "$1" describe "$name" "${place[@]}" --format="value(state)") state
  [[ "$1" == tpu-vm ]] || command[${#command[@]} - 1]="--format=value(state.state)"
  if [[ -n "$dry_run" ]]; then # as if missing until `create` was printed, and there for `delete`
    call "${command[@]}"
    case "$1,$queued,$made" in tpu-vm,*,1) echo READY ;; *,1,1) echo ACTIVE ;; *) echo MISSING ;; esac
  elif state=$(gcloud "${command[@]}" 2>"$scratch/$name.error"); then
    echo "$state"
  elif grep -qiE 'NOT_FOUND|was not found' "$scratch/$name.error"; then
    echo MISSING
  else
    cat "$scratch/$name.error" >&2
    return "$gcloud_failed"
  fi
}

# Prints the state of the place in the queue until that is filled, then of the VMs.
slice_state() {
  local state
  if [[ -n "$queued" ]]; then
    state=$(describe queued-resources) || return
    [[ "$state" == ACTIVE ]] || { echo "$state" && return; }
  fi
  state=$(describe tpu-vm) || return
  [[ -z "$queued" || "$state" != MISSING ]] || state=SUSPENDED # VMs deleted by hand: the place is used up
  echo "$state"
}

create_slice() {
  local runtime="$image" kind="tpu-vm" options
  [[ -n "$runtime" ]] || case "$type" in
    v6e-*) runtime=v2-alpha-tpuv6e ;;
    v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
    v5p-*) runtime=v2-alpha-tpuv5 ;;
    *) runtime=tpu-ubuntu2204-base ;;
  esac
  options=(--version="$runtime")
  [[ -z "$queued" ]] || kind="queued-resources" options=(--runtime-version="$runtime" --node-id="$name")
  say "making $name"
  made=1 set_up=""
  call compute tpus "$kind" create "$name" "${place[@]}" --accelerator-type="$type" "${options[@]}" \
    ${spot:+--spot} 2>&1 | tee "$scratch/$name.error" >&2 && return
  # No room at present, or taken away while it was being made.
  ! grep -qiE 'no more capacity|insufficient (reserved )?capacity|in state PREEMPTED' \
    "$scratch/$name.error" || return "$again"
  return "$gcloud_failed"
}

# A place in the queue takes its own VMs with it; others may have its name since.
delete_slice() {
  local kind force=--force state found=""
  for kind in queued-resources tpu-vm; do
    state=$(describe "$kind") || return
    if [[ "$state" != MISSING ]]; then
      call compute tpus "$kind" delete "$name" "${place[@]}" $force --quiet || return "$gcloud_failed"
      found=1
    fi
    force=""
  done
  [[ -n "$found" ]] || say "there is no $name in $zone."
}

# Returns when the slice is ready: makes it where it is missing or was taken away, and waits.
ensure_slice() {
  local state last="" missed=0
  while :; do
    if ! state=$(slice_state); then # in days of waiting gcloud fails now and then
      [[ -n "$last" ]] && ((++missed < 10)) || return "$gcloud_failed"
      sleep 30
      continue
    fi
    missed=0
    [[ "$state" == "$last" || "$state" == MISSING ]] || say "$name is $state"
    last="$state"
    case "$state" in
      READY) return ;;
      MISSING) create_slice || return ;;
      PREEMPTED | TERMINATED | SUSPENDED) delete_slice || return ;;
      *ING | ACCEPTED | WAITING_FOR_RESOURCES) sleep 30 ;;
      *) say "error: see with gcloud's describe why $name is $state, then delete it." && set_up="" && return 1 ;;
    esac
  done
}

# gcloud reaches all workers at the same time, waits for all, and exits with the first exit code above 0. A VM
# that is gone does not hang up, so ssh has to ask; gcloud then tries ten times to get there again.
on_workers() {
  call compute tpus tpu-vm ssh "$name" "${place[@]}" --worker="$1" --ssh-flag=-oConnectTimeout=20 \
    --ssh-flag=-oServerAliveInterval=20 --command="$2"
}

# The head of what a worker is told: the words of the streamsynth command, and whether one is going on.
worker_head() {
  echo "set --$(quoted ${words[@]+"${words[@]}"})"
  cat <<'END'
refuse() { echo "launch_tpu.sh: error: $1" >&2; exit 2; }
mkdir -p ~/run && exec 9>~/run/lock
busy=""
until flock -n 9; do
  [ "$(cat ~/run/line 2>/dev/null)" = setup ] || { busy=1 && break; }
  sleep 5
done
[ -z "$busy" ] || [ "$*" = "$(cat ~/run/line)" ] || refuse "the slice is busy: streamsynth $(cat ~/run/line)"
END
}

# The images carry Python 3.10, so uv brings a newer one.
setup_script() {
  worker_head
  echo "fetch=($(quoted ${fetch[@]+"${fetch[@]%/}"}) )"
  cat <<'END'
[ -z "$busy" ] || exit 0
echo setup > ~/run/line
set -e
trap 'case $? in 0 | 2) ;; *) exit 100 ;; esac' EXIT
rm -rf ~/streamsynth && mkdir ~/streamsynth && tar -xzf ~/streamsynth.tar.gz -C ~/streamsynth
cd ~/streamsynth
python3 -m pip install --quiet --user uv
[ -x ~/environment/bin/python ] || ~/.local/bin/uv venv --quiet --python 3.12 ~/environment
~/.local/bin/uv pip install --quiet --python ~/environment/bin/python ".[tpu,gcs]"
for folder in "${fetch[@]}"; do
  last="${folder##*/}"
  [ ! -e "$last" ] || [ -L "$last" ] || refuse "--fetch=$folder: the working tree has a $last of its own."
  mkdir -p ~/fetched/"$last"
  gcloud storage rsync --recursive "$folder" ~/fetched/"$last"
  ln -sfn ~/fetched/"$last" "$last"
done
END
}

# SIGTERM reaches every process of a VM that is taken away: the shell around the command holds the lock, and
# outlasts it to keep how it ended; where it could not, the machine went down, and the run can go on. What ended
# of the same id while the connection was lost is not run again.
run_script() {
  worker_head
  echo "id=$id"
  cat <<'END'
if [ -z "$busy" ] && { [ "$id" != "$(cat ~/run/id 2>&1)" ] || [ "$(cat ~/run/status || echo 75)" = 75 ]; }; then
  rm -f ~/run/status
  echo "$*" > ~/run/line
  echo "$id" > ~/run/id
  setsid bash -c 'trap : TERM
    cd ~/streamsynth
    code=0
    JAX_PLATFORMS=tpu,cpu ~/environment/bin/streamsynth "$@" 9>&- || code=$?
    echo "$code" > ~/run/status' - "$@" > ~/run/log 2>&1 < /dev/null &
  echo $! > ~/run/pid
fi
exec 9>&-
worker=$(curl -sf -H "Metadata-Flavor: Google" \
  http://metadata.google.internal/computeMetadata/v1/instance/attributes/agent-worker-number || echo 0)
( [ "$worker" = 0 ] || exec > /dev/null
  exec tail -n 200 -s 0.2 -f --pid="$(cat ~/run/pid)" ~/run/log )
code=$(cat ~/run/status 2>/dev/null || echo 75)
case $worker,$code in 0,* | *,0 | *,75) ;; *) tail -n 20 ~/run/log | sed "s/^/worker $worker: /" >&2 ;; esac
[ "$code" != 1 ] || code=100
exit "$code"
END
}

setup_slice() {
  local bundle="$scratch/$name.tar.gz" file
  [[ -n "$dry_run" || -e "$bundle" ]] || git -C "$root" ls-files -z --cached --others --exclude-standard |
    while IFS= read -r -d '' file; do # git's list has files that were deleted since
      if [[ -e "$root/$file" || -L "$root/$file" ]]; then printf '%s\0' "$file"; fi
    done | tar -C "$root" --null -T - -czf "$bundle" || return
  say "setting up $name"
  call compute tpus tpu-vm scp "$bundle" "$name:streamsynth.tar.gz" "${place[@]}" --worker=all || return
  on_workers all "$(setup_script)"
}

read_words() {
  words=()
  while IFS= read -r word; do words+=("$word"); done
}

# Takes a streamsynth command ($1 is what the user knows it by); leaves `words`, as the workers get them.
take_command() {
  local called="$1" word folder=""
  shift
  [[ "${1-}" != streamsynth ]] || shift
  words=()
  for word in "$@"; do
    case "$word" in
      *$'\n'*) fail "$called has a line break in $(quoted "$word"); write it without." ;;
      --workdir=*) folder="${word#*=}" ;;
      --distributed) ;;
      --output=gs://*) words+=("$word") ;;
      --output*) fail "$called: $word would be lost with the slice; name --output=gs://BUCKET/DIR." ;;
      --config="$root"/*) words+=("--config=${word#--config="$root"/}") ;;
      *) words+=("$word") ;;
    esac
  done
  case "$((${type##*-} > 8)) ${words[0]-}" in # of every type, what ends above 8 has several hosts
    "1 train" | "1 synthesize" | "1 evaluate") words+=(--distributed) ;;
    "1 report" | "1 export") fail "$called: ${words[0]} runs on one host and $type has several." ;;
    "0 train" | "0 synthesize" | "0 evaluate" | "0 report" | "0 export") ;;
    *) fail "$called is no streamsynth command, such as train --config=configs/quickstart.py." ;;
  esac
  [[ "$folder" == gs://?* ]] || folder="${workdir%/}${folder:+/$folder}"
  [[ "$folder" =~ ^gs://[^/]+(/[^/]+)+$ ]] ||
    fail "$called: the workdir '$folder' is no folder in a bucket; name one as --workdir=gs://BUCKET/RUN."
  words+=("--workdir=$folder")
}

# Calls what runs on the workers, and returns the exit code that it comes to; $1 if gcloud found no way there.
reach() {
  local no_way="$1" status=0 state
  shift
  "$@" || status=$?
  case "$status" in 0 | 2 | "$again") return "$status" ;; esac
  state=$(slice_state) || return
  if [[ "$state" == READY ]] && ((restarts > 0)); then
    sleep 30 # a command may fail a moment before its slice is known to be gone
    state=$(slice_state) || return
  fi
  [[ "$state" == READY ]] || return "$again"
  case "$status" in
    1 | 255) return "$no_way" ;;
    "$failed") return 1 ;;
    *) return "$status" ;;
  esac
}

attempt() {
  ensure_slice || return
  [[ -n "$set_up" ]] || reach "$gcloud_failed" setup_slice || return
  set_up=1
  say "$name: streamsynth ${words[*]}"
  reach "$again" on_workers all "$(run_script)"
}

# Runs `words` to their end, over as many slices as that takes. Beside the run lies this whole line, one word
# a line, so that `resume` needs nothing else. `set_up` is left empty where the slice was at fault.
run_job() {
  local folder="${words[${#words[@]} - 1]#--workdir=}" id="$$-$SECONDS-$RANDOM" line
  local restart=0 wait=30 started status
  line=$(printf '%s\n' "${given[@]}" --name="$name" -- "${words[@]}")
  call storage cp - "$folder/launch.txt" <<<"$line" || { set_up="" && return 1; }
  while :; do
    started=$SECONDS status=0
    attempt || status=$?
    ((status != gcloud_failed || restart > 0)) || [[ -n "$set_up" ]] || return 1
    if ((status != again && status != gcloud_failed)); then
      [[ "$status" == 0 || -z "$set_up" ]] || say "error: streamsynth ended with exit code $status on $name."
      return "$status"
    fi
    if ((restart >= restarts)); then
      say "error: the run is not finished; ./launch_tpu.sh resume --workdir=$folder goes on."
      set_up=""
      return "$again"
    fi
    ((SECONDS - started < 600)) || wait=30 # the longer nothing comes of it, the longer the wait
    restart=$((restart + 1))
    say "restart $restart of at most $restarts in $wait seconds: $folder"
    sleep "$wait"
    wait=$((wait < 600 ? wait * 2 : wait))
  done
}

# Calls $1 for every slice, at the same time, what it prints under the slice's name.
each_slice() {
  local first="$name" pids=() status=0
  if [[ -z "$slices" ]]; then "$1" && return || return; fi
  local name
  set -m # process groups, so that Ctrl-C can end each with what it has started
  for ((slice = 1; slice <= slices; slice++)); do
    name="$first-$slice"
    if [[ -n "$dry_run" ]]; then ("$1") && continue || return; fi
    ("$1" 2>&1 | while IFS= read -r line; do echo "[$name] $line"; done) &
    pids+=($!)
  done
  trap 'for pid in "${pids[@]}"; do kill -- "-$pid" 2>/dev/null; done; exit 130' INT TERM
  for pid in ${pids[@]+"${pids[@]}"}; do wait "$pid" || status=$?; done
  return "$status"
}

# A command of an earlier call of the same sweep may be going on: its slice takes that one first.
join_slice() {
  local line job
  line=$(slice_state) || return
  [[ "$line" == READY ]] || return 0
  line=$(on_workers 0 'flock -n ~/run/lock true 2>/dev/null || cat ~/run/line 2>/dev/null || true') || return
  [[ -n "$line" && "$line" != setup ]] || return 0
  for ((job = 1; job <= jobs; job++)); do
    read_words <"$scratch/job.$job"
    [[ "$line" == "${words[*]}" ]] || continue
    mkdir "$scratch/taken.$job" && echo "$job" >"$scratch/first.$name" && return
  done
  fail "$name is busy with no command of this sweep: streamsynth $line"
}

# Every slice takes the next command that none has taken yet; a slice that is at fault takes no more.
sweep_slice() {
  local job first=""
  [[ ! -e "$scratch/first.$name" ]] || first=$(cat "$scratch/first.$name")
  for job in $first $(seq "$jobs"); do
    [[ -z "$dry_run" || -z "$slices" ]] || ((job % slices == slice % slices)) || continue
    if [[ "$job" == "$first" ]]; then first=""; else mkdir "$scratch/taken.$job" 2>/dev/null || continue; fi
    read_words <"$scratch/job.$job"
    if run_job; then
      touch "$scratch/done.$job"
    else
      say "not finished: streamsynth ${words[*]}"
      [[ -n "$set_up" ]] || return 1
    fi
  done
}

sweep() {
  local line text number=0 folders="|" finished
  [[ ! -t 0 ]] || fail "sweep reads commands: python configs/sweep_balance.py | ./launch_tpu.sh sweep ..."
  while IFS= read -r line || [[ -n "$line" ]]; do
    number=$((number + 1))
    [[ ! "$line" =~ ^[[:space:]]*(#|$) ]] || continue
    text=$(xargs printf '%s\n' 2>/dev/null <<<"$line") || fail "line $number has an open quotation mark."
    read_words <<<"$text"
    take_command "line $number" "${words[@]}"
    text="${words[${#words[@]} - 1]}"
    [[ "$folders" != *"|$text|"* ]] || fail "line $number: an earlier line has $text too."
    folders="$folders$text|" jobs=$((jobs + 1))
    printf '%s\n' "${words[@]}" >"$scratch/job.$jobs"
  done
  ((jobs > 0)) || fail "standard input has no commands."
  exec </dev/null
  each_slice join_slice || return
  each_slice sweep_slice || true
  finished=$(find "$scratch" -name 'done.*' | wc -l)
  say "$((finished)) of $jobs commands are finished."
  ((finished == jobs))
}

parse() {
  while (($#)); do
    case "$1" in
      --) shift && behind=("$@") && return ;;
      --dry-run) dry_run=1 ;;
      --spot | --queued | --follow) printf -v "${1#--}" 1 ;;
      --fetch=gs://?*/?*) fetch+=("${1#*=}") ;;
      --fetch=*) fail "$1 is no folder in a bucket, such as --fetch=gs://BUCKET/weights." ;;
      --slices=*[!0-9]* | --restarts=*[!0-9]* | --slices=0) fail "$1 has to be a whole number." ;;
      --type=*[!0-9]) fail "$1 is no accelerator type, such as v5litepod-8 or v5p-16." ;;
      --name=?* | --zone=?* | --type=*-* | --project=?* | --image=?* | --workdir=?* | --worker=?* | \
        --slices=?* | --restarts=?*)
        printf -v "$(cut -d= -f1 <<<"${1#--}")" %s "${1#*=}"
        ;;
      *) fail "$1 is no option, or one without its value; see the head of this file." ;;
    esac
    case "$1" in --workdir=* | --slices=* | --dry-run) ;; *) given+=("$1") ;; esac
    shift
  done
}

need() {
  local option
  for option in "$@"; do
    [[ -n "${!option}" ]] || fail "--$option is missing; see the head of this file."
  done
}

name="" zone="" type="" project="" image="" workdir="" worker="" slices="" restarts="" spot="" queued=""
follow="" dry_run="" made="" set_up="" jobs=0 given=() fetch=() behind=() words=()
verb="${1-}"
[[ "$verb" =~ ^(create|setup|run|resume|logs|sweep|delete)$ ]] ||
  fail "say what to do: create, setup, run, resume, logs, sweep or delete; see the head of this file."
shift
parse "$@"
if [[ "$verb" == resume ]]; then
  need workdir
  stored=(storage cat "${workdir%/}/launch.txt")
  if [[ -n "$dry_run" ]]; then call "${stored[@]}" && exit; fi
  text=$(call "${stored[@]}") || fail "--workdir=$workdir: no run was started there."
  given=() fetch=()
  read_words <<<"$text"
  parse "${words[@]}"
  behind=("${behind[@]:0:${#behind[@]}-1}") # its --workdir: a run may have been copied
  parse "$@"
fi
case "$verb" in
  create) need name zone type ;;
  run | resume | sweep) need name zone type workdir ;;
  *) need name zone ;;
esac
[[ -n "$slices" && "$verb" =~ ^(run|resume|logs)$ ]] && fail "$verb is for one slice; leave --slices out."
[[ "$verb" =~ ^(run|resume)$ ]] || ((${#behind[@]} == 0)) || fail "$verb takes no command behind --."
[[ "$verb" != run ]] || ((${#behind[@]} > 0)) || fail "no command; put one behind --, as train --config=FILE."
restarts="${restarts:-${spot:+100}}" restarts="${restarts:-0}"
place=(--zone="$zone")
[[ -z "$project" ]] || place+=(--project="$project")
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
trap 'exit 130' INT # also where gcloud takes Ctrl-C for itself and ends as if a connection were lost

status=0
[[ "$verb" == sweep ]] || exec </dev/null
case "$verb" in
  create) each_slice ensure_slice || status=$? ;;
  setup) each_slice setup_slice || status=$? ;;
  run | resume)
    take_command "the command behind --" "${behind[@]}"
    run_job || status=$?
    ;;
  logs)
    script='[ -e ~/run/log ] || { echo "launch_tpu.sh: error: nothing has run here." >&2; exit 2; }
tail -n 200 '"${follow:+-s 0.2 -f --pid=\"\$(cat ~/run/pid)\" }"'~/run/log'
    on_workers "${worker:-0}" "$script" || status=$?
    ;;
  sweep) sweep || status=$? ;;
  delete) made=1 && each_slice delete_slice || status=$? ;;
esac
[[ "$status" != "$failed" && "$status" != "$gcloud_failed" ]] || status=1
exit "$status"
