"""Loss and gradients do not depend on how the work is cut, placed or recomputed.

Every case is compared with one plain program: one device, one micro-batch, no recomputation. The
bound is 1e-5 of each tensor's norm, in float32. A few chosen cases run in the fast tier, a set that
contains every pair of settings in the full tier, the whole product as a campaign.
"""

import dataclasses
import itertools
from functools import cache, partial

import jax
import numpy as np
import pytest

from rpo_jax.config import Mesh
from rpo_jax.model.qwen2 import init_params
from rpo_jax.sharding.mesh import mesh_sizes
from rpo_jax.sharding.rules import batch_sharding, replicated
from rpo_jax.training.evaluation import put_batch
from rpo_jax.training.state import abstract_weights
from rpo_jax.training.step import compute_gradients
from tests.tiny import (
    MESHES,
    NETWORK,
    SHAPE,
    make_config,
    make_work,
    pair_batch,
    pairs,
    relative_difference,
    text_batch,
)

BOUND = 1e-5
TWO_LAYERS = dataclasses.replace(NETWORK, shape=dataclasses.replace(SHAPE, num_hidden_layers=2))

DEVICES = {  # mesh -> how many of the eight devices it takes
    "one": (Mesh(), 1),
    "fsdp2": (Mesh(data=1, fsdp=2), 2),
    "tensor2": (Mesh(data=1, tensor=2), 2),
    "seq2": (Mesh(data=1, seq=2), 2),
    "fsdp2-tensor2": (Mesh(data=1, fsdp=2, tensor=2), 4),
    **{name: (mesh, 8) for name, mesh in MESHES.items()},
}
SETTINGS = {
    "stage": ("cpt", "rpo", "rpo, token mean with prompts"),
    "mesh": tuple(DEVICES),
    "permuted_devices": (False, True),
    "micro_batches": (1, 2, 4),
    "share_prefix": (True, False),
    "loss_chunk": (100, 5, 1),
    "keep_logits": (False, True),
    "remat": ("none", "dots", "full"),
    "scan_layers": (True, False),
}
PLAIN = {name: values[0] for name, values in SETTINGS.items()} | {"mesh": "one"}
ROWS = 8


def is_possible(case):
    """The mesh must divide the rows of a micro-batch."""
    sizes = mesh_sizes(*DEVICES[case["mesh"]])
    return ROWS // case["micro_batches"] % (sizes["data"] * sizes["fsdp"]) == 0


@cache
def every_case():
    cases = (dict(zip(SETTINGS, v, strict=True)) for v in itertools.product(*SETTINGS.values()))
    return [case for case in cases if is_possible(case)]


@cache
def covering_cases():
    """Few cases that hold every possible pair of settings: the greedy choice, a case at a time."""
    pairs_of = [set(itertools.combinations(case.items(), 2)) for case in every_case()]
    missing = set().union(*pairs_of)
    chosen = []
    while missing:
        best = max(range(len(pairs_of)), key=lambda i: len(pairs_of[i] & missing))
        missing -= pairs_of[best]
        chosen.append(every_case()[best])
    return chosen


@cache
def weights():
    """Random ones at which nothing hides: biases and norms are drawn too."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: np.asarray(leaf) + 0.1 * rng.normal(size=leaf.shape).astype(np.float32),
        jax.jit(partial(init_params, TWO_LAYERS))(jax.random.key(0)),
    )


def make_batch(case):
    if case["stage"] == "cpt":
        return text_batch(ROWS)
    return pair_batch(pairs(ROWS), case["share_prefix"], prompt_targets="prompts" in case["stage"])


def run(case):
    """(gradients, means) of a case."""
    mesh, count = DEVICES[case["mesh"]]
    devices = jax.devices()
    if case["permuted_devices"]:
        devices = [devices[i] for i in (5, 2, 7, 0, 3, 6, 1, 4)]
    network = dataclasses.replace(TWO_LAYERS, remat=case["remat"], scan_layers=case["scan_layers"])
    variant = {"nll_tokens": "prompt+completion", "nll_norm": "batch_tokens"}
    config = make_config(
        case["stage"][:3],
        mesh=dataclasses.asdict(mesh),
        train={name: case[name] for name in ("micro_batches", "loss_chunk", "keep_logits")},
        rpo={"share_prefix": case["share_prefix"]}
        | (variant if "prompts" in case["stage"] else {}),
    )
    work = make_work(config, network, devices[:count])
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract_weights(network, work.mesh))
    everywhere = replicated(work.mesh)
    with jax.set_mesh(work.mesh):
        gradients = jax.jit(
            partial(compute_gradients, work.objective, case["micro_batches"]),
            in_shardings=(places, {}, everywhere, batch_sharding(work.mesh)),
            out_shardings=(places, everywhere),
        )
        batch = put_batch(make_batch(case), work.mesh)
        return jax.device_get(gradients(jax.device_put(weights(), places), {}, work.hyper, batch))


@cache
def plain(stage):
    return run(PLAIN | {"stage": stage})


def check(cases):
    assert cases
    worst = {str(case): relative_difference(plain(case["stage"]), run(case)) for case in cases}
    assert max(worst.values()) < BOUND, max(worst, key=worst.__getitem__)


@pytest.mark.parametrize(
    "changes",
    [
        {"stage": "rpo", "mesh": "data2-fsdp2-tensor2", "permuted_devices": True, "loss_chunk": 5},
        {"stage": "cpt", "mesh": "fsdp4-seq2", "micro_batches": 2, "remat": "full"},
        {"stage": "rpo", "share_prefix": False, "scan_layers": False, "micro_batches": 4},
    ],
    ids=lambda changes: f"{changes['stage']} {changes.get('mesh', 'one')}",
)
def test_chosen_cases_give_the_plain_result(changes):
    check([PLAIN | changes])


@pytest.mark.full
@pytest.mark.parametrize("mesh", DEVICES)
def test_covering_cases_give_the_plain_result(mesh):
    check([case for case in covering_cases() if case["mesh"] == mesh])


@pytest.mark.campaign
@pytest.mark.parametrize("stage", SETTINGS["stage"])
@pytest.mark.parametrize("mesh", DEVICES)
def test_every_case_gives_the_plain_result(mesh, stage):
    check([case for case in every_case() if (case["mesh"], case["stage"]) == (mesh, stage)])
