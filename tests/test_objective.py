"""What a stage minimises, and the step around it: against float64, by hand, and by invariants."""

import dataclasses
import math
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rpo_jax.config import Optim, Rpo
from rpo_jax.data.packing import Size
from rpo_jax.data.rows import CHOSEN, PROMPT, REJECTED
from rpo_jax.model.qwen2 import forward, init_params
from rpo_jax.training.evaluation import put_batch
from rpo_jax.training.objective import divide, make_hyper
from rpo_jax.training.optim import clip_factor, make_optimizer
from rpo_jax.training.state import abstract_state, make_params, start_from
from rpo_jax.training.step import (
    choose_size,
    compute_gradients,
    cut_rows,
    make_measure,
    make_score,
    make_step,
)
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

SMALL = dataclasses.replace(NETWORK, shape=dataclasses.replace(SHAPE, num_hidden_layers=1))
ADAM = optax.scale_by_adam()


@pytest.fixture(scope="module")
def params():
    return jax.jit(partial(init_params, SMALL))(jax.random.key(0))


@pytest.fixture(scope="module")
def means_of(params):
    """`(config, batch) -> means` of the forward pass and the loss, compiled once a variant."""

    @cache
    def compiled(nll_tokens, nll_norm):
        config = make_config(rpo={"nll_tokens": nll_tokens, "nll_norm": nll_norm})
        objective = make_work(config, SMALL).objective

        def means(params, hyper, batch):
            means = divide(objective.sums(params, batch, hyper), objective.counts(batch))
            return means | {"loss": objective.loss(means, hyper)}

        return jax.jit(means)

    def run(config, batch):
        rpo = config.rpo
        return compiled(rpo.nll_tokens, rpo.nll_norm)(params, make_hyper(rpo, 1e-3), batch)

    return run


def float64_logps(params, batch):
    """Log-probabilities of all targets [B, M]: our hidden states, then numpy in float64."""
    ids = [batch[name] for name in ("tokens", "segment_ids", "branch_ids", "positions")]
    hidden = jax.jit(partial(forward, SMALL))(params, *ids)
    hidden = np.take_along_axis(np.asarray(hidden), batch["target_index"][..., None], axis=1)
    logits = hidden.astype(np.float64) @ np.asarray(params["head"]["table"], np.float64).T
    top = logits.max(-1, keepdims=True)
    logz = np.log(np.exp(logits - top).sum(-1)) + top[..., 0]
    return np.take_along_axis(logits, batch["labels"][..., None], -1)[..., 0] - logz


def float64_rpo(logps, batch, rpo):
    """Equation 1 of arXiv:2404.19733v3, a pair and a token at a time: the means (dpo, nll)."""
    dpo, nll, lengths = [], [], []
    for row, logps_M in enumerate(logps):
        ratio = {CHOSEN: 0.0, REJECTED: 0.0}
        trained = []
        for m, logp in enumerate(logps_M):
            side = int(batch["target_side"][row, m])
            if not batch["target_mask"][row, m]:
                continue
            if side != PROMPT:
                ratio[side] += logp - float(batch["reference_logps"][row, m])
            if side == CHOSEN or (side == PROMPT and rpo.nll_tokens == "prompt+completion"):
                trained.append(logp)
        z = rpo.beta * (ratio[CHOSEN] - ratio[REJECTED])
        s = rpo.label_smoothing
        dpo.append((1 - s) * np.logaddexp(0, -z) + s * np.logaddexp(0, z))
        nll.append(-sum(trained))
        lengths.append(len(trained))
    if rpo.nll_norm == "batch_tokens":
        return np.mean(dpo), sum(nll) / sum(lengths)
    return np.mean(dpo), np.mean([n / length for n, length in zip(nll, lengths, strict=True)])


