"""Plans by the TPU compiler itself: one small program, its cache, and what is refused."""

import dataclasses
import gzip
import itertools
import json
import os
import re
import shlex
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rpo_jax import plan as command
from rpo_jax.cli import load_config
from rpo_jax.config import Lora, Mesh
from rpo_jax.errors import UserError
from rpo_jax.model.qwen2 import count_params, make_network
from rpo_jax.model.shape import load_shape
from rpo_jax.sharding.gpus import GPUS
from rpo_jax.sharding.mesh import make_mesh
from rpo_jax.sharding.topology import open_topology
from rpo_jax.training.estimate import local_bytes, plan_program
from rpo_jax.training.metrics import count_flops, count_recompute, forward_flops
from rpo_jax.training.origin import as_stored, make_quantize
from rpo_jax.training.programs import make_job
from rpo_jax.training.search import search
from rpo_jax.training.state import abstract_weights, split_params
from tests.tiny import NETWORK, SHAPE, make_config

pytest.importorskip("libtpu", reason="compiling for TPUs wants libtpu: pip install .[tpu]")

REPO = Path(__file__).resolve().parents[1]
FORMS = {"uint4": 512, "int8": 1024, "bfloat16": 2048, "float32": 4096}
WIDE = dataclasses.replace(
    SHAPE,
    hidden_size=256,
    intermediate_size=512,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=512,
    num_hidden_layers=2,
)


def small_run(**changes):
    """An RPO run of two layers on four chips, by the TPU kernel."""
    sections = {
        "model": {"attention": "splash", "compute_dtype": "bfloat16", "remat": "full"},
        "data": {"prompt_length": 128, "response_length": 64},
        "mesh": {"data": 1, "fsdp": 2, "tensor": 2},
        "train": {"batch_rows": 2, "loss_chunk": 128},
    }
    for name, values in changes.items():
        sections[name] = {**sections[name], **values}
    return make_config("rpo", **sections)


def plan_for(config, topology, cache, program="step", shape=WIDE):
    return plan_program(program, config, shape, open_topology(topology), cache, 1e9)


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    cache = tmp_path_factory.mktemp("plans")
    return cache, plan_for(small_run(), "v6e:2x2", cache)


def test_a_small_rpo_step_compiles_for_a_tpu(planned):
    _, plan = planned
    assert plan["fits"] and plan["chips"] == 4 and plan["tokens_a_run"] == 2 * 256
    sizes = plan["hbm_gb"]
    assert sizes["chip"] == 33.55
    assert 0 < sizes["total"] < 1
    assert plan["seconds"]["step"] == pytest.approx(
        sum(v for name, v in plan["seconds"].items() if name != "step"), abs=2e-4
    )
    assert plan["seconds"]["compute"] > 0
    # The kernel of each pass; what else the compiler cannot estimate counts nothing, and is told.
    assert plan["ops_without_estimate"]["kernels_charged"] >= 2
    assert "of 0 kernels and " in command.format_plan(plan)
    assert {"fsdp", "tensor"} <= set(plan["collectives_gb"])
    assert "DOES NOT FIT" not in command.format_plan(plan)
    assert json.loads(json.dumps(plan)) == plan
    rate = plan["tokens_per_s_per_chip"]
    assert plan["run_chip_hours"] == pytest.approx(1e9 / rate / 3600, abs=0.06)


def test_what_a_step_holds_by_hand():
    """Weights are cut over four chips, but for norms and biases; Adam holds two of each."""
    job = make_job("step", small_run(), WIDE, open_topology("v6e:2x2").devices)
    weights, moments = (local_bytes(job.holds[name]) for name in ("weights", "optimizer"))
    whole = 4 * count_params(job.work.network)
    assert whole / 4 < weights < whole / 4 * 1.02
    assert moments == pytest.approx(2 * weights, abs=16)  # and a count


def test_layers_are_cast_one_by_one(planned):
    """The weights of the MLP, two layers in float32, are never whole in bfloat16 beside."""
    (stored,) = planned[0].iterdir()
    hlo = json.loads(gzip.decompress(stored.read_bytes()))["hlo"]
    assert "f32[2,128,256]" in hlo
    assert not re.search(r"= bf16\[2,128,256\]\S* convert\(", hlo)


