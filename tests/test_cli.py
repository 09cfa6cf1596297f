"""The command line: overrides, help, and errors without tracebacks."""

import errno
import os
import subprocess
import sys

import pytest

from rpo_jax import __main__, cli, evaluate, generate
from rpo_jax.errors import PassingError, UserError

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
    again = [f"--config.{field}" for field in ("lora.targets=('q',)", "lora.targets=('v',)")]
    config, _ = call(f"--config={path}", *again, "--config.train.steps=11", "--dry_run")
    assert (config.lora.targets, config.train.steps) == (("v",), 11)  # the last one counts


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["--config.rpo.aplha=1"],
            "--config.rpo.aplha: there is no such field; did you mean --config.rpo.alpha?",
        ),
        (["--config.steps=1"], "--config.steps: there is no such field; did you mean --config.tra"),
        (["--config.rpo.alpha=abc"], "--config.rpo.alpha=abc: a number is wanted"),
        (["--config.train.steps=1.5"], "--config.train.steps=1.5: a whole number is wanted"),
        (["--config.rpo.share_prefix=x"], "share_prefix=x: True or False is wanted"),
        (["--config.rpo.alpha=-1"], "rpo.alpha=-1.0: must be at least 0.0"),
        (["--config.train=3"], "--config.train=3"),
        (["--dry-run"], "--dry-run: there is no such flag, did you mean --dry_run?"),
        (["--dry_run=x"], "--dry_run=x: True or False is wanted"),
        (["--rpo.alpha=3"], "--rpo.alpha: there is no such flag; did you mean --config.rpo.alpha="),
        (["rpo.alpha=3"], "unexpected argument 'rpo.alpha=3'; did you mean --config.rpo.alpha=3?"),
        (["alpha"], "unexpected argument 'alpha'; overrides are --config.field=value"),
        (["b.py:x"], "unexpected argument 'b.py:x'; did you mean --config=b.py:x?"),
        (
            ["--help=rpo.alpa"],
            "--help=rpo.alpa: there is no such field; did you mean --help=",
        ),
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


def ask(capsys, flag):
    """What `--help` says."""
    with pytest.raises(SystemExit) as stop:
        cli.run(command, ["prog", flag], examples=["--config a.py"], dry_run="only say it")
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_help_tells_usage_examples_and_every_field_in_a_line(capsys):
    text = ask(capsys, "--help")
    assert text.startswith(f"usage: python -m {__name__} --config configs/<name>.py")
    assert f"\n\nDoes a thing.\n\n  python -m {__name__} --config a.py\n" in text
    assert "\n  --dry_run             only say it\n" in text
    assert "\nrpo: Reasoning Preference Optimization" in text
    assert "\n  optim.schedule='cosine'             [constant|cosine] after the warm-up\n" in text
    assert max(map(len, text.splitlines())) <= 100


def test_help_of_a_section_or_field_tells_all_of_it(capsys):
    text = ask(capsys, "--help=rpo.label_smoothing")
    assert text.splitlines() == [
        "--config.rpo.label_smoothing=0.0",
        "    dpo: probability that a preference is the wrong way round",
        "    at least 0.0",
        "    below 0.5",
    ]
    section = ask(capsys, "--help=rpo")
    assert text in section and "    one of 'dpo', 'ipo', 'simpo', 'orpo', 'none'\n" in section
    assert "lora" not in section
    assert " ".join(ask(capsys, "--help=init_from").split()).endswith("folder; empty: random")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--sloots=3"], "--sloots: there is no such flag, did you mean --slots?"),
        (
            ["--checkpoint", "a", "--slots", "x"],
            "--slots: a whole number is wanted, not 'x'; --help tells more",
        ),
        (["--checkpoint", "a", "--kind", "rad"], "--kind: 'rad' is none, did you mean red?"),
        (["--checkpoint", "a", "b.py"], "unexpected argument 'b.py'; did you mean --config=b.py?"),
        ([], "the following arguments are required: --checkpoint; --help tells more"),
    ],
    ids=str,
)
def test_commands_without_a_config_err_alike(args, message, capsys):
    parser = cli.Parser(prog="prog")
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--slots", type=int)
    parser.add_argument("--kind", choices=("red", "blue"))
    with pytest.raises(SystemExit) as stop, cli.exit_on_error():
        parser.parse_args(args)
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: {message}\n"


def test_help_without_a_config_tells_defaults(capsys):
    for command, wanted in (
        (generate.main, ("(default 256)", "1.0 (default): all", "(default float32)")),
        (evaluate.main, ("of the weights; default: float32",)),
    ):
        with pytest.raises(SystemExit):
            command(["--help"])
        said = " ".join(capsys.readouterr().out.split())
        assert all(words in said for words in wanted), said


def test_python_m_rpo_jax_lists_the_verbs(capsys):
    __main__.main()
    told = capsys.readouterr().out
    assert "rpo_jax.train     Trains one run.\n" in told
    assert "rpo_jax.pair      Preference pairs of an exam.\n" in told
    assert "rpo_jax.cli " not in told and "__main__" not in told
    assert __main__.main(["--help"]) == 0
    assert capsys.readouterr().out == told


@pytest.mark.parametrize(
    ("args", "hint"),
    [
        (["train", "--config=a.py"], "with a dot, python -m rpo_jax.train ..., is wanted"),
        (["study"], "with a dot, python -m rpo_jax.study, is wanted"),
        (["trane"], "python -m rpo_jax.<verb> ... is wanted, a verb of convert, evaluate, "),
        (["--config=a.py"], "python -m rpo_jax.<verb> ... is wanted, a verb of "),
    ],
)
def test_python_m_rpo_jax_takes_no_arguments(capsys, args, hint):
    assert __main__.main(args) == 2
    printed = capsys.readouterr()
    assert not printed.out
    assert printed.err.startswith(f"error: unexpected argument {args[0]!r}; {hint}")


def test_the_list_of_verbs_may_be_cut_off():
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "rpo_jax"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


def test_overrides_stand_beside_flags():
    parser = cli.Parser(prog="prog")
    parser.add_argument("--together", action="store_true")
    args, overrides = parser.parse_overrides(["--together", "--config.seed=1"])
    assert args.together and overrides == ["--config.seed=1"]
    with pytest.raises(UserError, match=r"'seed=1'; did you mean --config.seed=1\?"):
        parser.parse_overrides(["seed=1"])


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


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (UserError("wrong"), 2),
        (PassingError("late"), 75),
        (FileNotFoundError(errno.ENOENT, "No such file", "a"), 2),
        (OSError(errno.EIO, "Input/output error", "a"), 75),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer", "a"), 75),
    ],
    ids=repr,
)
def test_the_status_tells_whether_another_try_may_help(path, capsys, error, status):
    def fail(config):
        raise error

    with pytest.raises(SystemExit) as ended:
        cli.run(fail, ["prog", f"--config={path}"])
    assert ended.value.code == status
    assert capsys.readouterr().err.startswith("error: ")


def test_user_errors_are_value_errors():
    assert issubclass(UserError, ValueError) and issubclass(PassingError, UserError)
