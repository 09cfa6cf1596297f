#!/usr/bin/env bash
# Runs as root on every host of a slice, at each boot, below the settings and `act`, which runs or
# prints a command, that tpu_vm.sh puts first: it is no script by itself.
# Mounts the bucket and starts the job as a service: a slice that comes up anew goes on by itself.
# What it would do: launch/tpu_vm.sh create --dry-run FILE.env | tail -n +2 | bash -s -- --dry-run
set -euo pipefail
if ! declare -F act >/dev/null; then
  echo 'error: startup.sh wants the settings of a job above it: see launch/tpu_vm.sh create --dry-run' >&2
  exit 2
fi
dry=''
[[ ${1:-} == --dry-run ]] && dry=yes

install_gcsfuse() {
  local key=/usr/share/keyrings/cloud.google.asc
  local source
  source="deb [signed-by=$key] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main"
  act curl -fsSL https://packages.cloud.google.com/apt/doc/apt-key.gpg -o "$key"
  act bash -c "echo '$source' >/etc/apt/sources.list.d/gcsfuse.list"
  act apt-get update -q
  act apt-get install -qy gcsfuse
}

mount_bucket() {
  act mkdir -p /mnt/rpo
  # What one host writes, the others must see at once: nothing about files is cached. A folder gets its
  # name when it is whole; the weights of the 72B are 5,217 files.
  act gcsfuse --implicit-dirs --rename-dir-limit=10000 --metadata-cache-ttl-secs=0 -o allow_other \
    "$BUCKET" /mnt/rpo
}

# docker stop sends SIGTERM: the run saves a checkpoint and ends on all hosts, with 143. So it does after a
# notice to one host, which must find the others when it is back: 143 is tried again, and nothing but
# `systemctl stop` keeps a host down. One that it has not reached yet starts again, and waits for those
# that it has. Status 2 is a mistake of the user's, which another try does not mend; after anything else it
# is tried again, 75 among them: a host that is late or gone, a store that does not answer.
# --init: as process 1, Python would not end by a SIGTERM that comes before it listens for one.
write_unit() {
  local processes='' exam=''
  # `sample` and `evaluate` run on one host, and know no --processes.
  ((HOSTS == 1)) || processes=" --processes=$HOSTS"
  [[ -z $EXAM ]] || exam=" --env=IGAKUQA_DIR=/mnt/rpo/$EXAM"
  cat <<EOF
[Unit]
Description=rpo_jax: $NAME
After=docker.service network-online.target
Requires=docker.service
StartLimitIntervalSec=0

[Service]
ExecStartPre=-/usr/bin/docker rm -f rpo_jax
ExecStart=/usr/bin/docker run --init --name=rpo_jax --privileged --network=host --ipc=host \\
  --volume=/mnt/rpo:/mnt/rpo --workdir=/mnt/rpo --env=JAX_COMPILATION_CACHE_DIR=/mnt/rpo/jax_cache$exam \\
  $IMAGE $COMMAND$processes
ExecStop=/usr/bin/docker stop --time=300 rpo_jax
TimeoutStopSec=330
Restart=on-failure
RestartPreventExitStatus=2
RestartSec=15
EOF
}

start_service() {
  if [[ $dry ]]; then
    write_unit
  else
    write_unit >/etc/systemd/system/rpo_jax.service
  fi
  act systemctl daemon-reload
  # Not enabled: after a reboot it waits for this script, which mounts the bucket.
  act systemctl start rpo_jax.service
}

command -v gcsfuse >/dev/null || install_gcsfuse
mountpoint -q /mnt/rpo || mount_bucket
act gcloud auth configure-docker "${IMAGE%%/*}" --quiet
act docker pull "$IMAGE"
start_service
