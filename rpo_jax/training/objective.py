"""What a stage minimises, written so that any cut of the global batch gives the same number.

An `Objective` turns rows into *sums* (grouped by what they are to be divided by), counts the
divisors apart, and makes the loss from the *means*. The loss is linear in the sums: a micro-batch
divided by the counts of the global batch contributes exactly its share, whatever its own mix of
short and long rows.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rpo_jax.config import Config
from rpo_jax.config import Rpo as RpoConfig
from rpo_jax.data.rows import CHOSEN, PROMPT, REJECTED
from rpo_jax.losses.preference import dpo, ipo, orpo, rpo, sequence_nll, simpo
from rpo_jax.losses.token_logps import Projection, token_logps
from rpo_jax.model.lora import without_adapters
from rpo_jax.model.qwen2 import Network, Params, forward, head_table
from rpo_jax.sharding.rules import constrain, gathered

Batch = dict[str, Array]
Hyper = dict[str, Array]  # loss weights and learning rate: traced, so that no value recompiles
Sums = dict[str, dict[str, Array]]  # divisor -> name -> sum
Counts = dict[str, Array]  # divisor -> how many

_TIE = 1e-4  # nats; a smaller margin is rounding, where the policy still is the reference


@dataclass(frozen=True)
class Objective:
    """Sums over rows, their divisors, and the loss as a function of the means."""

    sums: Callable[[Params, Batch, Hyper], Sums]
    counts: Callable[[Batch], Counts]
    loss: Callable[[Mapping[str, Any], Mapping[str, Any]], Any]


def divide(sums: Sums, counts: Counts) -> dict[str, Array]:
    """The means, flat; a divisor of 0 gives 0."""
    return {
        name: value / jnp.maximum(counts[divisor], 1)
        for divisor, group in sums.items()
        for name, value in group.items()
    }


def make_projection(config: Config) -> Projection:
    """How the config wants hidden states to meet the vocabulary."""
    return Projection(
        config.train.loss_chunk, config.train.keep_logits, config.model.used_vocab_size
    )


def target_states(network: Network, params: Params, batch: Batch) -> Float[Array, "B M D"]:
    """The hidden states that predict a batch's targets.

    Rows are as `data.rows` makes them. Where `target_index` is present it says which positions
    these are; otherwise every position of the row predicts its label.
    """
    hidden_BTD = forward(
        network,
        params,
        batch["tokens"],
        batch["segment_ids"],
        batch.get("branch_ids"),
        batch["positions"],
        batch.get("dropout_seed"),
    )
    if "target_index" in batch:
        hidden_BTD = jnp.take_along_axis(hidden_BTD, batch["target_index"][..., None], axis=1)
        # Not left to the partitioner: on data x fsdp x tensor it gave wrong gradients here (XLA of
        # jaxlib 0.10.2), the chunked loop having cut the width of the states over fsdp.
        hidden_BTD = constrain(hidden_BTD, "batch", None, None)
    return hidden_BTD


def target_logps(
    network: Network, params: Params, batch: Batch, how: Projection
) -> Float[Array, "B M"]:
    """Log-probabilities of a batch's targets, float32, 0 where `target_mask` is 0."""
    hidden_BMD = target_states(network, params, batch)
    # Gathered along its width here, once, and not in every chunk.
    head_VD = constrain(head_table(params).astype(hidden_BMD.dtype), *gathered(("vocab", "embed")))
    logps_BM = token_logps(hidden_BMD, head_VD, batch["labels"], how)
    return jnp.where(batch["target_mask"] > 0, logps_BM, 0.0)


def make_cpt_objective(network: Network, how: Projection) -> Objective:
    """Continued pretraining: nats/token, a mean over all predicted tokens of the global batch."""

    def sums(params: Params, batch: Batch, hyper: Hyper) -> Sums:
        return {"tokens": {"nll": -jnp.sum(target_logps(network, params, batch, how))}}

    def counts(batch: Batch) -> Counts:
        return {"tokens": jnp.sum(batch["target_mask"], dtype=jnp.float32)}

    return Objective(sums, counts, lambda means, hyper: means["nll"])


