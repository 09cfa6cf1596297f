"""Our Qwen2.5 against transformers' Qwen2ForCausalLM, on random weights."""

import json
from decimal import Decimal, getcontext
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from rpo_jax import convert
from rpo_jax.config import Mesh as MeshConfig
from rpo_jax.losses.token_logps import Projection, token_logps
from rpo_jax.model.attention import attend, rope_frequencies, rotate, visible
from rpo_jax.model.qwen2 import Attention, Mlp, Network, RMSNorm, forward, head_table
from rpo_jax.model.shape import ModelShape, load_shape, parse_shape, shape_to_hf
from rpo_jax.sharding.mesh import make_mesh
from rpo_jax.training.origin import load_params
from rpo_jax.training.state import abstract_weights
from rpo_jax.weights.names import from_hf, list_tensors

torch = pytest.importorskip("torch", reason="parity needs the `parity` extra")
transformers = pytest.importorskip("transformers", reason="parity needs the `parity` extra")
from transformers.models.qwen2 import modeling_qwen2  # noqa: E402

pytestmark = pytest.mark.full

# The bounds of the project; never to be relaxed.
LOGITS_ATOL, MODULE_ATOL, GRADIENT_RTOL = 1e-4, 1e-5, 1e-4

BASE = ModelShape(
    vocab_size=512,
    hidden_size=256,
    intermediate_size=352,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    tie_word_embeddings=False,
    max_position_embeddings=32768,
)


def vary(**changes: Any) -> ModelShape:
    return parse_shape(shape_to_hf(BASE) | changes, "test")


SHAPES = {
    "untied-4q2kv-64": BASE,
    "tied-14q2kv-64": vary(
        hidden_size=896, num_attention_heads=14, tie_word_embeddings=True, num_hidden_layers=2
    ),
    "untied-4q4kv-64-eps1e-5": vary(num_key_value_heads=4, rms_norm_eps=1e-5),
    "untied-4q1kv-128-eps1e-5": vary(hidden_size=512, num_key_value_heads=1, rms_norm_eps=1e-5),
    "tied-6q2kv-128": vary(
        hidden_size=768, num_attention_heads=6, tie_word_embeddings=True, num_hidden_layers=2
    ),
}


@pytest.fixture(params=SHAPES.values(), ids=SHAPES.keys())
def shape(request: pytest.FixtureRequest) -> ModelShape:
    return request.param


def hf_model(shape: ModelShape, seed: int = 0, dtype: Any = None) -> Any:
    """Random weights at which nothing hides: biases and norms are drawn too."""
    torch.manual_seed(seed)
    config = transformers.Qwen2Config(**shape_to_hf(shape), attn_implementation="eager")
    model = transformers.Qwen2ForCausalLM(config).eval()
    assert config.rope_parameters["rope_theta"] == shape.rope_theta
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim == 1:
                value.add_(torch.randn_like(value) * 0.2)
            elif "layers" in name or "head" in name:
                value.mul_(2.0)
    return model.to(dtype or torch.float32)


def to_params(shape: ModelShape, tensors: dict[str, Any]) -> dict[str, Any]:
    """Our tree, in float32, from HF tensors; every tensor must be asked for."""
    tree: dict[str, Any] = {"layers": {}}
    left = {name: value.detach().float().numpy() for name, value in tensors.items()}
    stacks: dict[str, list[np.ndarray]] = {}
    for tensor in list_tensors(shape):
        stacks.setdefault(tensor.path, []).append(from_hf(left.pop(tensor.name), tensor))
    left.pop("lm_head.weight", None) if shape.tie_word_embeddings else None
    assert not left, left.keys()
    for path, values in stacks.items():
        node = tree
        *parents, last = path.split("/")
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = jnp.asarray(np.stack(values) if path.startswith("layers/") else values[0])
    return tree


def ids(shape: ModelShape, rows: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, shape.vocab_size, (rows, length))


def hf_logits(
    model: Any, tokens: np.ndarray, positions: np.ndarray, keep: Any = None
) -> np.ndarray:
    with torch.no_grad():
        return (
            model(
                torch.tensor(tokens),
                # Always a mask: without one, a jump in the positions is read as a new document.
                attention_mask=torch.tensor(np.ones_like(tokens) if keep is None else keep),
                position_ids=torch.tensor(positions),
                use_cache=False,
            )
            .logits.float()
            .numpy()
        )


