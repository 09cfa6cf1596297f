"""The convert command as its tests give it, on tensors cut into many small pieces."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import SHAPE

from rpo_jax import convert
from rpo_jax.weights import store

REPO = Path(__file__).resolve().parents[1]
ODD = replace(SHAPE, vocab_size=101, intermediate_size=37, num_hidden_layers=2)
BASE = "Qwen/Qwen2.5-0.5B"


def cut_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every matrix of the tiny shapes is cut, some unevenly."""
    monkeypatch.setattr(store, "PIECE_BYTES", 700)
    monkeypatch.setattr(store, "_CHUNK", {"D": 8, "N": 2, "K": 2, "F": 5, "V": 6, "H": 99})


def run(*words: object) -> None:
    """Gives a command in this process."""
    convert.main([str(word) for word in words])


def import_(source: Path, target: Path, *more: object) -> None:
    run("import", "--source", source, "--target", target, *more)


def export(source: Path, target: Path, *more: object) -> None:
    run("export", "--source", source, "--target", target, "--base", BASE, *more)


def refusal(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """What a command that has to fail says."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(*words)
    assert stop.value.code == 2
    return capsys.readouterr().err


def command(*words: object) -> list[str]:
    """The command line for a process of its own, to be run in REPO."""
    return [sys.executable, "-m", "rpo_jax.convert", *map(str, words)]
