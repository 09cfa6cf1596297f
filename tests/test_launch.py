"""The files of launch/: what they would do, to the letter, with a stand-in for gcloud."""

import json
import math
import os
import re
import shlex
import shutil
import subprocess
import time
from pathlib import Path

import jsonschema
import pytest
import yaml

from rpo_jax import cli, train
from rpo_jax.errors import UserError
from rpo_jax.training.distributed import OPTIONS

REPO = Path(__file__).resolve().parents[1]
LAUNCH = REPO / "launch"
SCHEMAS = REPO / "tests/schemas"
JOBSET = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())
STARTUP = (LAUNCH / "startup.sh").read_text()
RUNBOOK = (REPO / "docs/runbook.md").read_text(encoding="utf-8")
SKY = yaml.safe_load((LAUNCH / "sky.yaml").read_text())

STUB = """#!/usr/bin/env bash
# one write a call: two slices are asked at once, and their lines must not mix
printf '%s\\n' "$(printf '%s\\037' "${0##*/}" "$@")" >>"$CALLS"
for argument in "$@"; do
  case $argument in
  --metadata-from-file=startup-script=*) cp "${argument#*=*=}" "$CALLS.startup" ;;
  describe) # a state a line; after the last one it is always that
    state=$(head -n 1 "$CALLS.state")
    [[ $(wc -l <"$CALLS.state") -le 1 ]] || sed -i 1d "$CALLS.state"
    case $state in
    NOT_FOUND) echo "ERROR: NOT_FOUND: Resource 'rpo-72b' was not found" >&2; exit 1 ;;
    nobody) echo 'ERROR: the network cannot be reached' >&2; exit 1 ;;
    esac
    echo "$state"
    ;;
  storage) [[ -e $CALLS.done ]]; exit ;;
  "${FAILS:-nothing}") exit 1 ;;
  esac
done
"""
WHERE = ["--project=one-project", "--zone=us-east5-a"]
FILLED = {
    "PROJECT": "one-project",
    "BUCKET": "one-bucket",
    "IMAGE": "us-docker.pkg.dev/one-project/rpo/rpo_jax@sha256:0123",
}
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
        self.env = {"PATH": path, "CALLS": str(self.calls_file), "HOME": str(folder), **FILLED}

    def say(self, *states):
        """The answers to the next calls of `describe`; the last one stays."""
        text = "".join(f"{state}\n" for state in states)
        self.calls_file.with_name("calls.state").write_text(text)

    def verbs(self):
        """What was asked of the queued resource, or of the bucket, in order."""
        return [call[4] if call[1] == "compute" else call[1] for call in self.calls()]

    def keep(self, status=0, **env):
        return self.run("tpu_vm.sh", "keep", status=status, **{"KEEP_EVERY_S": "0.01", **env})

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