@partial(jax.jit, static_argnums=0)
def logits_of(
    network: Network, params: Any, tokens: Any, segments: Any, branches: Any, positions: Any
) -> Any:
    hidden = forward(network, params, tokens, segments, branches, positions)
    return jnp.einsum(
        "btd,vd->btv",
        hidden,
        head_table(params).astype(hidden.dtype),
        preferred_element_type=jnp.float32,
    )


def our_logits(
    network: Network,
    params: Any,
    tokens: np.ndarray,
    positions: np.ndarray,
    segments: Any = None,
    branches: Any = None,
) -> np.ndarray:
    segments = np.ones_like(tokens) if segments is None else segments
    branches = np.zeros_like(tokens) if branches is None else branches
    return np.asarray(logits_of(network, params, tokens, segments, branches, positions))


def count_up(rows: int, length: int) -> np.ndarray:
    return np.tile(np.arange(length), (rows, 1))


# Module by module.


def test_norm(shape: ModelShape) -> None:
    rng = np.random.default_rng(0)
    scale = rng.normal(1, 0.3, shape.hidden_size).astype(np.float32)
    # Rows as small as the eps, where eps matters, up to rows of size 30.
    size = 10.0 ** np.linspace(-4, 1.5, 12)[:, None]
    x = (rng.normal(size=(2, 12, shape.hidden_size)) * size).astype(np.float32)
    theirs = modeling_qwen2.Qwen2RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)
    theirs.weight.data = torch.tensor(scale)
    want = theirs(torch.tensor(x)).detach().numpy()
    params = {"params": {"scale": jnp.asarray(scale)}}
    got = RMSNorm(shape.rms_norm_eps, "float32").apply(params, jnp.asarray(x))
    np.testing.assert_allclose(got, want, rtol=0, atol=MODULE_ATOL)


@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_rope_to_32k(head_dim: int) -> None:
    shape = vary(hidden_size=4 * head_dim)
    rng = np.random.default_rng(0)
    positions = np.arange(32768)[None]
    x = rng.normal(size=(1, 32768, 2, head_dim)).astype(np.float32)
    rope = modeling_qwen2.Qwen2RotaryEmbedding(transformers.Qwen2Config(**shape_to_hf(shape)))
    cos, sin = rope(torch.tensor(x), torch.tensor(positions))
    heads_first = torch.tensor(x).transpose(1, 2)
    want, _ = modeling_qwen2.apply_rotary_pos_emb(heads_first, heads_first, cos, sin)
    got = rotate(jnp.asarray(x), jnp.asarray(positions), rope_frequencies(head_dim, 1e6))
    np.testing.assert_allclose(got, want.transpose(1, 2).numpy(), rtol=0, atol=MODULE_ATOL)


def test_rope_frequencies_do_not_depend_on_the_processor() -> None:
    # Correctly rounded by integers: theta^(i/64) lies between the two neighbours of the float.
    getcontext().prec = 50
    exponents = np.arange(0, 128, 2, dtype=np.float32) / np.float32(128)
    for exponent, frequency in zip(exponents, rope_frequencies(128, 1e6), strict=True):
        exact = Decimal(10**6) ** Decimal(float(exponent))
        power = np.float32(float(exact))
        assert np.float32(1) / power == frequency


def test_attention(shape: ModelShape) -> None:
    model = hf_model(shape)
    theirs = model.model.layers[0].self_attn
    x = np.random.default_rng(0).normal(size=(2, 48, shape.hidden_size)).astype(np.float32)
    positions = np.stack([np.arange(48), 32768 - 48 + np.arange(48)])
    cos_sin = model.model.rotary_emb(torch.tensor(x), torch.tensor(positions))
    mask = torch.full((48, 48), -torch.inf).triu(1)[None, None]
    with torch.no_grad():
        want = theirs(torch.tensor(x), cos_sin, mask)[0].numpy()
    params = to_params(shape, dict(model.named_parameters()))["layers"]["attention"]
    first = jax.tree.map(lambda leaf: leaf[0], params)
    see = visible(jnp.ones((2, 48), int), jnp.zeros((2, 48), int))
    got, _ = Attention(Network(shape)).apply(
        {"params": first}, jnp.asarray(x), jnp.asarray(positions), partial(attend, visible_BTS=see)
    )
    np.testing.assert_allclose(got, want, rtol=0, atol=MODULE_ATOL)


