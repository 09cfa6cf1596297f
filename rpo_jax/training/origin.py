"""Where weights come from: whole models, and adapters over the model of another folder.

A model folder either holds whole weights, or `model/adapters.json` says whose weights its adapters
change. That may be a folder of adapters in turn: the chain is followed to the whole weights at its
end, and merged on the way, one array at a time and in float32.
"""

import contextlib
import dataclasses
import json
import os
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh

from rpo_jax.config import Checkpoint, Config, Lora
from rpo_jax.config import Mesh as MeshConfig
from rpo_jax.data.tokenizer import Tokenizer
from rpo_jax.errors import PassingError, UserError
from rpo_jax.model.lora import init_adapters, merge_kernel, put_rows, take_rows
from rpo_jax.model.quantize import is_quantized, quantize_kernel
from rpo_jax.model.qwen2 import Network, Params
from rpo_jax.sharding.mesh import make_mesh
from rpo_jax.sharding.rules import replicated
from rpo_jax.training.checkpoint import (
    Read,
    describe_params,
    find_step,
    open_checkpoints,
    open_existing,
    open_params,
)
from rpo_jax.training.state import abstract_weights, join_params, make_params, split_params
from rpo_jax.weights.manifest import fingerprint_step
from rpo_jax.weights.store import find_checkpoints
from rpo_jax.writing import draft_folder, write_json

NOTE = "adapters.json"


@dataclass(frozen=True)
class Adapters:
    """What adapters change.

    Attributes:
        base: the model folder whose weights they change.
        step: of the checkpoint there.
        checkpoint: fingerprint of that checkpoint.
        lora: rank, alpha, targets.
        row_ids: of the tokens whose rows are trained too.
    """

    base: Path
    step: int
    checkpoint: str
    lora: Lora
    row_ids: tuple[int, ...] = ()


def read_adapters(folder: Path) -> Adapters | None:
    """The note in a model folder; None where its weights are whole.

    Raises:
        UserError: the note is damaged.
    """
    path = folder / "model" / NOTE
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        lists = {name: tuple(values["lora"][name]) for name in ("targets", "trained_tokens")}
        lora = Lora(**{**values["lora"], **lists})
        base, rows = folder / values["base"], tuple(values["row_ids"])
        return Adapters(base, values["step"], values["checkpoint"], lora, rows)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged ({error!r})") from error


def note_adapters(config: Config, tokenizer: Tokenizer) -> None:
    """Writes the note of a run of adapters: what they change is the newest step of `init_from`.

    With `lora.previous="keep"` it is what the adapters there change, which this run trains on.

    Raises:
        UserError: there is nothing to keep, or it is of another shape than this run asks for.
    """
    assert config.origin is not None, "resolve() wants an origin for adapters"
    folder, lora = config.folder, config.lora
    before = read_adapters(config.origin)
    if lora.previous == "keep":
        if before is None:
            raise UserError(
                f"lora.previous='keep': {config.origin} holds whole weights and no adapters"
            )
        for name in ("rank", "alpha", "targets", "trained_tokens"):
            if getattr(before.lora, name) != getattr(lora, name):
                raise UserError(
                    f"lora.{name}={getattr(lora, name)!r}: the adapters that are kept have "
                    f"{getattr(before.lora, name)!r}"
                )
        base, step, checkpoint = before.base, before.step, before.checkpoint
    else:
        base = config.origin
        with open_existing(base) as checkpoints:
            step = find_step(checkpoints, None)
        checkpoint = fingerprint_checkpoint(base, step)
    ids = tuple(_find_id(tokenizer, token) for token in lora.trained_tokens)
    _write_note(folder, Adapters(base, step, checkpoint, lora, ids), folder)


def _find_id(tokenizer: Tokenizer, token: str) -> int:
    ids = [tokenizer.eos_id] if token == tokenizer.eos_token else tokenizer.encode(token)
    if len(ids) != 1:
        raise UserError(f"lora.trained_tokens: {token!r} is {len(ids)} tokens, {ids}, not one")
    return ids[0]


def _write_note(folder: Path, adapters: Adapters, beside: Path) -> None:
    """Writes the note into `folder`, which is or will be `beside`: the base is named from there."""
    values = dataclasses.asdict(adapters) | {"base": os.path.relpath(adapters.base, beside)}
    write_json(folder / "model" / NOTE, values)


