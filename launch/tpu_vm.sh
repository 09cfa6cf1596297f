#!/usr/bin/env bash
# A job on TPU VMs, through a queued resource.
#
#   launch/tpu_vm.sh create|keep|status|logs|stop|run|delete [--dry-run] [FILE.env]
#
#   create  queues the slice; once it is there, its startup script installs and runs the job
#   keep    watches over it: creates it anew whenever it was preempted (a spot slice is not restarted)
#   status  the state of the request
#   logs    what process 0 says, as it says it
#   stop    the job saves a checkpoint and ends, on all hosts; the slice stays, and costs
#   run     starts it again
#   delete  gives the slice back
#
# --dry-run prints the commands instead. The default FILE is launch/72b_rpo.env.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

verb='' file=$here/72b_rpo.env dry=''
for argument in "$@"; do
  case $argument in
  --dry-run) dry=yes ;;
  *.env) file=$argument ;;
  create | keep | status | logs | stop | run | delete) verb=$argument ;;
  *)
    echo "error: $argument: create, keep, status, logs, stop, run, delete, --dry-run or a .env file is wanted" >&2
    exit 2
    ;;
  esac
done
if [[ -z $verb ]]; then
  sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
  exit 2
fi
# shellcheck source=launch/72b_rpo.env
source "$file"

act() { # COMMAND...: runs it, or prints it
  if [[ $dry ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

write_startup() { # prints the startup script with the settings of this job, and `act`
  echo '#!/usr/bin/env bash'
  local name
  for name in NAME BUCKET IMAGE COMMAND HOSTS; do
    printf '%s=%q\n' "$name" "${!name}"
  done
  declare -f act
  tail -n +2 "$here/startup.sh"
}

queue() { # VERB FLAGS...: gcloud on the queued resource
  act gcloud compute tpus queued-resources "$1" "$NAME" --project="$PROJECT" --zone="$ZONE" "${@:2}"
}

nodes() { # the TPU VMs of the request, one for each slice
  if ((SLICES == 1)); then
    echo "$NAME"
  else
    local slice
    for ((slice = 0; slice < SLICES; slice++)); do
      echo "$NAME-$slice"
    done
  fi
}

on_hosts() { # NODE WORKERS COMMAND: runs a command on hosts of a slice
  act gcloud compute tpus tpu-vm ssh "$1" --project="$PROJECT" --zone="$ZONE" --worker="$2" \
    --command="$3"
}

on_all() { # COMMAND: on all hosts of all slices at once
  local node
  for node in $(nodes); do
    on_hosts "$node" all "$1" &
    [[ $dry ]] && wait
  done
  wait
}

create() {
  local script
  script=$(mktemp)
  write_startup >"$script"
  local flags=(--accelerator-type="$ACCELERATOR" --runtime-version="$RUNTIME"
    --metadata-from-file=startup-script="$script")
  if ((SLICES == 1)); then
    flags+=(--node-id="$NAME")
  else
    flags+=(--node-count="$SLICES" --node-prefix="$NAME")
  fi
  [[ $SPOT == yes ]] && flags+=(--spot)
  queue create "${flags[@]}"
  [[ -z $dry ]] || write_startup
  rm "$script"
}

state() {
  gcloud compute tpus queued-resources describe "$NAME" --project="$PROJECT" --zone="$ZONE" \
    --format='value(state.state)'
}

keep() {
  if [[ $dry ]]; then
    queue describe --format='value(state.state)'
    return
  fi
  while true; do
    local found
    # No state: there is no such request, or nobody answers. Then nothing is deleted: a slice that
    # runs meanwhile stays, since it cannot be created twice.
    found=$(state || true)
    case $found in
    SUSPENDED | FAILED | '')
      echo "$(date -u +%FT%TZ) $NAME is ${found:-not there}: asking for it again"
      [[ -z $found ]] || queue delete --force --quiet || true
      create || true
      ;;
    esac
    sleep "${KEEP_EVERY_S:-60}"
  done
}

case $verb in
create) create ;;
keep) keep ;;
status) queue describe --format='value(state.state)' ;;
logs) on_hosts "$(nodes | head -n 1)" 0 'sudo journalctl --unit=rpo_jax --follow --lines=200 --output=cat' ;;
stop) on_all 'sudo systemctl stop rpo_jax' ;;
run) on_all 'sudo systemctl restart rpo_jax' ;;
delete) queue delete --force --quiet ;;
esac
