"""The files of launch/: what they would do, to the letter, with a stand-in for gcloud."""

import json
import math
import os
import re
import shlex
import subprocess
import time
from pathlib import Path

import jsonschema
import pytest
import yaml

from rpo_jax import cli, train
from rpo_jax.training.distributed import OPTIONS

REPO = Path(__file__).resolve().parents[1]
LAUNCH = REPO / "launch"
SCHEMAS = REPO / "tests/schemas"
JOBSET = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())
SKY = yaml.safe_load((LAUNCH / "sky.yaml").read_text())

STUB = """#!/usr/bin/env bash
# one write a call: two slices are asked at once, and their lines must not mix
printf '%s\\n' "$(printf '%s\\037' "${0##*/}" "$@")" >>"$CALLS"
for argument in "$@"; do
  case $argument in
  --metadata-from-file=startup-script=*) cp "${argument#*=*=}" "$CALLS.startup" ;;
  describe) cat "$CALLS.state"; echo ACTIVE >"$CALLS.state" ;;
  esac
done
"""
WHERE = ["--project=my-project", "--zone=us-east5-a"]
QUEUE = ["gcloud", "compute", "tpus", "queued-resources"]
SSH = ["gcloud", "compute", "tpus", "tpu-vm", "ssh"]


class Cloud:
    """A shell in which gcloud and others only write down how they were called."""

    def __init__(self, folder):
        self.calls_file = folder / "calls"
        (folder / "calls.state").write_text("ACTIVE\n")
        for name in ("gcloud", "docker", "gcsfuse", "systemctl"):
            stub = folder / name
            stub.write_text(STUB)
            stub.chmod(0o755)
        path = f"{folder}:{os.environ['PATH']}"
        self.env = {"PATH": path, "CALLS": str(self.calls_file), "HOME": str(folder)}

    def run(self, script, *words, status=0, **env):
        command = ["bash", str(LAUNCH / script), *words]
        done = subprocess.run(
            command, env=self.env | env, capture_output=True, text=True, check=False, timeout=300
        )
        assert done.returncode == status, done.stderr
        return done.stdout if status == 0 else done.stderr

    def calls(self):
        if not self.calls_file.exists():
            return []
        text = self.calls_file.read_text()
        return [line.split("\x1f")[:-1] for line in text.splitlines()]


@pytest.fixture
def cloud(tmp_path):
    return Cloud(tmp_path)


def create_call(call):
    """A recorded call without the name of the file that the startup script was in."""
    return [re.sub(r"(startup-script=).*", r"\1FILE", word) for word in call]


CREATE = [
    *QUEUE,
    "create",
    "rpo-72b",
    *WHERE,
    "--accelerator-type=v5p-128",
    "--runtime-version=v2-alpha-tpuv5",
    "--metadata-from-file=startup-script=FILE",
]