def test_mlp(shape: ModelShape) -> None:
    model = hf_model(shape)
    x = np.random.default_rng(0).normal(size=(2, 24, shape.hidden_size)).astype(np.float32)
    with torch.no_grad():
        want = model.model.layers[0].mlp(torch.tensor(x)).numpy()
    params = to_params(shape, dict(model.named_parameters()))["layers"]["mlp"]
    first = jax.tree.map(lambda leaf: leaf[0], params)
    got = Mlp(Network(shape)).apply({"params": first}, jnp.asarray(x))
    np.testing.assert_allclose(got, want, rtol=0, atol=MODULE_ATOL)


# The whole model.


@pytest.mark.parametrize("spread", ["near", "last of 32k", "all over 32k"])
def test_logits(shape: ModelShape, spread: str) -> None:
    model = hf_model(shape)
    tokens = ids(shape, 2, 96)
    positions = {
        "near": count_up(2, 96),
        "last of 32k": count_up(2, 96) + 32768 - 96,
        "all over 32k": np.sort(np.random.default_rng(1).integers(0, 32768, (2, 96))),
    }[spread]
    params = to_params(shape, dict(model.named_parameters()))
    want = hf_logits(model, tokens, positions)
    assert np.std(want) > 0.5  # else the bound would be empty
    for scan_layers in (True, False):
        got = our_logits(Network(shape, scan_layers=scan_layers), params, tokens, positions)
        np.testing.assert_allclose(got, want, rtol=0, atol=LOGITS_ATOL)


def test_logits_over_a_long_row() -> None:
    shape = vary(num_hidden_layers=2)
    model = hf_model(shape)
    tokens, positions = ids(shape, 1, 2048), 16 * count_up(1, 2048)
    params = to_params(shape, dict(model.named_parameters()))
    got = our_logits(Network(shape), params, tokens, positions)
    want = hf_logits(model, tokens, positions)
    np.testing.assert_allclose(got, want, rtol=0, atol=LOGITS_ATOL)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(shape: ModelShape, side: str) -> None:
    model = hf_model(shape)
    params = to_params(shape, dict(model.named_parameters()))
    tokens, keep = ids(shape, 3, 40), np.ones((3, 40), int)
    for row, length in enumerate((40, 25, 1)):
        keep[row, : 40 - length] = 0
        if side == "right":
            keep[row] = keep[row, ::-1]
    positions = np.maximum(np.cumsum(keep, 1) - 1, 0)
    want = hf_logits(model, tokens, positions, keep)
    got = our_logits(Network(shape), params, tokens, positions, segments=keep)
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got[keep == 1], want[keep == 1], rtol=0, atol=LOGITS_ATOL)


def test_packed_documents_equal_separate_ones(shape: ModelShape) -> None:
    model = hf_model(shape)
    params = to_params(shape, dict(model.named_parameters()))
    lengths = (17, 1, 30, 9)
    tokens = ids(shape, 1, sum(lengths) + 7)
    segments = np.zeros_like(tokens)
    positions = np.zeros_like(tokens)
    spans, start = [], 0
    for number, length in enumerate(lengths, 1):
        spans.append(slice(start, start + length))
        segments[0, spans[-1]], positions[0, spans[-1]] = number, np.arange(length)
        start += length
    got = our_logits(Network(shape), params, tokens, positions, segments)
    for span, length in zip(spans, lengths, strict=True):
        want = hf_logits(model, tokens[:, span], count_up(1, length))
        np.testing.assert_allclose(got[:, span], want, rtol=0, atol=LOGITS_ATOL)