def test_the_same_program_is_not_compiled_again(planned):
    cache, plan = planned
    stored = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert [path.name for path in stored] == [f"{plan['digest']}.json.gz"]
    # Alpha and beta are traced: a sweep over them is one program.
    rpo = dataclasses.replace(small_run().rpo, alpha=0.25, beta=0.5)
    assert (rpo.alpha, rpo.beta) != (small_run().rpo.alpha, small_run().rpo.beta)
    swept = dataclasses.replace(small_run(), rpo=rpo)
    assert plan_for(swept, "v6e:2x2", cache) == plan
    assert {path: path.stat().st_mtime_ns for path in cache.iterdir()} == stored


@pytest.mark.parametrize("variable", ["LIBTPU_INIT_ARGS", "XLA_FLAGS"])
def test_under_other_flags_a_program_is_another(variable, planned, monkeypatch):
    def compile_again(lowered):
        raise NotImplementedError("compiled again")

    cache, plan = planned
    monkeypatch.setattr("jax.stages.Lowered.compile", compile_again)
    with monkeypatch.context() as here:
        flags = os.environ.get(variable, "") + " --xla_cpu_enable_fast_math=false"
        here.setenv(variable, flags)
        with pytest.raises(NotImplementedError, match="compiled again"):
            plan_for(small_run(), "v6e:2x2", cache)
    assert plan_for(small_run(), "v6e:2x2", cache) == plan


@pytest.mark.parametrize(
    ("program", "kinds"),
    [
        pytest.param("reference", {"weights", "optimizer"}, marks=pytest.mark.full),
        ("decode", {"weights", "cache"}),
    ],
)
def test_other_programs_of_a_run_compile_too(program, kinds, tmp_path):
    plan = plan_for(small_run(), "v6e:2x2", tmp_path, program)
    assert plan["fits"] and plan["program"] == program
    assert kinds < plan["hbm_gb"].keys()
    # Each writes or reads what it is asked for, once.
    assert plan["tokens_a_run"] == {"reference": 2 * 256, "decode": 16}[program]
    assert plan["model_tflops"] >= 0 and plan["seconds"]["step"] > 0
    assert "tokens/s/chip" in command.format_plan(plan)


def test_several_slices_in_one_call_and_their_plans_in_a_file(tmp_path, capsys):
    config = small_run(model={"shape": "laptop-names"}, mesh={"data": 1, "fsdp": 1, "tensor": 1})
    config = dataclasses.replace(config, workdir=str(tmp_path))
    path = tmp_path / "plans.json"
    command.main(config, topology="v6e:1x1,v5e:1x1", json=str(path), tokens="2e9")
    plans = json.loads(path.read_text())
    assert [plan["topology"] for plan in plans] == ["v6e:1x1", "v5e:1x1"]
    assert {plan["run_tokens"] for plan in plans} == {2e9}
    printed = capsys.readouterr().out
    assert printed.count("chip-hours for 2,000,000,000 tokens\n") == 2
    # Unless said, the cost is that of the run itself: all steps of two rows of 256 tokens.
    steps = config.train.steps
    command.main(config, topology="v6e:1x1", json=str(path))
    (plan,) = json.loads(path.read_text())
    assert (plan["run_tokens"], plan["run_steps"]) == (steps * 2 * 256, steps)
    hours = steps * 512 / plan["tokens_per_s_per_chip"] / 3600
    assert plan["run_chip_hours"] == pytest.approx(hours, abs=0.06)
    told = f"chip-hours for {steps * 512:,} tokens, all of the run's {steps:,} steps\n"
    assert told in capsys.readouterr().out


def list_examples():
    """What follows the command's name, as `--help` and the README have it."""
    readme = (REPO / "README.md").read_text(encoding="utf-8")
    return [*command.EXAMPLES, *re.findall(r"^python -m rpo_jax\.plan (.*)$", readme, re.M)]


@pytest.mark.parametrize("example", list_examples())
def test_the_mesh_of_every_example_fits_its_topologies(example):
    words = dict(itertools.pairwise(shlex.split(example)))
    config = load_config(words["--config"])
    for name in words["--topology"].split(","):
        card, _, count = name.partition(":")
        if card in GPUS:  # their compiler is an extra; as many devices will do
            make_mesh(config.mesh, jax.devices()[: int(count)])
        else:
            command.check_meshes(config, [open_topology(name)])


def test_a_mesh_has_to_fit_every_topology_before_anything_is_compiled(tmp_path):
    config = small_run(model={"shape": "laptop-names"}, mesh={"data": 1, "fsdp": 1, "tensor": 1})
    config = dataclasses.replace(config, workdir=str(tmp_path))
    told = r"--topology=v6e:2x2: mesh \(data=1, .*\) wants 1 device, 4 are there"
    with pytest.raises(UserError, match=told):
        command.main(config, topology="v6e:1x1,v6e:2x2")
    assert not list(tmp_path.iterdir())


