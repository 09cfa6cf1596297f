"""What a run would do, told without doing it."""

import jax
from etils import epath

from rpo_jax.config import Config
from rpo_jax.model.qwen2 import count_params
from rpo_jax.sharding.mesh import is_enough, say_wanted
from rpo_jax.training.estimate import local_bytes
from rpo_jax.training.metrics import count_flops
from rpo_jax.training.optim import make_optimizer
from rpo_jax.training.state import abstract_state, abstract_weights, split_params
from rpo_jax.training.step import make_step
from rpo_jax.training.workload import Workload, example_batch, full_batch
from rpo_jax.weights.store import place_checkpoints

_GIB = 2**30


def describe_elsewhere(config: Config) -> str:
    """A line on the devices that a run wants and does not find here; "" where they are here."""
    platform, count = jax.devices()[0].platform, jax.device_count()
    for_tpus = config.model.attention == "splash"
    if is_enough(config.mesh, count) and (platform == "tpu" or not for_tpus):
        return ""
    kind = " of TPUs" if for_tpus else ""
    return (
        f"the plan wants {say_wanted(config.mesh)}{kind}, here are {count} of {platform}: "
        "`python -m rpo_jax.plan --config=... --topology=...` makes it without them"
    )


def describe_run(work: Workload) -> str:
    """A table: parameters, mesh, batch, steps, memory a device, paths.

    The memory is the compiler's account of the very step that would run: it is compiled here, for
    the devices that are here.
    """
    config, mesh = work.config, work.mesh
    tx = make_optimizer(config.optim)
    batch = example_batch(work)
    row_tokens = batch["tokens"].shape[1]
    with jax.set_mesh(mesh):
        abstract = abstract_state(work.network, tx, mesh)
        step = make_step(work, tx, abstract)
        _, frozen = split_params(abstract_weights(work.network, mesh))
        memory = step.lower(abstract, frozen, work.hyper, batch).compile().memory_analysis()
    assert memory is not None, "every backend of XLA accounts for its memory"
    state = local_bytes((abstract, frozen))
    parameters = f"{count_params(work.network):,}"
    if frozen:
        adapters = sum(leaf.size for leaf in jax.tree.leaves(abstract.params))
        held = config.lora.quantize or config.model.param_dtype
        parameters += f" frozen in {held}, {adapters:,} of adapters trained"
    folder = config.folder
    full = full_batch(work)
    rows = config.train.batch_rows
    lines = {
        "stage": f"{config.stage}, from {config.init_from or 'random weights'}",
        "parameters": parameters,
        "mesh": ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
        + f" over {mesh.size} x {mesh.devices.flat[0].device_kind}",
        "attention": f"{config.model.attention}, remat {config.model.remat}",
        "batch": f"{rows} rows of {row_tokens} = {rows * row_tokens:,} tokens, "
        f"in {config.train.micro_batches} micro-batches",
        "steps": f"{config.train.steps:,}, at most "
        f"{config.train.steps * rows * row_tokens:,} tokens",
        "model FLOPs": f"at most {count_flops(work.network, full) / 1e12:.4g} T a step",
        "memory": f"{state / _GIB:.3f} GiB state + {memory.temp_size_in_bytes / _GIB:.3f} GiB "
        "working space a device, by the compiler",
        "data": f"{config.data.source} -> {config.workdir}/data/",
        "run": f"{folder}/ (run.json, model/, metrics.jsonl, log.txt)",
        "checkpoints": f"every {config.checkpoint.save_every_steps} steps, newest "
        f"{config.checkpoint.keep} kept in "
        f"{place_checkpoints(epath.Path(folder), config.checkpoint.directory)}/",
    }
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {text}" for name, text in lines.items())
