"""Sweeps: their points, several policies in one program, tables and figures."""

import csv
import dataclasses
import json
import math
import os
import shutil
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rpo_jax import cli, sweep
from rpo_jax.config import Mesh, to_dict
from rpo_jax.errors import Stopped, UserError
from rpo_jax.sharding.hlo import read_program
from rpo_jax.training.compile_once import compile_once
from rpo_jax.training.evaluation import put_batch
from rpo_jax.training.optim import make_optimizer
from rpo_jax.training.programs import make_job
from rpo_jax.training.results import average
from rpo_jax.training.run import find_commit, read_metrics
from rpo_jax.training.state import (
    TrainState,
    abstract_state,
    abstract_weights,
    split_params,
    start_from,
)
from rpo_jax.training.step import frozen_places, make_step
from rpo_jax.training.together import (
    check_together,
    make_steps,
    make_take,
    put_batches,
    stack_abstract,
    stack_states,
)
from tests.test_lora import SMALL, perturbed
from tests.test_train import REPO, RPO, rpo_overrides, workdir
from tests.tiny import MESHES, make_config, make_work, pair_batch, pairs, relative_difference

__all__ = ["workdir"]  # the fixture

GRID = """
from runpy import run_path

get_config = run_path({rpo!r})["get_config"]


def sweep():
    for alpha, beta in ((0.0, 0.1), (1.0, 0.5)):
        for seed in range(2):
            yield {{"rpo.alpha": alpha, "rpo.beta": beta, "seed": seed}}
"""
POLICIES = (  # alpha, beta, learning rate
    (0.0, 0.1, 1e-3),
    (1.0, 0.1, 1e-3),
    (0.25, 1.0, 3e-4),
)
STEPS = 10


@pytest.mark.full
@pytest.mark.parametrize(
    ("mesh", "at_once"),
    [(Mesh(data=1), 0), (Mesh(data=1), 2), (MESHES["data2-fsdp2-tensor2"], 1)],
    ids=["one", "one, two at once", "eight, one at once"],
)
def test_policies_together_take_the_steps_that_each_takes_alone(mesh, at_once):
    """Other weights, losses, batches and optimizers; ten steps of one program and of three."""
    # A plain Adam divides rounding by rounding where a gradient is 0; this one is smooth there.
    config = dataclasses.replace(make_config("rpo", optim={"eps": 1e-3}), mesh=mesh)
    work = make_work(config, SMALL, jax.devices()[: max(1, mesh.data * mesh.fsdp * mesh.tensor)])
    hypers = [
        work.hyper | {"alpha": jnp.float32(a), "beta": jnp.float32(b), "learning_rate": rate}
        for a, b, rate in ((a, b, jnp.float32(rate)) for a, b, rate in POLICIES)
    ]
    tx = make_optimizer(config.optim)
    with jax.set_mesh(work.mesh):
        single = abstract_state(SMALL, tx, work.mesh)
        places = jax.tree.map(lambda leaf: leaf.sharding, single.params)
        trained, frozen = split_params(perturbed(SMALL, size=0.05))
        frozen = jax.device_put(frozen, frozen_places(work))

        def first(number) -> TrainState:
            own = jax.tree.map(lambda x: x * (1 + 0.3 * number), trained)
            return start_from(jax.device_put(own, places), tx, single)

        def batch(number, step):
            return pair_batch(pairs(seed=100 * number + step))

        abstract = stack_abstract(single, len(POLICIES))
        state = stack_states([first(number) for number in range(len(POLICIES))], abstract)
        together, losses = make_steps(work, tx, abstract, at_once), []
        hyper = jax.tree.map(lambda *values: jnp.stack(values), *hypers)
        for step in range(STEPS):
            batches = [batch(number, step) for number in range(len(POLICIES))]
            state, metrics = together(state, frozen, hyper, put_batches(batches, work))
            losses.append(metrics)
        assert together._cache_size() == 1

        alone, take = make_step(work, tx, single), make_take(single)
        for number in range(len(POLICIES)):
            own = first(number)
            for step in range(STEPS):
                placed = put_batch(batch(number, step), work.mesh)
                own, metrics = alone(own, frozen, hypers[number], placed)
                for name in ("loss", "grad_norm", "margin"):
                    assert losses[step][name][number] == pytest.approx(
                        float(metrics[name]), rel=1e-5, abs=1e-5
                    ), (number, step, name)
            found = take(state, number)
            assert int(found.step) == STEPS
            assert relative_difference(own.params, found.params) < 1e-5
        assert alone._cache_size() == 1


