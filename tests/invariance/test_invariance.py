"""Loss and gradients do not depend on how the work is cut, placed or recomputed.

Every case is compared with one plain program: one device, one micro-batch, no recomputation. The
bound is 1e-5 of each tensor's norm, in float32. A few chosen cases run in the fast tier, a set that
contains every pair of settings in the full tier, every way to cut the work as a campaign:

    JAX_DISABLE_MOST_OPTIMIZATIONS=1 pytest -m campaign tests/invariance -n 2

That takes an hour, most of it in the compiler, which is why it is told to hurry. What each part
gave goes to campaign.json as soon as it is known, so `-k` can run them a few at a time.
"""

import dataclasses
import itertools
import json
import random
import statistics
import subprocess
from functools import cache, partial
from pathlib import Path

import jax
import numpy as np
import pytest
from filelock import FileLock

from rpo_jax.config import Mesh
from rpo_jax.data.loader import make_batches
from rpo_jax.model import blocks
from rpo_jax.model.qwen2 import init_params
from rpo_jax.sharding.mesh import mesh_sizes
from rpo_jax.sharding.rules import batch_sharding, replicated
from rpo_jax.training.evaluation import put_batch
from rpo_jax.training.state import abstract_weights
from rpo_jax.training.step import compute_gradients
from rpo_jax.writing import write_json
from tests.tiny import (
    MESHES,
    NETWORK,
    SHAPE,
    make_config,
    make_work,
    pairs,
    refer,
    relative_difference,
    text_batch,
)

BOUND = 1e-5
FIGURES = Path(__file__).with_name("campaign.json")
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
    "attention": ("dense", "blocks"),
    "pairs_per_row": (1, 3),
    "row_sizes": (1, 3),
}
PLAIN = {name: values[0] for name, values in SETTINGS.items()} | {"mesh": "one"}
# Of these, on each mesh, the campaign runs every combination.
CUT = (
    "micro_batches",
    "share_prefix",
    "loss_chunk",
    "pairs_per_row",
    "row_sizes",
)
ROWS = 8


def is_possible(case):
    """The mesh must divide the rows of a micro-batch; text is packed when it is prepared."""
    sizes = mesh_sizes(*DEVICES[case["mesh"]])
    divides = ROWS // case["micro_batches"] % (sizes["data"] * sizes["fsdp"]) == 0
    return divides and (case["stage"] != "cpt" or case["pairs_per_row"] == case["row_sizes"] == 1)


@cache
def covering_cases():
    """Few cases that hold every possible pair of settings: of many drawn, what adds most."""
    rng = random.Random(0)
    items = [(name, value) for name, values in SETTINGS.items() for value in values]
    missing = {
        pair
        for pair in itertools.combinations(items, 2)
        if pair[0][0] != pair[1][0] and is_possible(PLAIN | {"stage": "rpo"} | dict(pair))
    }

    def draw(pair):
        while True:
            case = {name: rng.choice(values) for name, values in SETTINGS.items()} | dict(pair)
            if is_possible(case):
                return case

    chosen = []
    while missing:
        first = min(missing, key=str)
        drawn = [draw(first) for _ in range(100)]
        held = [set(itertools.combinations(case.items(), 2)) & missing for case in drawn]
        best = max(range(len(drawn)), key=lambda i: len(held[i]))
        missing -= held[best]
        chosen.append(drawn[best])
    return chosen


