"""Small networks and batches that several tests share."""

from dataclasses import replace
from typing import Any

import jax
import numpy as np

from rpo_jax.config import Config, Train
from rpo_jax.config import Mesh as MeshConfig
from rpo_jax.data.rows import PairLayout, pair_row, text_row
from rpo_jax.model.qwen2 import Network
from rpo_jax.model.shape import ModelShape
from rpo_jax.sharding.mesh import make_mesh
from rpo_jax.training.workload import Workload, make_workload

SHAPE = ModelShape(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    tie_word_embeddings=False,
    max_position_embeddings=128,
    initializer_range=0.2,
)
NETWORK = Network(SHAPE)

PROMPT_LENGTH, RESPONSE_LENGTH = 12, 6


def make_config(stage: str = "rpo", **changes: Any) -> Config:
    """A config for 8 rows, changed section by section: `rpo={"alpha": 0.0}`."""
    train = Train(steps=10, batch_rows=8, loss_chunk=5)
    config = Config(stage=stage, name="tiny", init_from="somewhere", train=train)
    config = replace(
        config,
        data=replace(
            config.data,
            row_length=24,
            prompt_length=PROMPT_LENGTH,
            response_length=RESPONSE_LENGTH,
        ),
        optim=replace(config.optim, learning_rate=1e-2, weight_decay=0.1),
    )
    for section, values in changes.items():
        config = replace(config, **{section: replace(getattr(config, section), **values)})
    return config


def make_work(
    config: Config, network: Network = NETWORK, devices: list[jax.Device] | None = None
) -> Workload:
    """The workload of a config, by default on one device."""
    return make_workload(config, network, make_mesh(config.mesh, devices or jax.devices()[:1]))


def pairs(count: int = 8, seed: int = 0) -> list[dict[str, np.ndarray]]:
    """Preference pairs of random ids and lengths."""
    rng = np.random.default_rng(seed)

    def ids(longest: int) -> np.ndarray:
        return rng.integers(1, SHAPE.vocab_size, rng.integers(1, longest + 1)).astype(np.int32)

    return [
        {
            "prompt_ids": ids(PROMPT_LENGTH),
            "chosen_ids": ids(RESPONSE_LENGTH),
            "rejected_ids": ids(RESPONSE_LENGTH),
        }
        for _ in range(count)
    ]


def stack(rows: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Rows to a batch with record indices."""
    batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    return batch | {"record_index": np.arange(len(rows), dtype=np.int32)[:, None]}


def refer(records: list[dict[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
    """The pairs with made-up log-probabilities of a reference, enough for any targets."""
    rng = np.random.default_rng(1)
    count = PROMPT_LENGTH + 2 * RESPONSE_LENGTH
    made_up = rng.normal(-4, 1, (len(records), count)).astype(np.float32)
    return [
        {**record, "reference_logps": logps} for record, logps in zip(records, made_up, strict=True)
    ]


def pair_batch(
    records: list[dict[str, np.ndarray]],
    share_prefix: bool = True,
    prompt_targets: bool = False,
    reference: bool = True,
) -> dict[str, np.ndarray]:
    """A batch of pair rows, one pair each, with a made-up reference."""
    layout = PairLayout(PROMPT_LENGTH, RESPONSE_LENGTH, share_prefix, prompt_targets)
    records = refer(records) if reference else records
    return stack([pair_row([record], layout) for record in records])


def text_batch(count: int = 8, length: int = 24, seed: int = 0) -> dict[str, np.ndarray]:
    """A batch of packed text rows with three documents each and padding at the end of some."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        cuts = np.sort(rng.choice(np.arange(1, length), 3, replace=False))
        segments = np.digitize(np.arange(length), cuts).astype(np.int32) + 1
        segments[segments == 4] = 0
        tokens = rng.integers(1, SHAPE.vocab_size, length).astype(np.int32)
        rows.append(text_row({"tokens": tokens * (segments > 0), "segment_ids": segments}))
    return stack(rows)


def relative_difference(left: Any, right: Any) -> float:
    """The largest |a - b| / |a| over the arrays of two trees, norms over whole arrays."""
    ratios = jax.tree.map(
        lambda a, b: float(
            np.linalg.norm(np.asarray(a, np.float64) - np.asarray(b, np.float64))
            / max(np.linalg.norm(np.asarray(a, np.float64)), 1e-30)
        ),
        left,
        right,
    )
    return max(jax.tree.leaves(ratios))


MESHES = {
    "data8": MeshConfig(data=8),
    "data2-fsdp2-tensor2": MeshConfig(data=2, fsdp=2, tensor=2),
    "fsdp4-seq2": MeshConfig(data=1, fsdp=4, seq=2),
    "data2-seq4": MeshConfig(data=2, seq=4),
}