def count_gathered(work, count):
    """Bytes that a device gathers in a step of so many policies."""
    tx = make_optimizer(work.config.optim)
    single = abstract_state(work.network, tx, work.mesh)
    abstract = stack_abstract(single, count)
    places = frozen_places(work)
    frozen = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        split_params(abstract_weights(work.network, work.mesh))[1],
        places,
    )
    batch = put_batches([pair_batch(pairs())] * count, work)
    hyper = jax.tree.map(lambda value: jnp.stack([value] * count), work.hyper)
    lowered = make_steps(work, tx, abstract).lower(abstract, frozen, hyper, batch)
    transfers = read_program(lowered.compile().as_text()).transfers
    return sum(t.output_bytes * t.times for t in transfers if t.kind == "all-gather")


@pytest.mark.full
def test_policies_together_gather_the_base_once():
    """Cut over eight devices, the frozen weights travel for all policies as they do for one."""
    config = dataclasses.replace(make_config("rpo"), mesh=Mesh(fsdp=8))
    work = make_work(config, SMALL, jax.devices())
    with jax.set_mesh(work.mesh):
        one, four = (count_gathered(work, count) for count in (1, 4))
    assert one > 0 and four < 2 * one


@pytest.fixture
def grid(tmp_path):
    """A sweep of four points over the tiny world."""
    return write_grid(tmp_path / "grid.py", GRID)


def write_grid(path, text):
    path.write_text(text.format(rpo=str(RPO)))
    return str(path)


def small(folder, **fields):
    quick = {"train__steps": 6, "lora__rank": 4, "optim__learning_rate": 0.01}
    return rpo_overrides(folder, **{**quick, "train__eval_rows": 16, "name": "grid", **fields})


@pytest.mark.full
def test_a_sweep_together_is_the_sweep_apart(grid, workdir, tmp_path, capsys):
    results = {}
    for how in ("together", "apart"):
        shutil.copytree(workdir, tmp_path / how)
        arguments = [f"--config={grid}", *small(tmp_path / how, log__tensorboard=False)]
        flags = ["--together", "--at_once=3"] if how == "together" else []
        sweep.main([*arguments, *flags])
        shown = capsys.readouterr().out
        assert "4 of 4 points" in shown
        folder = tmp_path / how / "grid"
        results[how] = json.loads((folder / "results.json").read_text())
        made = json.loads((folder / "sweep.json").read_text())
        assert (made["points"], made["finished"]) == (4, 4)
        assert made["command"].startswith("python -m rpo_jax.sweep")
        assert made["commit"] == find_commit()
        with (folder / "results.csv").open() as file:
            assert [row["name"] for row in csv.DictReader(file)] == [
                "grid-alpha0.0-beta0.1-seed0",
                "grid-alpha0.0-beta0.1-seed1",
                "grid-alpha1.0-beta0.5-seed0",
                "grid-alpha1.0-beta0.5-seed1",
            ]
        for name in ("maps.png", "curves.png", "log_ratios.png"):
            assert (folder / name).read_bytes().startswith(b"\x89PNG")
        assert not list((tmp_path / how).glob("*-together-*"))
        run = folder.parent / "grid-alpha1.0-beta0.5-seed1"
        assert (run / "log.txt").is_file()
        before = (folder.parent / "grid-alpha1.0-beta0.5-seed1" / "metrics.jsonl").stat().st_mtime
        sweep.main([*arguments, *flags])  # finished points are kept
        after = (folder.parent / "grid-alpha1.0-beta0.5-seed1" / "metrics.jsonl").stat().st_mtime
        assert before == after and capsys.readouterr().out == shown
    for one, other in zip(results["together"], results["apart"], strict=True):
        assert one.keys() == other.keys()
        for name in one.keys() - {"name"}:
            assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-4), name
    runs = [tmp_path / how / "grid-alpha1.0-beta0.5-seed1" for how in ("together", "apart")]
    curves = [[line["loss"] for line in read_metrics(run) if "loss" in line] for run in runs]
    assert len(curves[0]) == 6
    np.testing.assert_allclose(*curves, rtol=1e-5)


