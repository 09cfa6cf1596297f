#!/usr/bin/env bash
# A job on TPU VMs, through a queued resource.
#
#   launch/tpu_vm.sh create|keep|status|logs|stop|run|delete [--dry-run] [FILE.env]
#
#   create  queues the slice; once it is there, its startup script installs and runs the job
#   keep    watches over it, and asks again for a spot slice that was taken (none is restarted); blocks,
#           and ends when the job is done (DONE is in the bucket) or `delete` took the request away
#   status  the state of the request
#   logs    what process 0 says, as it says it; first what its startup script says
#   stop    the job saves a checkpoint and ends, on all hosts; the slice stays, and costs
#   run     starts it again
#   delete  gives the slice back
#
# --dry-run prints the commands instead. The default FILE is launch/72b_rpo.env. It sets, and values of
# the environment win:
#
#   NAME PROJECT ZONE              of the request
#   ACCELERATOR RUNTIME SPOT       the kind of slice: v5p-128, v2-alpha-tpuv5, yes or no
#   SLICES HOSTS                   how many, and the hosts of all together
#   BUCKET IMAGE                   where the files are, and the code
#   COMMAND                        what each host runs; by default made of TOPOLOGY and FLAGS
#   EXAM DONE                      paths in the bucket: the exam, and what is there when the job is done
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

usage() {
  sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
}

verb='' file=$here/72b_rpo.env dry=''
for argument in "$@"; do
  case $argument in
  --dry-run) dry=yes ;;
  *.env) file=$argument ;;
  create | keep | status | logs | stop | run | delete) verb=$argument ;;
  -h | --help)
    usage
    exit
    ;;
  *)
    echo "error: $argument: create, keep, status, logs, stop, run, delete, --dry-run, --help or a .env file is wanted" >&2
    exit 2
    ;;
  esac
done
if [[ -z $verb ]]; then
  usage >&2
  exit 2
fi
if [[ ! -r $file ]]; then
  echo "error: $file: cannot be read" >&2
  exit 2
fi
# shellcheck source=launch/72b_rpo.env
source "$file"