@pytest.mark.full
@pytest.mark.parametrize("slice_", ["v6e:2x2", "v5e:2x4"])
def test_a_base_is_quantised_on_the_few_chips_that_then_hold_it(slice_):
    """The largest kernels of the 72B, in the room that all others leave when they are there."""
    config = load_config(f"{REPO}/configs/qwen25_72b_rpo_lora.py:{slice_}", ())
    topology = open_topology(slice_)
    mesh = make_mesh(config.mesh, topology.devices)
    network = make_network(load_shape(config.model.shape), config.model, config.lora)
    _, frozen = split_params(abstract_weights(network, mesh))
    with jax.set_mesh(mesh):
        for name in ("up", "down"):
            leaf = frozen["layers"]["mlp"][name]["kernel"]
            compiled = make_quantize(name, leaf).lower(as_stored(leaf)).compile()
            sizes = compiled.memory_analysis()
            taken = sizes.argument_size_in_bytes + sizes.output_size_in_bytes
            taken += sizes.temp_size_in_bytes + local_bytes(frozen) - local_bytes(leaf)
            assert taken < topology.chip.hbm_bytes


@pytest.mark.full
def test_a_row_may_be_cut_over_chips(tmp_path):
    config = small_run(mesh={"data": 1, "fsdp": 1, "seq": 2, "tensor": 2})
    plan = plan_for(config, "v6e:2x2", tmp_path)
    assert plan["fits"] and "seq" in plan["collectives_gb"]
    assert plan["ops_without_estimate"]["kernels_charged"] >= 2


@pytest.mark.full
def test_activations_may_wait_in_the_memory_of_the_host(tmp_path):
    """Device temporaries fall by less than the host takes: copies on their way have buffers."""
    deep = dataclasses.replace(WIDE, num_hidden_layers=24)
    sizes = {}
    for offload in (False, True):
        config = small_run(model={"remat": "dots", "offload": offload}, train={"batch_rows": 64})
        plan = plan_for(config, "v6e:2x2", tmp_path, shape=deep)
        sizes[offload] = plan["hbm_gb"]["temporaries"], plan["host_gb"]
        assert ("host's memory" in command.format_plan(plan)) == offload
    assert sizes[True][0] < 0.9 * sizes[False][0]
    assert sizes[False][1] == 0 < sizes[True][1]


@pytest.mark.full
def test_two_slices_are_compiled_as_one_run(tmp_path):
    config = small_run(mesh={"data": 2, "fsdp": 2, "tensor": 2}, train={"batch_rows": 4})
    plan = plan_for(config, "2*v6e:2x2", tmp_path)
    assert plan["fits"] and plan["chips"] == 8
    # Gradients are summed over the slices, and nothing else goes between them.
    assert plan["collectives_gb"]["slices"].keys() == {"all-reduce"}
    assert not {"send", "recv"} & plan["ops_without_estimate"].keys()


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ({"program": "train"}, "--program=train: train is none of step, reference, decode"),
        ({"tokens": "many"}, "--tokens=many: a number is wanted"),
        ({"search": True, "program": "step,decode"}, "training step: leave out --program=step,dec"),
    ],
    ids=str,
)
def test_what_is_no_option_is_refused(option, told):
    with pytest.raises(UserError, match=told):
        command.main(small_run(model={"shape": "qwen2.5-0.5b"}), topology="v6e:2x2", **option)


@pytest.mark.full
def test_a_search_ranks_what_fits_and_does_not_compile_twice(tmp_path):
    found = search(small_run(), WIDE, open_topology("v6e:2x2"), tmp_path, 1e9)
    seconds = [plan["seconds"]["step"] for plan in found]
    assert seconds == sorted(seconds)
    # Two rows: at most two devices share them out.
    meshes = {tuple(plan["mesh"].items()) for plan in found}
    assert len(meshes) == 2 and all(dict(mesh).get("fsdp", 1) <= 2 for mesh in meshes)
    assert {plan["remat"] for plan in found} == {"full", "dots"}
    stored = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert search(small_run(), WIDE, open_topology("v6e:2x2"), tmp_path, 1e9) == found
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == stored
    assert command.format_search(found).count("tokens/s/chip") == len(found)


