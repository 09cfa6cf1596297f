"""How every command starts: one config file, dotted overrides, errors a person can read."""

import contextlib
import difflib
import itertools
import logging
import os
import runpy
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from rpo_jax.config import Config, describe, field_names, resolve
from rpo_jax.errors import Stopped, UserError
from rpo_jax.fields import suggestion


def run(
    command: Callable[..., Any],
    argv: list[str] | None = None,
    options: Mapping[str, str] | None = None,
    **switches: str,
) -> None:
    """Parses the command line, calls `command(config, **switches)` and exits.

    Args:
        command: what to do; its docstring heads `--help`.
        argv: the command line; by default this process's.
        options: flags that take text (empty by default) with their help, passed on as keywords.
        **switches: boolean flags (off by default) with their help, passed on as keywords.
    """
    with exit_on_error():
        config, values = parse(command, sys.argv if argv is None else argv, switches, options or {})
        command(config, **values)


@contextlib.contextmanager
def exit_on_error() -> Iterator[None]:
    """Shows a `UserError` as its message alone (status 2), a stop as a hint (128 + signal)."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
    for chatty in ("absl", "jax", "orbax", "grain"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except Stopped as stopped:
        print(f"{stopped}; the same command goes on from there", file=sys.stderr)
        sys.exit(128 + stopped.signal)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:  # the reader of our output, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        sys.exit(2)


def parse(
    command: Callable[..., Any],
    argv: list[str],
    switches: Mapping[str, str],
    options: Mapping[str, str],
) -> tuple[Config, dict[str, Any]]:
    """The typed config, and the switches and options of a command line.

    Raises:
        UserError: unknown flag or field, a value that does not parse, a config file that is missing
            or fails, or whatever `config.resolve` finds.
        SystemExit: after `--help`.
    """
    if any(arg in ("-h", "--help", "-help") for arg in argv[1:]):
        print(_help(command, switches, options))
        sys.exit(0)
    _check_flags(argv[1:], {**switches, **options})
    values = flags.FlagValues()
    holder = config_flags.DEFINE_config_file(
        "config", lock_config=True, flag_values=values, sys_argv=argv
    )
    for name, text in switches.items():
        flags.DEFINE_boolean(name, False, text, flag_values=values)
    for name, text in options.items():
        flags.DEFINE_string(name, "", text, flag_values=values)
    try:
        rest = values(argv)
    except flags.Error as error:
        raise UserError(str(error)) from error
    except (
        Exception
    ) as error:  # the config file is the user's program: whatever it raises is theirs
        raise UserError(f"--config: {_where(error)}{_explain(error)}") from error
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}; overrides are --config.field=value")
    if holder.value is None:
        raise UserError("--config=configs/<name>.py is wanted; --help tells more")
    if not isinstance(holder.value, ConfigDict):
        raise UserError(
            "--config: get_config() must return the ConfigDict of rpo_jax.config.defaults()"
        )
    return resolve(holder.value), {name: getattr(values, name) for name in (*switches, *options)}


def load_config(path: str, overrides: Sequence[str] = ()) -> Config:
    """The config of a file; `overrides` are as on a command line: `--config.field=value`."""
    return parse(load_config, ["", f"--config={path}", *overrides], {}, {})[0]


def load_sweep(path: str) -> list[dict[str, Any]]:
    """The points of a config file's `sweep()`: dicts of dotted overrides.

    Raises:
        UserError: there is none, it fails, or yields something else.
    """
    try:
        module = runpy.run_path(path.split(":", 1)[0])
        found = module.get("sweep")
        points = list(found()) if callable(found) else None
    except Exception as error:
        raise UserError(f"--config: {_where(error)}{_explain(error)}") from error
    if points is None:
        raise UserError(f"{path}: a function sweep() is wanted, which yields overrides a point")
    if not points or not all(isinstance(point, dict) and point for point in points):
        raise UserError(f"{path}: sweep() must yield dicts like {{'rpo.alpha': 0.5}}, one at least")
    return points


def _check_flags(args: list[str], switches: Mapping[str, str]) -> None:
    """Misspelt flags, told with the nearest right one before any file is read."""
    fields = field_names()
    for arg, following in itertools.zip_longest(args, args[1:], fillvalue=""):
        if not arg.startswith("-") or arg == "--":
            continue
        name, _, value = arg.lstrip("-").partition("=")
        if name == "config":
            path = (value or following).split(":", 1)[0]
            if not Path(path).is_file():
                raise UserError(f"--config: {path or '(empty)'}: no such file")
        if name.startswith("config."):
            field = name.removeprefix("config.")
            if field not in fields:
                close = difflib.get_close_matches(field, fields, n=1)
                hint = f"; did you mean --config.{close[0]}?" if close else "; --help lists them"
                raise UserError(f"--config.{field}: there is no such field{hint}")
        elif name not in ("config", *switches) and name.removeprefix("no") not in switches:
            raise UserError(
                f"{arg}: there is no such flag{suggestion(name, ['config', *switches])}"
            )


def _where(error: BaseException) -> str:
    """File and line of the innermost frame outside libraries: the config file, most likely."""
    place = ""
    traceback = error.__traceback__
    while traceback is not None:
        file = traceback.tb_frame.f_code.co_filename
        if file.endswith(".py") and "site-packages" not in file and Path(file) != Path(__file__):
            place = f"{file}:{traceback.tb_lineno}: "
        traceback = traceback.tb_next
    return place


def _explain(error: BaseException) -> str:
    """The exception in words; of ml_collections' list of all other fields, only the nearest one."""
    text = str(error.args[0]) if error.args else str(error)
    head, _, tail = text.partition(" Other fields present:")
    hint = tail[tail.find("Did you mean") :] if "Did you mean" in tail else ""
    return f"{type(error).__name__}: {head} {hint}".rstrip()


def _help(
    command: Callable[..., Any], switches: Mapping[str, str], options: Mapping[str, str]
) -> str:
    module = command.__module__ if command.__module__ != "__main__" else _main_module()
    lines = [
        (command.__doc__ or "").strip().split("\n\n")[0],
        "",
        f"usage: python -m {module} --config=configs/<name>.py [--config.field=value ...]",
        *(f"  --{name}\n      {text}" for name, text in switches.items()),
        *(f"  --{name}=...\n      {text}" for name, text in options.items()),
        "",
        "Fields (default) [choices]; lists are written '(1, 2)':",
        describe(),
    ]
    return "\n".join(lines)


def _main_module() -> str:
    spec = sys.modules["__main__"].__spec__
    return spec.name if spec else Path(sys.argv[0]).name
