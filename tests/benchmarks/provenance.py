"""What every stored figure comes with."""

import os
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rpo_jax.training.run import find_commit

REPO = Path(__file__).resolve().parents[2]
COMMIT = find_commit()  # before any figure is written


def describe_run(*packages: str) -> dict[str, Any]:
    """Command, date, commit, machine, how memory is taken, and the versions of `packages`."""
    return {
        "command": f"{Path(sys.argv[0]).name} {' '.join(sys.argv[1:])}",
        "date": time.strftime("%Y-%m-%d"),
        "commit": COMMIT,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
        "versions": {name: version(name) for name in packages},
        "allocator": {k: v for k, v in os.environ.items() if k.startswith(("MALLOC_", "GLIBC_"))},
    }