def test_responses_that_share_a_prompt_equal_separate_rows(shape: ModelShape) -> None:
    model = hf_model(shape)
    params = to_params(shape, dict(model.named_parameters()))
    tokens = ids(shape, 1, 60)
    branches = np.repeat([0, 1, 2], 20)[None]
    positions = np.concatenate([np.arange(40), np.arange(20, 40)])[None]
    got = our_logits(Network(shape), params, tokens, positions, branches=branches)
    for branch in (1, 2):
        path = np.flatnonzero((branches[0] == 0) | (branches[0] == branch))
        want = hf_logits(model, tokens[:, path], count_up(1, 40))
        np.testing.assert_allclose(got[:, path], want, rtol=0, atol=LOGITS_ATOL)


def test_gradients(shape: ModelShape) -> None:
    model = hf_model(shape)
    tokens = ids(shape, 2, 65)
    inputs, labels, positions = tokens[:, :-1], tokens[:, 1:], count_up(2, 64)
    logits = model(torch.tensor(inputs), use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.tensor(labels).flatten())
    loss.backward()
    want = to_params(shape, {name: value.grad for name, value in model.named_parameters()})

    def our_loss(params: Any) -> Any:
        tokens_BT, one_BT = jnp.asarray(inputs), jnp.ones_like(inputs)
        hidden = forward(
            Network(shape), params, tokens_BT, one_BT, 0 * one_BT, jnp.asarray(positions)
        )
        return -jnp.mean(
            token_logps(hidden, head_table(params), jnp.asarray(labels), Projection(16))
        )

    params = to_params(shape, dict(model.named_parameters()))
    value, got = jax.jit(jax.value_and_grad(our_loss))(params)
    assert abs(value - loss.item()) < 1e-5
    far = {}
    for (path, leaf), expected in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        layers = range(len(leaf)) if name.startswith("layers/") else [...]
        for layer in layers:
            difference = np.linalg.norm(leaf[layer] - expected[layer])
            size = np.linalg.norm(expected[layer])
            if difference > GRADIENT_RTOL * size:
                far[f"{name}[{layer}]"] = float(difference / size)
    assert not far


def test_greedy_continuation(shape: ModelShape) -> None:
    model = hf_model(shape)
    params = to_params(shape, dict(model.named_parameters()))
    prompt, count = 16, 64
    tokens = np.zeros((1, prompt + count), int)
    tokens[:, :prompt] = ids(shape, 1, prompt)
    positions, segments = count_up(*tokens.shape), np.zeros_like(tokens)
    segments[:, :prompt] = 1
    chosen = set()
    for end in range(prompt, prompt + count):
        got = our_logits(Network(shape), params, tokens, positions, segments)[0, end - 1]
        want = hf_logits(model, tokens[:, :end], positions[:, :end])[0, -1]
        best, second = np.sort(want)[[-1, -2]]
        if best - second >= 1e-4:
            assert got.argmax() == want.argmax(), f"token {end - prompt}"
        tokens[0, end], segments[0, end] = want.argmax(), 1
        chosen.add(int(want.argmax()))
    assert len(chosen) > 1


def test_bfloat16(shape: ModelShape) -> None:
    """In bf16 our logits lie as near the float32 ones as those of transformers do.

    Measured, norm of the difference over norm: 0.7 % to 1.4 %, and 0.99 to 1.06 times theirs.
    """
    model = hf_model(shape, dtype=torch.bfloat16)
    tokens, positions = ids(shape, 2, 64), count_up(2, 64)
    params = to_params(shape, dict(model.named_parameters()))
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), params)
    network = Network(shape, "bfloat16", "bfloat16")
    got = our_logits(network, params, tokens, positions)
    theirs = hf_logits(model, tokens, positions)
    exact = hf_logits(model.float(), tokens, positions)

    def distance(logits: np.ndarray) -> float:
        return float(np.linalg.norm(logits - exact) / np.linalg.norm(exact))

    print(f"bf16: ours {distance(got):.2e}, transformers {distance(theirs):.2e}")
    assert distance(got) <= 1.5 * distance(theirs)
    assert distance(got) <= 0.02


def test_a_shipped_shape_loads_in_transformers() -> None:
    shape = load_shape("qwen2.5-0.5b")
    config = transformers.Qwen2Config(**shape_to_hf(shape))
    assert parse_shape(config.to_dict(), "transformers") == shape