def print_startup(cloud):
    """What the startup script of the last request would do."""
    startup = cloud.calls_file.with_name("calls.startup")
    return subprocess.run(
        ["bash", str(startup), "--dry-run"],
        env=cloud.env,
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def started_words(printed):
    """The command of the service, as systemd takes it apart."""
    started = re.search(r"ExecStart=((?:.*\\\n)*.*)\n", printed)[1]
    return shlex.split(started.replace("\\\n", " "))


def test_create_queues_a_spot_slice_with_the_job_in_its_startup_script(cloud):
    cloud.run("tpu_vm.sh", "create")
    (call,) = cloud.calls()
    assert create_call(call) == [*CREATE, "--node-id=rpo-72b", "--spot"]
    printed = print_startup(cloud)
    assert (
        "gcsfuse --implicit-dirs --rename-dir-limit=10000 --metadata-cache-ttl-secs=0 " in printed
    )
    assert "docker pull us-docker.pkg.dev/one-project/rpo/rpo_jax@sha256:0123" in printed
    assert "\nExecStop=/usr/bin/docker stop --time=300 rpo_jax\n" in printed
    # Only a mistake is final: what a notice to one host ended must meet that host again.
    assert "\nRestart=on-failure\nRestartPreventExitStatus=2\n" in printed
    words = started_words(printed)
    assert words[:3] == ["/usr/bin/docker", "run", "--init"]
    assert "--workdir=/mnt/rpo" in words
    assert "--env=JAX_COMPILATION_CACHE_DIR=/mnt/rpo/jax_cache" in words
    assert "--env=IGAKUQA_DIR=/mnt/rpo/IgakuQA/data" in words
    assert_trains(words[words.index("python") :], processes=16)
    assert len(cloud.calls()) == 1  # the dry run did nothing


def test_at_each_boot_the_bucket_is_there_before_the_service_starts(cloud):
    cloud.run("tpu_vm.sh", "create")
    printed = print_startup(cloud)
    assert printed.index("\ngcsfuse ") < printed.index("\nsystemctl start rpo_jax.service")
    # nor does systemd start it by itself
    assert "[Install]" not in printed and "enable" not in printed


@pytest.mark.skipif(shutil.which("gcsfuse") is not None, reason="gcsfuse is here already")
def test_gcsfuse_is_installed_where_it_is_not(cloud, tmp_path):
    cloud.run("tpu_vm.sh", "create")
    (tmp_path / "gcsfuse").unlink()
    release = tmp_path / "lsb_release"
    release.write_text("#!/bin/sh\necho jammy\n")
    release.chmod(0o755)
    key, source, update, install = map(shlex.split, print_startup(cloud).splitlines()[:4])
    assert key[0] == "curl" and source[:2] == ["bash", "-c"]
    script = source[2].replace("/etc/apt/sources.list.d/", f"{tmp_path}/")
    assert script != source[2]
    subprocess.run(["bash", "-c", script], check=True)
    assert (tmp_path / "gcsfuse.list").read_text() == (
        f"deb [signed-by={key[-1]}] https://packages.cloud.google.com/apt gcsfuse-jammy main\n"
    )
    assert update[:2] == ["apt-get", "update"]
    assert install == ["apt-get", "install", "-qy", "gcsfuse"]


def test_flags_with_quotes_arrive_as_they_were(cloud):
    flags = "\"--config.data.pair.explanations=('explanations.jsonl',)\" --dry_run"
    cloud.run("tpu_vm.sh", "create", FLAGS=flags)
    words = started_words(print_startup(cloud))
    assert words[-3:-1] == ["--config.data.pair.explanations=('explanations.jsonl',)", "--dry_run"]


def test_one_host_runs_a_command_that_knows_no_processes(cloud):
    one = {"ACCELERATOR": "v6e-8", "HOSTS": "1", "COMMAND": "python -m rpo_jax.sample", "EXAM": ""}
    cloud.run("tpu_vm.sh", "create", **one)
    words = started_words(print_startup(cloud))
    assert words[-3:] == ["python", "-m", "rpo_jax.sample"]
    assert not any("IGAKUQA_DIR" in word for word in words)


def test_the_startup_script_is_tried_as_its_comment_says(cloud):
    (comment,) = re.findall(r"^# What it would do: (.*)$", STARTUP, re.MULTILINE)
    command = comment.replace("launch/", f"{LAUNCH}/").replace("FILE.env", "72b_cpt.env")
    done = subprocess.run(
        ["bash", "-c", command], cwd=LAUNCH, env=cloud.env, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "qwen25_72b_cpt.py:v5p:4x4x4" in done.stdout and not cloud.calls()
    told = cloud.run("startup.sh", "--dry-run", status=2)
    assert told.startswith("error: startup.sh wants the settings of a job above it")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PROJECT", "my-project"),
        ("BUCKET", "my-bucket"),
        ("IMAGE", "us-docker.pkg.dev/one-project/rpo/rpo_jax@sha256:my-digest"),
        ("IMAGE", "us-docker.pkg.dev/my-project/rpo/rpo_jax@sha256:0123"),
        ("ZONE", "..."),
    ],
)
def test_a_placeholder_is_refused_by_name(cloud, name, value):
    for verb in ("create", "keep"):
        told = cloud.run("tpu_vm.sh", verb, status=2, **{name: value})
        assert told.startswith(f"error: {name}={value}: a placeholder; give your own")
    # to be looked at before there is any of it
    cloud.run("tpu_vm.sh", "create", "--dry-run", **{name: value})
    assert not cloud.calls()


