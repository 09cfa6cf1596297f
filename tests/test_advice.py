"""What a program that does not fit is told: only what would help it."""

import dataclasses

import jax
import pytest

from rpo_jax.sharding.chips import CHIPS
from rpo_jax.sharding.topology import Topology
from rpo_jax.training.estimate import advise
from rpo_jax.training.programs import make_job
from tests.tiny import SHAPE, make_config

WIDE = dataclasses.replace(SHAPE, hidden_size=256, intermediate_size=512, num_key_value_heads=4)

REMAT = "--config.model.remat=full recomputes layers instead of keeping them"
FINER = "--config.train.micro_batches={}: fewer rows at once"
CUT = "a larger {} cuts each row's activations"
COPIES = "mesh.data=4 holds as many copies of {}: 1 will do, with a larger mesh.fsdp"
HALF = "--config.model.param_dtype=bfloat16: weights in half the bytes"
ADAPTERS = "--config.lora.rank trains adapters, and the rest has no optimizer's moments"
NF4 = "--config.lora.quantize=nf4: frozen kernels in four bits"
CACHE = "a smaller {}: the cache takes {} GB a chip"
HALF_CACHE = "--config.model.compute_dtype=bfloat16: weights and cache in half the bytes"
CHIPS_WANTED = "{} alone take 30.0 GB a chip: about 8 chips"  # twice the four that are there

STATE, SLOTS = "weights and optimizer", "data.prompt_length or data.response_length"
BF16 = {"param_dtype": "bfloat16", "compute_dtype": "bfloat16", "remat": "full"}
COPIED = {"data": 4, "fsdp": 2, "tensor": 1}
LORA = {"rank": 4}


def ask(program, stage="rpo", each=2.0, slices=1, **changes):
    """Advice on eight devices of four v4 chips, where each kind of state takes so many GB."""
    mesh = {"data": 1, "fsdp": 4, "tensor": 2} | changes.pop("mesh", {})
    config = make_config(stage, **changes, mesh=mesh)
    topology = Topology("v4:2x2x1", CHIPS["v4"], slices, jax.devices())
    job = make_job(program, config, WIDE, topology.devices)
    state = dict.fromkeys([*job.holds, *job.beside], each)
    return advise(job, topology, state, used=40.0, limit=32.7)


@pytest.mark.parametrize("program", ["step", "reference"])
def test_fewer_rows_at_once_are_a_count_that_divides_them(program):
    assert ask(program, model=BF16) == [FINER.format(2)]
    odd = {"batch_rows": 12, "micro_batches": 2}
    mesh = {"fsdp": 1, "seq": 4}
    assert ask(program, model=BF16, train=odd, mesh=mesh) == [FINER.format(3)]


@pytest.mark.parametrize("program", ["step", "reference"])
@pytest.mark.parametrize(
    ("mesh", "axes"),
    [
        ({}, "mesh.seq or mesh.tensor"),
        ({"fsdp": 2, "tensor": 4}, "mesh.seq"),  # of four heads of keys and values
        ({"fsdp": 1, "seq": 2, "tensor": 4}, ""),
    ],
    ids=str,
)
def test_of_single_rows_the_activations_are_cut(program, mesh, axes):
    alone = {"batch_rows": mesh.get("fsdp", 4)}
    told = [CUT.format(axes)] if axes else []
    assert ask(program, model=BF16, train=alone, mesh=mesh) == told


def test_only_a_step_keeps_layers():
    assert ask("step") == [REMAT, FINER.format(2)]
    assert ask("reference") == [FINER.format(2)]
    assert REMAT not in ask("decode")


@pytest.mark.parametrize(
    ("program", "copied"), [("step", STATE), ("reference", STATE), ("decode", "weights")]
)
def test_copies_over_data_are_named(program, copied):
    assert COPIES.format(copied) in ask(program, mesh=COPIED)
    # Slices are joined along it, so that it can be no less.
    assert not any("copies" in told for told in ask(program, mesh=COPIED, slices=4))


@pytest.mark.parametrize("program", ["step", "reference"])
@pytest.mark.parametrize(
    ("model", "lora", "told"),
    [
        ({"remat": "full"}, {}, [HALF, ADAPTERS]),
        (BF16, {}, [ADAPTERS]),
        ({"remat": "full"}, LORA, [HALF, NF4]),
        (BF16, LORA, [NF4]),
        (BF16, {**LORA, "quantize": "int8"}, [NF4]),
        (BF16, {**LORA, "quantize": "nf4"}, []),
    ],
    ids=str,
)
def test_large_weights_may_be_held_in_fewer_bytes(program, model, lora, told):
    found = ask(program, each=15.0, model=model, lora=lora)
    assert found == [FINER.format(2), *told, CHIPS_WANTED.format(STATE)]
    assert ask(program, model=model, lora=lora) == [FINER.format(2)]


def test_decoding_is_told_of_its_cache():
    assert ask("decode") == [CACHE.format(SLOTS, 2.0), HALF_CACHE]
    assert ask("decode", "cpt", model=BF16) == [CACHE.format("data.row_length", 2.0)]
    found = ask("decode", each=15.0, model=BF16, lora=LORA)
    assert found == [CACHE.format(SLOTS, 15.0), CHIPS_WANTED.format("weights and cache")]