def store_adapters(target: Path, base: Path, lora: Lora, pairs: Params) -> Adapters:
    """Makes a model folder of adapters over the newest step of another one; returns its note.

    Args:
        target: a folder that does not exist yet.
        base: the model folder whose weights they change.
        lora: rank, alpha, targets.
        pairs: the adapters, as `init_adapters` lays them out.

    Raises:
        UserError: the target exists, or the base has no checkpoint.
    """
    if target.exists():
        raise UserError(f"{target}: is there already; choose another --target")
    with open_existing(base) as checkpoints:
        step = find_step(checkpoints, None)
    note = Adapters(base, step, fingerprint_checkpoint(base, step), lora)
    with draft_folder(target) as draft:
        shutil.copytree(base / "model", draft / "model", ignore=shutil.ignore_patterns(NOTE))
        _write_note(draft, note, target)
        with open_checkpoints(draft, Checkpoint(keep=1)) as checkpoints:
            checkpoints.save_checkpointables(0, {"params": {"lora": pairs}})
    return note


def fingerprint_checkpoint(folder: Path, step: int) -> str:
    """Tells one written checkpoint from another: Orbax notes when each was begun.

    Raises:
        UserError: it is not there.
    """
    path = find_checkpoints(epath.Path(folder)) / str(step)
    try:
        return fingerprint_step(path)[:16]
    except OSError as error:
        raise UserError(f"{path}: the checkpoint is not there") from error


def load_params(folder: Path, abstract: Params, step: int | None = None) -> tuple[int, Params]:
    """Step and whole weights of a model folder, adapters merged.

    Args:
        folder: of the model.
        abstract: places and dtypes; what is quantised there is quantised once it is merged.
        step: of the checkpoint; default: the newest.

    Raises:
        UserError: the folder holds no checkpoint (of that step), or one of another shape; or
            adapters whose base is no longer what they were trained on.
    """
    with contextlib.ExitStack() as stack:
        found, read = _open(folder, abstract, step, stack)

        def load(path: Any, leaf: Any) -> Any:
            if not is_quantized(leaf):
                return read(path, leaf)
            return make_quantize(path[-2].key, leaf)(read(path, as_stored(leaf)))

        return found, jax.tree_util.tree_map_with_path(load, abstract, is_leaf=is_quantized)


def make_quantize(name: str, leaf: Any) -> Any:
    """The jitted program from a projection's stored kernel, which it takes, to one like `leaf`."""
    places = jax.tree.map(lambda part: part.sharding, leaf)
    quantize = partial(quantize_kernel, name=name, how=leaf.qtype)
    return jax.jit(quantize, out_shardings=places, donate_argnums=0)


def as_stored(leaf: Any) -> Any:
    """The array that a quantised one is made of."""
    if not is_quantized(leaf):
        return leaf
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.qvalue.sharding)