@pytest.mark.parametrize(
    ("accelerator", "slices", "hosts", "topology"),
    [
        ("v5p-128", 1, 16, "v5p:4x4x4"),
        ("v5p-8", 1, 1, "v5p:2x2x1"),
        ("v6e-256", 2, 128, "2*v6e:16x16"),
        ("v6e-8", 1, 1, "v6e:2x4"),
        ("v5litepod-16", 1, 4, "v5e:4x4"),
    ],
)
def test_the_hosts_are_those_of_the_slices(cloud, accelerator, slices, hosts, topology):
    asked = {"ACCELERATOR": accelerator, "SLICES": str(slices), "TOPOLOGY": topology}
    cloud.run("tpu_vm.sh", "create", HOSTS=str(hosts), **asked)
    told = cloud.run("tpu_vm.sh", "create", status=2, HOSTS=str(hosts + 1), **asked)
    assert told == (
        f"error: HOSTS={hosts + 1}, but SLICES={slices} of ACCELERATOR={accelerator} have {hosts}\n"
    )
    assert len(cloud.calls()) == 1


@pytest.mark.parametrize("topology", ["v5p:8x8x8", "v6e:8x8", "2*v5p:4x4x4"])
def test_the_topology_is_that_of_the_slices(cloud, topology):
    """Where a command is made of it: one that does not fit would fail on a slice that costs."""
    told = cloud.run("tpu_vm.sh", "create", status=2, TOPOLOGY=topology)
    assert told == (
        f"error: TOPOLOGY={topology}, but SLICES=1 of ACCELERATOR=v5p-128 are 1 of 64 v5p chips\n"
    )
    assert not cloud.calls()
    cloud.run("tpu_vm.sh", "create", TOPOLOGY=topology, COMMAND="python -m mine")
    assert len(cloud.calls()) == 1


def test_a_file_that_is_not_there_is_named(cloud):
    assert cloud.run("tpu_vm.sh", "create", "no.env", status=2) == "error: no.env: cannot be read\n"


def test_hosts_of_an_unknown_kind_are_taken_as_given(cloud):
    cloud.run("tpu_vm.sh", "create", ACCELERATOR="tpu9-64", HOSTS="3")
    assert len(cloud.calls()) == 1


def test_the_slices_of_the_runbook_are_slices_that_the_configs_have(cloud):
    row = (
        r"^\| `([\w-]+)`(?:, `SLICES=(\d)`)? \| `([\w-]+)` \| (\d+) \| (\d+) \| `(\S+)` \| (.*) \|$"
    )
    rows = re.findall(row, RUNBOOK, re.MULTILINE)
    assert len(rows) == 5
    for accelerator, slices, runtime, chips, hosts, topology, there in rows:
        asked = {"ACCELERATOR": accelerator, "RUNTIME": runtime, "SLICES": slices or "1"}
        asked |= {"HOSTS": hosts, "TOPOLOGY": topology}
        for stage, word in zip(("cpt", "rpo"), there.split(" | "), strict=True):
            cloud.run("tpu_vm.sh", "create", str(LAUNCH / f"72b_{stage}.env"), **asked)
            words = started_words(print_startup(cloud))
            if word == "yes":
                mesh = parse_command(words).mesh
                assert mesh.data * mesh.fsdp * mesh.seq * mesh.tensor == int(chips)
                assert int(chips) == 4 * int(hosts)
            else:
                with pytest.raises(UserError, match="is none of"):
                    parse_command(words)


def parse_command(words):
    """The config that the service's command, the end of these words, trains."""
    command = [word.replace("/rpo_jax/configs", str(REPO / "configs")) for word in words]
    return cli.parse(train.main, command[command.index("python") + 2 :], {"dry_run": ""}, OPTIONS)[
        0
    ]


