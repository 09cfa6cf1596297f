"""A finished model, opened for use: network, weights on a mesh, tokenizer."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import jax
from jax.sharding import Mesh

from rpo_jax.config import Mesh as MeshConfig
from rpo_jax.data.tokenizer import Tokenizer, read_tokenizer
from rpo_jax.errors import UserError
from rpo_jax.model.cache import split_layers
from rpo_jax.model.qwen2 import Network, Params
from rpo_jax.model.shape import ModelShape, load_shape
from rpo_jax.sharding.mesh import is_one_cpu, make_mesh
from rpo_jax.training.origin import load_params
from rpo_jax.training.state import abstract_weights


@dataclass(frozen=True)
class Opened:
    """A model folder that was read.

    Attributes:
        folder: of a run, or of a converted model.
        step: of its checkpoint.
        network: shape and dtypes.
        params: the weights, on `mesh`.
        tokenizer: of the folder.
        mesh: where everything lies.
        end_ids: that end a completion besides the tokenizer's end of text.
    """

    folder: Path
    step: int
    network: Network
    params: Params
    tokenizer: Tokenizer
    mesh: Mesh
    end_ids: tuple[int, ...] = ()


def find_model(folder: Path) -> ModelShape:
    """The shape of the model in a folder.

    Raises:
        UserError: the folder is no model.
    """
    path = folder / "model" / "config.json"
    if not path.is_file():
        raise UserError(
            f"{folder}: {path} is not there; the folder of a run, or one made by `rpo_jax.convert "
            "import`, is wanted"
        )
    return load_shape(str(path))


def open_model(
    folder: Path, mesh: MeshConfig, dtype: str = "float32", step: int | None = None
) -> Opened:
    """Reads a model folder; its weights are cast to `dtype`, which is that of the matmuls too.

    `step` names a checkpoint; None: the newest.

    Raises:
        UserError: the folder is no model, or its tokenizer does not fit its network.
    """
    network = Network(find_model(folder), param_dtype=dtype, compute_dtype=dtype)
    tokenizer = read_tokenizer(folder / "model")
    if tokenizer.vocab_size > network.shape.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has ids up to {tokenizer.vocab_size - 1}, the embedding only "
            f"{network.shape.vocab_size} rows"
        )
    placed = make_mesh(mesh)
    with jax.set_mesh(placed):
        step, params = load_params(folder, abstract_weights(network, placed), step)
    return Opened(folder, step, network, params, tokenizer, placed, read_end_ids(folder))


def take_apart(model: Opened) -> Opened:
    """The model with its layers apart, as generation takes them; the stacked ones are given up."""
    with jax.set_mesh(model.mesh):
        params = split_layers(model.params, give_up=True, turned=is_one_cpu(model.mesh))
    return replace(model, params=params)


def read_end_ids(folder: Path) -> tuple[int, ...]:
    """The ids that a model folder's generation_config.json ends completions with.

    Raises:
        UserError: it is damaged.
    """
    path = folder / "model" / "generation_config.json"
    if not path.is_file():
        return ()
    try:
        stated = json.loads(path.read_text("utf-8")).get("eos_token_id")
        ids = stated if isinstance(stated, list) else [] if stated is None else [stated]
        return tuple(int(id_) for id_ in ids)
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: damaged ({error!r})") from error
