"""Weights in and out: Hugging Face safetensors to a model folder, and back for a release.

    python -m rpo_jax.convert import  --source Qwen/Qwen2.5-0.5B --target models/qwen
    python -m rpo_jax.convert verify  --source models/qwen --against Qwen/Qwen2.5-0.5B
    python -m rpo_jax.convert export  --source runs/rpo --target release
    python -m rpo_jax.convert inspect --source release

Runs of adapters are exported merged, or with --adapter as PEFT loads them; import --base takes them
back.

An interrupted import or export goes on where it stopped when the same command is given again.
"""

import argparse
import logging
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from rpo_jax.cli import Parser, exit_on_error
from rpo_jax.config import Mesh as MeshConfig
from rpo_jax.data.tokenizer import FILE_NAMES, read_tokenizer
from rpo_jax.errors import UserError, say_install
from rpo_jax.model.qwen2 import Network, forward, head_table
from rpo_jax.sharding.mesh import make_mesh
from rpo_jax.training.opening import find_model
from rpo_jax.training.origin import (
    check_base,
    load_params,
    load_trained_to_host,
    read_adapters,
    store_adapters,
)
from rpo_jax.training.state import abstract_weights
from rpo_jax.weights.adapters import (
    BASE_NOTE,
    MergedArrays,
    list_factors,
    note_base,
    read_base_checkpoint,
    read_peft,
    write_peft,
)
from rpo_jax.weights.adapters import CONFIG as ADAPTER_CONFIG
from rpo_jax.weights.card import make_card, make_notice
from rpo_jax.weights.exporting import Weights, export_weights, open_weights, verify_checksums
from rpo_jax.weights.history import History, tell_history
from rpo_jax.weights.hub import fetch_config, find_source, is_hub_id
from rpo_jax.weights.importing import Part, import_weights
from rpo_jax.weights.names import Tensor, list_tensors
from rpo_jax.weights.source import open_source
from rpo_jax.weights.store import DTYPE_NAMES, DTYPES
from rpo_jax.writing import in_bucket

_TEXT = "高血圧の患者には、まず減塩を勧める。 A question, an answer, and the number 3.14.\n"


def import_command(args: argparse.Namespace) -> None:
    """Hugging Face safetensors -> a model folder; with --base, a PEFT adapter over that one."""
    if args.base:
        _import_adapters(epath.Path(args.source), Path(args.base), Path(args.target))
        return
    if (epath.Path(args.source) / ADAPTER_CONFIG).exists():
        raise UserError(
            f"{args.source}: an adapter saved by PEFT; --base, the model folder that it changes, "
            "is wanted too"
        )
    source = find_source(args.source, args.revision, args.target)
    if not any((source.directory / name).exists() for name in FILE_NAMES):
        wanted = " or ".join(FILE_NAMES)
        logging.warning(
            "%s: holds no %s, which all that reads text with the model wants: train, generate, "
            "evaluate. Put one there before importing, or into %s/model afterwards",
            source.name,
            wanted,
            args.target,
        )
    if import_weights(source, args.target, args.ram_budget_gib, args.part):
        print(f"{args.target}: {_count(source.tensors):,} parameters, {source.dtype}")
    else:
        print(
            f"part {args.part.index} of {args.part.count} is done; others are not yet, and the "
            "last of them gives the folder its name"
        )


def export_command(args: argparse.Namespace) -> None:
    """A model folder -> Hugging Face safetensors, adapters merged, with a model card."""
    weights = open_model(epath.Path(args.source), args.step)
    imported = weights.manifest
    base = args.base or (imported.source if imported and imported.commit else "")
    base = "none" if base.lower() == "none" else base
    if base != "none" and not is_hub_id(base):
        raise UserError(
            f"--base{f'={args.base}' if args.base else ''}: the card must name the base model, "
            "whose licence applies, and only an import of a hub id tells it: give its hub id, such "
            "as Qwen/Qwen2.5-72B, or `none` for a model trained from random weights, or one whose "
            "base is not known"
        )
    if args.adapter:
        _export_adapters(weights, base, args)
        return
    dtype = DTYPE_NAMES.get(args.dtype, weights.arrays.dtype)
    stated = f"{_count(weights.tensors.values()):,} parameters, {dtype}"
    papers = _write_papers(weights, base, stated, "transformers", args)
    for change in export_weights(weights, args.target, args.ram_budget_gib, dtype, papers):
        print(change)
    _tell_what_is_wanted(args.target, base)
    print(f"{args.target}: step {weights.step}, {dtype}")