def test_the_runbook_trains_adapters_on_one_small_host(cloud):
    (shown,) = re.findall(
        r"^export NAME=rpo-lora-72b.*?72b_rpo\.env$", RUNBOOK, re.MULTILINE | re.DOTALL
    )
    for old, new in {"ZONE=...": "", " --dry-run": "", " launch/": f" {LAUNCH}/"}.items():
        assert old in shown
        shown = shown.replace(old, new)
    flags = {"FLAGS": "--config.rpo.alpha=0.5"}
    subprocess.run(["bash", "-c", shown], env=cloud.env | flags, check=True)
    (call,) = cloud.calls()
    assert "rpo-lora-72b" in call and "--accelerator-type=v6e-4" in call
    words = started_words(print_startup(cloud))
    config = parse_command(words)
    assert (config.name, config.lora.quantize) == ("qwen25-72b-rpo-lora", "nf4")
    assert config.rpo.alpha == 0.5
    assert (config.mesh.data, config.mesh.fsdp, config.mesh.tensor) == (1, 4, 1)
    assert config.checkpoint.directory.startswith("gs://")
    assert not any(word.startswith("--processes") for word in words)


def test_the_flags_of_the_runbook_make_its_pairs(cloud):
    (shown,) = re.findall(r"^PAIRS=.*?^quoted\(\).*?$", RUNBOOK, re.MULTILINE | re.DOTALL)
    flags = r"""FLAGS="$(quoted "${PAIRS[@]}")" """
    command = f"{shown}\n{flags} bash {LAUNCH}/tpu_vm.sh create {LAUNCH}/72b_rpo.env"
    subprocess.run(["bash", "-c", command], env=cloud.env, check=True)
    words = started_words(print_startup(cloud))
    config = parse_command(words)
    assert config.data.source == "candidates"
    assert config.data.pair.explanations == ("explanations.jsonl",)


def assert_trains(words, processes, bucket="one-bucket"):
    """Checks that a command is one that `train` takes, on so many processes."""
    assert words[:3] == ["python", "-m", "rpo_jax.train"]
    here = [word.replace("/rpo_jax/configs", str(REPO / "configs")) for word in words[2:]]
    config, values = cli.parse(train.main, here, {"dry_run": ""}, OPTIONS)
    assert config.checkpoint.directory == f"gs://{bucket}/checkpoints"
    assert config.name == "qwen25-72b-rpo"
    assert (config.mesh.fsdp, config.mesh.tensor) == (16, 4)
    assert values["processes"] == str(processes)


def test_a_dry_run_of_create_and_keep_tells_and_does_nothing(cloud):
    call, _, startup = cloud.run("tpu_vm.sh", "create", "--dry-run").partition("\n")
    assert create_call(shlex.split(call)) == [*CREATE, "--node-id=rpo-72b", "--spot"]
    assert startup.startswith("#!/usr/bin/env bash\nNAME=rpo-72b\n")
    calls = [shlex.split(line, comments=True) for line in keep_lines(cloud)]
    assert [call[:2] + call[4:6] for call in calls if call] == [
        ["gcloud", "storage"],
        ["gcloud", "compute", "describe", "rpo-72b"],
        ["gcloud", "compute", "delete", "rpo-72b"],
        ["gcloud", "compute", "create", "rpo-72b"],
    ]
    assert not cloud.calls()


def keep_lines(cloud):
    return cloud.run("tpu_vm.sh", "keep", "--dry-run").splitlines()


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
    cloud.run("tpu_vm.sh", "create", SLICES="2", HOSTS="32", SPOT="no", TOPOLOGY="2*v5p:4x4x4")
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
                "--command=sudo journalctl --unit=google-startup-scripts --unit=rpo_jax --follow "
                "--lines=200 --output=cat",
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


@pytest.mark.parametrize("verb", ["stop", "run"])
def test_a_host_that_was_not_reached_is_a_failure_with_its_name(cloud, verb):
    told = cloud.run("tpu_vm.sh", verb, status=1, SLICES="2", FAILS="rpo-72b-0")
    assert re.findall(r"^error: (\S+): not done on all of its hosts", told, re.MULTILINE) == [
        "rpo-72b-0"
    ]
    assert len(cloud.calls()) == 2


