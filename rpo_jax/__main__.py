"""Lists the commands: `python -m rpo_jax`."""

import ast
import os
import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] = ()) -> int:
    """Prints a line for each module of this package that is a command.

    Args:
        argv: what follows `python -m rpo_jax`; nothing but `--help` is allowed.

    Returns:
        The exit status.
    """
    commands = _list_commands()
    if argv and argv[0] not in ("-h", "-help", "--help"):
        word = argv[0]
        meant = word.removesuffix(".py")
        if meant in commands:
            hint = f"with a dot, python -m rpo_jax.{meant}{' ...' if argv[1:] else ''}, is wanted"
        else:
            hint = f"python -m rpo_jax.<verb> ... is wanted, a verb of {', '.join(commands)}"
        print(f"error: unexpected argument {word!r}; {hint}", file=sys.stderr)
        return 2
    lines = [f"python -m rpo_jax.{name:<8}  {about}.\n" for name, about in commands.items()]
    try:
        print("".join(lines) + "\nEach tells more with --help.", flush=True)
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _list_commands() -> dict[str, str]:
    """The first line about each, without its full stop."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("[!_]*.py")):
        text = path.read_text(encoding="utf-8")
        if '\nif __name__ == "__main__":' in text:
            about = (ast.get_docstring(ast.parse(text)) or "").splitlines()[0]
            found[path.stem] = about.partition(": `")[0].rstrip(".")
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