check_filled() { # NAMES...: refuses settings that are still what the file was shipped with
  local name kind=error
  # A dry run is there to be looked at, before there is an image, too.
  [[ -z $dry ]] || kind=warning
  for name in "$@"; do
    case ${!name} in
    my-project | my-bucket | */my-project/* | *sha256:my-digest | *...*)
      echo "$kind: $name=${!name}: a placeholder; give your own in $file or the environment" >&2
      [[ $dry ]] || exit 2
      ;;
    esac
  done
}

check_slices() { # refuses HOSTS and TOPOLOGY that the slices do not have: the job would wait, or fail there
  [[ $ACCELERATOR =~ ^(v4|v5p|v5litepod|v6e)-([0-9]+)$ ]] || return 0
  local kind=${BASH_REMATCH[1]/litepod/e} chips=${BASH_REMATCH[2]} hosts=1 largest=8 asked
  case $kind in
  v4 | v5p) chips=$((chips / 2)) largest=4 ;; # counted in cores
  esac
  ((chips <= largest)) || hosts=$((chips / 4))
  hosts=$((hosts * SLICES))
  if ((HOSTS != hosts)); then
    echo "error: HOSTS=$HOSTS, but SLICES=$SLICES of ACCELERATOR=$ACCELERATOR have $hosts" >&2
    exit 2
  fi
  # A command of one's own need not be made of it.
  [[ "$COMMAND " == *":${TOPOLOGY:=none} "* ]] || return 0
  [[ $TOPOLOGY =~ ^(([0-9]+)\*)?([a-z0-9]+):([0-9]+)x([0-9]+)(x([0-9]+))?$ ]] || return 0
  asked=$((BASH_REMATCH[4] * BASH_REMATCH[5] * ${BASH_REMATCH[7]:-1}))
  if ((asked != chips || ${BASH_REMATCH[2]:-1} != SLICES)) || [[ ${BASH_REMATCH[3]} != "$kind" ]]; then
    echo "error: TOPOLOGY=$TOPOLOGY, but SLICES=$SLICES of ACCELERATOR=$ACCELERATOR are $SLICES of $chips $kind chips" >&2
    exit 2
  fi
}

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
  for name in NAME BUCKET EXAM IMAGE COMMAND HOSTS; do
    printf '%s=%q\n' "$name" "${!name-}"
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

on_all() { # COMMAND: on all hosts of all slices at once; fails if it failed on one
  local node failed='' names=() jobs=()
  for node in $(nodes); do
    if [[ $dry ]]; then
      on_hosts "$node" all "$1"
      continue
    fi
    on_hosts "$node" all "$1" &
    names+=("$node") jobs+=($!)
  done
  local job
  # One by one: a bare `wait` forgets how they ended.
  for job in "${!jobs[@]}"; do
    if ! wait "${jobs[job]}"; then
      echo "error: ${names[job]}: not done on all of its hosts: $1" >&2
      failed=yes
    fi
  done
  [[ -z $failed ]]
}

create() {
  local script status=0
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
  queue create "${flags[@]}" || status=$?
  rm "$script"
  return "$status"
}

status() {
  queue describe --format='value(state.state)'
}

state() { # prints the state of the request, NOT_FOUND where there is none, nothing if nobody answers
  local said
  said=$(mktemp)
  if ! status 2>"$said"; then
    if grep -q NOT_FOUND "$said"; then
      echo NOT_FOUND
    else
      cat "$said" >&2
    fi
  fi
  rm "$said"
}

look_for_end() {
  act gcloud storage ls "gs://$BUCKET/$DONE"
}

say() {
  echo "$(date -u +%FT%TZ) $NAME $1"
}

keep() {
  if [[ $dry ]]; then
    echo '# each minute, until the first finds something (the job is done) or the second no request:'
    [[ -z ${DONE-} ]] || look_for_end
    status
    echo '# if that is SUSPENDED or FAILED:'
    queue delete --force --quiet
    create
    return
  fi
  local found known='' owed=''
  while true; do
    if [[ ${DONE-} ]] && look_for_end >/dev/null 2>&1; then
      say "is done: gs://$BUCKET/$DONE is there; \`delete\` gives the slice back"
      return
    fi
    found=$(state)
    case $found in
    SUSPENDED | FAILED)
      say "is $found: asking for it again"
      # From here on NOT_FOUND is our own doing, and not somebody's `delete`.
      known=yes owed=yes
      if queue delete --force --quiet && create; then
        owed=''
      fi
      ;;
    NOT_FOUND)
      if [[ $owed ]]; then
        say 'is not there yet: asking for it again'
        create && owed=''
      elif [[ $known ]]; then
        say 'was deleted: nothing is left to watch over'
        return
      else
        echo "error: there is no request $NAME; \`create\` asks for it" >&2
        return 1
      fi
      ;;
    # What may still run is neither deleted nor created twice.
    '') say 'has no state: nobody answers; waiting' ;;
    SUSPENDING | DELETING) known=yes ;;
    *) known=yes owed='' ;;
    esac
    sleep "${KEEP_EVERY_S:-60}"
  done
}

check_filled PROJECT ZONE
case $verb in
create | keep)
  check_filled BUCKET IMAGE
  check_slices
  ;;
esac

case $verb in
create)
  create
  [[ -z $dry ]] || write_startup
  ;;
keep) keep ;;
status) status ;;
# The startup script's own log too: when it fails there is no service yet.
logs)
  on_hosts "$(nodes | head -n 1)" 0 \
    'sudo journalctl --unit=google-startup-scripts --unit=rpo_jax --follow --lines=200 --output=cat'
  ;;
stop) on_all 'sudo systemctl stop rpo_jax' ;;
run) on_all 'sudo systemctl restart rpo_jax' ;;
delete) queue delete --force --quiet ;;
esac