def _write_papers(
    weights: Weights, base: str, stated: str, library: str, args: argparse.Namespace
) -> dict[str, bytes]:
    """The card, from what the runs tell and what was given instead, and the licence's notice."""
    history = History()
    if not in_bucket(weights.folder):
        history = tell_history(Path(weights.folder), weights.step)
    given = {name: _read_text(getattr(args, name)) for name in vars(history)}
    history = replace(history, **{name: text for name, text in given.items() if text})
    notice = make_notice(base)
    imported = weights.manifest
    which = f"Step {weights.step}, {stated}."
    card = make_card(base, which, not weights.sums, history, library, imported is not None)
    return {"README.md": card} | ({"NOTICE": notice} if notice else {})


def _tell_what_is_wanted(target: epath.Path, base: str) -> None:
    if (target / "NOTICE").exists() and not (target / "LICENSE").exists():
        print(f"LICENSE: the licence of {base} wants a copy of itself in {target}; add it")


def verify_command(args: argparse.Namespace) -> None:
    """Reads all weights against the checksums of their import; --against compares logits too."""
    weights = open_model(epath.Path(args.source), args.step)
    peer = (
        make_peer(weights, args.against, _read_text(args.text) or _TEXT) if args.against else None
    )
    verify_checksums(weights, args.ram_budget_gib)
    found = "every checksum agrees" if weights.sums else "readable and finite"
    print(f"{weights.folder_of_step}: {found}")
    if peer:
        furthest = peer()
        print(f"logits differ from those of {args.against} by at most {furthest:.1e}")
        if furthest > args.tolerance:
            raise UserError(f"{args.source}: that is more than --tolerance={args.tolerance}")


def inspect_command(args: argparse.Namespace) -> None:
    """Describes a model folder, or safetensors, from headers alone; a hub id from its config."""
    folder = epath.Path(args.source)
    if (folder / "model").is_dir():
        weights = open_model(epath.Path(args.source), args.step)
        shape, dtype, tensors = weights.shape, weights.arrays.dtype, list(weights.tensors.values())
        origin = weights.manifest.source if weights.manifest else "a run"
        print(f"{weights.folder_of_step}: checkpoint of {origin}")
        if adapters := read_adapters(Path(args.source)):
            print(f"  adapters over {adapters.base}, step {adapters.step}; merged in what follows")
            for name in ("rank", "alpha", "targets"):
                print(f"  {name}: {getattr(adapters.lora, name)}")
    elif is_hub_id(args.source) and not folder.is_dir():
        fetched, shape, dtype = fetch_config(args.source, args.revision)
        tensors = list_tensors(shape)
        print(f"{args.source} at {fetched.name}: as its config says, the weights are not fetched")
    else:
        source = open_source(folder)
        shape, dtype, tensors = source.shape, source.dtype, list(source.tensors)
        print(f"{source.directory}: safetensors")
        for shard in source.shards:
            print(f"  {shard.file}: {len(shard.entries)} tensors, {shard.size:,} bytes")
    for name, value in vars(shape).items():
        print(f"  {name}: {value}")
    print(f"  {len(tensors)} tensors, {_count(tensors):,} parameters, {dtype}")