RATES = """
from runpy import run_path

get_config = run_path({rpo!r})["get_config"]


def sweep():
    for rate in (1e30, 0.01, 0.02):
        yield {{"optim.learning_rate": rate}}
"""


@pytest.mark.full
@pytest.mark.parametrize("flags", [[], ["--together"]], ids=["apart", "together"])
def test_a_point_that_diverges_does_not_stop_the_others(workdir, tmp_path, capsys, flags):
    shutil.copytree(workdir, tmp_path / "runs")
    path = write_grid(tmp_path / "grid.py", RATES)
    words = [f"--config={path}", *small(tmp_path / "runs"), *flags]
    with pytest.raises(UserError, match=r"1 of 3 points have no results: grid-learning_rate1e\+30"):
        sweep.main(words)
    assert "2 of 3 points" in capsys.readouterr().out
    folder = tmp_path / "runs" / "grid"
    names = [row["name"] for row in json.loads((folder / "results.json").read_text())]
    assert names == ["grid-learning_rate0.01", "grid-learning_rate0.02"]
    assert not (folder.parent / "grid-learning_rate1e+30" / "summary.json").exists()
    kept = (folder.parent / names[0] / "metrics.jsonl").stat().st_mtime_ns
    with pytest.raises(UserError, match="1 of 3 points have no results"):
        sweep.main(words)  # tried again, the others are kept
    assert (folder.parent / names[0] / "metrics.jsonl").stat().st_mtime_ns == kept


@pytest.mark.full
def test_points_together_go_on_where_they_were_stopped(grid, workdir, tmp_path, monkeypatch):
    """Also when the grid has grown and lost a point meanwhile, and what may change has changed."""
    for name in ("whole", "stopped"):
        shutil.copytree(workdir, tmp_path / name)
    text = Path(grid).read_text()
    grown = tmp_path / "grown.py"
    grown.write_text(text.replace("(0.0, 0.1), (1.0, 0.5)", "(0.0, 0.1), (0.5, 0.5)"))
    less = tmp_path / "less.py"
    less.write_text(text.replace("range(2)", "range(1, 2)"))
    sweep.main([f"--config={grid}", *small(tmp_path / "whole"), "--together"])

    def stop_after_three(*arguments):
        step, taken = make_steps(*arguments), iter(range(10))

        def steps(*given):
            if next(taken) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(*given)

        return steps

    words = [*small(tmp_path / "stopped"), "--together"]
    with monkeypatch.context() as patched:
        patched.setattr(sweep, "make_steps", stop_after_three)
        with pytest.raises(Stopped, match="stopped at step 3, saved"):
            sweep.main([f"--config={grid}", *words])
    with pytest.raises(UserError, match=r"unfinished training of grid-alpha0\.0-beta0\.1-seed0"):
        other = tmp_path / "other.py"
        other.write_text(text.replace("range(2)", "(5,)"))
        sweep.main([f"--config={other}", *words])
    sweep.main([f"--config={less}", *words, "--config.log.tensorboard=False"])
    found, whole = (
        {
            row["name"]: row
            for row in json.loads((tmp_path / name / "grid/results.json").read_text())
        }
        for name in ("stopped", "whole")
    )
    assert set(found) == {"grid-alpha0.0-beta0.1-seed1", "grid-alpha1.0-beta0.5-seed1"}
    for name, row in found.items():
        runs = [tmp_path / place / name for place in ("stopped", "whole")]
        steps, losses = zip(
            *(
                [
                    [line[x] for line in read_metrics(run) if "loss" in line]
                    for x in ("step", "loss")
                ]
                for run in runs
            ),
            strict=True,
        )
        assert steps[0] == steps[1] == [1, 2, 3, 4, 5, 6]
        np.testing.assert_allclose(*losses, rtol=1e-5)
        assert row["nll"] == pytest.approx(whole[name]["nll"], rel=1e-5)
    assert not list((tmp_path / "stopped").glob("*-together-*"))
    sweep.main([f"--config={grown}", *words])
    rows = json.loads((tmp_path / "stopped/grid/results.json").read_text())
    assert len(rows) == 4
    assert {row["name"]: row for row in rows}["grid-alpha0.0-beta0.1-seed1"] == found[
        "grid-alpha0.0-beta0.1-seed1"
    ]


