"""The command line: overrides, help, and errors without tracebacks."""

import pytest

from rpo_jax import cli
from rpo_jax.errors import UserError

CONFIG = """
from rpo_jax.config import defaults

def get_config(arg=""):
    config = defaults()
    config.stage, config.name, config.model.shape = "cpt", "x", "laptop-1m"
    config.train.steps, config.train.batch_rows = 10, 4
    config.data.source = "fictional"
    if arg == "typo":
        config.train.stepz = 3
    return {} if arg == "other" else config
"""


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "a.py"
    path.write_text(CONFIG)
    return path


def command(config, dry_run):
    """Does a thing."""
    command.seen = config, dry_run


def call(*args):
    command.seen = None
    cli.run(command, ["prog", *args], dry_run="only say it")
    return command.seen


def refuse(capsys, *args):
    with pytest.raises(SystemExit) as stop:
        call(*args)
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert "Traceback" not in captured.err
    return captured.err


def test_overrides_and_switches_arrive(path):
    config, dry_run = call(f"--config={path}", "--config.rpo.alpha=0.5", "--dry_run")
    assert (config.rpo.alpha, config.train.steps, dry_run) == (0.5, 10, True)
    config, dry_run = call(
        "--config", str(path), "--config.data.igakuqa.train_years=(2019,)", "--nodry_run"
    )
    assert (config.data.igakuqa.train_years, dry_run) == ((2019,), False)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["--config.rpo.aplha=1"],
            "--config.rpo.aplha: there is no such field; did you mean --config.rpo.alpha?",
        ),
        (["--config.rpo.alpha=abc"], "--config.rpo.alpha=abc: could not convert string to float"),
        (["--config.train.steps=1.5"], "--config.train.steps=1.5"),
        (["--config.rpo.alpha=-1"], "rpo.alpha=-1.0: must be at least 0.0"),
        (["--config.train=3"], "--config.train=3"),
        (["--dryrun"], "--dryrun: there is no such flag, did you mean dry_run?"),
        (["alpha=3"], "unexpected argument 'alpha=3'"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_arguments_end_with_one_message(path, capsys, args, message):
    assert message in refuse(capsys, f"--config={path}", *args)


def test_bad_config_files_end_with_one_message(path, tmp_path, capsys):
    assert "no such file" in refuse(capsys, f"--config={tmp_path}/none.py")
    assert "--config=configs/<name>.py is wanted" in refuse(capsys)
    typo = refuse(capsys, f"--config={path}:typo")
    assert f"{path}:10" in typo
    assert 'Did you mean "steps" instead of "stepz"?' in typo
    assert "FieldReference" not in typo
    assert "must return the ConfigDict" in refuse(capsys, f"--config={path}:other")
    path.write_text("def get_config(arg=''):\n    return 1 / 0\n")
    assert f"{path}:2: ZeroDivisionError" in refuse(capsys, f"--config={path}")
    path.write_text("def get_config(:\n")
    assert "SyntaxError" in refuse(capsys, f"--config={path}")


def test_help_tells_usage_and_fields(capsys):
    with pytest.raises(SystemExit) as stop:
        call("--help")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith("Does a thing.")
    assert "--dry_run\n      only say it" in text
    assert "--config.rpo.alpha (1.0)" in text


def test_interrupt_and_bugs_are_told_apart(path, capsys):
    def stop(config):
        raise KeyboardInterrupt

    def fail(config):
        raise RuntimeError("a bug")

    with pytest.raises(SystemExit) as ended:
        cli.run(stop, ["prog", f"--config={path}"])
    assert ended.value.code == 130
    assert "goes on from the last checkpoint" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="a bug"):
        cli.run(fail, ["prog", f"--config={path}"])


def test_user_errors_are_value_errors():
    assert issubclass(UserError, ValueError)