def open_model(folder: epath.Path, step: int | None) -> Weights:
    """Opens a step of a model folder for reading; adapters are merged into what is read of it.

    Raises:
        UserError: no such step, unreadable, or adapters whose base is not what it was.
    """
    here = Path(folder)
    adapters = None if in_bucket(folder) else read_adapters(here)
    if adapters is None:
        return open_weights(folder, step)
    check_base(here, adapters)
    found, trained = load_trained_to_host(here, step)
    base = open_model(epath.Path(adapters.base), adapters.step)
    arrays = MergedArrays(
        base.arrays,
        list_factors(trained["lora"], adapters.lora, base.shape),
        adapters.lora.alpha / adapters.lora.rank,
        {
            f"{name}/table": (np.array(adapters.row_ids), rows)
            for name, rows in trained.get("rows", {}).items()
        },
    )
    return replace(base, folder=folder, step=found, arrays=arrays)


def _import_adapters(source: epath.Path, base: Path, target: Path) -> None:
    lora, pairs = read_peft(source, find_model(base))
    over = read_base_checkpoint(source)
    adapters = store_adapters(target, base, lora, pairs)
    if over and over != adapters.checkpoint:
        logging.warning(
            "warning: %s was trained over another checkpoint than step %d of %s; that is well if "
            "both hold the same weights",
            source,
            adapters.step,
            base,
        )
    count = sum(leaf.size for leaf in jax.tree.leaves(pairs))
    print(f"{target}: {count:,} parameters of adapters of rank {lora.rank} over {base}")


def _export_adapters(weights: Weights, base: str, args: argparse.Namespace) -> None:
    folder = Path(weights.folder)
    adapters = read_adapters(folder)
    if adapters is None:
        raise UserError(f"--adapter: {folder} holds whole weights and no adapters")
    if read_adapters(adapters.base) is not None:
        logging.warning(
            "warning: %s, which these adapters were trained over, is itself adapters over another "
            "model: export it merged (without --adapter), and load these over that",
            os.path.normpath(adapters.base),
        )
    _, trained = load_trained_to_host(folder, weights.step)
    if "rows" in trained:
        raise UserError(
            f"--adapter: {folder} trained the rows of {', '.join(adapters.lora.trained_tokens)} "
            "too, which this export does not hold; export it merged, without --adapter"
        )
    name = Path(os.path.normpath(adapters.base)).name
    stated = (
        f"adapters of rank {adapters.lora.rank} alone, trained over step {adapters.step} of {name}"
    )
    papers = _write_papers(weights, base, stated, "peft", args)
    papers[BASE_NOTE] = note_base(name, adapters.step, adapters.checkpoint)
    write_peft(args.target, trained["lora"], adapters.lora, weights.shape, base, papers)
    _tell_what_is_wanted(args.target, base)
    print(f"{args.target}: step {weights.step}, adapters of rank {adapters.lora.rank} for PEFT")