@pytest.mark.parametrize(
    "rpo",
    [
        {},
        {"alpha": 0.25, "beta": 0.7, "label_smoothing": 0.2},
        {"nll_norm": "batch_tokens"},
        {"nll_tokens": "prompt+completion", "alpha": 2.0},
        {"nll_tokens": "prompt+completion", "nll_norm": "batch_tokens", "beta": 0.01},
    ],
    ids=str,
)
def test_loss_is_equation_1_in_float64(params, means_of, rpo):
    config = make_config(rpo=rpo)
    batch = pair_batch(pairs(), prompt_targets=True)
    found = means_of(config, batch)
    dpo, nll = float64_rpo(float64_logps(params, batch), batch, config.rpo)
    np.testing.assert_allclose(found["dpo"], dpo, rtol=1e-6)
    np.testing.assert_allclose(found["nll"], nll, rtol=1e-6)
    np.testing.assert_allclose(found["loss"], dpo + config.rpo.alpha * nll, rtol=1e-6)


def test_nll_variants_by_hand(params, means_of):
    """Two pairs, chosen responses of 2 and 4 tokens after prompts of 3 and 5; six empty rows."""
    one = np.ones(1, np.int32)
    records = [
        {"prompt_ids": np.tile(one, n), "chosen_ids": np.tile(2 * one, m), "rejected_ids": 3 * one}
        for n, m in [(3, 2), (5, 4)]
    ]
    batch = fill_up(pair_batch(records, prompt_targets=True), 6)
    logps = float64_logps(params, batch) * batch["target_mask"]
    chosen = (logps * (batch["target_side"] == CHOSEN)).sum(1)
    prompt = (logps * (batch["target_side"] == PROMPT)).sum(1)
    both = chosen + prompt
    by_hand = {
        ("completion", "sequence"): -(chosen[0] / 2 + chosen[1] / 4) / 2,
        ("completion", "batch_tokens"): -(chosen[0] + chosen[1]) / 6,  # TRL's token mean
        ("prompt+completion", "sequence"): -(both[0] / (2 + 2) + both[1] / (4 + 4)) / 2,
        ("prompt+completion", "batch_tokens"): -(both[0] + both[1]) / (4 + 8),
    }
    for (nll_tokens, nll_norm), wanted in by_hand.items():
        config = make_config(rpo={"nll_tokens": nll_tokens, "nll_norm": nll_norm})
        found = means_of(config, batch)
        np.testing.assert_allclose(found["nll"], wanted, rtol=1e-6, err_msg=nll_norm + nll_tokens)


def fill_up(batch, rows):
    """The batch with empty rows at its end, as the loader fills up the last batch of a set."""
    return {name: np.pad(v, [(0, rows)] + [(0, 0)] * (v.ndim - 1)) for name, v in batch.items()}


@cache
def program(mesh=None, micro_batches=1):
    """(work, abstract state, jitted step) of the small network, compiled once."""
    changes = {"mesh": dataclasses.asdict(MESHES[mesh])} if mesh else {}
    config = make_config(train={"micro_batches": micro_batches}, **changes)
    work = make_work(config, SMALL, jax.devices()[: 8 if mesh else 1])
    abstract = abstract_state(SMALL, ADAM, work.mesh)
    return work, abstract, make_step(work, ADAM, abstract)