@pytest.mark.full
def test_a_search_with_no_place_to_look_says_so(tmp_path):
    with pytest.raises(UserError, match=r"no mesh divides train.batch_rows=3"):
        odd = small_run(train={"batch_rows": 3, "micro_batches": 1})
        shape = dataclasses.replace(WIDE, num_key_value_heads=1)
        search(odd, shape, open_topology("v6e:4x4"), tmp_path, 1e9)


@pytest.mark.parametrize(
    ("room", "layouts"),
    [
        (1024, {(1, 1, 1), (2, 1, 2)}),
        (512, {(1, 1, 2), (2, 1, 4)}),
        (256, {(1, 2, 4), (2, 2, 8)}),  # half a row is the most that a chip can take
    ],
)
def test_a_search_finds_the_smallest_seq_and_the_fewest_micro_batches(
    room, layouts, tmp_path, monkeypatch
):
    """16 rows of 512 tokens, eight chips with room for so many at once: tensor, seq, cuts."""
    tried = []

    def fill(program, config, shape, topology, cache, tokens):
        mesh, count = config.mesh, config.train.micro_batches
        tried.append((mesh.tensor, mesh.seq, count))
        assert mesh.tensor * mesh.seq * mesh.fsdp == 8
        fits = 16 * 512 / (mesh.fsdp * mesh.seq * count) <= room
        sizes = {"total": topology.chip.hbm_bytes / 1e9, "chip": 33.55}  # none for other policies
        speed = {"seconds": {"step": count}, "tokens_per_s_per_chip": 1.0, "mfu": 0.5}
        layout = {"mesh": dataclasses.asdict(mesh), "micro_batches": count, "remat": "full"}
        return {"fits": fits, "hbm_gb": sizes, **layout, **speed}

    monkeypatch.setattr("rpo_jax.training.search.plan_program", fill)
    rows = {"train": {"batch_rows": 16}, "data": {"prompt_length": 384, "response_length": 64}}
    found = search(small_run(**rows), WIDE, open_topology("v6e:2x4"), tmp_path, 1e9)
    assert len(set(tried)) == len(tried) == len(found), "nothing is compiled twice"
    fewest: dict[tuple[int, int], int] = {}
    for plan in (plan for plan in found if plan["fits"]):
        mesh, count = (plan["mesh"]["tensor"], plan["mesh"]["seq"]), plan["micro_batches"]
        fewest[mesh] = min(count, fewest.get(mesh, count))
    assert {(*mesh, count) for mesh, count in fewest.items()} == layouts


def test_a_search_passes_over_what_the_compiler_fails_on(tmp_path, monkeypatch, caplog):
    def fail(program, config, shape, topology, cache, tokens):
        if config.mesh.tensor == broken or broken is None:
            raise jax.errors.JaxRuntimeError("INTERNAL: Mosaic failed to compile")
        speed = {"seconds": {"step": 1.0}, "tokens_per_s_per_chip": 1.0, "mfu": 0.5}
        mesh = {"tensor": config.mesh.tensor}
        sizes = {"hbm_gb": {"total": 1.0, "chip": 33.0}, "micro_batches": 1, "remat": "full"}
        return {"fits": True, "mesh": mesh, **sizes, **speed}

    monkeypatch.setattr("rpo_jax.training.search.plan_program", fail)
    look = partial(search, small_run(), WIDE, open_topology("v6e:2x2"), tmp_path, 1e9)
    broken = 2
    assert {plan["mesh"]["tensor"] for plan in look()} == {1}
    assert "tensor 2: the compiler failed: INTERNAL: Mosaic" in caplog.text
    broken = None
    with pytest.raises(UserError, match="the compiler failed on every mesh: INTERNAL"):
        look()


def test_four_bits_are_half_a_byte():
    """A kernel of 64 x 32 over two devices, in the forms that weights are held in."""
    mesh = make_mesh(Mesh(data=2), jax.devices()[:2])
    place = NamedSharding(mesh, PartitionSpec("data"))
    held = {name: jax.ShapeDtypeStruct((64, 32), name, sharding=place) for name in FORMS}
    assert {name: local_bytes(leaf) for name, leaf in held.items()} == FORMS