MIXED = """
from runpy import run_path

get_config = run_path({rpo!r})["get_config"]


def sweep():
    for preference in ("dpo", "none"):
        for alpha in (0.5, 1.0):
            for rate in (0.1, 0.2):
                for decay in (0.0, 0.1):
                    yield {{
                        "rpo.preference": preference,
                        "rpo.alpha": alpha,
                        "optim.learning_rate": rate,
                        "optim.weight_decay": decay,
                    }}
"""


def test_losses_that_measure_different_things_share_a_table(tmp_path):
    """Rows of `none` have no margin; maps and curves average over seeds alone."""
    path = write_grid(tmp_path / "grid.py", MIXED)
    points = sweep.read_points(path, small(tmp_path))
    for number, point in enumerate(points):
        folder = point.config.folder
        folder.mkdir(parents=True)
        after = {"nll": float(number), "loss": 1.0}
        if point.config.rpo.preference == "dpo":
            after["margin"] = 0.5
        summary = {"heldout": {"before": after, "after": after}, "trained_on": {"tokens": 1}}
        (folder / "summary.json").write_text(json.dumps(summary))
        (folder / "run.json").write_text(json.dumps({"config": to_dict(point.config), "data": {}}))
        (folder / "metrics.jsonl").touch()
    told = sweep.report(tmp_path / "grid", points)
    lines = [line.split() for line in told.splitlines() if line.startswith(("dpo", "none"))]
    assert [line[5] for line in lines] == ["0.5000"] * 8 + ["-"] * 8
    figures = {path.name for path in (tmp_path / "grid").glob("*.png")}
    assert figures == {
        f"{what}-preference{preference}-weight_decay{decay}.png"
        for what in ("maps", "curves")
        for preference in ("dpo", "none")
        for decay in (0.0, 0.1)
    }


@pytest.mark.full
def test_points_that_differ_in_numbers_alone_are_compiled_once(monkeypatch):
    """The cache of a sweep holds one step for all its points, another one for another program."""
    monkeypatch.delenv("XLA_FLAGS")  # where several CPU devices are asked for there is no cache
    with compile_once():
        kept = Path(jax.config.jax_compilation_cache_dir)
        for point, (alpha, beta, rate) in enumerate(POLICIES):
            weights = {"alpha": alpha, "beta": beta}
            config = make_config("rpo", rpo=weights, optim={"learning_rate": rate})
            config = dataclasses.replace(config, seed=point)
            make_job("step", config, SMALL.shape, jax.devices()[:1]).lower().compile()
            assert len(list(kept.glob("jit_step-*-cache"))) == 1
        config = make_config("rpo", train={"batch_rows": 4})
        make_job("step", config, SMALL.shape, jax.devices()[:1]).lower().compile()
        assert len(list(kept.glob("jit_step-*-cache"))) == 2
    assert not kept.exists() and jax.config.jax_compilation_cache_dir is None


def test_several_cpu_devices_get_no_cache():
    """They can hang in programs out of it."""
    with compile_once():
        assert jax.config.jax_compilation_cache_dir is None


