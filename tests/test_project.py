"""The promises of the project's own files: commands, versions, imports, package data."""

import dataclasses
import importlib.metadata
import importlib.resources
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import rpo_jax
from rpo_jax.cli import load_config
from tests.benchmarks import pod_plans

REPO = Path(__file__).resolve().parents[1]
INSTALL = "python3 -m venv .venv && .venv/bin/pip install -q -c constraints.txt -e"
TEST = f'{INSTALL} ".[test]" && .venv/bin/pytest -n 2'
JOB = f"{INSTALL} . && .venv/bin/python -m rpo_jax.study"


def read(name: str) -> str:
    return (REPO / name).read_text(encoding="utf-8")


def run(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)


@pytest.mark.parametrize("command", [TEST, JOB], ids=["test", "job"])
def test_readme_command_is_what_ci_runs(command):
    blocks = re.findall(r"^```sh\n(.*?)^```$", read("README.md"), re.MULTILINE | re.DOTALL)
    assert command in [line for block in blocks for line in block.splitlines()]
    assert f"\nreadme '{command}'\n" in read(".ci/run")


def test_the_table_of_plans_is_of_its_figures_and_of_the_committed_configs():
    figures = json.loads(pod_plans.FIGURES.read_text(encoding="utf-8"))
    assert pod_plans.TABLE.read_text(encoding="utf-8") == pod_plans.format_tables(figures)
    for path, slice_, program in pod_plans.LINES:
        plan = figures["plans"][pod_plans.name_line(path, slice_, program)]
        config = load_config(str(REPO / path), pod_plans.OVERRIDES.get(program, ()))
        mesh = {axis: size for axis, size in dataclasses.asdict(config.mesh).items() if size > 1}
        assert {axis: size for axis, size in plan["mesh"].items() if size > 1} == mesh, path
        if program == "step":
            train = config.train
            laid_out = (train.batch_rows, train.micro_batches, config.model.remat)
            assert (plan["rows"], plan["micro_batches"], plan["remat"]) == laid_out, path
            assert plan["fits"], path


def test_installed_version_is_the_package_version():
    installed = importlib.metadata.version("rpo_jax")
    assert installed == rpo_jax.__version__, "installed from other sources: pip install -e . again"


def test_import_loads_nothing_heavy():
    heavy = {"absl", "flax", "grain", "jax", "jaxlib", "numpy", "optax", "tensorflow_datasets"}
    program = f"import sys, rpo_jax; print(sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


def test_import_of_any_module_changes_no_setting_and_queries_no_device():
    # No device can be queried: the platform does not exist.
    program = """
import importlib, os, pkgutil
os.environ["JAX_PLATFORMS"] = "none_such"
import flax, jax, optax, orbax.checkpoint, rpo_jax
before = dict(jax.config.values)
for module in pkgutil.walk_packages(rpo_jax.__path__, "rpo_jax."):
    importlib.import_module(module.name)
print({name: value for name, value in jax.config.values.items() if before.get(name) != value})
"""
    done = run(program)
    assert (done.returncode, done.stdout, done.stderr) == (0, "{}\n", "")


def test_package_data_is_there():
    package = importlib.resources.files("rpo_jax")
    assert (package / "py.typed").is_file()
    shapes = list((package / "model" / "shapes").iterdir())
    assert "qwen2.5-72b.json" in {path.name for path in shapes}
    for path in shapes:
        assert isinstance(json.loads(path.read_text(encoding="utf-8")), dict), path.name


def test_every_requirement_has_a_tested_version():
    pinned = re.findall(r"^([a-z0-9-]+)==", read("constraints.txt"), re.MULTILINE)
    required = importlib.metadata.requires("rpo_jax") or []
    names = {re.match(r"[\w.-]+", line)[0].lower().replace("_", "-") for line in required}
    assert names - set(pinned) == set()