def make_rpo_objective(
    network: Network, config: RpoConfig, how: Projection, pairs_per_row: int = 1
) -> Objective:
    """RPO on pair rows, or one of its relatives: see `rpo_jax.losses.preference`.

    Where the loss has a reference, `batch["reference_logps"]` are its log-probabilities, a token
    each, float32, or a live one is what the weights give without adapters; margins and log-ratios
    are then measured too. N counts the places for pairs: B
    times those of a row.
    """
    with_prompt = config.nll_tokens == "prompt+completion"

    def in_nll(batch: Batch) -> Array:
        side_BM = batch["target_side"]
        trained = (side_BM == CHOSEN) | (side_BM == PROMPT) if with_prompt else side_BM == CHOSEN
        return trained * batch["target_mask"]

    def sum_by_pair(values_BM: Array, batch: Batch) -> Float[Array, "N"]:
        slots: Int[Array, "slots"] = jnp.arange(pairs_per_row)
        is_own = batch["target_pair"][..., None] == slots
        return jnp.sum(values_BM[..., None] * is_own, axis=1, dtype=jnp.float32).ravel()

    def sum_by_side(values_BM: Array, batch: Batch) -> Float[Array, "N P"]:
        sides = (values_BM * (batch["target_side"] == side) for side in (CHOSEN, REJECTED))
        return jnp.stack([sum_by_pair(side_BM, batch) for side_BM in sides], axis=1)

    def reference_logps(params: Params, batch: Batch) -> Float[Array, "B M"]:
        if config.stores_reference:
            return batch["reference_logps"]
        whole = {name: batch[name] for name in batch if name != "dropout_seed"}
        live_BM = target_logps(network, without_adapters(params), whole, how)
        return jax.lax.stop_gradient(live_BM)

    def counts(batch: Batch) -> Counts:
        length_NP = sum_by_side(batch["target_mask"], batch)
        return {
            "pairs": jnp.sum(length_NP[:, CHOSEN] > 0, dtype=jnp.float32),
            "nll_tokens": jnp.sum(in_nll(batch), dtype=jnp.float32),
        }

    def sums(params: Params, batch: Batch, hyper: Hyper) -> Sums:
        logps_BM = target_logps(network, params, batch, how)
        length_NP = jnp.maximum(sum_by_side(batch["target_mask"], batch), 1)
        logp_NP = sum_by_side(logps_BM, batch)
        per_pair = {
            "preference_accuracy": logp_NP[:, CHOSEN] > logp_NP[:, REJECTED],
            "chosen_logp": logp_NP[:, CHOSEN],
            "rejected_logp": logp_NP[:, REJECTED],
        }
        if config.has_reference:
            reference_BM = reference_logps(params, batch) * batch["target_mask"]
            ratio_NP = sum_by_side(logps_BM - reference_BM, batch)
            margin_N = ratio_NP[:, CHOSEN] - ratio_NP[:, REJECTED]
            per_pair |= {
                "margin": margin_N,
                "chosen_log_ratio": ratio_NP[:, CHOSEN],
                "rejected_log_ratio": ratio_NP[:, REJECTED],
                "reward_accuracy": (margin_N > _TIE) + 0.5 * (jnp.abs(margin_N) <= _TIE),
            }
            compared_NP = ratio_NP / length_NP if config.length_normalised else ratio_NP
        else:
            compared_NP = logp_NP / length_NP
        if config.preference != "none":
            per_pair[config.preference] = _preference_term(config.preference, compared_NP, hyper)

        nll_mask_BM = in_nll(batch)
        nll_logp_N = sum_by_pair(logps_BM * nll_mask_BM, batch)
        per_token = {}
        if config.nll_norm == "batch_tokens":
            per_token["nll"] = -nll_logp_N
        else:
            per_pair["nll"] = sequence_nll(nll_logp_N, sum_by_pair(nll_mask_BM, batch))
        exists_N = sum_by_side(batch["target_mask"], batch)[:, CHOSEN] > 0
        return {
            "pairs": {name: jnp.sum(value_N * exists_N) for name, value_N in per_pair.items()},
            "nll_tokens": {name: jnp.sum(value_N) for name, value_N in per_token.items()},
        }

    def loss(means: Mapping[str, Any], hyper: Mapping[str, Any]) -> Any:
        return rpo(means.get(config.preference, 0.0), means["nll"], hyper["alpha"])

    return Objective(sums, counts, loss)


def _preference_term(
    name: str, compared_NP: Float[Array, "N P"], hyper: Hyper
) -> Float[Array, "N"]:
    """The preference loss of each pair from what it compares.

    That is a log-ratio to the reference (dpo, ipo) or a mean log-probability a token (simpo, orpo).
    """
    chosen_N, rejected_N = compared_NP[:, CHOSEN], compared_NP[:, REJECTED]
    beta = hyper["beta"]
    if name == "dpo":
        return dpo(chosen_N - rejected_N, beta, hyper["label_smoothing"])
    if name == "ipo":
        return ipo(chosen_N - rejected_N, beta)
    if name == "simpo":
        return simpo(chosen_N, rejected_N, beta, hyper["gamma"])
    assert name == "orpo", name
    return beta * orpo(chosen_N, rejected_N)


def make_hyper(rpo_config: RpoConfig, learning_rate: float) -> Hyper:
    """The traced numbers of a run."""
    return jax.tree.map(
        jnp.float32,
        {
            "alpha": rpo_config.alpha,
            "beta": rpo_config.beta,
            "gamma": rpo_config.gamma,
            "label_smoothing": rpo_config.label_smoothing,
            "learning_rate": learning_rate,
        },
    )