def test_a_cache_that_is_set_serves_a_sweep_and_stays(tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    try:
        with compile_once():
            assert jax.config.jax_compilation_cache_dir == str(tmp_path)
        assert tmp_path.exists()
    finally:
        jax.config.update("jax_compilation_cache_dir", None)


@pytest.mark.parametrize("flags", [["--at_once=2"], ["--together", "--at_once=-1"]])
def test_points_at_once_are_a_number_of_those_together(grid, flags):
    with pytest.raises(UserError, match=r"--at_once=.*a number of points of --together is wanted"):
        sweep.main([f"--config={grid}", *flags])


def test_commands_of_points_name_all_that_differs(grid, tmp_path, capsys):
    shape = small(tmp_path)
    sweep.main([f"--config={grid}", *shape, "--print"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert lines[3].startswith(f"python -m rpo_jax.train --config={grid} ")
    assert lines[3].endswith(
        "--config.rpo.alpha=1.0 --config.rpo.beta=0.5 --config.seed=1 "
        "--config.name=grid-alpha1.0-beta0.5-seed1"
    )


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("", "a function sweep() is wanted"),
        ("def sweep():\n    return []", "must yield dicts"),
        ("def sweep():\n    yield 3", "must yield dicts"),
        ("def sweep():\n    yield {'rpo.alhpa': 1.0}", "did you mean --config.rpo.alpha"),
        ("def sweep():\n    yield {'rpo.alpha': -1.0}", "rpo.alpha=-1.0: must be at least 0.0"),
        ("def sweep():\n    yield {'seed': 1}\n    yield {'seed': 1}", "grid-seed1 more than once"),
        ("def sweep():\n    yield {'seed': 1}\n    yield {'rpo.beta': 1.0}", "the same fields"),
        ("def sweep():\n    1 / 0\n    yield {}", "ZeroDivisionError"),
    ],
)
def test_what_is_no_sweep_is_refused(grid, tmp_path, body, told):
    head = GRID.format(rpo=str(RPO)).split("def sweep")[0]
    (tmp_path / "grid.py").write_text(head + body)
    with pytest.raises(UserError) as error:
        sweep.read_points(grid, small(tmp_path))
    assert told in str(error.value)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"lora": {"rank": 0}}, "lora.rank=0"),
        ({"lora": {"rank": 2, "dropout": 0.5}}, "lora.dropout=0.5"),
        ({"lora": {"rank": 2}, "data": {"row_sizes": 2}}, "data.row_sizes=2"),
        ({"lora": {"rank": 2}, "rpo": {"reference": "live"}}, "rpo.reference='live'"),
        ({"lora": {"rank": 2}, "rpo": {"term_gradients_every_steps": 1}}, "term_gradients_every"),
        ({"lora": {"rank": 2}, "log": {"wandb_project": "x"}}, "log.wandb_project='x'"),
    ],
)
def test_what_is_not_one_program_is_refused(changes, told):
    with pytest.raises(UserError, match=told):
        check_together([make_config("rpo", **changes)])


def test_policies_of_one_program_have_one_shape():
    one = make_config("rpo", lora={"rank": 2})
    other = make_config("rpo", lora={"rank": 4}, rpo={"alpha": 0.5})
    check_together([one, make_config("rpo", lora={"rank": 2}, rpo={"alpha": 0.5})])
    with pytest.raises(UserError, match=r"lora\.rank=2 and tiny 4"):
        check_together([one, other])


def test_means_have_the_interval_of_students_t():
    rows = [{"a": 1, "x": value} for value in (1.0, 2.0, 3.0)] + [{"a": 2, "x": 5.0}]
    means = average(rows, ["a"], "x")
    # Standard error 1 / sqrt(3), times 4.3027 for two degrees of freedom.
    assert means[(1,)].value == 2.0
    assert means[(1,)].half == pytest.approx(4.302652730 / math.sqrt(3))
    assert str(means[(1,)]) == "2.0000 ± 2.4841"
    assert str(means[(2,)]) == "5.0000"


def test_the_committed_sweep_is_a_grid():
    path = str(REPO / "configs/fictional_sweep.py")
    points = sweep.read_points(path, [])
    assert len(points) == 48
    small = sweep.read_points(f"{path}:small", [])
    assert len(small) == 18 and all(point in points for point in small)
    with pytest.raises(UserError, match="'large' is none of full, small"):
        sweep.read_points(f"{path}:large", [])
    check_together([point.config for point in points])
    assert {point.overrides["rpo.alpha"] for point in points} >= {0.0, 1.0}
    assert cli.load_config(path).rpo.alpha == 1.0