@pytest.mark.parametrize(
    ("mesh", "micro_batches"), [(None, 1), ("data2-fsdp2-tensor2", 2)], ids=["one", "eight"]
)
def test_step_0_stands_at_the_reference(mesh, micro_batches):
    """The reference of the same program: ln 2, and margins that are exactly 0."""
    work, abstract, step = program(mesh, micro_batches)
    batch = pair_batch(pairs(), reference=False)
    with jax.set_mesh(work.mesh):
        state = start_from(make_params(SMALL, work.mesh, seed=0), ADAM, abstract)
        score = make_score(work, abstract.params)
        scored = [
            np.asarray(score(state.params, put_batch(part, work.mesh)))
            for part in _parts(batch, micro_batches)
        ]
        batch["reference_logps"] = np.concatenate(scored)
        measure = make_measure(work, abstract.params)
        sums, counts = measure(state.params, work.hyper, put_batch(batch, work.mesh))
        noise = np.random.default_rng(0).normal(0, 1e-6, batch["reference_logps"].shape)
        noisy = batch | {"reference_logps": batch["reference_logps"] + noise.astype(np.float32)}
        tied = divide(*measure(state.params, work.hyper, put_batch(noisy, work.mesh)))
        _, stepped = step(state, {}, work.hyper, put_batch(batch, work.mesh))
    for means in (divide(sums, counts), stepped):
        assert abs(float(means["dpo"]) - math.log(2)) < 1e-6
        # A margin above 0 counts 1, one at 0, or within rounding of it, a half.
        assert float(means["margin"]) == 0.0
        assert float(means["reward_accuracy"]) == 0.5
        assert float(means["chosen_log_ratio"]) == float(means["rejected_log_ratio"]) == 0.0
    # As another cut of the work rounds.
    assert float(tied["margin"]) != 0.0 and float(tied["reward_accuracy"]) == 0.5