def test_create_queues_a_spot_slice_with_the_job_in_its_startup_script(cloud):
    cloud.run("tpu_vm.sh", "create")
    (call,) = cloud.calls()
    assert create_call(call) == [*CREATE, "--node-id=rpo-72b", "--spot"]
    startup = cloud.calls_file.with_name("calls.startup")
    printed = subprocess.run(
        ["bash", str(startup), "--dry-run"],
        env=cloud.env,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "gcsfuse --implicit-dirs --rename-dir-limit=1000 --metadata-cache-ttl-secs=0 " in printed
    assert "docker pull us-docker.pkg.dev/my-project/rpo/rpo_jax@sha256:my-digest" in printed
    assert "systemctl enable --now rpo_jax.service" in printed
    assert "\nExecStop=/usr/bin/docker stop --time=300 rpo_jax\n" in printed
    # A mistake and a stop are final, anything else is tried again.
    assert "\nRestart=on-failure\nRestartPreventExitStatus=2 143\n" in printed
    started = re.search(r"ExecStart=((?:.*\\\n)*.*)\n", printed)[1].replace("\\\n", " ")
    words = shlex.split(started)
    assert words[:2] == ["/usr/bin/docker", "run"]
    assert "--workdir=/mnt/rpo" in words
    assert "--env=JAX_COMPILATION_CACHE_DIR=/mnt/rpo/jax_cache" in words
    assert_trains(words[words.index("python") :], processes=16)
    assert len(cloud.calls()) == 1  # the dry run did nothing


def assert_trains(words, processes):
    """Checks that a command is one that `train` takes, on so many processes."""
    assert words[:3] == ["python", "-m", "rpo_jax.train"]
    here = [word.replace("/rpo_jax/configs", str(REPO / "configs")) for word in words[2:]]
    config, values = cli.parse(train.main, here, {"dry_run": ""}, OPTIONS)
    assert config.checkpoint.directory == "gs://my-bucket/checkpoints"
    assert config.name == "qwen25-72b-rpo"
    assert (config.mesh.fsdp, config.mesh.tensor) == (16, 4)
    assert values["processes"] == str(processes)


def test_a_dry_run_of_create_and_keep_tells_and_does_nothing(cloud):
    call, _, startup = cloud.run("tpu_vm.sh", "create", "--dry-run").partition("\n")
    assert create_call(shlex.split(call)) == [*CREATE, "--node-id=rpo-72b", "--spot"]
    assert startup.startswith("#!/usr/bin/env bash\nNAME=rpo-72b\n")
    (call,) = cloud.run("tpu_vm.sh", "keep", "--dry-run").splitlines()
    assert shlex.split(call)[4:6] == ["describe", "rpo-72b"]
    assert not cloud.calls()


def test_each_job_trains_on_the_slice_that_it_asks_for(cloud):
    hosts = {"72b_rpo.env": 16, "72b_cpt.env": 16}
    assert {path.name for path in LAUNCH.glob("*.env")} == set(hosts)
    for file, count in hosts.items():
        told = cloud.run("tpu_vm.sh", "create", "--dry-run", str(LAUNCH / file))
        settings = dict(re.findall(r"^(HOSTS|COMMAND|NAME)=(.*)$", told, re.MULTILINE))
        assert settings["HOSTS"] == str(count)
        command = shlex.split(shlex.split(settings["COMMAND"])[0])
        here = [word.replace("/rpo_jax/configs", str(REPO / "configs")) for word in command[2:]]
        config, _ = cli.parse(train.main, here, {"dry_run": ""}, OPTIONS)
        assert config.stage in file and config.name == "qwen25-72b-" + config.stage
        mesh = config.mesh
        chips = mesh.data * mesh.fsdp * mesh.seq * mesh.tensor
        assert chips == 4 * count  # a v5p host has four
        assert f"--accelerator-type=v5p-{2 * chips}" in told


def test_several_slices_are_one_request(cloud):
    cloud.run("tpu_vm.sh", "create", SLICES="2", HOSTS="32", SPOT="no")
    (call,) = cloud.calls()
    assert create_call(call) == [*CREATE, "--node-count=2", "--node-prefix=rpo-72b"]
    startup = cloud.calls_file.with_name("calls.startup").read_text()
    assert "\nHOSTS=32\n" in startup


@pytest.mark.parametrize(
    ("verb", "wanted"),
    [
        ("status", [*QUEUE, "describe", "rpo-72b", *WHERE, "--format=value(state.state)"]),
        ("delete", [*QUEUE, "delete", "rpo-72b", *WHERE, "--force", "--quiet"]),
        (
            "logs",
            [
                *SSH,
                "rpo-72b",
                *WHERE,
                "--worker=0",
                "--command=sudo journalctl --unit=rpo_jax --follow --lines=200 --output=cat",
            ],
        ),
        (
            "stop",
            [*SSH, "rpo-72b", *WHERE, "--worker=all", "--command=sudo systemctl stop rpo_jax"],
        ),
        (
            "run",
            [*SSH, "rpo-72b", *WHERE, "--worker=all", "--command=sudo systemctl restart rpo_jax"],
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_verb_is_one_call(cloud, verb, wanted):
    cloud.run("tpu_vm.sh", verb)
    assert cloud.calls() == [wanted]
    # and a dry run prints that call, and makes none
    printed = cloud.run("tpu_vm.sh", verb, "--dry-run")
    assert shlex.split(printed) == wanted
    assert len(cloud.calls()) == 1


def test_all_slices_are_told_to_stop(cloud):
    cloud.run("tpu_vm.sh", "stop", SLICES="2")
    assert sorted(call[5] for call in cloud.calls()) == ["rpo-72b-0", "rpo-72b-1"]


@pytest.mark.parametrize(
    ("state", "calls"),
    [
        ("SUSPENDED\n", ["describe", "delete", "create", "describe", "describe"]),
        ("FAILED\n", ["describe", "delete", "create", "describe", "describe"]),
        # Nobody answered: what may still run is not deleted.
        ("", ["describe", "create", "describe", "describe"]),
    ],
    ids=["suspended", "failed", "unknown"],
)
def test_keep_asks_again_for_a_slice_that_was_taken(cloud, state, calls):
    cloud.calls_file.with_name("calls.state").write_text(state)
    process = subprocess.Popen(
        ["bash", str(LAUNCH / "tpu_vm.sh"), "keep"],
        env=cloud.env | {"KEEP_EVERY_S": "0.1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 300
    while len(cloud.calls()) < len(calls):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.terminate()
    said, _ = process.communicate()
    assert f"rpo-72b is {state.strip() or 'not there'}: asking for it again" in said
    assert [call[4] for call in cloud.calls()][: len(calls)] == calls


def test_what_it_does_not_know_it_refuses(cloud):
    assert "error: explode: create, keep," in cloud.run("tpu_vm.sh", "explode", status=2)
    assert cloud.calls() == []


@pytest.mark.parametrize(
    ("schema", "document"), [("jobset", JOBSET), ("skypilot", SKY)], ids=["jobset", "skypilot"]
)
def test_a_yaml_is_what_its_schema_says(schema, document):
    jsonschema.validate(document, json.loads((SCHEMAS / f"{schema}.json").read_text()))


def test_the_jobset_has_a_process_for_each_host_of_its_slices():
    (job,) = JOBSET["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert spec["parallelism"] == spec["completions"]
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    chips = math.prod(map(int, topology.split("x")))
    assert chips == spec["parallelism"] * container["resources"]["limits"]["google.com/tpu"]
    words = [word.replace("BUCKET", "my-bucket") for word in container["command"]]
    assert_trains(words, processes=job["replicas"] * spec["parallelism"])
    assert [mount["name"] for mount in container["volumeMounts"]] == [
        volume["name"] for volume in pod["volumes"]
    ]


def test_the_sky_task_runs_what_train_takes():
    names = {**SKY["envs"], "here": "/rpo_jax"}
    filled = re.sub(r"\$\{?(\w+)\}?", lambda found: names.get(found[1], ""), SKY["run"])
    last = filled.replace("\\\n", " ").splitlines()[-1]
    words = shlex.split(last.replace("/rpo_jax/.venv/bin/python", "python"))
    assert_trains(words, processes=16)
    assert list(SKY["file_mounts"]) == ["/mnt/rpo"] and "cd /mnt/rpo\n" in SKY["run"]


def test_the_image_holds_what_it_needs():
    """No docker here: at least every file that is copied exists, and the extras do."""
    text = (LAUNCH / "Dockerfile").read_text()
    for line in re.findall(r"^COPY (.*)$", text, re.MULTILINE):
        for name in line.split()[:-1]:
            assert (REPO / name).exists(), name
    extras = re.search(r'"\.\[([\w,]+)\]"', text)[1].split(",")
    setup = (REPO / "setup.py").read_text()
    assert all(f'"{extra}": [' in setup for extra in extras)
