"""Preference losses: functions of arrays and floats, one value a pair.

Notation, for a prompt x with a chosen answer w and a rejected answer l:

    ratio_w = log p(w|x) - log p_ref(w|x)        summed over the tokens of the response, in nats
    margin  = ratio_w - ratio_l

Ratios come in as sums of per-token differences. A difference of two sums would lose what matters:
near -6000 nats neighbouring float32 numbers lie 5e-4 apart.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

Scalar = Float[Array, ""] | float


def dpo(
    margin_N: Float[Array, "N"], beta: Scalar, label_smoothing: Scalar = 0.0
) -> Float[Array, "N"]:
    """Direct Preference Optimization, in nats a pair: ln 2 where the policy is the reference.

        -(1 - s) log sigmoid(beta margin) - s log sigmoid(-beta margin)

    Args:
        margin_N: ratio_w - ratio_l of each pair.
        beta: inverse temperature.
        label_smoothing: s, the probability that a preference is the wrong way round.

    >>> dpo(jnp.zeros(1), beta=0.1)
    Array([0.6931472], dtype=float32)

    Source: arXiv:2305.18290 eq. 7; with s > 0 the conservative DPO of its authors.
    """
    z_N = beta * margin_N
    return -(1 - label_smoothing) * jax.nn.log_sigmoid(z_N) - label_smoothing * jax.nn.log_sigmoid(
        -z_N
    )


def sequence_nll(logp_N: Float[Array, "N"], length_N: Num[Array, "N"]) -> Float[Array, "N"]:
    """Negative log-likelihood a token, in nats/token: each sequence over its own length.

    A length of 0 (an empty slot of a batch) gives 0.

    Source: the second term of arXiv:2404.19733v3 eq. 1, without alpha.
    """
    return -logp_N / jnp.maximum(length_N, 1)


def ipo(margin_N: Float[Array, "N"], tau: Scalar) -> Float[Array, "N"]:
    """Identity Preference Optimization: the margin is drawn to 1 / (2 tau) and not beyond.

        (margin - 1 / (2 tau))^2

    Source: arXiv:2310.12036 eq. 17. With log-ratios as means over tokens it is what its authors
    ran, says TRL.
    """
    return (margin_N - 1 / (2 * tau)) ** 2


def simpo(
    chosen_mean_N: Float[Array, "N"],
    rejected_mean_N: Float[Array, "N"],
    beta: Scalar,
    gamma: Scalar,
) -> Float[Array, "N"]:
    """Simple Preference Optimization: mean log-probabilities a token, no reference.

        -log sigmoid(beta (log p(w|x) / |w| - log p(l|x) / |l|) - gamma)

    Source: arXiv:2405.14734 eq. 6.
    """
    return -jax.nn.log_sigmoid(beta * (chosen_mean_N - rejected_mean_N) - gamma)


def orpo(chosen_mean_N: Float[Array, "N"], rejected_mean_N: Float[Array, "N"]) -> Float[Array, "N"]:
    """The odds-ratio term of ORPO, no reference; the whole loss is NLL + lambda times this.

        -log sigmoid(log(odds_w / odds_l)),  odds = p / (1 - p),  p = exp(log p(y|x) / |y|)

    Source: arXiv:2403.07691 eq. 3, 4 and 7.
    """

    def log_odds(mean_N: Array) -> Array:
        # A response that is certain (p = 1, as that of an empty slot) has no finite odds.
        return mean_N - jnp.log(-jnp.expm1(jnp.minimum(mean_N, -1e-7)))

    return -jax.nn.log_sigmoid(log_odds(chosen_mean_N) - log_odds(rejected_mean_N))


def rpo(preference_term: Scalar, nll_term: Scalar, alpha: Scalar) -> Scalar:
    """Reasoning Preference Optimization: DPO plus alpha times the NLL of the chosen response.

    It is linear in both terms, so the mean of the losses is the loss of the means. With another
    preference term it is that term's loss, regularised in the same way.

    Source: arXiv:2404.19733v3 eq. 1.
    """
    return preference_term + alpha * nll_term
