"""Plans for GPUs, by jax's own compiler for them: memory by kind, and no word of time."""

import dataclasses

import pytest

from rpo_jax import plan as command
from rpo_jax.errors import UserError
from rpo_jax.sharding.gpus import GPUS
from rpo_jax.sharding.topology import open_topology
from rpo_jax.training.estimate import plan_program
from tests.tiny import SHAPE, make_config

WIDE = dataclasses.replace(SHAPE, hidden_size=256, intermediate_size=512, vocab_size=4096)


def run_on(fsdp):
    return make_config(
        "rpo",
        model={"attention": "dense", "compute_dtype": "bfloat16", "remat": "full"},
        data={"prompt_length": 128, "response_length": 64},
        mesh={"data": 1, "fsdp": fsdp},
        train={"batch_rows": 4},
    )


@pytest.fixture
def compiler():
    name = "jax_plugins.xla_cuda12"
    pytest.importorskip(name, reason="compiling for GPUs wants the extra `cuda`")


def test_a_step_compiles_for_gpus_that_are_not_here(compiler, tmp_path):
    one, four = (
        plan_program("step", run_on(count), WIDE, open_topology(f"h100:{count}"), tmp_path, 1e9)
        for count in (1, 4)
    )
    assert one["fits"] and four["fits"]
    assert (one["chips"], four["chips"], four["mesh"]) == (1, 4, {"fsdp": 4})
    sizes = one["hbm_gb"]
    assert sizes["chip"] == pytest.approx(0.75 * GPUS["h100"].memory_mib * 2**20 / 1e9, abs=0.01)
    assert sizes["temporaries"] > 0
    assert one["model_tflops"] == four["model_tflops"]
    assert "seconds" not in one and "jax-cuda12-pjrt" in one["versions"]
    told = command.format_plan(one)
    assert "unknown: the compiler for GPUs counts no cycles" in told
    assert "fits" in told and "jax-cuda12-pjrt" in told and "MFU" not in told
    with pytest.raises(UserError, match="ranks by time, which is unknown of a GPU: h100:1"):
        command.main(run_on(1), topology="h100:1", search=True)


def test_what_does_not_fit_a_gpu_says_by_how_much(compiler, tmp_path, monkeypatch):
    small = dataclasses.replace(GPUS["l4"], memory_mib=32)
    monkeypatch.setitem(GPUS, "small", small)
    found = plan_program("step", run_on(1), WIDE, open_topology("small:1"), tmp_path, 1e9)
    assert not found["fits"] and found["too_large_by_gb"] > 0
    assert "DOES NOT FIT" in command.format_plan(found)


@pytest.mark.parametrize("name", ["l5:1", "h100:9", "h100:0", "2*h100:1"])
def test_what_is_no_gpu_is_refused(name):
    with pytest.raises(UserError, match=r"wanted is .*GPUs of one host: l4, a100, h100 \(h100:8\)"):
        open_topology(name)


def test_without_the_compiler_the_extra_is_named(monkeypatch):
    def lack(**_):
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", lack)
    with pytest.raises(UserError, match=r"cannot be loaded \(topology not .*\.\[cuda\]"):
        open_topology("a100:3")
