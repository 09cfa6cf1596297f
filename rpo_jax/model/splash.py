"""Splash attention, JAX's block-sparse TPU kernel, on a mesh and with branches."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from rpo_jax.model.blocks import OUTPUT
from rpo_jax.sharding.rules import partition_spec

LANES = 128  # of a TPU's vector unit: rows, and the width of a head, come in multiples of it
_LARGEST_BLOCK = 512
# Added to a score that must not count: exp(-_FAR) is 0, and a bfloat16 holds it exactly.
_FAR = 2.0**20


def splash_attend(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    segment_ids_BT: Int[Array, "B T"],
    branch_ids_BT: Int[Array, "B T"] | None,
    *,
    slots: tuple[int, ...] = (),
    interpret: bool,
) -> tuple[Float[Array, "B T N H"], None]:
    """What `attend` gives under `visible`, without ever holding the scores of a row.

    The kernel knows segments, and a mask that is the same for all rows. Branches that have their
    slots are in that mask. Elsewhere they are told to it in the product of query and key itself:
    the heads are widened by two columns, whose product is -2^20 where a query looks at a branch
    that is neither its own nor the trunk, and 0 elsewhere. Branch ids are 0, 1 and 2.

    On a mesh (`jax.set_mesh`) each device has its own rows, heads and, with an axis `seq`, queries;
    keys and values of a row are gathered over `seq`.

    Args:
        q_BTNH: queries; T is a multiple of 128 on each device.
        k_BSKH: keys.
        v_BSKH: values.
        segment_ids_BT: as in `visible`.
        branch_ids_BT: as in `visible`; None: all tokens are on the trunk.
        slots: as in `make_attend`.
        interpret: run the kernel's program on a CPU, slowly.

    Source: ours but for the kernel; gathering keys and values is arXiv:2407.21783, section 3.3.2.
    """
    width = q_BTNH.shape[-1]
    q_BTNH = (q_BTNH.astype(jnp.float32) * width**-0.5).astype(q_BTNH.dtype)
    if branch_ids_BT is not None and not slots:
        q_BTNH, k_BSKH = _tell_branches(q_BTNH, k_BSKH, branch_ids_BT)
    q_BTNH, k_BSKH, v_BSKH = (_widen(x) for x in (q_BTNH, k_BSKH, v_BSKH))

    mesh = jax.sharding.get_abstract_mesh()
    sizes = dict(mesh.shape) or {"tensor": 1, "seq": 1}
    rows, heads = q_BTNH.shape[1], q_BTNH.shape[2]
    mask = masks.MultiHeadMask([_make_mask(rows, slots)] * heads)
    kernel = _make_kernel(mask, sizes["tensor"], sizes["seq"], interpret)
    q_BNTH, k_BKSH, v_BKSH = (x.swapaxes(1, 2) for x in (q_BTNH, k_BSKH, v_BSKH))
    run = _run
    if not mesh.empty:
        batch, row, head = partition_spec(("batch", "row", "act_heads"))
        kernel_spec = kernel.manual_sharding_spec(NamedSharding(mesh, P(head, row)))
        keys = P(batch, head)
        run = jax.shard_map(
            _run,
            in_specs=(kernel_spec, P(batch, head, row), keys, keys, P(batch, row), P(batch)),
            out_specs=P(batch, head, row),
            check_vma=False,
        )
    y_BNTH = run(kernel, q_BNTH, k_BKSH, v_BKSH, segment_ids_BT, segment_ids_BT)
    return y_BNTH.swapaxes(1, 2)[..., :width], None


def _run(kernel, q_BNTH, k_BKSH, v_BKSH, query_ids_BT, key_ids_BS):  # type: ignore[no-untyped-def]
    ids = kernels.SegmentIds(query_ids_BT, key_ids_BS)
    return jax.vmap(kernel)(q_BNTH, k_BKSH, v_BKSH, ids)


def _tell_branches(
    q_BTNH: Array, k_BSKH: Array, branch_ids_BT: Int[Array, "B T"]
) -> tuple[Array, Array]:
    """Queries and keys, wider by one column for each branch."""
    branches = jnp.array([1, 2])
    own_BTb = branch_ids_BT[..., None] == branches
    far_BTb = jnp.where(own_BTb, 0.0, -_FAR)

    def join(x: Array, columns_BTb: Array) -> Array:
        shape = (*x.shape[:3], len(branches))
        columns = jnp.broadcast_to(columns_BTb[:, :, None].astype(x.dtype), shape)
        return jnp.concatenate([x, columns], axis=-1)

    return join(q_BTNH, far_BTb), join(k_BSKH, own_BTb)


def _widen(x: Array) -> Array:
    """Zeros at the end of the last axis, to a multiple of the lanes."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % LANES)])


def _make_mask(rows: int, slots: tuple[int, ...]) -> masks.Mask:
    """What every row of this layout may see: nothing later, and no response the other."""
    if not slots:
        return masks.CausalMask((rows, rows))
    prompt, chosen, rejected = slots
    assert prompt + chosen + rejected == rows, (slots, rows)
    seen_TS = np.tri(rows, dtype=bool)
    seen_TS[prompt + chosen :, prompt : prompt + chosen] = False
    return masks.NumpyMask(seen_TS)


def _make_kernel(  # type: ignore[no-untyped-def]
    mask: masks.MultiHeadMask, head_shards: int, row_shards: int, interpret: bool
):
    rows = mask.shape[-1]
    local = rows // row_shards
    assert local % LANES == 0 and local * row_shards == rows, (rows, row_shards)
    block = LANES * math.gcd(local // LANES, _LARGEST_BLOCK // LANES)
    sizes = kernels.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    return kernels.make_splash_mha(
        mask,
        block_sizes=sizes,
        head_shards=head_shards,
        q_seq_shards=row_shards,
        residual_checkpoint_name=OUTPUT,
        interpret=interpret,
    )