def _parts(batch, count):
    rows = len(batch["tokens"]) // count
    return [
        {name: value[i * rows : (i + 1) * rows] for name, value in batch.items()}
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def rpo_gradients():
    """`(hyper changes, batch) -> (gradients, means)` of the small network, compiled once."""
    work = make_work(make_config(), SMALL)
    compiled = jax.jit(partial(compute_gradients, work.objective, 1))

    def run(params, batch, **hyper):
        changes = {name: jnp.float32(value) for name, value in hyper.items()}
        return jax.device_get(compiled(params, {}, work.hyper | changes, batch))

    return run


def test_alpha_0_is_dpo(params, rpo_gradients):
    """The loss is the DPO term alone, and alpha scales the gradient of the NLL term."""
    batch = pair_batch(pairs())
    objective = make_work(make_config(), SMALL).objective
    dpo, means = rpo_gradients(params, batch, alpha=0.0)
    numbers = {name: float(mean) for name, mean in means.items()}
    assert objective.loss(numbers, make_hyper(Rpo(alpha=0.0), 1e-3)) == means["dpo"]
    one, two = (rpo_gradients(params, batch, alpha=alpha)[0] for alpha in (1.0, 2.0))
    line = jax.tree.map(lambda zero, one: 2 * one - zero, dpo, one)
    assert relative_difference(two, line) < 1e-5


def test_swapped_pair_flips_the_margin(params, rpo_gradients):
    records = pairs()
    swapped = [
        {**r, "chosen_ids": r["rejected_ids"], "rejected_ids": r["chosen_ids"]} for r in records
    ]
    batch, other = pair_batch(records), pair_batch(swapped)
    for row, (record, logps) in enumerate(zip(records, batch["reference_logps"], strict=True)):
        count = len(record["chosen_ids"]), len(record["rejected_ids"])
        chosen, rejected = logps[: count[0]], logps[count[0] : sum(count)]
        other["reference_logps"][row, : sum(count)] = np.concatenate([rejected, chosen])
    found, flipped = (rpo_gradients(params, b)[1] for b in (batch, other))
    assert abs(found["margin"]) > 0.1
    np.testing.assert_allclose(flipped["margin"], -found["margin"], rtol=1e-5)
    np.testing.assert_allclose(flipped["chosen_log_ratio"], found["rejected_log_ratio"], rtol=1e-5)
    np.testing.assert_allclose(flipped["reward_accuracy"], 1 - found["reward_accuracy"])


def test_masked_tokens_have_no_gradient(params, rpo_gradients):
    batch = pair_batch(pairs())
    is_padding, is_masked = batch["segment_ids"] == 0, batch["target_mask"] == 0
    assert is_padding.any() and is_masked.any()
    unused = np.setdiff1d(np.arange(SHAPE.vocab_size), batch["tokens"])[0]
    other = {
        **batch,
        "tokens": np.where(is_padding, unused, batch["tokens"]),
        "positions": np.where(is_padding, 7, batch["positions"]),
        "labels": np.where(is_masked, 5, batch["labels"]),
        "reference_logps": np.where(is_masked, np.float32(3), batch["reference_logps"]),
    }
    gradients, means = rpo_gradients(params, batch)
    other_gradients, other_means = rpo_gradients(params, other)
    assert means == other_means
    jax.tree.map(np.testing.assert_array_equal, gradients, other_gradients)
    assert not other_gradients["embed"]["table"][unused].any()
    assert other_gradients["embed"]["table"][batch["tokens"][0, 0]].any()


def test_rows_that_fill_up_a_batch_change_nothing(params, rpo_gradients):
    batch = pair_batch(pairs(6))
    gradients, means = rpo_gradients(params, batch)
    filled_gradients, filled_means = rpo_gradients(params, fill_up(batch, 2))
    assert relative_difference((gradients, means), (filled_gradients, filled_means)) < 1e-5


def test_cpt_loss_is_the_mean_over_all_tokens(params):
    batch = text_batch()
    work = make_work(make_config("cpt"), SMALL)
    targets = {**batch, "branch_ids": np.zeros_like(batch["tokens"])}
    targets["target_index"] = np.tile(
        np.arange(batch["tokens"].shape[1]), (len(batch["tokens"]), 1)
    )
    logps = float64_logps(params, targets)
    wanted = -(logps * batch["target_mask"]).sum() / batch["target_mask"].sum()
    sums = jax.jit(work.objective.sums)(params, batch, work.hyper)
    counts = jax.jit(work.objective.counts)(batch)
    np.testing.assert_allclose(divide(sums, counts)["nll"], wanted, rtol=1e-6)


def test_one_compilation_for_all_weights_and_a_refused_batch():
    """Loss weights and learning rate are traced; a bad batch leaves the state as it was."""
    work, abstract, step = program()
    with jax.set_mesh(work.mesh):
        state = start_from(make_params(SMALL, work.mesh, seed=0), ADAM, abstract)
        batch = pair_batch(pairs())
        for alpha, beta, rate in [(1.0, 0.1, 1e-3), (0.0, 0.5, 1e-2), (2.0, 0.01, 0.0)]:
            hyper = make_hyper(Rpo(alpha=alpha, beta=beta), rate)
            before = jax.device_get(state.params)
            state, metrics = step(state, {}, hyper, put_batch(batch, work.mesh))
            loss = metrics["dpo"] + alpha * metrics["nll"]
            np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
            assert metrics["finite"] == 1.0
            assert (relative_difference(before, jax.device_get(state.params)) > 0) == (rate > 0)
        kept = jax.device_get(state)
        batch["reference_logps"][3, 0] = np.nan
        state, metrics = step(state, {}, hyper, put_batch(batch, work.mesh))
        assert metrics["finite"] == 0.0 and not np.isfinite(metrics["loss"])
        jax.tree.map(np.testing.assert_array_equal, kept, jax.device_get(state))
        assert int(state.step) == 3
        assert step._cache_size() == 1


def test_the_new_state_takes_the_place_of_the_old():
    """Beyond the gradients a step holds no copy of weights or moments, here two large tables."""
    shape = dataclasses.replace(SMALL.shape, vocab_size=30_000)
    network = dataclasses.replace(SMALL, shape=shape)
    work = make_work(make_config(train={"loss_chunk": 1}), network)
    tx = make_optimizer(work.config.optim)
    state = abstract_state(network, tx, work.mesh)
    batch = jax.eval_shape(lambda: pair_batch(pairs()))
    with jax.set_mesh(work.mesh):
        plan = make_step(work, tx, state).lower(state, {}, work.hyper, batch).compile()
    table = state.params["embed"]["table"].size * 4
    assert plan.memory_analysis().temp_size_in_bytes < 3.5 * table  # two gradients, and logits


@pytest.mark.parametrize("clip_norm, factor", [(0.5, 0.25), (2.0, 1.0), (3.0, 1.0), (0.0, 1.0)])
def test_gradients_are_clipped_to_a_norm(clip_norm, factor):
    assert float(clip_factor(Optim(clip_norm=clip_norm), jnp.float32(2.0))) == factor


def test_each_layer_pins_its_activations():
    """A constraint that no mesh hears would be silent: count them in the lowered step."""

    def count(layers):
        shape = dataclasses.replace(SHAPE, num_hidden_layers=layers)
        network = dataclasses.replace(NETWORK, shape=shape, scan_layers=False)
        work = make_work(make_config(mesh={"fsdp": 2, "data": 1}), network, jax.devices()[:2])
        state = abstract_state(network, ADAM, work.mesh)
        batch = jax.eval_shape(lambda: pair_batch(pairs()))
        with jax.set_mesh(work.mesh):
            lowered = make_step(work, ADAM, state).lower(state, {}, work.hyper, batch).as_text()
        return lowered.count("sharding_constraint")

    assert count(2) - count(1) >= 4  # block in and out, heads, mlp: and once more backwards


@pytest.mark.parametrize(
    "tx",
    [
        optax.chain(optax.clip_by_global_norm(1.0), ADAM),
        optax.sgd(0.1, momentum=0.9),
        optax.lion(1e-3),
        optax.chain(ADAM, optax.ema(0.9), optax.trace(0.5)),
    ],
    ids=["adam", "momentum", "lion", "ema"],
)
def test_optimizer_state_lies_like_its_weights(tx):
    work = make_work(make_config(mesh=dataclasses.asdict(MESHES["data2-fsdp2-tensor2"])),
                     devices=jax.devices())  # fmt: skip
    state = abstract_state(NETWORK, tx, work.mesh)
    places = {
        jax.tree_util.keystr(path): leaf.sharding
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.params)
    }
    found = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.optimizer):
        name = jax.tree_util.keystr(path)
        match = [place for weight, place in places.items() if name.endswith(weight)]
        assert leaf.sharding == match[0] if match else leaf.shape == ()
        found += len(match)
    assert found >= len(places)


