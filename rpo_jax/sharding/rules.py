"""One table from logical axes to mesh axes, for weights, activations and batches."""

import math
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rpo_jax.errors import UserError

# A logical axis -> the mesh axes it is cut over. An axis of size 1 cuts nothing.
RULES: dict[str, tuple[str, ...]] = {
    # activations
    "batch": ("data", "fsdp"),
    "row": ("seq",),
    "act_embed": ("tensor",),
    "act_heads": ("tensor",),
    "act_kv_heads": ("tensor",),
    "act_vocab": ("tensor",),
    "act_mlp": ("tensor",),
    # weights
    "layers": (),
    "embed": ("fsdp", "seq"),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "norm": (),
    "lora_rank": (),
    # The head multiplies, so its vocabulary is cut. The input table is looked up, and rows looked
    # up in a table cut by rows would be computed everywhere: its columns are cut instead, and
    # gathered over fsdp only, just before the lookup (hence tensor is the outer axis).
    "vocab": ("tensor",),
    "vocab_lookup": (),
    "embed_lookup": ("tensor", "fsdp"),
    "act_embed_lookup": ("tensor",),
}


def partition_spec(axes: tuple[str | None, ...]) -> P:
    """The mesh axes of an array with these logical axes; None is an axis that is never cut."""
    return P(*(RULES[axis] or None if axis is not None else None for axis in axes))


def gathered(axes: tuple[str | None, ...]) -> tuple[str | None, ...]:
    """The logical axes of a weight where a matmul reads it: no longer cut where it was for storage.

    Asked for by name and once a layer. Left to the compiler, a matmul that meets a weight cut along
    its contraction becomes a loop of small ones.
    """
    return tuple(None if axis == "embed" else axis for axis in axes)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pins an activation to its place on the current mesh (`jax.set_mesh`).

    Outside any mesh, as in a notebook on one device, there is nothing to pin; `train` always sets a
    mesh, and a test counts the constraints in its lowered step.

    An axis that does not divide is padded by the compiler, in silence: right for a few rows or one
    token at a time, a waste in training, where `make_workload` and `make_shardings` refuse it.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes))


def is_whole() -> bool:
    """Whether the current mesh cuts no array: it is one device, or there is none."""
    mesh = jax.sharding.get_abstract_mesh()
    return bool(mesh.empty or mesh.size == 1)


def make_shardings(abstract: Any, axes: Any, mesh: Mesh) -> Any:
    """Shardings for a tree of arrays.

    Args:
        abstract: tree of anything with a `.shape`.
        axes: the same tree, its leaves tuples of logical axis names.
        mesh: the device mesh.

    Raises:
        UserError: an axis of an array does not divide by its mesh axes, or two of its axes are cut
            over the same mesh axis; names all such arrays.
    """
    problems: list[str] = []

    def place(path: Any, leaf: Any, names: tuple[str | None, ...]) -> NamedSharding:
        assert len(names) == len(leaf.shape), (path, names, leaf.shape)
        array = jax.tree_util.keystr(path, simple=True, separator="/")
        taken: dict[str, str] = {}  # mesh axis -> the axis of the array that is cut over it
        for name, size in zip(names, leaf.shape, strict=True):
            cuts = RULES[name] if name is not None else ()
            count = math.prod(mesh.shape[axis] for axis in cuts)
            if size % count:
                problems.append(
                    f"mesh: {array} has {size} along {name!r}, which {'*'.join(cuts)}={count} "
                    "does not divide"
                )
            for axis in cuts:
                if axis in taken:
                    problems.append(
                        f"mesh: {array} would be cut over {axis!r} twice, along {taken[axis]!r} "
                        f"and {name!r}: the rules of these two collide"
                    )
                taken[axis] = str(name)
        return NamedSharding(mesh, P() if problems else partition_spec(names))

    shardings = jax.tree_util.tree_map_with_path(place, abstract, axes)
    if problems:
        raise UserError("\n".join(problems))
    return shardings


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of every array of a batch: rows over data and fsdp, the rest whole."""
    return NamedSharding(mesh, partition_spec(("batch",)))


def find_own_rows(mesh: Mesh, batch_rows: int) -> list[int]:
    """The rows of a global batch that the devices of this process hold, in order.

    Which they are is the mesh's affair: its devices are not in the order of the processes, and
    where `tensor` or `seq` spans several processes, these hold the same rows.
    """
    places = batch_sharding(mesh).devices_indices_map((batch_rows,))
    cuts = [places[device][0] for device in mesh.local_devices]
    return sorted({row for cut in cuts for row in range(*cut.indices(batch_rows))})


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, P())
