"""Each notebook is run as it stands, made small by its parameters; none has outputs."""

import json
import re
import shutil
from pathlib import Path

import pytest

from tests.test_train import base_overrides

nbformat = pytest.importorskip("nbformat", reason="wants the `notebooks` extra")
nbclient = pytest.importorskip("nbclient", reason="wants the `notebooks` extra")

REPO = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((REPO / "notebooks").glob("*.ipynb"))
LENGTHS = ["--config.data.prompt_length=224", "--config.data.response_length=224"]


def tags(cell):
    return cell["metadata"].get("tags", [])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code)
    assert [tag for cell in code for tag in tags(cell)] == ["install", "parameters"]
    if path.stem != "study":  # reads what was stored
        assert "jax[tpu]" in code[0]["source"] or ".[tpu" in code[0]["source"]


def execute(path, tmp_path, parameters):
    """Runs a notebook with other parameters, without its install cell; what it printed."""
    notebook = nbformat.read(path, as_version=4)
    notebook.cells = [cell for cell in notebook.cells if "install" not in tags(cell)]
    (given,) = (cell for cell in notebook.cells if "parameters" in tags(cell))
    assert set(re.findall(r"^(\w+) =", given["source"], re.MULTILINE)) == parameters.keys()
    given["source"] = "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
    resources = {"metadata": {"path": str(REPO)}}
    nbclient.NotebookClient(
        notebook, timeout=1800, startup_timeout=300, iopub_timeout=60, resources=resources
    ).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(
        output.get("text", "") + str(output.get("data", {}).keys()) for output in outputs
    )


def make_smaller(tmp_path, **fields):
    """Overrides for all stages of a notebook that sets the workdir itself."""
    of_others = (".workdir=", ".data.general=")  # the notebook's own; of one stage only
    small = base_overrides(tmp_path, train__steps=4, **fields)
    return [word for word in [*small, *LENGTHS] if not any(x in word for x in of_others)]


@pytest.mark.full
def test_ablation(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")  # one device: programs for eight take longer to compile
    few = {"mesh__fsdp": 1, "mesh__tensor": 1, "train__batch_rows": 4, "train__eval_rows": 8}
    parameters = {
        "CONFIG": "configs/fictional_sweep.py:small",
        "WORKDIR": str(tmp_path),
        "SMALLER": make_smaller(tmp_path, **few),
    }
    said = execute(REPO / "notebooks/ablation.ipynb", tmp_path, parameters)
    for word in ("18 of 18 points", "18 rows; rpo.alpha rpo.beta"):
        assert word in said
    assert said.count("image/png") == 3
    assert (tmp_path / "fictional-sweep/dpo_and_rpo.png").exists()


@pytest.mark.full
def test_colab(tmp_path):
    parameters = {"WORKDIR": str(tmp_path), "SMALLER": make_smaller(tmp_path)}
    said = execute(REPO / "notebooks/colab.ipynb", tmp_path, parameters)
    for word in ("fictional-base: cpt, 4 steps", "fictional-rpo: rpo", "image/png", "as it should"):
        assert word in said


@pytest.mark.full
def test_study(tmp_path):
    folder = shutil.copytree(REPO / "docs/results/study", tmp_path / "study")
    drawn = (folder / "arms.png").stat().st_mtime_ns
    said = execute(REPO / "notebooks/study.ipynb", tmp_path, {"FOLDER": str(folder)})
    arms = json.loads((folder / "study.json").read_text())["arms"]
    asked = f"{arms['cpt']['questions']:,} test questions"
    for word in ("nats/token", asked, "ABC explain_first", "means over runs", "verdict, fact told"):
        assert word in said
    assert said.count("image/png") == 2
    assert (folder / "arms.png").stat().st_mtime_ns == drawn  # what is stored stays


@pytest.mark.full
def test_tpu_vm(tmp_path):
    parameters = {
        "CONFIG": "configs/fictional_base.py",
        "OVERRIDES": base_overrides(tmp_path, name="small", mesh__fsdp=1, mesh__tensor=1),
        "STEPS": 4,
    }
    said = execute(REPO / "notebooks/tpu_vm.ipynb", tmp_path, parameters)
    for word in ("by the compiler", "small: cpt, 4 steps", "image/png"):
        assert word in said
    (difference,) = re.findall(r"largest difference: (\S+) nats", said)
    assert float(difference) < 1e-4