@cache
def weights():
    """Random ones at which nothing hides: biases and norms are drawn too."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: np.asarray(leaf) + 0.1 * rng.normal(size=leaf.shape).astype(np.float32),
        jax.jit(partial(init_params, TWO_LAYERS))(jax.random.key(0)),
    )


def make_batch(case, work):
    if case["stage"] == "cpt":
        return text_batch(ROWS)
    # Prompts of one token give rows that three pairs, or the least of the row sizes, can be in.
    records = [
        {**record, "prompt_ids": record["prompt_ids"][: 1 if i % 3 else None]}
        for i, record in enumerate(refer(pairs(ROWS)))
    ]
    arranged = {"arrange": work.arrange, "row_records": case["pairs_per_row"]}
    batches = make_batches(
        records,
        work.make_row,
        batch_rows=ROWS,
        seed=0,
        **(arranged if work.is_arranged else {}),
    )
    return next(batches)


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch):
    """Blocks shorter than the rows of these tests."""
    monkeypatch.setattr(blocks, "_BLOCK", 7)


def run(case):
    """(gradients, means) of a case."""
    mesh, count = DEVICES[case["mesh"]]
    devices = jax.devices()
    if case["permuted_devices"]:
        devices = [devices[i] for i in (5, 2, 7, 0, 3, 6, 1, 4)]
    network = dataclasses.replace(
        TWO_LAYERS, **{name: case[name] for name in ("remat", "scan_layers", "attention")}
    )
    variant = {"nll_tokens": "prompt+completion", "nll_norm": "batch_tokens"}
    config = make_config(
        case["stage"][:3],
        mesh=dataclasses.asdict(mesh),
        data={name: case[name] for name in ("pairs_per_row", "row_sizes")},
        train={name: case[name] for name in ("micro_batches", "loss_chunk", "keep_logits")},
        rpo={"share_prefix": case["share_prefix"]}
        | (variant if "prompts" in case["stage"] else {}),
    )
    work = make_work(config, network, devices[:count])
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract_weights(network, work.mesh))
    everywhere = replicated(work.mesh)
    with jax.set_mesh(work.mesh):
        gradients = jax.jit(
            partial(
                compute_gradients,
                work.objective,
                case["micro_batches"],
                row_sizes=work.row_sizes,
            ),
            in_shardings=(places, {}, everywhere, batch_sharding(work.mesh)),
            out_shardings=(places, everywhere),
        )
        batch = put_batch(make_batch(case, work), work.mesh)
        return jax.device_get(gradients(jax.device_put(weights(), places), {}, work.hyper, batch))


@cache
def plain(stage):
    return run(PLAIN | {"stage": stage})


def check(cases):
    """How far each case is from the plain result."""
    assert cases
    worst = {str(case): relative_difference(plain(case["stage"]), run(case)) for case in cases}
    assert max(worst.values()) < BOUND, max(worst, key=worst.__getitem__)
    return list(worst.values())


@pytest.mark.parametrize(
    "changes",
    [
        {"stage": "rpo", "mesh": "data2-fsdp2-tensor2", "permuted_devices": True, "loss_chunk": 5},
        {"stage": "cpt", "mesh": "fsdp4-seq2", "micro_batches": 2, "remat": "full"},
        {"stage": "rpo", "share_prefix": False, "scan_layers": False, "micro_batches": 4},
        {"stage": "rpo", "pairs_per_row": 3, "row_sizes": 3, "micro_batches": 4},
        {"stage": "rpo", "pairs_per_row": 3, "micro_batches": 2, "mesh": "data2-fsdp2-tensor2"},
        {"stage": "rpo", "row_sizes": 3, "micro_batches": 1, "attention": "blocks"},
    ],
    ids=lambda changes: " ".join(f"{v}" for v in changes.values()),
)
def test_chosen_cases_give_the_plain_result(changes):
    check([PLAIN | changes])


@pytest.mark.full
@pytest.mark.parametrize("mesh", DEVICES)
def test_covering_cases_give_the_plain_result(mesh):
    check([case for case in covering_cases() if case["mesh"] == mesh])


@pytest.mark.campaign
@pytest.mark.parametrize("kind", ["cpt", "rpo"])
@pytest.mark.parametrize("mesh", DEVICES)
def test_every_cut_gives_the_plain_result(mesh, kind):
    """The whole product of how the work is cut and placed; its variant, and what is computed
    again, are drawn.
    """
    rng = random.Random(0)
    drawn = {name: values for name, values in SETTINGS.items() if name not in CUT}
    drawn["stage"] = [stage for stage in SETTINGS["stage"] if stage.startswith(kind)]
    cut = {name: SETTINGS[name] for name in CUT}
    cases = [
        {name: rng.choice(values) for name, values in drawn.items()}
        | dict(zip(cut, values, strict=True))
        | {"mesh": mesh}
        for values in itertools.product(*cut.values())
    ]
    store(f"{mesh}, {kind}", check(list(filter(is_possible, cases))))


def store(name, differences):
    """Keeps how far the cases of a campaign were from the plain result, beside this file."""
    git = ["git", "rev-parse", "HEAD"]
    commit = subprocess.run(git, cwd=FIGURES.parent, capture_output=True, text=True, check=True)
    with FileLock(f"{FIGURES}.lock"):
        figures = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
        figures[name] = {
            "cases": len(differences),
            "worst": max(differences),
            "median": statistics.median(differences),
            "commit": commit.stdout.strip(),
            "optimised": not jax.config.read("jax_disable_most_optimizations"),
        }
        write_json(FIGURES, dict(sorted(figures.items())))
