"""Generation against a loop without cache or batch, on any mesh; and each way of choosing."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from rpo_jax.config import Mesh as MeshConfig
from rpo_jax.data.tokenizer import Tokenizer
from rpo_jax.errors import UserError
from rpo_jax.generation.batching import make_generate
from rpo_jax.generation.requests import Completion, Request, Settings
from rpo_jax.generation.sampling import Draw, choose
from rpo_jax.model.cache import compute_logits, forward_cached, make_cache, split_layers
from rpo_jax.model.qwen2 import abstract_params, forward, head_table, init_params, param_axes
from rpo_jax.sharding.mesh import make_mesh
from rpo_jax.sharding.rules import make_shardings
from tests.tiny import MESHES, NETWORK, SHAPE

USED, EOS = 90, 1  # of the 96 rows; the other six are no tokens


def _spell(ids):
    return "".join(chr(ord("!") + i) for i in ids)


TOKENIZER = Tokenizer(
    vocab_size=USED,
    eos_id=EOS,
    eos_token=_spell([EOS]),
    content=b"",
    file_name="",
    control={},
    _encode=lambda texts: [[ord(letter) - ord("!") for letter in text] for text in texts],
    _decode=_spell,
)


@pytest.fixture(scope="module")
def params():
    return init_params(NETWORK, jax.random.key(0))


# The cache.


def test_layers_are_set_apart_in_place_of_the_stacked_ones(params):
    copy = jax.tree.map(jnp.array, params)
    apart = split_layers(copy, give_up=True)
    jax.tree.map(np.testing.assert_array_equal, apart, split_layers(params))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(copy["layers"]))


@pytest.mark.parametrize(("shared", "turned"), [(0, False), (6, True)])
def test_cached_states_are_those_of_the_full_pass_at_every_step(params, shared, turned):
    rng = np.random.default_rng(0)
    lengths, prompts = [23, 9, 16], [7, 1, 5]  # of the rows in all, and of their prompts
    tokens = rng.integers(0, SHAPE.vocab_size, (3, 30)).astype(np.int32)
    tokens[:, :shared] = tokens[0, :shared]
    one = jnp.ones_like(tokens)
    positions = jnp.tile(jnp.arange(30, dtype=jnp.int32), (3, 1))
    hidden = forward(NETWORK, params, jnp.asarray(tokens), one, 0 * one, positions)
    want = np.asarray(hidden @ head_table(params).T)

    weights = split_layers(params, turned=turned)
    step = jax.jit(
        lambda tokens, start, own, prefix: forward_cached(
            NETWORK, weights, tokens, start, own, prefix
        )
    )
    logits = jax.jit(lambda hidden: compute_logits(weights, hidden, SHAPE.vocab_size).T)
    nothing, prefix = make_cache(NETWORK, 1, 0), make_cache(NETWORK, 1, shared)
    if shared:
        first = jnp.asarray(tokens[:1, :shared])
        _, prefix = step(first, jnp.zeros(1, jnp.int32), prefix, nothing)
    # Prompts in one go, padded with what must not matter; then a token a step, each row at its own.
    own = make_cache(NETWORK, 3, 24)
    asked = tokens[:, shared : shared + 7].copy()
    for row, length in enumerate(prompts):
        asked[row, length:] = 13
    hidden, own = step(jnp.asarray(asked), jnp.zeros(3, jnp.int32), own, prefix)
    for row, length in enumerate(prompts):
        got = np.asarray(logits(hidden[row, :length]))
        np.testing.assert_allclose(got, want[row, shared : shared + length], rtol=0, atol=1e-5)
    done = np.array(prompts)
    compared = 0
    while (live := shared + done < lengths).any():
        newest = tokens[np.arange(3), np.minimum(shared + done, 29)][:, None]
        hidden, own = step(jnp.asarray(newest), jnp.asarray(done, jnp.int32), own, prefix)
        got = np.asarray(logits(hidden[:, 0]))
        for row in np.flatnonzero(live):
            np.testing.assert_allclose(got[row], want[row, shared + done[row]], rtol=0, atol=1e-5)
            compared += 1
        done += live
    assert compared == sum(lengths) - sum(prompts) - 3 * shared


def test_what_is_no_token_has_no_logit(params):
    states = jax.random.normal(jax.random.key(1), (5, SHAPE.hidden_size))
    want = np.asarray(states @ head_table(params).T, np.float64)
    got = compute_logits(split_layers(params), states, USED).T
    np.testing.assert_allclose(got[:, :USED], want[:, :USED], rtol=0, atol=1e-5)
    assert np.isneginf(got[:, USED:]).all()


@pytest.mark.parametrize("rows", [2, 4])
def test_few_rows_on_a_mesh_are_those_of_one_device(params, rows):
    """A row a device or less: where a layer's weights were not gathered by name, XLA went wrong."""
    tokens = jnp.asarray(np.random.default_rng(2).integers(0, 96, (rows, 16)), jnp.int32)
    start_B = jnp.zeros(rows, jnp.int32)

    def states(weights):
        own, prefix = make_cache(NETWORK, rows, 16), make_cache(NETWORK, 1, 0)
        return forward_cached(NETWORK, split_layers(weights), tokens, start_B, own, prefix)[0]

    want = np.asarray(jax.jit(states)(params))
    mesh = make_mesh(MESHES["data2-fsdp2-tensor2"], jax.devices())
    places = make_shardings(abstract_params(NETWORK), param_axes(NETWORK), mesh)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, places)
        got = np.asarray(jax.jit(lambda weights: states(weights), in_shardings=(places,))(placed))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def test_the_cache_is_cut_over_rows_and_heads(params):
    mesh = make_mesh(MESHES["data2-fsdp2-tensor2"], jax.devices())
    with jax.set_mesh(mesh):
        cache = jax.jit(lambda: make_cache(NETWORK, 8, 16))()
    shards = {leaf.sharding.shard_shape(leaf.shape) for leaf in jax.tree.leaves(cache)}
    heads, width = SHAPE.num_key_value_heads, SHAPE.head_dim
    assert shards == {(8 // 4, heads // 2, 16, width)}


# Whole completions.


def _requests():
    rng = np.random.default_rng(1)
    common = rng.integers(2, USED, 10).tolist()
    kinds = [
        Settings(max_tokens=30),
        Settings(max_tokens=9, temperature=0.7),
        Settings(max_tokens=21, temperature=1.3, top_k=5),
        Settings(max_tokens=40, temperature=0.9, top_p=0.6),
        Settings(max_tokens=1),
        Settings(max_tokens=33, temperature=1.5, top_k=40, top_p=0.9, stop=("A", "gL")),
        Settings(max_tokens=33, stop=("L",)),
    ]
    return [
        Request(
            id=f"r{i}",
            prompt_ids=common + rng.integers(2, USED, rng.integers(1, 30)).tolist(),
            seed=i,
            settings=kinds[i % len(kinds)],
        )
        for i in range(17)
    ]


@pytest.fixture(scope="module")
def expected(params):
    """The same by the full forward pass, a row and a token at a time, nothing kept."""

    @jax.jit
    def one_more(tokens, length, draw, index):
        one = jnp.ones_like(tokens)[None]
        positions = jnp.arange(len(tokens), dtype=jnp.int32)[None]
        hidden = forward(NETWORK, params, tokens[None], one, 0 * one, positions)
        logits = hidden[0, length - 1] @ head_table(params).T
        logits = jnp.where(jnp.arange(SHAPE.vocab_size) < USED, logits, -jnp.inf)[None]
        token, logp = choose(logits.T, draw, index[None], jnp.ones(1, bool))
        return token[0], logp[0]

    def complete(request):
        settings, ids, logprob = request.settings, list(request.prompt_ids), 0.0
        draw = Draw(
            jnp.array([request.seed], jnp.uint32),
            jnp.array([settings.temperature]),
            jnp.array([settings.top_k]),
            jnp.array([settings.top_p]),
        )
        written: list[int] = []
        while len(written) < settings.max_tokens:
            tokens = np.zeros(80, np.int32)
            tokens[: len(ids + written)] = ids + written
            length, index = np.int32(len(ids + written)), np.int32(len(written))
            token, logp = one_more(tokens, length, draw, index)
            written.append(int(token))
            logprob += float(logp)
            text = _spell(written)
            if written[-1] == EOS:
                return Completion(request.id, tuple(written), text[:-1], "eos", logprob)
            if found := [text.index(stop) for stop in settings.stop if stop in text]:
                return Completion(request.id, tuple(written), text[: min(found)], "stop", logprob)
        return Completion(request.id, tuple(written), text, "length", logprob)

    completions = {request.id: complete(request) for request in _requests()}
    reasons = {completion.stop_reason for completion in completions.values()}
    assert reasons == {"eos", "stop", "length"}, "the requests exercise every ending"
    return completions


def _generate(params, requests, mesh=None, devices=1, prefix=None, **options):
    mesh = make_mesh(mesh or MeshConfig(), jax.devices()[:devices])
    places = make_shardings(abstract_params(NETWORK), param_axes(NETWORK), mesh)
    generate = make_generate(NETWORK, mesh, TOKENIZER, **options)
    return list(generate(jax.device_put(params, places), requests, prefix))


def _check_same(got, expected):
    assert {completion.id for completion in got} == expected.keys()
    assert len(got) == len(expected)
    for completion in got:
        want = expected[completion.id]
        assert replace(completion, logprob=0.0) == replace(want, logprob=0.0)
        assert completion.logprob == pytest.approx(want.logprob, abs=1e-4)


def test_generate_is_the_plain_loop(params, expected):
    _check_same(_generate(params, _requests(), slots=5, chunk=8, steps=7), expected)


@pytest.mark.full
@pytest.mark.parametrize(
    "options",
    [
        {"slots": 1, "chunk": 64},
        {"slots": 40, "chunk": 8, "steps": 3},
        {"slots": 6, "chunk": 16, "prefix": []},
        {"slots": 8, "chunk": 8, "prefix": _requests()[0].prompt_ids[:4]},
    ],
    ids=str,
)
def test_slots_chunks_and_prefix_change_nothing(params, expected, options):
    _check_same(_generate(params, _requests()[::-1], **options), expected)


@pytest.mark.parametrize(
    ("name", "devices"),
    [
        ("data2-fsdp2-tensor2", 8),
        *(
            pytest.param(name, 8, marks=pytest.mark.full)
            for name in ("data8", "fsdp4-seq2", "data2-seq4")
        ),
        pytest.param("tensor2", 2, marks=pytest.mark.full),
    ],
)
def test_meshes_change_nothing(params, expected, name, devices):
    mesh = MESHES.get(name) or MeshConfig(data=1, tensor=2)
    _check_same(_generate(params, _requests(), mesh, devices, slots=8, chunk=16), expected)


@pytest.mark.full
def test_batch_mates_change_nothing(params, expected):
    for request in _requests()[1:4]:
        _check_same(
            _generate(params, [request], slots=4, chunk=16), {request.id: expected[request.id]}
        )


def test_split_weights_give_the_same_and_nothing_is_asked_for_nothing(params, expected):
    requests = _requests()[:3]
    got = _generate(params, requests, slots=5, chunk=8, steps=7)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    generate = make_generate(NETWORK, mesh, TOKENIZER, slots=5, chunk=8, steps=7)
    assert list(generate(split_layers(params, turned=True), requests)) == got
    assert list(generate(params, [])) == []


# The choice of a token.

LOGITS = np.random.default_rng(5).normal(0, 3, 1300).astype(np.float32)  # three blocks
DRAWS = 8_000


def _draw(temperature, top_k=0, top_p=1.0, seed=11):
    """The tokens of one long completion, all drawn from the same logits."""
    draw = Draw(
        jnp.full(DRAWS, seed, jnp.uint32),
        jnp.full(DRAWS, temperature),
        jnp.full(DRAWS, top_k),
        jnp.full(DRAWS, top_p),
    )
    logits = jnp.broadcast_to(jnp.asarray(LOGITS)[:, None], (LOGITS.size, DRAWS))
    index = jnp.arange(DRAWS, dtype=jnp.int32)
    return jax.jit(choose)(logits, draw, index, jnp.ones(DRAWS, bool))


def _probabilities(temperature, top_k=0, top_p=1.0):
    logits = LOGITS.astype(np.float64) / temperature
    order = np.argsort(-logits)
    if top_k:
        logits[order[top_k:]] = -np.inf
    p = np.exp(logits - logits.max())
    p /= p.sum()
    before = np.cumsum(p[order]) - p[order]  # what is likelier than this one
    p[order[before >= top_p]] = 0
    return p / p.sum()


def _p_value(tokens, p):
    """Of Pearson's test; cells that expect fewer than five draws are one cell."""
    counts = np.bincount(np.asarray(tokens), minlength=p.size)
    small = p * DRAWS < 5
    assert not counts[p == 0].any()
    seen, wanted = (np.append(x[~small], x[small].sum()) for x in (counts, p * DRAWS))
    return stats.chisquare(seen[wanted > 0], wanted[wanted > 0]).pvalue


@pytest.mark.parametrize(
    "settings", [(1.0,), (0.6,), (1.2, 40), (1.0, 0, 0.7), (0.9, 60, 0.85)], ids=str
)
def test_draws_have_their_distribution(settings):
    tokens, logps = _draw(*settings)
    assert _p_value(tokens, _probabilities(*settings)) > 1e-3
    wrong = (settings[0] * 1.15, *settings[1:])
    assert _p_value(tokens, _probabilities(*wrong)) < 1e-3
    # Log-probabilities are the model's, whatever the settings.
    want = np.log(_probabilities(1.0))[np.asarray(tokens)]
    np.testing.assert_allclose(logps, want, rtol=1e-5, atol=1e-5)


def test_draws_of_other_seeds_are_others():
    (one, _), (same, _), (other, _) = _draw(1.0), _draw(1.0), _draw(1.0, seed=12)
    np.testing.assert_array_equal(one, same)
    joint = np.mean(np.asarray(one) == np.asarray(other))
    assert joint == pytest.approx(np.sum(_probabilities(1.0) ** 2), abs=0.02)


def test_no_temperature_takes_the_first_of_the_best():
    logits = jnp.asarray([[0.0, 2.0, 2.0, -1.0], [-jnp.inf, -3.0, -4.0, -3.0]])
    zero = jnp.zeros(2)
    draw = Draw(zero.astype(jnp.uint32), zero, zero.astype(jnp.int32), zero + 1)
    token, _ = choose(logits.T, draw, jnp.zeros(2, jnp.int32), jnp.ones(2, bool))
    assert token.tolist() == [1, 1]


# What is refused.

SHORT = Settings(max_tokens=5)
PROMPTS = {"a": [2, 3, 4], "b": [2, 4, 4]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_ids": []}, "request 'x': its prompt is empty"),
        ({"prompt_ids": [3, USED]}, f"the id {USED}; the tokenizer ends at {USED - 1}"),
        (
            {"prompt_ids": [2] * 100},
            "100 prompt tokens and max_tokens=30 make 130; the model has 128",
        ),
        ({"seed": -1}, "seed=-1, 0 to 4294967295 is wanted"),
        ({"max_tokens": 0}, "max_tokens=0, at least 1 is wanted"),
        ({"temperature": -0.5}, "temperature=-0.5, a number that is 0 or more"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": -1}, "top_k=-1, 0 (all) or more is wanted"),
        ({"top_p": 0.0}, "top_p=0.0, above 0 and at most 1 is wanted"),
        ({"stop": ("a", "")}, "stop=('a', ''), texts that are not empty is wanted"),
        ({"id": "y"}, "request 'y': there is another of that id"),
    ],
    ids=str,
)
def test_what_cannot_be_answered_is_refused(params, change, message):
    ours = {"id": "x", "prompt_ids": [5, 6], "seed": 0}
    settings = {"max_tokens": 30} | {k: v for k, v in change.items() if k not in ours}
    request = Request(**ours | {k: v for k, v in change.items() if k in ours})
    request = replace(request, settings=Settings(**settings))
    with pytest.raises(UserError, match=re.escape(message)):
        _generate(params, [Request("y", [2], settings=SHORT), request])


def test_a_prefix_that_is_none_is_refused(params):
    requests = [Request(name, ids, settings=SHORT) for name, ids in PROMPTS.items()]
    with pytest.raises(UserError, match="request 'b': its prompt does not begin with the prefix"):
        _generate(params, requests, prefix=[2, 3])


def test_a_tokenizer_of_another_model_is_refused():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with pytest.raises(UserError, match="ids up to 96, the model only 96 rows"):
        make_generate(NETWORK, mesh, replace(TOKENIZER, vocab_size=97))