@pytest.mark.parametrize(
    ("room", "policies"),
    [
        (510 * 2**10, ["full"]),
        (514 * 2**10, ["full", "attention"]),
        (2**30, ["full", "dots"]),
    ],
)
def test_a_search_tries_what_the_room_is_for(room, policies, tmp_path, monkeypatch):
    """512 tokens in two layers: attention keeps 512 KiB; what layers read is there already."""
    topology = open_topology("v6e:1x1")
    tried = []

    def fill(program, config, shape, topology, cache, tokens):
        if config.train.micro_batches == 1:
            tried.append(config.model.remat)
        sizes = {"total": (topology.chip.hbm_bytes - room) / 1e9, "chip": 33.55}
        speed = {"seconds": {"step": 1.0}, "tokens_per_s_per_chip": 1.0, "mfu": 0.5}
        layout = {"mesh": {}, "micro_batches": 1, "remat": config.model.remat}
        return {"fits": True, "hbm_gb": sizes, **layout, **speed}

    monkeypatch.setattr("rpo_jax.training.search.plan_program", fill)
    search(small_run(), WIDE, topology, tmp_path, 1e9)
    assert tried == policies


def test_flops_by_hand():
    """Four tokens in three layers of 3072 weights of attention and three times 1536 of MLP."""
    one = np.ones((1, 4), np.int32)
    batch = {"segment_ids": one, "positions": np.arange(4)[None], "target_mask": one}
    parts = forward_flops(NETWORK, batch)
    assert parts == {
        "projections": 2 * 3 * 4 * 3072,
        "attention": 2 * 3 * (1 + 2 + 3 + 4) * 2 * 32,
        **dict.fromkeys(("gate", "up", "down"), 2 * 3 * 4 * 1536),
        "head": 2 * 4 * 96 * 32,
    }
    assert count_flops(NETWORK, batch) == 3 * sum(parts.values())
    adapted = dataclasses.replace(NETWORK, lora=Lora(rank=2))
    assert count_flops(adapted, batch) == 2 * sum(parts.values())
    again = {
        remat: count_recompute(dataclasses.replace(NETWORK, remat=remat), batch, keep_logits=True)
        for remat in ("full", "attention", "mlp", "dots", "none")
    }
    assert again == {
        "full": 73728 + 3840 + 2 * 36864,
        "attention": 73728 + 2 * 36864,
        "mlp": 2 * 36864,
        "dots": 0,
        "none": 0,
    }
    assert count_recompute(NETWORK, batch, keep_logits=False) == parts["head"]


@pytest.mark.full
def test_too_large_says_by_how_much(tmp_path):
    giant = dataclasses.replace(
        WIDE, hidden_size=8192, intermediate_size=65536, num_hidden_layers=8
    )
    plan = plan_for(small_run(), "v6e:2x2", tmp_path, shape=giant)
    assert not plan["fits"]
    assert plan["hbm_gb"]["total"] > 32 and plan["too_large_by_gb"] > 0
    assert any("chips" in advice for advice in plan["what_would_help"])
    assert "too large by" in command.format_plan(plan)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("v9:2x2", "topology 'v9:2x2': no TPU v9 is known; wanted is a chip"),
        (
            "v6e",
            "topology 'v6e': wanted is .* two sides for v5e, v6e .*, three for v4, v5p, tpu7x ",
        ),
        ("0*v6e:2x2", r"topology '0\*v6e:2x2': wanted is"),
        ("v6e:3x5", "topology 'v6e:3x5' is not made of whole hosts: wanted is"),
        ("v5p:4x4", "topology 'v5p:4x4' has 2 sides: wanted is"),
        ("v6e:4x4x4", "topology 'v6e:4x4x4' has 3 sides: wanted is"),
        ("", "--topology is wanted"),
    ],
)
def test_what_is_no_topology_is_refused(name, told):
    with pytest.raises(UserError, match=told):
        command.main(small_run(model={"shape": "qwen2.5-0.5b"}), topology=name)


def test_a_mesh_that_does_not_divide_is_refused(tmp_path):
    config = small_run(mesh={"fsdp": 1, "tensor": 4})
    told = "mesh: layers/attention/k/kernel has 2 along 'kv_heads', which tensor=4 does not divide"
    with pytest.raises(UserError, match=told):
        plan_for(config, "v6e:2x2", tmp_path)
    config = small_run(mesh={"data": 1, "fsdp": 2, "tensor": 2})
    with pytest.raises(UserError, match="wants 4 devices"):
        plan_for(config, "v6e:4x4", tmp_path)


def test_slices_are_joined_along_data(tmp_path):
    config = small_run(mesh={"data": 1, "fsdp": 4, "tensor": 2}, train={"batch_rows": 4})
    with pytest.raises(UserError, match="2 slices are joined along data"):
        plan_for(config, "2*v6e:2x2", tmp_path)
