"""Lists the commands: `python -m rpo_jax`."""

import ast
from pathlib import Path


def main() -> None:
    """Prints a line for each module of this package that is a command."""
    for path in sorted(Path(__file__).parent.glob("[!_]*.py")):
        text = path.read_text(encoding="utf-8")
        if '\nif __name__ == "__main__":' in text:
            about = (ast.get_docstring(ast.parse(text)) or "").splitlines()[0]
            print(f"python -m rpo_jax.{path.stem:<8}  {about.partition(': `')[0].rstrip('.')}.")
    print("\nEach tells more with --help.")


if __name__ == "__main__":
    main()