@pytest.mark.parametrize("state", ["SUSPENDED", "FAILED"])
def test_keep_asks_again_for_a_slice_that_was_taken(cloud, state):
    cloud.say(state, "ACTIVE", "NOT_FOUND")
    said = cloud.keep(DONE="")
    assert f"rpo-72b is {state}: asking for it again" in said
    assert cloud.verbs() == ["describe", "delete", "create", "describe", "describe"]


def test_keep_ends_when_the_request_was_deleted(cloud):
    cloud.say("ACTIVE", "DELETING", "NOT_FOUND")
    assert "rpo-72b was deleted: nothing is left to watch over" in cloud.keep(DONE="")
    assert set(cloud.verbs()) == {"describe"}


def test_keep_ends_when_there_never_was_a_request(cloud):
    cloud.say("NOT_FOUND")
    assert cloud.keep(DONE="", status=1).startswith("error: there is no request rpo-72b; `create`")
    assert cloud.verbs() == ["describe"]


def test_keep_ends_when_the_job_is_done(cloud):
    cloud.say("SUSPENDED")
    cloud.calls_file.with_name("calls.done").touch()
    assert "rpo-72b is done: gs://one-bucket/runs/qwen25-72b-rpo/summary.json is" in cloud.keep()
    assert cloud.verbs() == ["storage"]  # a slice that was taken after the end is not asked for


def test_keep_does_nothing_while_nobody_answers(cloud):
    cloud.say("ACTIVE", "nobody", "nobody", "NOT_FOUND")
    said = cloud.keep(DONE="")
    assert said.count("has no state: nobody answers; waiting") == 2
    assert set(cloud.verbs()) == {"describe"}


def test_keep_goes_on_asking_when_creating_fails(cloud):
    cloud.say("SUSPENDED", "NOT_FOUND", "NOT_FOUND")
    process = subprocess.Popen(
        ["bash", str(LAUNCH / "tpu_vm.sh"), "keep"],
        env=cloud.env | {"KEEP_EVERY_S": "0.01", "DONE": "", "FAILS": "create"},
        stdout=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 300
    while cloud.verbs().count("create") < 3:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.terminate()
    process.wait()
    assert cloud.verbs().count("delete") == 1  # its own deleting is not taken for the user's


def test_what_it_does_not_know_it_refuses(cloud):
    assert "error: explode: create, keep," in cloud.run("tpu_vm.sh", "explode", status=2)
    assert cloud.calls() == []


def test_help_names_the_verbs_and_the_settings(cloud):
    told = cloud.run("tpu_vm.sh", "--help")
    settings = set(re.findall(r"^([A-Z]+)=", (LAUNCH / "72b_rpo.env").read_text(), re.MULTILINE))
    for word in (*settings, "create", "keep", "status", "logs", "stop", "run", "delete"):
        assert re.search(rf"\b{word}\b", told), word
    assert cloud.run("tpu_vm.sh", status=2) == told
    assert not cloud.calls()


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
    assert_trains(words, job["replicas"] * spec["parallelism"], bucket="my-bucket")
    assert pod["shareProcessNamespace"]  # or Python is process 1, deaf to an early SIGTERM
    (volume,) = pod["volumes"]
    assert "rename-dir-limit=10000," in volume["csi"]["volumeAttributes"]["mountOptions"]
    assert [mount["name"] for mount in container["volumeMounts"]] == [
        volume["name"] for volume in pod["volumes"]
    ]


def test_the_sky_task_runs_what_train_takes():
    names = {**SKY["envs"], "here": "/rpo_jax"}
    filled = re.sub(r"\$\{?(\w+)\}?", lambda found: names.get(found[1], ""), SKY["run"])
    last = filled.replace("\\\n", " ").splitlines()[-1]
    words = shlex.split(last.replace("/rpo_jax/.venv/bin/python", "python"))
    assert_trains(words, processes=16, bucket="my-bucket")
    # and CPT as the comment at its top says
    (cpt,) = re.findall(r"^# CPT.* CONFIG=(\S+)$", (LAUNCH / "sky.yaml").read_text(), re.MULTILINE)
    assert (REPO / "configs" / cpt.partition(":")[0]).is_file()
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