def _open(
    folder: Path, abstract: Params, step: int | None, stack: contextlib.ExitStack
) -> tuple[int, Read]:
    """The step of a folder's weights, and a function that reads one array of them, merged."""
    adapters = read_adapters(folder)
    checkpoints = stack.enter_context(open_existing(folder))
    found = find_step(checkpoints, step)
    if adapters is None:
        stored = jax.tree.map(as_stored, abstract, is_leaf=is_quantized)
        return found, open_params(checkpoints, found, stored)
    check_base(folder, adapters)
    _, read_base = _open(adapters.base, abstract, adapters.step, stack)
    mesh = jax.tree.leaves(abstract)[0].sharding.mesh
    trained = load_trained(folder, mesh, found)
    pairs, rows = trained["lora"], trained.get("rows", {})
    ids = jnp.asarray(adapters.row_ids, jnp.int32)
    scale = adapters.lora.alpha / adapters.lora.rank

    def read(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        kernel = read_base(path, leaf)
        keys = [key.key for key in path]
        if keys[0] in rows:
            put = jax.jit(put_rows, out_shardings=leaf.sharding, donate_argnums=0)
            return put(kernel, ids, rows[keys[0]])
        if keys[0] != "layers" or keys[-1] != "kernel" or keys[2] not in pairs.get(keys[1], {}):
            return kernel
        merge = partial(merge_kernel, scale=scale)
        pair = pairs[keys[1]][keys[2]]
        return jax.jit(merge, out_shardings=leaf.sharding, donate_argnums=0)(kernel, **pair)

    return found, read


def check_base(folder: Path, adapters: Adapters) -> None:
    """Refuses adapters whose base is no longer the checkpoint that they were trained over.

    Raises:
        UserError: names both.
    """
    try:
        there = fingerprint_checkpoint(adapters.base, adapters.step)
    except PassingError:
        raise
    except UserError as error:
        raise UserError(
            f"{folder} holds adapters alone, and the model that they change is gone: step "
            f"{adapters.step} of {os.path.normpath(adapters.base)}; put it back there"
        ) from error
    if there != adapters.checkpoint:
        raise UserError(
            f"{folder}: its adapters were trained over another checkpoint than {adapters.base} "
            f"holds now at step {adapters.step}; restore that, or train them anew"
        )


def load_trained(folder: Path, mesh: Mesh, step: int | None = None) -> Params:
    """What a run trained, a whole copy on every device: {"lora": ...} of a folder of adapters."""
    everywhere = replicated(mesh)
    with open_existing(folder) as checkpoints:
        found = find_step(checkpoints, step)
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere),
            describe_params(checkpoints, found),
        )
        read = open_params(checkpoints, found, abstract)
        return jax.tree_util.tree_map_with_path(read, abstract)


def load_trained_to_host(folder: Path, step: int | None = None) -> tuple[int, Params]:
    """Step and adapters (with the rows of trained tokens) of a model folder, on the host."""
    with open_existing(folder) as checkpoints:
        found = find_step(checkpoints, step)
    mesh = make_mesh(MeshConfig(data=1), jax.local_devices()[:1])
    return found, jax.device_get(load_trained(folder, mesh, found))


def load_frozen(folder: Path, network: Network, mesh: Mesh) -> Params:
    """What a run does not train, on the mesh: {} if it trains everything."""
    _, abstract = split_params(abstract_weights(network, mesh))
    adapters = read_adapters(folder)
    if adapters is None:
        return {}
    check_base(folder, adapters)
    ids = abstract.pop("row_ids", None)
    frozen = load_params(adapters.base, abstract, adapters.step)[1]
    if ids is not None:
        frozen["row_ids"] = jax.device_put(jnp.asarray(adapters.row_ids, jnp.int32), ids.sharding)
    return frozen


def first_trained(config: Config, network: Network, mesh: Mesh, frozen: Params) -> Params:
    """What a run trains, as it is at step 0: random, those of `init_from`, or new adapters."""
    if config.origin is None:
        return make_params(network, mesh, config.seed)
    abstract, _ = split_params(abstract_weights(network, mesh))
    if network.lora is None:
        return load_params(config.origin, abstract)[1]
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    if network.lora.previous == "keep":
        return jax.device_put(load_trained(config.origin, mesh), places)
    init = partial(init_adapters, lora=network.lora, key=jax.random.key(config.seed))
    layers = jax.eval_shape(lambda: frozen["layers"])
    tables = {name: frozen[name] for name in ("embed", "head") if name in frozen}

    def make(tables: Params, ids: jax.Array | None) -> Params:
        rows = {} if ids is None else {"rows": take_rows(tables, ids)["rows"]}
        return {"lora": init(layers), **rows}

    return jax.jit(make, out_shardings=places)(tables, frozen.get("row_ids"))


def load_run(folder: Path, network: Network, mesh: Mesh) -> tuple[int, Params]:
    """Step and weights of a run as it was trained: adapters beside their base, quantised if it was.

    Raises:
        UserError: as `load_params`.
    """
    abstract = abstract_weights(network, mesh)
    if network.lora is None:
        return load_params(folder, abstract)
    trained, _ = split_params(abstract)
    with open_existing(folder) as checkpoints:
        step = find_step(checkpoints, None)
    places = jax.tree.map(lambda leaf: leaf.sharding, trained)
    adapters = jax.device_put(load_trained(folder, mesh, step), places)
    return step, join_params(adapters, load_frozen(folder, network, mesh))
