"""Whole runs of adapters: over a base, quantised or not, merged or kept, in and out."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rpo_jax import cli, convert
from rpo_jax.evaluate import main as evaluate_main
from rpo_jax.sharding.mesh import make_mesh
from rpo_jax.training.origin import load_params, load_run
from rpo_jax.training.state import abstract_weights
from tests.test_lora import merged
from tests.test_train import CPT, RPO, overrides, refuse, rpo_overrides, run, workdir
from tests.tiny import make_config, relative_difference

__all__ = ["workdir"]  # the fixture


def lora_overrides(folder, **fields):
    quick = {
        "init_from": "fictional-base",
        "train__steps": 6,
        "lora__rank": 4,
        "optim__learning_rate": 0.01,
        "mesh__fsdp": 1,  # one scale for the 32 inputs of a kernel cannot be cut
    }
    return overrides(folder, **{**quick, **fields})


@pytest.fixture(scope="module")
def adapted(workdir, make_once):
    """A folder with the base and a run of adapters over it in its nf4 form."""

    def build(folder):
        shutil.copytree(workdir, folder, dirs_exist_ok=True)
        run(CPT, lora_overrides(folder, name="cpt", lora__quantize="nf4"))

    return make_once("adapted", build)


def network_of(config, arguments):
    from rpo_jax.train import build

    work = build(cli.load_config(str(config), arguments))
    return work.network, work.mesh


def test_a_qlora_run_holds_adapters_and_names_its_base(adapted, capsys):
    summary = json.loads((adapted / "cpt/summary.json").read_text())["heldout"]
    assert summary["after"]["nll"] < summary["before"]["nll"]
    note = json.loads((adapted / "cpt/model/adapters.json").read_text())
    assert note["base"] == "../fictional-base" and note["step"] == 40
    network, mesh = network_of(CPT, lora_overrides(adapted, name="cpt", lora__quantize="nf4"))
    step, trained = load_run(adapted / "cpt", network, mesh)
    assert step == 6 and trained["layers"]["mlp"]["up"]["kernel"].qtype == "nf4"
    printed = lora_overrides(adapted, name="cpt", lora__quantize="nf4")
    evaluate_main([f"--config={CPT}", *printed, "--json", "--merged"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    np.testing.assert_allclose(result["heldout"]["nll"], summary["after"]["nll"], rtol=1e-5)
    assert 0 < abs(result["merged"]["nll"] - result["heldout"]["nll"]) < 0.2
    assert 1e-6 < result["divergence"] < 0.2
    # Read as a whole model it is merged into the weights as they were before they were quantised.
    base_mesh = make_mesh(make_config().mesh, jax.devices()[:1])
    abstract = abstract_weights(network.base, base_mesh)
    _, base = load_params(adapted / "fictional-base", abstract)
    _, whole = load_params(adapted / "cpt", abstract)
    adapters = jax.tree.map(jnp.asarray, jax.device_get(trained["lora"]))
    wanted = merged(network, {**base, "lora": adapters})
    assert relative_difference(wanted, whole) < 1e-6
    assert relative_difference(base["layers"], whole["layers"]) > 1e-3


@pytest.mark.full
def test_rpo_starts_from_merged_or_from_kept_adapters(adapted, capsys):
    for previous in ("merge", "keep"):
        more = {"lora__rank": 4, "lora__previous": previous, "train__steps": 3}
        name = f"rpo-{previous}"
        arguments = rpo_overrides(adapted, name=name, init_from="cpt", **more)
        heldout = run(RPO, arguments)["heldout"]
        assert heldout["before"]["margin"] == 0.0, previous
        assert heldout["after"]["margin"] != 0.0
        base = json.loads((adapted / name / "model/adapters.json").read_text())["base"]
        assert base == {"merge": "../cpt", "keep": "../fictional-base"}[previous]
        # What was stored is gone: the reference is made again from the model of step 0.
        for path in (adapted / "data").rglob("reference-*.npy"):
            path.unlink()
        evaluate_main([f"--config={RPO}", *arguments, "--json"])
        margin = json.loads(capsys.readouterr().out.splitlines()[-1])["heldout"]["margin"]
        np.testing.assert_allclose(margin, heldout["after"]["margin"], rtol=1e-4, atol=1e-6)
    more["lora__rank"] = 5
    message = refuse(capsys, RPO, rpo_overrides(adapted, name="other", init_from="cpt", **more))
    assert "lora.rank=5: the adapters that are kept have 4" in message
    plain = rpo_overrides(adapted, name="other", **more)
    assert "holds whole weights and no adapters" in refuse(capsys, RPO, plain)


def test_a_base_that_changed_is_refused(adapted, tmp_path, capsys):
    folder = tmp_path / "runs"
    shutil.copytree(adapted, folder)
    note = folder / "fictional-base/checkpoints/40/_CHECKPOINT_METADATA"
    note.write_bytes(note.read_bytes() + b" ")
    arguments = lora_overrides(folder, name="cpt", lora__quantize="nf4", checkpoint__keep=3)
    message = refuse(capsys, CPT, arguments)
    assert "were trained over another checkpoint" in message
    (folder / "cpt/model/adapters.json").write_text("{")
    assert "adapters.json: damaged" in refuse(capsys, CPT, arguments)


@pytest.mark.full
def test_an_uninterrupted_run_and_a_resumed_one_are_the_same(adapted):
    whole = lora_overrides(adapted, name="whole", lora__dropout=0.1, checkpoint__save_every_steps=3)
    first = run(CPT, whole)
    shutil.copytree(adapted / "whole", adapted / "resumed")
    shutil.rmtree(adapted / "resumed/checkpoints/6")
    config = json.loads((adapted / "resumed/run.json").read_text())
    config["config"]["name"] = "resumed"
    (adapted / "resumed/run.json").write_text(json.dumps(config))
    second = run(CPT, [word.replace("name=whole", "name=resumed") for word in whole])
    assert first["heldout"] == second["heldout"]


def test_what_a_config_cannot_ask_for(tmp_path, capsys):
    for fields, message in (
        ({"lora__rank": 0, "lora__quantize": "nf4"}, "quantised weights are frozen"),
        ({"lora__targets": "('q','w')"}, "lora.targets: 'w' is none of"),
        ({"init_from": ""}, "adapters need a model to adapt"),
        ({"lora__dropout": 1.0}, "lora.dropout=1.0: must be below 1"),
        ({"rpo__preference": "none", "rpo__beta": 0.2}, "rpo.beta=0.2: rpo.preference='none'"),
    ):
        assert message in refuse(capsys, CPT, lora_overrides(tmp_path, **fields))


def test_adapters_go_out_merged_or_alone_and_come_in(adapted, tmp_path, capsys):
    """The export of a run is its merged weights; the adapter alone, taken back, gives the same."""
    run_folder = adapted / "cpt"
    words = ["export", "--source", run_folder, "--base", "none"]
    convert.main([*map(str, words), "--target", str(tmp_path / "whole")])
    convert.main([*map(str, words), "--adapter", "--target", str(tmp_path / "peft")])
    back = ["--source", str(tmp_path / "peft"), "--base", str(adapted / "fictional-base")]
    convert.main(["import", *back, "--target", str(tmp_path / "back")])
    convert.main(["import", "--source", str(tmp_path / "whole"), "--target", str(tmp_path / "in")])
    convert.main(["inspect", "--source", str(tmp_path / "back")])
    assert "adapters over" in capsys.readouterr().out
    network, mesh = network_of(CPT, lora_overrides(adapted, name="cpt", lora__quantize="nf4"))
    abstract = abstract_weights(network.base, mesh)
    wanted = load_params(run_folder, abstract)[1]
    for name in ("in", "back"):
        assert relative_difference(wanted, load_params(tmp_path / name, abstract)[1]) < 1e-6, name

    wide = lora_overrides(adapted, name="wide", lora__rank=33)
    assert "no change of one has a higher rank" in refuse(capsys, CPT, wide)

    damaged = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    assert damaged["base_model_name_or_path"] is None  # no hub id called "none"
    card = (tmp_path / "peft/README.md").read_text()
    assert "alone, trained over step 40 of fictional-base" in card
    over = ["--source", str(tmp_path / "peft"), "--base", str(tmp_path / "in")]
    convert.main(["import", *over, "--target", str(tmp_path / "other")])
    assert "was trained over another checkpoint than step 0" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        convert.main(["import", *over[:2], "--target", str(tmp_path / "never")])
    assert "an adapter saved by PEFT; --base" in capsys.readouterr().err
    (tmp_path / "in").rename(tmp_path / "gone")
    with pytest.raises(SystemExit):
        convert.main(["inspect", "--source", str(tmp_path / "other")])
    told = capsys.readouterr().err
    assert f"the model that they change is gone: step 0 of {tmp_path / 'in'}" in told
    for key, value, message in (
        ("use_dora", True, "use_dora=True is not supported"),
        ("r", 5, "shape (4, 32), (5, 32) is wanted"),
        ("target_modules", ["q_proj"], "no adapter of this model has that tensor"),
        ("target_modules", ["router"], "target_modules=['router']"),
        ("peft_type", "IA3", "'LORA' is wanted"),
    ):
        (tmp_path / "peft/adapter_config.json").write_text(json.dumps({**damaged, key: value}))
        with pytest.raises(SystemExit):
            convert.main(["import", *back, "--target", str(tmp_path / "never")])
        assert message in capsys.readouterr().err
        assert not (tmp_path / "never").exists()


@pytest.mark.full
def test_rows_of_chosen_tokens_are_trained_too(workdir, tmp_path, capsys):
    """The end-of-text row moves, its neighbours do not, in the embedding that is the head too."""
    from rpo_jax.data.tokenizer import read_tokenizer

    folder = tmp_path / "runs"
    shutil.copytree(workdir, folder)
    tokenizer = read_tokenizer(folder / "fictional-base/model")
    words = f"('{tokenizer.eos_token}',)"
    arguments = lora_overrides(folder, name="rows", lora__trained_tokens=words, mesh__tensor=1)
    assert run(CPT, arguments)["heldout"]["after"]["nll"] > 0
    network, mesh = network_of(CPT, arguments)
    abstract = abstract_weights(network.base, mesh)
    _, base = load_params(folder / "fictional-base", abstract)
    _, whole = load_params(folder / "rows", abstract)
    moved = np.any(np.asarray(base["embed"]["table"] != whole["embed"]["table"]), axis=1)
    assert np.flatnonzero(moved).tolist() == [tokenizer.eos_id]
    _, trained = load_run(folder / "rows", network, mesh)
    assert trained["row_ids"].tolist() == [tokenizer.eos_id]

    export = ["export", "--source", str(folder / "rows"), "--base", "none"]
    convert.main([*export, "--target", str(tmp_path / "out")])
    convert.main(["import", "--source", str(tmp_path / "out"), "--target", str(tmp_path / "in")])
    assert relative_difference(whole, load_params(tmp_path / "in", abstract)[1]) < 1e-6
    with pytest.raises(SystemExit):
        convert.main([*export, "--adapter", "--target", str(tmp_path / "peft")])
    assert "export it merged" in capsys.readouterr().err
    several = lora_overrides(folder, name="other", lora__trained_tokens="('two words',)")
    assert "not one" in refuse(capsys, CPT, several)
