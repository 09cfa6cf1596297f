"""How every command starts: one config file, dotted overrides, errors a person can read."""

import argparse
import contextlib
import difflib
import itertools
import logging
import os
import re
import runpy
import signal
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import flags
from ml_collections import ConfigDict, config_flags

from rpo_jax.config import Config, describe, explain, field_names, resolve
from rpo_jax.errors import Stopped, UserError, find_status
from rpo_jax.fields import suggestion

# What the libraries say of a value of the wrong type, and what is said here.
_TYPES = {
    r"invalid literal for int.*": "a whole number is wanted",
    r"could not convert string to float.*": "a number is wanted",
    r"\(?'?Non-boolean argument.*": "True or False is wanted",
    r"invalid int value: (.*)": r"a whole number is wanted, not \1",
    r"invalid float value: (.*)": r"a number is wanted, not \1",
}


def run(
    command: Callable[..., Any],
    argv: list[str] | None = None,
    options: Mapping[str, str] | None = None,
    examples: Sequence[str] = (),
    **switches: str,
) -> None:
    """Parses the command line, calls `command(config, **switches)` and exits.

    Args:
        command: what to do; its docstring heads `--help`.
        argv: the command line; by default this process's.
        options: flags that take text (empty by default) with their help, passed on as keywords.
        examples: of what follows the command's name, for `--help`.
        **switches: boolean flags (off by default) with their help, passed on as keywords.
    """
    with exit_on_error():
        argv = sys.argv if argv is None else argv
        config, values = parse(command, argv, switches, options or {}, examples)
        command(config, **values)