def test_a_micro_batch_is_computed_in_the_least_size_that_holds_it():
    sizes = (Size(4, 2), Size(8, 3))

    def choose(tokens, targets):
        batch = {
            "segment_ids": np.arange(8) < np.array(tokens)[:, None],
            "target_mask": np.arange(3) < np.array(targets)[:, None],
        }
        return int(choose_size(jax.tree.map(lambda x: jnp.asarray(x, jnp.int32), batch), sizes))

    assert choose([0, 0], [0, 0]) == 0
    assert choose([4, 0], [2, 0]) == choose([1, 2], [1, 1]) == 1
    assert choose([5, 1], [1, 1]) == choose([2, 4], [1, 3]) == 2
    cut = cut_rows({"tokens": jnp.ones((2, 8)), "labels": jnp.ones((2, 3)),
                    "record_index": jnp.ones((2, 5))}, sizes[0])  # fmt: skip
    assert {name: x.shape for name, x in cut.items()} == {
        "tokens": (2, 4), "labels": (2, 2), "record_index": (2, 5)
    }  # fmt: skip


def test_packing_leaves_micro_batches_empty():
    """Eight short pairs, three a row: of four micro-batches of two rows, two have none."""
    config = make_config(data={"pairs_per_row": 3}, train={"micro_batches": 4})
    work = make_work(config, SMALL)
    one = np.ones(2, np.int32)
    records = [{"prompt_ids": one, "chosen_ids": one, "rejected_ids": one}] * 8
    rows = work.arrange(records)
    assert sorted(place for row in rows for place in row) == list(range(8))
    assert [[len(row) for row in rows[part::4]] for part in range(4)] == [
        [3, 3], [2, 0], [0, 0], [0, 0]
    ]  # fmt: skip