def test_a_05b_goes_in_and_out_and_matches(tmp_path: Path) -> None:
    """The real shape of Qwen2.5-0.5B on random weights, by way of the files transformers writes."""
    shape = load_shape("qwen2.5-0.5b")
    torch.manual_seed(0)
    source, model, out = tmp_path / "source", tmp_path / "model", tmp_path / "out"
    config = transformers.Qwen2Config(**shape_to_hf(shape), dtype=torch.bfloat16)
    made = transformers.Qwen2ForCausalLM(config).to(torch.bfloat16)
    made.save_pretrained(source, max_shard_size="300MB")
    assert len(list(source.glob("*.safetensors"))) > 1
    del made
    convert.main(["import", f"--source={source}", f"--target={model}", "--ram_budget_gib=1"])
    convert.main(["export", f"--source={model}", f"--target={out}", "--base=Qwen/Qwen2.5-0.5B"])
    for path in source.iterdir():
        if path.name != "generation_config.json":  # gets an end of text where there was none
            assert (out / path.name).read_bytes() == path.read_bytes(), path.name

    network = Network(shape, param_dtype="bfloat16")
    mesh = make_mesh(MeshConfig(data=1, fsdp=1, seq=1, tensor=1), jax.devices()[:1])
    _, params = load_params(model, abstract_weights(network, mesh))
    tokens, positions = ids(shape, 1, 48), count_up(1, 48)
    got = our_logits(network, params, tokens, positions)
    del params
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    want = hf_logits(theirs, tokens, positions)
    np.testing.assert_allclose(got, want, rtol=0, atol=LOGITS_ATOL)


def test_verify_compares_logits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = vary(num_hidden_layers=2)
    source, model = tmp_path / "source", tmp_path / "model"
    hf_model(shape).save_pretrained(source)
    vocabulary = {"a": 0, "b": 1, "<unk>": 2}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(source / "tokenizer.json"))
    (tmp_path / "text").write_text("a b a a c")
    convert.main(["import", f"--source={source}", f"--target={model}"])
    words = ["verify", f"--source={model}", f"--text={tmp_path / 'text'}", "--tolerance=1e-4"]
    convert.main([*words, f"--against={source}"])
    assert "every checksum agrees" in capsys.readouterr().out
    hf_model(shape, seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(SystemExit):
        convert.main([*words, f"--against={tmp_path / 'other'}"])
    assert "more than --tolerance" in capsys.readouterr().err
    # What cannot be compared with is told before all the weights are read.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    hf_model(vary(num_hidden_layers=1)).save_pretrained(tmp_path / "short")
    for against, told in (
        ("nobody/nothing", "nobody/nothing: no such folder, and the hub cannot be reached"),
        ("nothing", "nothing: no such folder"),
        (tmp_path / "short", "has another shape"),
    ):
        with pytest.raises(SystemExit) as stop:
            convert.main([*words, f"--against={against}"])
        said = capsys.readouterr()
        assert stop.value.code == 2
        assert told in said.err and "checksum" not in said.out + said.err
    (model / "model" / "tokenizer.json").unlink()
    with pytest.raises(SystemExit):
        convert.main([*words, f"--against={source}"])
    assert "tokenizer.json or tokenizer.model is wanted" in capsys.readouterr().err


def test_an_export_loads_and_generates(tmp_path: Path) -> None:
    """transformers reads what we write: same logits, and it stops at the end of text."""
    shape = vary(num_hidden_layers=2, tie_word_embeddings=True)
    source, model, out = tmp_path / "source", tmp_path / "model", tmp_path / "out"
    hf_model(shape).save_pretrained(source)
    (source / "tokenizer.json").write_text(
        json.dumps({"added_tokens": [{"id": 11, "content": "<|endoftext|>"}]})
    )
    convert.main(["import", f"--source={source}", f"--target={model}"])
    convert.main(["export", f"--source={model}", f"--target={out}", "--base=none"])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, attn_implementation="eager"
    )
    assert theirs.generation_config.eos_token_id == 11
    tokens, positions = ids(shape, 1, 16), count_up(1, 16)
    want = hf_logits(hf_model(shape), tokens, positions)
    np.testing.assert_array_equal(hf_logits(theirs, tokens, positions), want)
