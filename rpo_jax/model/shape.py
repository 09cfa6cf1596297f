"""The shape of a network, read from a Hugging Face `config.json`."""

import dataclasses
import json
import typing
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from rpo_jax.errors import UserError

_SHIPPED = resources.files("rpo_jax.model") / "shapes"

# Values of a Qwen2 config.json under which the network is the one of qwen2.py; a key may be absent.
_FIXED: dict[str, tuple[Any, ...]] = {
    "architectures": (["Qwen2ForCausalLM"], None),
    "model_type": ("qwen2",),
    "hidden_act": ("silu",),
    "use_sliding_window": (False,),
    "use_mrope": (False,),
    "rope_scaling": (None,),
    "quantization_config": (None,),
}

_LARGEST = 2**53  # of any number in a config.json: beyond, a float is no longer exact


@dataclass(frozen=True)
class ModelShape:
    """Every number of the architecture. Names are those of the HF `config.json`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool
    max_position_embeddings: int
    initializer_range: float = 0.02

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads


def parse_shape(values: dict[str, Any], where: str) -> ModelShape:
    """Reads a shape out of the dict of a Qwen2 `config.json`.

    Args:
        values: the parsed file; keys that do not shape the network are ignored.
        where: the file, for messages.

    Raises:
        UserError: naming each key that is missing, mistyped, or says another architecture.
    """
    values = _flatten_rope(values)
    problems = [
        f"{key}={values[key]!r}, only {allowed[0]!r} is supported"
        for key, allowed in _FIXED.items()
        if key in values and values[key] not in allowed
    ]
    layer_types = values.get("layer_types") or []
    if any(kind != "full_attention" for kind in layer_types):
        problems.append(f"layer_types={layer_types!r:.80}, only full_attention is supported")
    fields: dict[str, Any] = {}
    kinds = typing.get_type_hints(ModelShape)
    for field in dataclasses.fields(ModelShape):
        kind = kinds[field.name]
        value = values.get(field.name, field.default)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is dataclasses.MISSING:
            problems.append(f"{field.name} is missing")
        elif kind is bool and not isinstance(value, bool):
            problems.append(f"{field.name}={value!r}, true or false is wanted")
        elif kind in (int, float) and not (
            number and 0 < value < _LARGEST and value == kind(value)
        ):
            problems.append(f"{field.name}={value!r}, a positive {kind.__name__} is wanted")
        else:
            fields[field.name] = kind(value)
    if not problems:
        shape = ModelShape(**fields)
        heads, kv_heads = shape.num_attention_heads, shape.num_key_value_heads
        if shape.hidden_size % heads or shape.head_dim % 2:
            problems.append(
                f"hidden_size={shape.hidden_size} over {heads} heads is not an even width"
            )
        if values.get("head_dim") not in (None, shape.head_dim):
            problems.append(
                f"head_dim={values['head_dim']}, hidden_size / heads is {shape.head_dim}"
            )
        if heads % kv_heads:
            problems.append(f"{heads} query heads do not share {kv_heads} kv heads evenly")
    if problems:
        raise UserError("\n".join(f"{where}: {problem}" for problem in problems))
    return shape


def _flatten_rope(values: dict[str, Any]) -> dict[str, Any]:
    """Newer transformers write {"rope_parameters": {"rope_type", "rope_theta"}} for rope_theta."""
    rope = values.get("rope_parameters")
    if not isinstance(rope, dict):
        return values
    plain = rope.get("rope_type", "default") == "default"
    return {
        **values,
        "rope_theta": rope.get("rope_theta", values.get("rope_theta")),
        "rope_scaling": None if plain else rope,
    }


def load_shape(name_or_path: str) -> ModelShape:
    """A shipped shape by name (`qwen2.5-72b`), or the shape in a `config.json`.

    Raises:
        UserError: no such shape or file, not JSON, or not a Qwen2 architecture.
    """
    shipped = sorted(f.name.removesuffix(".json") for f in _SHIPPED.iterdir())
    if name_or_path in shipped:
        return parse_shape(
            json.loads((_SHIPPED / f"{name_or_path}.json").read_text()), name_or_path
        )
    path = Path(name_or_path)
    if not path.is_file():
        raise UserError(
            f"model.shape={name_or_path!r} is neither a file nor a shipped shape "
            f"({', '.join(shipped)})"
        )
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: a JSON object is wanted, not {type(values).__name__}")
    return parse_shape(values, str(path))


def shape_to_hf(shape: ModelShape) -> dict[str, Any]:
    """The shape as an HF `config.json` that transformers loads."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "use_sliding_window": False,
        **dataclasses.asdict(shape),
    }