@contextlib.contextmanager
def exit_on_error() -> Iterator[None]:
    """Shows a `UserError` as its message alone, a stop as a hint.

    The status is 2, or 75 where another try may mend it, and 128 + signal after a stop.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
    for chatty in ("absl", "jax", "orbax", "grain"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.status)
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
        sys.exit(find_status(error))


def parse(
    command: Callable[..., Any],
    argv: list[str],
    switches: Mapping[str, str],
    options: Mapping[str, str],
    examples: Sequence[str] = (),
) -> tuple[Config, dict[str, Any]]:
    """The typed config, and the switches and options of a command line.

    Raises:
        UserError: unknown flag or field, a value that does not parse, a config file that is missing
            or fails, or whatever `config.resolve` finds.
        SystemExit: after `--help`.
    """
    for arg in argv[1:]:
        flag, _, about = arg.partition("=")
        if flag in ("-h", "--help", "-help"):
            about = about.removeprefix("--config.")
            if about and about not in field_names():
                raise UserError(f"{arg}: there is no such field{_nearest_field(about, '--help=')}")
            print(explain(about) if about else _help(command, switches, options, examples))
            sys.exit(0)
    _check_flags(argv[1:], {**switches, **options})
    argv = _keep_last(argv)
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
        raise UserError(_say_plainly(str(error).removeprefix("flag "))) from error
    except (
        Exception
    ) as error:  # the config file is the user's program: whatever it raises is theirs
        raise UserError(f"--config: {_where(error)}{_explain(error)}") from error
    if len(rest) > 1:
        raise UserError(_explain_stray(rest[1]))
    if holder.value is None:
        raise UserError("--config=configs/<name>.py is wanted; --help tells more")
    if not isinstance(holder.value, ConfigDict):
        raise UserError(
            "--config: get_config() must return the ConfigDict of rpo_jax.config.defaults()"
        )
    return resolve(holder.value), {name: getattr(values, name) for name in (*switches, *options)}


class Parser(argparse.ArgumentParser):
    """The command line of a command without a config: its errors are those of the others."""

    def __init__(self, *, formatter_class: Any = argparse.RawDescriptionHelpFormatter, **more: Any):
        super().__init__(formatter_class=formatter_class, allow_abbrev=False, **more)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Before anything is found missing, a misspelt flag is told; `--config.` ones are not ours.

        Raises:
            UserError: names the flag, and the nearest right one.
        """
        given = sys.argv[1:] if args is None else list(args)
        known = [flag for action in self._actions for flag in action.option_strings]
        for arg in [] if self._subparsers else itertools.takewhile(lambda arg: arg != "--", given):
            ours = arg.partition("=")[0] in known or arg.startswith("--config.")
            if arg.startswith("--") and not ours:
                names = [flag.removeprefix("--") for flag in known if flag.startswith("--")]
                raise UserError(_explain_flag(arg, names))
        return super().parse_known_args(given, namespace)

    def parse_overrides(self, argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
        """The flags, and the overrides of config fields beside them.

        Raises:
            UserError: there is something else.
        """
        args, rest = self.parse_known_args(argv)
        for arg in rest:
            if not arg.startswith("--config."):
                raise UserError(_explain_stray(arg))
        return args, rest

    def error(self, message: str) -> NoReturn:
        """Raises the message as a `UserError`, in plain words."""
        message = _say_plainly(message.removeprefix("argument "))
        if stray := re.fullmatch(r"unrecognized arguments: (\S+).*", message):
            raise UserError(_explain_stray(stray[1]))
        if wrong := re.fullmatch(r"(.*): invalid choice: '(.*?)' \(choose from (.*)\)", message):
            choices = re.findall(r"[^\s,']+", wrong[3])
            raise UserError(f"{wrong[1]}: {wrong[2]!r} is none{suggestion(wrong[2], choices)}")
        raise UserError(f"{message}; --help tells more")


def load_config(path: str, overrides: Sequence[str] = ()) -> Config:
    """The config of a file; `overrides` are as on a command line: `--config.field=value`."""
    return parse(load_config, ["", f"--config={path}", *overrides], {}, {})[0]


def as_flags(changes: Mapping[str, Any]) -> list[str]:
    """Values by the dotted names of their fields, as words of a command line."""
    return [f"--config.{name}={value}" for name, value in changes.items()]


def load_sweep(path: str) -> list[dict[str, Any]]:
    """The points of a config file's `sweep()`: dicts of dotted overrides.

    It takes an argument as `get_config()` does, which stands after a colon behind the path.

    Raises:
        UserError: there is none, it fails, or yields something else.
    """
    points = _list_yields(path, "sweep", "overrides a point")
    if not points or not all(isinstance(point, dict) and point for point in points):
        raise UserError(f"{path}: sweep() must yield dicts like {{'rpo.alpha': 0.5}}, one at least")
    return points


def load_arms(path: str) -> dict[str, dict[str, Any]]:
    """The arms of a study by name: what a config file's `arms()` yields, dotted overrides each.

    It takes an argument as `get_config()` does, which stands after a colon behind the path.

    Raises:
        UserError: there is none, it fails, yields something else, or a name twice.
    """
    found = _list_yields(path, "arms", "a name and overrides an arm")
    if not found or not all(
        isinstance(arm, tuple) and list(map(type, arm)) == [str, dict] for arm in found
    ):
        raise UserError(
            f"{path}: arms() must yield pairs like 'dpo', {{'rpo.alpha': 0.0}}, one at least"
        )
    arms = dict(found)
    if len(arms) < len(found):
        raise UserError(
            f"{path}: arms() yields a name more than once: {[name for name, _ in found]}"
        )
    return arms


def _list_yields(path: str, function: str, what: str) -> list[Any]:
    """What a function of a config file yields."""
    file, _, argument = path.partition(":")
    try:
        found = runpy.run_path(file).get(function)
        yields = list(found(*([argument] if argument else []))) if callable(found) else None
    except Exception as error:
        raise UserError(f"--config: {_where(error)}{_explain(error)}") from error
    if yields is None:
        raise UserError(f"{path}: a function {function}() is wanted, which yields {what}")
    return yields


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
                raise UserError(f"--config.{field}: there is no such field{_nearest_field(field)}")
        elif name not in ("config", *switches) and name.removeprefix("no") not in switches:
            raise UserError(_explain_flag(arg, ["config", *switches]))


def _keep_last(argv: Sequence[str]) -> list[str]:
    """Of several `--config.field=value` for one field the last: absl adds those of lists up."""
    settings = [re.match(r"--?(config\.[^=]+)=", arg) for arg in argv]
    last = {setting[1]: place for place, setting in enumerate(settings) if setting}
    return [
        arg
        for place, (arg, setting) in enumerate(zip(argv, settings, strict=True))
        if not setting or last[setting[1]] == place
    ]


def _explain_flag(arg: str, known: Sequence[str]) -> str:
    """What to say of a flag that there is not: the field, or the flag, that may be meant."""
    flag, _, value = arg.partition("=")
    name = flag.lstrip("-")
    if name in field_names():
        return f"{flag}: there is no such flag; did you mean --config.{name}={value or 'VALUE'}?"
    flags_ = [f"--{flag}" for flag in known]
    return f"{flag}: there is no such flag{suggestion(f'--{name}', flags_)}"


def _explain_stray(arg: str) -> str:
    """What to say of an argument that stands there without a flag."""
    name, equals, _ = arg.partition("=")
    if arg.partition(":")[0].endswith(".py"):
        hint = f"did you mean --config={arg}?"
    elif equals and name.removeprefix("config.") in field_names():
        hint = f"did you mean --config.{arg.removeprefix('config.')}?"
    else:
        hint = "overrides are --config.field=value; --help tells more"
    return f"unexpected argument {arg!r}; {hint}"


def _nearest_field(name: str, before: str = "--config.") -> str:
    """Ends an error: the field that may be meant, and how it is given."""
    known = field_names()
    ends = [field for field in known if field.endswith(f".{name}")]
    close = ends or difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {before}{close[0]}?" if close else "; --help lists them"


def _say_plainly(message: str) -> str:
    """A library's complaint about the type of a value, in our words."""
    for theirs, ours in _TYPES.items():
        message = re.sub(theirs, ours, message)
    return message


def _where(error: BaseException) -> str:
    """File and line of the innermost frame outside libraries and us: most likely the config's."""
    place = ""
    traceback = error.__traceback__
    while traceback is not None:
        file = traceback.tb_frame.f_code.co_filename
        ours = Path(file).is_relative_to(Path(__file__).parent)
        if file.endswith(".py") and "site-packages" not in file and not ours:
            place = f"{file}:{traceback.tb_lineno}: "
        traceback = traceback.tb_next
    return place


def _explain(error: BaseException) -> str:
    """The exception in words; of ml_collections' list of all other fields, only the nearest one.

    What `config.choose` says stands alone.
    """
    text = str(error.args[0]) if error.args else str(error)
    head, _, tail = text.partition(" Other fields present:")
    hint = tail[tail.find("Did you mean") :] if "Did you mean" in tail else ""
    kind = "" if type(error) is LookupError else f"{type(error).__name__}: "
    return f"{kind}{head} {hint}".rstrip()


def _help(
    command: Callable[..., Any],
    switches: Mapping[str, str],
    options: Mapping[str, str],
    examples: Sequence[str],
) -> str:
    module = command.__module__ if command.__module__ != "__main__" else _main_module()
    call = f"python -m {module}"
    flags_ = {f"--{name}": text for name, text in switches.items()}
    flags_ |= {f"--{name}=...": text for name, text in options.items()}
    lines = [
        f"usage: {call} --config configs/<name>.py [--config.FIELD=VALUE ...]",
        "",
        (command.__doc__ or "").strip().split("\n\n")[0],
        "",
        *(f"  {call} {example}" for example in examples),
        *(["", "flags:"] if flags_ else []),
        *(
            textwrap.fill(f"  {flag:<20}  {text}", 100, subsequent_indent=" " * 24)
            for flag, text in flags_.items()
        ),
        "",
        "fields, with their defaults, as in --config.train.steps=100; lists are written '(1, 2)';",
        "--help=train tells all of a section, --help=train.steps of a field:",
        "",
        describe(),
    ]
    return "\n".join(lines)


def _main_module() -> str:
    spec = sys.modules["__main__"].__spec__
    return spec.name if spec else Path(sys.argv[0]).name
