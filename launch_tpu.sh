#!/usr/bin/env bash
# Runs one streamsynth command on a Cloud TPU VM, and resumes it when it is started again.
#
#   ./launch_tpu.sh --name=synth --zone=us-west4-a --type=v5litepod-8 --workdir=gs://BUCKET/RUN \
#       -- train --config=configs/quickstart.py
#
# It makes the TPU VM where there is none of that name, copies this working tree to it (files that git
# ignores stay here), installs '.[tpu]' and runs `streamsynth COMMAND --workdir=...` on every worker.
# The workdir lies on the VM's disk. Worker 0 saves it every minute, and at the end, as the one object
# WORKDIR/workdir.tar.gz (an object is replaced whole or not at all); a later start unpacks it first, so the
# same line continues after a preemption or a lost connection.
#
# The training loop is one process: choose a type with one host (v5litepod-1 to -8, v6e-1 to -8).
#
#   --project=P   the Google Cloud project; gcloud's own unless named
#   --image=I     the VM image; found from --type unless named
#   --spot        a cheaper VM that may be taken away at any time
#   --dry-run     prints the commands and runs none
#
# The VM is left running. When done:  gcloud compute tpus tpu-vm delete NAME --zone=ZONE
set -euo pipefail

fail() {
  echo "launch_tpu.sh: error: $1" >&2
  exit 2
}

name="" zone="" type="" workdir="" project="" image="" spot="" dry_run=""
while (($#)); do
  case "$1" in
    --name=*) name="${1#*=}" ;;
    --zone=*) zone="${1#*=}" ;;
    --type=*) type="${1#*=}" ;;
    --workdir=*) workdir="${1#*=}" ;;
    --project=*) project="${1#*=}" ;;
    --image=*) image="${1#*=}" ;;
    --spot) spot=1 ;;
    --dry-run) dry_run=1 ;;
    --) shift; break ;;
    *) fail "unknown option $1; options stand before -- and the streamsynth command behind it." ;;
  esac
  shift
done
for option in name zone type workdir; do
  [[ -n "${!option}" ]] || fail "--$option is missing; see the head of this file."
done
[[ "$workdir" == gs://?* ]] || fail "--workdir=$workdir is no bucket folder; name one as gs://BUCKET/RUN."
(($#)) || fail "no command; put one behind --, such as: -- train --config=configs/quickstart.py"

if [[ -z "$image" ]]; then
  case "$type" in
    v6e-*) image=v2-alpha-tpuv6e ;;
    v5litepod-*) image=v2-alpha-tpuv5-lite ;;
    v5p-*) image=v2-alpha-tpuv5 ;;
    *) image=tpu-ubuntu2204-base ;;
  esac
fi

place=(--zone="$zone")
[[ -z "$project" ]] || place+=(--project="$project")
vm=(gcloud compute tpus tpu-vm)

run() {
  if [[ -n "$dry_run" ]]; then
    printf '%q ' "$@"
    printf '\n'
  else
    "$@"
  fi
}

on_workers() {
  run "${vm[@]}" ssh "$name" "${place[@]}" --worker=all --command="$1"
}

# What every worker runs. The images carry Python 3.10, so uv brings a newer one.
install='set -e
rm -rf ~/streamsynth && mkdir ~/streamsynth && tar -xzf ~/streamsynth.tar.gz -C ~/streamsynth
python3 -m pip install --quiet --user uv
cd ~/streamsynth
[ -d ~/environment ] || ~/.local/bin/uv venv --quiet --python 3.12 ~/environment
~/.local/bin/uv pip install --quiet --python ~/environment/bin/python ".[tpu]"'

printf -v command '%q ' "$@"
train="set -e
object=$(printf '%q' "${workdir%/}/workdir.tar.gz")"'
work=~/workdir snapshot=~/workdir.snapshot archive=~/workdir.tar.gz finished=~/finished
exec 9>~/lock
flock -n 9 || { echo "launch_tpu.sh: error: a run is still going on this VM; wait or stop it there." >&2; exit 2; }
save() {
  # Hard links freeze the folder at one moment: journals may only be ahead of a checkpoint, never behind.
  rm -rf "$snapshot"
  cp -al "$work" "$snapshot" 2>/dev/null || return 0  # a checkpoint was just removed: next time
  { tar -czf "$archive" -C "$snapshot" . || [ $? -eq 1 ]; } &&  # 1: a journal grew meanwhile
    gcloud storage cp --quiet "$archive" "$object"
}
rm -rf "$work" && mkdir -p "$work"
if gcloud storage ls "$object" >/dev/null 2>&1; then
  gcloud storage cp --quiet "$object" "$archive"
  tar -xzf "$archive" -C "$work"
fi
worker=$(curl -sf -H "Metadata-Flavor: Google" \
  http://metadata.google.internal/computeMetadata/v1/instance/attributes/agent-worker-number || echo 0)
cd ~/streamsynth
if [ "$worker" = 0 ]; then
  rm -f "$finished"
  # It looks every second for the end, so that no save is cut off and none comes after the last one.
  (
    last=$SECONDS
    while [ ! -e "$finished" ]; do
      sleep 1
      if [ $((SECONDS - last)) -ge 60 ]; then
        save || echo "launch_tpu.sh: the workdir could not be saved; trying again in a minute" >&2
        last=$SECONDS
      fi
    done
  ) &
fi
status=0
'"~/environment/bin/streamsynth $command"'--workdir="$work" || status=$?
if [ "$worker" = 0 ]; then
  touch "$finished"
  wait
  save
fi
exit $status'

if [[ -n "$dry_run" ]] || ! "${vm[@]}" describe "$name" "${place[@]}" >/dev/null 2>&1; then
  run "${vm[@]}" create "$name" "${place[@]}" --accelerator-type="$type" --version="$image" ${spot:+--spot}
fi

cd "$(dirname "$0")"
bundle="$(mktemp -d)/streamsynth.tar.gz"
trap 'rm -rf "$(dirname "$bundle")"' EXIT
git ls-files -z --cached --others --exclude-standard | tar --null --files-from=- -czf "$bundle"
run "${vm[@]}" scp "$bundle" "$name":streamsynth.tar.gz "${place[@]}" --worker=all
on_workers "$install"
on_workers "$train"
