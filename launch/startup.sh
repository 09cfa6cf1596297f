#!/usr/bin/env bash
# Runs as root on every host of a slice, at each boot, below the settings and `act`, which runs or
# prints a command, that tpu_vm.sh puts first.
# Mounts the bucket and starts the job as a service: a slice that comes up anew goes on by itself.
# startup.sh --dry-run prints what it would do.
set -euo pipefail
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
  # What one host writes, the others must see at once: nothing about files is cached.
  act gcsfuse --implicit-dirs --rename-dir-limit=1000 --metadata-cache-ttl-secs=0 -o allow_other \
    "$BUCKET" /mnt/rpo
}

# docker stop sends SIGTERM: the run saves a checkpoint and ends. Status 2 is a mistake of the user's,
# which another try does not mend, 143 the answer to a stop; after anything else it is tried again.
write_unit() {
  cat <<EOF
[Unit]
Description=rpo_jax: $NAME
After=docker.service network-online.target
Requires=docker.service
StartLimitIntervalSec=0

[Service]
ExecStartPre=-/usr/bin/docker rm -f rpo_jax
ExecStart=/usr/bin/docker run --name=rpo_jax --privileged --network=host --ipc=host \\
  --volume=/mnt/rpo:/mnt/rpo --workdir=/mnt/rpo --env=JAX_COMPILATION_CACHE_DIR=/mnt/rpo/jax_cache \\
  $IMAGE $COMMAND --processes=$HOSTS
ExecStop=/usr/bin/docker stop --time=300 rpo_jax
TimeoutStopSec=330
Restart=on-failure
RestartPreventExitStatus=2 143
RestartSec=15

[Install]
WantedBy=multi-user.target
EOF
}

start_service() {
  if [[ $dry ]]; then
    write_unit
  else
    write_unit >/etc/systemd/system/rpo_jax.service
  fi
  act systemctl daemon-reload
  act systemctl enable --now rpo_jax.service
}

command -v gcsfuse >/dev/null || install_gcsfuse
mountpoint -q /mnt/rpo || mount_bucket
act gcloud auth configure-docker "${IMAGE%%/*}" --quiet
act docker pull "$IMAGE"
start_service
