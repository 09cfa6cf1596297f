"""Every committed config of a slice or GPU, lowered for it: it traces, divides and pins."""

import importlib.util
from functools import cache
from pathlib import Path

import jax
import pytest

from rpo_jax.cli import load_config
from rpo_jax.model.qwen2 import make_network
from rpo_jax.model.shape import load_shape
from rpo_jax.sharding.gpus import GPUS
from rpo_jax.sharding.mesh import make_mesh
from rpo_jax.sharding.topology import open_topology
from rpo_jax.training.programs import abstract_run, lower_step
from rpo_jax.training.workload import make_workload

CONFIGS = Path(__file__).parents[2] / "configs"


@cache
def load(name):
    """A config file as a module, for its table of slices."""
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PODS = [
    (f"configs/{name}.py:{slice_}", slice_)
    for name in ("qwen25_72b_cpt", "qwen25_72b_rpo", "qwen25_72b_rpo_lora")
    for slice_ in load(name).SLICES
]
MID = [
    (f"configs/{name}.py:{size}", values[0])
    for name in ("qwen25_mid_cpt", "qwen25_mid_cpt_lora", "qwen25_mid_rpo", "qwen25_mid_rpo_lora")
    for size, values in load(name).SIZES.items()
]


def test_every_config_of_a_tpu_is_in_the_test():
    named = {path.name for path in CONFIGS.glob("qwen25_*.py")}
    assert named == {Path(path.partition(":")[0]).name for path, _ in PODS + MID}


@pytest.mark.full
@pytest.mark.parametrize(("path", "slice_"), PODS + MID)
def test_it_lowers_for_its_slice(path, slice_):
    name, _, count = slice_.partition(":")
    if name in GPUS:  # nothing in their programs is a GPU's own: devices of the CPU will do
        devices = jax.devices()[: int(count)]
    else:
        pytest.importorskip("libtpu", reason="lowering for TPUs wants libtpu: pip install .[tpu]")
        devices = open_topology(slice_).devices
    config = load_config(path)
    network = make_network(load_shape(config.model.shape), config.model, config.lora)
    work = make_workload(config, network, make_mesh(config.mesh, devices))
    text = lower_step(work, *abstract_run(work)).as_text()
    kernel = "tpu_custom_call" in text
    assert kernel == (name not in GPUS), "the attention kernel is in the programs of TPUs"
    assert text.count("sharding_constraint") >= 10
