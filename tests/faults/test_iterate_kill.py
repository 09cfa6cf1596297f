"""Iterative RPO killed again and again, wherever it happens to be: the same weights in the end."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rpo_jax.iterate import list_rounds
from rpo_jax.training.run import read_metrics
from tests.test_iterate import ROUNDS, load, make_guesser, overrides, weigh

REPO = Path(__file__).resolve().parents[2]


def iterate(workdir: Path, seconds: float | None) -> bool:
    """Runs the command, killed after so many seconds; whether it came to its end."""
    command = [sys.executable, "-m", "rpo_jax.iterate", f"--config={ROUNDS}", *overrides(workdir)]
    process = subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return False
    assert process.returncode == 0, output.decode()
    return True


@pytest.mark.campaign
def test_rounds_survive_any_kills(make_once, tmp_path):
    guesser = make_once("guesser", make_guesser)
    for name in ("straight", "killed"):
        shutil.copytree(guesser, tmp_path / name)
    assert iterate(tmp_path / "straight", None)
    rng, kills = random.Random(0), list[float]()
    # It gets longer each time: a start alone takes seconds, and something has to be new.
    while not iterate(tmp_path / "killed", wait := rng.uniform(4, 12) + 2 * len(kills)):
        kills.append(wait)
    assert len(kills) >= 3
    ends = []
    for name in ("straight", "killed"):
        rounds = list(list_rounds(load(tmp_path / name)))
        losses = [
            [line["loss"] for line in read_metrics(one.folder) if "loss" in line] for one in rounds
        ]
        results = json.loads((tmp_path / name / "rounds" / "rounds.json").read_text())
        ends.append(([weigh(one) for one in rounds], losses, results))
    assert ends[0] == ends[1]
    weights, _, results = ends[0]
    print(json.dumps({"killed_after_seconds": kills, "weights": weights, "results": results}))
