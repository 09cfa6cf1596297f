"""A source by its name: a folder, or a repository of the Hugging Face hub, fetched with care.

The small files come first, so that another architecture or a full disk is told before 145 GB have
been fetched. What has arrived stays in the hub's cache, and is not fetched again.
"""

import math
import re
from pathlib import Path

from etils import epath

from rpo_jax.errors import UserError, say_install
from rpo_jax.model.shape import ModelShape, parse_shape
from rpo_jax.weights.flow import check_space
from rpo_jax.weights.manifest import read_manifest
from rpo_jax.weights.names import list_tensors
from rpo_jax.weights.shards import ITEM_BYTES, read_json
from rpo_jax.weights.source import KEPT_FILES, Source, open_source
from rpo_jax.weights.store import DTYPE_NAMES
from rpo_jax.weights.workplace import find_workplace

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def is_hub_id(name: str) -> bool:
    """Whether a name can be that of a repository, `owner/model`."""
    return _HUB_ID.fullmatch(name) is not None


def find_source(
    source: str, revision: str | None = None, target: epath.Path | None = None
) -> Source:
    """A folder as it is; a hub id is fetched into the hub's cache, which keeps what has arrived.

    Args:
        source: a folder, gs://..., or a hub id.
        revision: of the hub id; default: the newest.
        target: what is to be made of it. That it can be is checked before more than small files
            is fetched.

    Raises:
        UserError: neither a folder nor a hub id, no room, a target that is taken, the download
            failed, or it is no Qwen2 checkpoint.
    """
    if epath.Path(source).is_dir() or not is_hub_id(source):
        return open_source(epath.Path(source))
    folder, shape, dtype = fetch_config(source, revision)
    if target is not None and read_manifest(target) is None and not find_workplace(target).exists():
        check_space(target, _count_bytes(shape, dtype))
    # By its commit: the newest one may be another by now.
    folder = _fetch(source, folder.name, ["*.safetensors"])
    return open_source(epath.Path(folder), hub_id=source)


def fetch_config(source: str, revision: str | None = None) -> tuple[Path, ModelShape, str]:
    """Fetches the small files of a hub id: their folder, the shape, and the dtype that they state.

    Raises:
        UserError: the download failed, or it is another architecture.
    """
    folder = _fetch(source, revision, list(KEPT_FILES))
    path = folder / "config.json"
    values = read_json(epath.Path(path))
    stated = str(values.get("torch_dtype", values.get("dtype")))
    return folder, parse_shape(values, f"{source}: config.json"), DTYPE_NAMES.get(stated, "BF16")


def _count_bytes(shape: ModelShape, dtype: str) -> int:
    return ITEM_BYTES[dtype] * sum(math.prod(tensor.hf_shape) for tensor in list_tensors(shape))


def _fetch(source: str, revision: str | None, files: list[str]) -> Path:
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError as error:
        raise UserError(
            f"{source}: no such folder; to ask the hub, {say_install('hub')}"
        ) from error
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=files))
    except errors.LocalEntryNotFoundError as error:
        raise UserError(
            f"{source}: no such folder, and the hub cannot be reached; files that arrived are "
            "kept: give the same command again where there is a network"
        ) from error
    except Exception as error:  # whatever the hub or the network made of it is no bug of ours
        raise UserError(
            f"{source}: no such folder, and the hub did not give it ({error}); files that "
            "arrived are kept: give the same command again"
        ) from error