def make_peer(weights: Weights, against: str, text: str) -> Callable[[], float]:
    """Checks all that a comparison of logits with transformers needs; what it returns compares.

    Both models lie in memory whole, in float32. Needs torch and transformers.

    Args:
        weights: our side.
        against: a folder or hub id: the other side.
        text: what both read.

    Returns:
        A function that gives the largest difference of any logit.

    Raises:
        UserError: they are not installed, `against` is not such a model, ours lies in a bucket, or
            there is no tokenizer to read the text with.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise UserError(f"--against wants {say_install('parity')}") from error

    if in_bucket(weights.folder):
        raise UserError(f"--against: {weights.folder} is in a bucket; copy it to a disk first")
    peer = find_source(against)
    if peer.shape != weights.shape:
        raise UserError(f"--against={against}: has another shape than {weights.folder}")
    tokens = np.array([read_tokenizer(Path(weights.folder / "model")).encode(text)])
    if not tokens.size:
        raise UserError("the tokenizer makes no tokens of the text; give another --text")

    def compare() -> float:
        network = Network(weights.shape, param_dtype=DTYPES[weights.arrays.dtype].name)
        mesh = make_mesh(MeshConfig(data=1, fsdp=1, seq=1, tensor=1), jax.devices()[:1])
        _, params = load_params(Path(weights.folder), abstract_weights(network, mesh), weights.step)
        ours = _logits(network, params, tokens)
        del params
        model = transformers.AutoModelForCausalLM.from_pretrained(
            str(peer.directory), dtype=torch.float32
        )
        with torch.no_grad():
            theirs = model(torch.tensor(tokens)).logits.numpy()
        return float(np.max(np.abs(ours - theirs)))

    return compare


def _logits(network: Network, params: dict, tokens: np.ndarray) -> np.ndarray:
    @jax.jit
    def run(params: dict) -> jax.Array:
        tokens_BT, one_BT = jnp.asarray(tokens), jnp.ones_like(tokens)
        positions_BT = jnp.arange(tokens.shape[1])[None]
        hidden = forward(network, params, tokens_BT, one_BT, 0 * one_BT, positions_BT)
        return hidden @ head_table(params).astype(hidden.dtype).T

    return np.asarray(run(params))


def _count(tensors: Iterable[Tensor]) -> int:
    return sum(math.prod(tensor.hf_shape) for tensor in tensors)


def _read_text(path: str | None) -> str:
    if path is None:
        return ""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}") from error


def _parse_part(text: str) -> Part:
    index, slash, count = text.partition("/")
    if not (slash and index.isdigit() and count.isdigit() and 1 <= int(index) <= int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is not like 3/16")
    return Part(int(index), int(count))


def _parse_target(text: str) -> epath.Path:
    if not text:
        raise argparse.ArgumentTypeError("is empty; the folder to make is wanted")
    return epath.Path(text)


def _parse_positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return value


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(prog="python -m rpo_jax.convert", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="import|export|verify|inspect")

    def add(name: str, run: Callable[[argparse.Namespace], None]) -> Callable[..., object]:
        command = commands.add_parser(name, help=run.__doc__, description=run.__doc__)
        command.set_defaults(run=run)
        return command.add_argument

    add_import = add("import", import_command)
    add_export = add("export", export_command)
    add_verify = add("verify", verify_command)
    add_inspect = add("inspect", inspect_command)
    for option in (add_import, add_inspect):
        option("--source", required=True, help="a folder, gs://..., or a hub id")
        option("--revision", help="of the hub id; by default the newest")
    for option in (add_export, add_verify):
        option("--source", required=True, help="a model folder: an import, or a run")
    for option in (add_export, add_verify, add_inspect):
        option("--step", type=int, help="which checkpoint; by default the newest")
    for option in (add_import, add_export):
        option("--target", required=True, type=_parse_target, help="folder to make")
    for option in (add_import, add_export, add_verify):
        option(
            "--ram_budget_gib",
            type=_parse_positive,
            default=4.0,
            help="anonymous memory to stay under, GiB (default 4)",
        )
    add_import(
        "--part",
        type=_parse_part,
        default=Part(),
        help="i/n: the share of host i of n that write to one target (default 1/1)",
    )
    add_import(
        "--base", help="model folder that --source, a folder saved by PEFT, holds an adapter for"
    )
    add_export(
        "--adapter", action="store_true", help="the adapters alone, as PEFT loads them, unmerged"
    )
    add_export("--dtype", choices=sorted(DTYPE_NAMES), help="by default that of the checkpoint")
    add_export(
        "--base",
        help="hub id of the base model, or none; by default the hub id that was imported: what "
        "came from a folder, or from random weights, wants it given",
    )
    for name in ("method", "data", "results"):
        add_export(
            f"--{name}",
            help=f"Markdown file for the card's section on {name}; by default what the runs tell",
        )
    add_verify(
        "--against",
        help="folder or hub id of safetensors (an export, or what was imported) whose logits, as "
        "transformers computes them, are compared with",
    )
    add_verify("--text", help="UTF-8 file with the text to compare on")
    add_verify(
        "--tolerance", type=_parse_positive, default=1e-3, help="of any logit (default 1e-3)"
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    """Parses the command line and runs one of the commands."""
    # Files are moved: no accelerator is taken, no other host of a pod waited for, and what verify
    # computes is float32 throughout.
    jax.config.update("jax_platforms", "cpu")
    with exit_on_error():
        args = make_parser().parse_args(argv)
        args.run(args)


if __name__ == "__main__":
    main()
