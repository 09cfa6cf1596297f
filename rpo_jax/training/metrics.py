"""What a run tells about itself: analytic FLOPs, memory, and the log files."""

import json
import logging
import os
import resource
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np

from rpo_jax.config import Log
from rpo_jax.errors import UserError
from rpo_jax.model.qwen2 import Network
from rpo_jax.writing import write_whole

# bf16 FLOP/s of one JAX device, by the start of its `device_kind`. Source: Google Cloud's TPU pages
# (system architecture); a TPU7x chip shows two devices.
_PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU7x": 2307e12 / 2,
}


def forward_flops(network: Network, batch: dict[str, np.ndarray]) -> dict[str, float]:
    """FLOPs of a forward pass over these rows by part: useful work only.

    Matmuls of the layers ("projections" of attention, "gate", "up", "down") for each token that is
    not padding, the "head" for each target, and "attention" for each key that a query sees. A token
    at position p of its document (or of its response, which goes on from the prompt) sees p + 1.
    """
    shape = network.shape
    width, heads, kv_heads = shape.hidden_size, shape.num_attention_heads, shape.num_key_value_heads
    real = batch["segment_ids"] > 0
    tokens = 2.0 * shape.num_hidden_layers * float(real.sum())
    seen_keys = 2.0 * shape.num_hidden_layers * float(((batch["positions"] + 1.0) * real).sum())
    mlp = tokens * width * shape.intermediate_size
    return {
        "projections": tokens * width * shape.head_dim * (2 * heads + 2 * kv_heads),
        "attention": seen_keys * 2 * heads * shape.head_dim,
        **dict.fromkeys(("gate", "up", "down"), mlp),
        "head": 2.0 * shape.vocab_size * width * float((batch["target_mask"] > 0).sum()),
    }


def count_flops(network: Network, batch: dict[str, np.ndarray]) -> float:
    """Model FLOPs of one training step on these rows: useful work only, no recomputation.

    Three times the forward pass; with adapters twice: nobody needs the gradients of frozen weights,
    and those of the adapters themselves are too small to count.
    """
    return (2 if network.lora else 3) * sum(forward_flops(network, batch).values())


# What a backward pass computes again, by `model.remat`; none needs the product of `down` again.
_AGAIN = {
    "full": ("projections", "attention", "gate", "up"),
    "attention": ("projections", "gate", "up"),
    "mlp": ("gate", "up"),
    "dots": (),
    "none": (),
}


def count_recompute(network: Network, batch: dict[str, np.ndarray], keep_logits: bool) -> float:
    """FLOPs of a training step that are done for the second time."""
    parts = forward_flops(network, batch)
    again = sum(parts[name] for name in _AGAIN[network.remat])
    return again + (0.0 if keep_logits or network.lora else parts["head"])


def peak_flops(devices: list[jax.Device]) -> float | None:
    """bf16 FLOP/s of all devices together; None where the device is not in the table."""
    for kind, flops in _PEAK_FLOPS.items():
        if devices[0].device_kind.startswith(kind):
            return flops * len(devices)
    return None


def measure_memory() -> dict[str, float]:
    """GiB in use: the process's resident set now and at its peak, and the fullest device's peak."""
    gib = 2**30
    peak_unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * peak_unit
    memory = {"host_peak_gib": peak / gib}
    statm = Path("/proc/self/statm")
    if statm.exists():
        pages = int(statm.read_text().split()[1])
        memory["host_gib"] = pages * os.sysconf("SC_PAGE_SIZE") / gib
    stats = [device.memory_stats() for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if s and "peak_bytes_in_use" in s]
    if peaks:
        memory["device_peak_gib"] = max(peaks) / gib
    return memory


class MetricLog:
    """Writes scalars to metrics.jsonl, TensorBoard and W&B, on process 0 only.

    Opening it for a run that goes on from `step` cuts what was logged after that step, so that the
    curves of a resumed run are those of one that never stopped.
    """

    def __init__(self, folder: Path, config: Log, step: int, run: dict[str, Any]):
        """Opens the logs of the run in `folder` at `step`; `run` is its config, for W&B."""
        path = folder / "metrics.jsonl"
        kept = _lines_until(path, step)
        self._logged = {(record["step"], name) for record in kept for name in record}
        self._file = self._tensorboard = self._wandb = None
        if jax.process_index() != 0:
            return
        if config.wandb_project:
            self._wandb = _start_wandb(config.wandb_project, folder, run)
        write_whole(path, "".join(json.dumps(record) + "\n" for record in kept))
        self._file = path.open("a", encoding="utf-8")
        if config.tensorboard:
            # Where torch is installed this imports it, which takes seconds.
            from tensorboardX import SummaryWriter

            logdir = str(folder / "tensorboard")
            self._tensorboard = SummaryWriter(logdir, purge_step=step + 1, flush_secs=30)

    def has(self, step: int, name: str) -> bool:
        """Whether a scalar of that name is logged under a step; the same on every process."""
        return (step, name) in self._logged

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Logs scalars under a step."""
        self._logged.update((step, name) for name in scalars)
        if self._file is not None:
            self._file.write(json.dumps({"step": step, **scalars}) + "\n")
            self._file.flush()
        if self._tensorboard is not None:
            for name, value in scalars.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(scalars, step=step)

    def sync(self) -> None:
        """Makes what was written outlast this machine; a mounted bucket has it only then."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def __enter__(self) -> "MetricLog":
        """Itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Closes the files."""
        if self._file is not None:
            self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if error is None else 1)


def _start_wandb(project: str, folder: Path, run: dict[str, Any]) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            "log.wandb_project is set, but wandb is not installed: pip install wandb"
        ) from error
    return wandb.init(
        project=project, name=folder.name, id=folder.name, dir=folder, config=run, resume="allow"
    )


def _lines_until(path: Path, step: int) -> list[dict[str, Any]]:
    """The records of a metrics file up to `step`, without what a kill left unfinished."""
    if not path.exists():
        return []
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
            if record["step"] <= step:
                kept.append(record)
        except (ValueError, KeyError, TypeError):
            logging.warning("%s: dropped a line that is not a record: %.80s", path, line)
    return kept
